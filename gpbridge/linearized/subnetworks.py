r"""The weights that the data leave most uncertain, by a diagonal posterior.

In: a trained network and its data. Out: masks for ``parameters=``.
Next: a model whose random weights are these, with a full covariance among them.
"""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor, nn

from gpbridge.functional import Parameters
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.structures import Diagonal
from gpbridge.subnetworks import largest
from gpbridge.types import Params


@torch.no_grad()
def largest_variance(
    network: nn.Module,
    train_X: Tensor,
    train_Y: Tensor,
    likelihood: Likelihood | None = None,
    *,
    count: int,
    within: Parameters = "all",
    **options: Any,
) -> Params:
    r"""The weights of largest marginal posterior variance under a diagonal curvature.

    With one prior variance s and the diagonal :math:`\lambda` of the Gauss-Newton
    matrix the variances are :math:`s / (1 + s \lambda_i)`, so that the order does not
    depend on s. Weights in which no output has a derivative at any of the data have the
    largest variance and change no prediction there: they come last instead.

    Args:
        network: The trained network.
        train_X: Inputs ``n x d``, or a loader, as for :class:`LinearizedGP`.
        train_Y: Targets; none beside a loader.
        likelihood: As for :class:`LinearizedGP`.
        count: How many weights are random.
        within: Which they are chosen from, as for
            :func:`gpbridge.subnetworks.largest_magnitude`.
        **options: Further ones of :class:`LinearizedGP`.

    Returns:
        A mask for each tensor that they are chosen from.

    Raises:
        ValueError: If there are fewer weights.
        TypeError: If another inference is asked for.

    References:
        Daxberger, Nalisnick, Allingham, Antorán, Hernández-Lobato, Bayesian deep
        learning via subnetwork inference, ICML 2021, section 3.2.
    """
    if not isinstance(options.setdefault("inference", Diagonal()), Diagonal):
        raise TypeError(
            "inference must be Diagonal(...), but is "
            f"{type(options['inference']).__name__}: the order is by its variances."
        )
    model = LinearizedGP(
        network, train_X, train_Y, likelihood, parameters=within, **options
    )
    problem, net = model.problem, model.functional
    curvature, weights = problem.curvature, problem.channel_weights()
    prior_variance = model.prior_variance.double()
    strategy = problem.structured_strategy(prior_variance)
    scores = weights.new_zeros(net.num_params, dtype=torch.float64)
    for block, values, shrunk in zip(
        curvature.blocks, curvature.eigenvalues, strategy.variances, strict=True
    ):
        seen = torch.tensordot(weights, values, dims=1) > 0
        scale = prior_variance[block.group]
        block.put(scores, torch.where(seen, scale * shrunk, 0.0))
    scores = scores * problem.unit_scale().square()
    return largest(net.unflatten(scores), count)
