r"""How many directions of each prior group the data determine.

.. math::
    \gamma_g = |g| - \frac{1}{s_g} \operatorname{tr} \Sigma_{gg}
             = \operatorname{tr}\bigl( (I + R^\top K R)^{-1} R^\top K_g R \bigr)
             = 2 s_g \, \frac{\partial}{\partial s_g}
               \tfrac12 \log\det(I + R^\top K R), \qquad K = \sum_g K_g

with :math:`\Sigma` the posterior covariance of the weights. It is the third form that
is computed, so that every way of computing an evidence has it.

In: a linearised network with prior groups. Out: one number for each group, which says
whether the evidence has switched a layer or a parallel path off.

References:
    MacKay, Bayesian interpolation, Neural Computation 1992, eq. (4.8); Tipping, Sparse
    Bayesian learning and the relevance vector machine, JMLR 2001, eq. (17).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpbridge.linearized.gp import LinearizedGP


def group_dimensions(model: LinearizedGP) -> Tensor:
    """Effective dimension of each group of weights, at the present hyperparameters.

    Between zero, where the group is switched off, and the number of its weights; the
    sum is ``model.evidence().effective_dimension``. Costs one evaluation of the
    evidence with its gradient.

    Args:
        model: The model; its ``groups`` say which weights share a prior variance.

    Returns:
        One number per group, in the order of ``model.covar_module.groups``.

    Raises:
        TypeError: If the model is another.
        MemoryError: If the exact evidence needs more than the memory budget.
        NotImplementedError: If the model was conditioned on further observations.

    Example:
        >>> X = torch.linspace(0, 1, 20).double()[:, None]
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(),
        ...                           torch.nn.Linear(8, 1)).double()
        >>> model = LinearizedGP(net, X, torch.sin(6 * X), groups="layer", noise=1e-2)
        >>> group_dimensions(model).shape
        torch.Size([2])
    """
    if not isinstance(model, LinearizedGP):
        raise TypeError(
            "group_dimensions needs a gpbridge.LinearizedGP, whose weights have prior "
            f"groups, but model is {type(model).__name__}."
        )
    raw = model.covar_module.raw_prior_variance
    learnt = raw.requires_grad
    try:
        raw.requires_grad_(True)
        with torch.enable_grad():
            complexity = model.evidence().complexity
            log_variance = model.prior_variance.log().sum()
        (slope,) = torch.autograd.grad(complexity, raw)
        (unit,) = torch.autograd.grad(log_variance, raw)
    finally:
        raw.requires_grad_(learnt)
    # Each variance depends on its own raw parameter only.
    return 2 * slope / unit
