r"""Posteriors over the coordinates of a subspace, by chains or by a fitted Gaussian.

.. math::
    p(z \mid D) \propto p(D \mid \hat w + B^\top z)^{1/T}\, N(z \mid 0, \sigma^2 I)

In: a subspace, data, a likelihood, and a method as an object with its options. Out: the
posterior over weights, beside coordinates and diagnostics. Next: its draws, with
batch-norm statistics of their own; ``subspace_tuning`` chooses T and sigma.

References:
    Izmailov, Maddox, Kirichenko, Garipov, Vetrov, Wilson, Subspace inference for
    Bayesian deep learning, UAI 2019, sections 3 and 5.
"""

from __future__ import annotations

from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor

from gpbridge.checks import ShapeError, check_positive
from gpbridge.dnn.point_likelihood import PointLikelihood
from gpbridge.dnn.subspace import Subspace
from gpbridge.dnn.subspace_likelihood import SubspaceLikelihood
from gpbridge.dnn.subspace_methods import (
    EllipticalSliceSampling,
    SubspaceChains,
    SubspaceGaussian,
    SubspaceMethod,
)
from gpbridge.randomness import fresh


def sample_subspace(
    subspace: Subspace,
    X: Tensor,
    Y: Tensor,
    likelihood: Likelihood | PointLikelihood,
    *,
    method: SubspaceMethod = EllipticalSliceSampling(),
    temperature: float = 1.0,
    prior_std: float | Tensor = 1.0,
    initial: Tensor | None = None,
    batch_size: int | None = None,
    batch_norm: str = "batch",
    generator: Generator | None = None,
    progress: bool = True,
) -> SubspaceChains | SubspaceGaussian:
    r"""Infer the coordinates of the weights from data.

    The likelihood is that of all data in every call: r is small, n moderate. Unless the
    temperature is one, the result is not Bayes' rule for the stated likelihood; a
    temperature far above one, as n / r, is a common choice and gives nearly the prior
    in directions that the data do not determine well. See
    :func:`gpbridge.dnn.subspace_tuning.tune_subspace` for a choice by held-out data.

    Networks with batch normalisation are evaluated with the statistics of each pass;
    give the draws that you keep their own by
    :func:`gpbridge.batch_norm.refresh_batch_norm`.

    Args:
        subspace: The weights as a function of coordinates.
        X: Inputs ``n x d``.
        Y: Targets in the form of the likelihood.
        likelihood: A gpytorch likelihood that :mod:`gpbridge.likelihoods` knows, or a
            function of outputs ``c x n x m`` and targets that returns the log density
            of each datum, ``c x n``.
        method: :class:`EllipticalSliceSampling`, ``HamiltonianMonteCarlo`` or
            ``VariationalInference``, with its options.
        temperature: T of the likelihood.
        prior_std: :math:`\sigma` in the coordinates, one number or ``r``.
        initial: Where to start, ``r``, or ``c x r`` for chains; default the origin.
        batch_size: Most rows of data in one pass.
        batch_norm: As for
            :class:`~gpbridge.dnn.subspace_likelihood.SubspaceLikelihood`.
        generator: Source of randomness.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        The posterior over weights with its coordinates and diagnostics.

    Raises:
        ShapeError: If shapes disagree.
        TypeError: If the subspace or the method is something else.
        ValueError: If temperature or prior width are not positive, or the likelihood is
            not finite at the start.

    Example:
        >>> import torch
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> from gpbridge.functional import FunctionalNet
        >>> net = FunctionalNet(torch.nn.Linear(1, 1))
        >>> X = torch.linspace(-1, 1, 20)[:, None]
        >>> run = sample_subspace(
        ...     Subspace.random(net, None, 2), X, 3 * X, GaussianLikelihood()
        ... )
        >>> run.posterior.draw()(X).shape  # 2 chains of 30 draws
        torch.Size([60, 20, 1])
    """
    if not isinstance(subspace, Subspace):
        raise TypeError(
            f"subspace must be a Subspace, but is a {type(subspace).__name__}. Try "
            "Subspace.random(network, None, 5), or Subspace.pca(tracker)."
        )
    if isinstance(method, type) or not callable(getattr(method, "run", None)):
        raise TypeError(
            "method must be EllipticalSliceSampling(), HamiltonianMonteCarlo() or "
            f"VariationalInference(), an object with its options, but is {method!r}."
        )
    check_positive(temperature=temperature, prior_std=prior_std)
    target = SubspaceLikelihood(
        *(subspace, X, Y, likelihood),
        temperature=temperature,
        batch_size=batch_size,
        batch_norm=batch_norm,
    )
    start = subspace.basis.new_zeros(subspace.dim) if initial is None else initial
    if start.dim() not in (1, 2) or start.shape[-1] != subspace.dim:
        raise ShapeError(
            f"initial must be ``{subspace.dim}`` coordinates, or one such row per "
            f"chain, but has shape {tuple(start.shape)}."
        )
    generator = fresh(generator, start.device)
    return method.run(target, prior_std, start.to(subspace.basis), generator, progress)
