r"""Temperature and prior width of subspace inference, chosen on held-out data.

In: a subspace, training data and data that did not train. Out: a table of held-out log
predictive densities, and the posterior of its best entry. Next: its draws.

References:
    Izmailov, Maddox, Kirichenko, Garipov, Vetrov, Wilson, Subspace inference for
    Bayesian deep learning, UAI 2019, section 3.4 (the temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor
from tqdm import tqdm

from gpbridge.batch_norm import even_batches, has_batch_norm, refresh_batch_norm
from gpbridge.checks import check_count, check_positive
from gpbridge.dnn.point_likelihood import (
    PointLikelihood,
    check_data,
    check_point_targets,
    mixture_log_density,
)
from gpbridge.dnn.scale_tuning import best_score
from gpbridge.dnn.subspace import Subspace
from gpbridge.dnn.subspace_inference import sample_subspace
from gpbridge.dnn.subspace_methods import (
    EllipticalSliceSampling,
    SubspaceChains,
    SubspaceGaussian,
    SubspaceMethod,
)
from gpbridge.randomness import fresh
from gpbridge.weights import EmpiricalWeights

_ROWS = 4096  # of a pass for batch-norm statistics


class SubspaceTuning(NamedTuple):
    """The result at the best temperature and prior width, and the whole table.

    ``table`` has mean held-out log predictive densities in nats per datum, one row per
    entry of ``temperatures`` and one column per entry of ``prior_stds``.
    """

    best: SubspaceChains | SubspaceGaussian
    temperature: float
    prior_std: float
    temperatures: tuple[float, ...]
    prior_stds: tuple[float, ...]
    table: Tensor


def tune_subspace(
    subspace: Subspace,
    X: Tensor,
    Y: Tensor,
    X_val: Tensor,
    Y_val: Tensor,
    likelihood: Likelihood | PointLikelihood,
    temperatures: Sequence[float] | None = None,
    prior_stds: Sequence[float] = (0.3, 1.0, 3.0),
    *,
    method: SubspaceMethod = EllipticalSliceSampling(),
    num_draws: int = 60,
    batch_size: int | None = None,
    batch_norm: str = "batch",
    noise_val: Tensor | None = None,
    generator: Generator | None = None,
    progress: bool = True,
) -> SubspaceTuning:
    r"""Choose temperature and prior width by the held-out density of the mixture.

    Every pair is inferred on the training data and scored by
    :math:`\frac1n \sum_i \log \frac1s \sum_j p(y_i \mid f(x_i, w_j))` on the held-out
    ones, at temperature one: the temperature belongs to the inference, not to the
    prediction. All pairs share their randomness. Costs one inference per pair.

    A temperature other than one is not Bayes' rule for the stated likelihood. It makes
    up for a likelihood or a subspace that does not fit, and is chosen as such, like a
    hyperparameter: what is held out must not have trained the network either.

    Args:
        subspace: The weights as a function of coordinates.
        X: Training inputs ``n x d``.
        Y: Targets in the form of the likelihood.
        X_val: Inputs that neither trained the network nor are among X.
        Y_val: Their targets.
        likelihood: As for
            :func:`~gpbridge.dnn.subspace_inference.sample_subspace`.
        temperatures: The candidates; default 1, 10, 100, 1000, 10000 and n / r.
        prior_stds: The candidates.
        method: How to infer.
        num_draws: Draws to score a Gaussian by; chains are scored by all of theirs.
        batch_size: Most rows of data in one pass.
        batch_norm: As for
            :class:`~gpbridge.dnn.subspace_likelihood.SubspaceLikelihood`.
        noise_val: Noise variances of the held-out points, for a likelihood with fixed
            ones, which has those of the training data.
        generator: Source of randomness.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        The best posterior, its temperature and prior width, and the table.

    Raises:
        ValueError: If a candidate is not positive, there is none, no score is finite,
            or ``noise_val`` is missing.

    Example:
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> from gpbridge.functional import FunctionalNet
        >>> subspace = Subspace.random(FunctionalNet(torch.nn.Linear(1, 1)), None, 2)
        >>> X = torch.linspace(-1, 1, 20)[:, None]
        >>> found = tune_subspace(
        ...     subspace, X, 3 * X, X, 3 * X, GaussianLikelihood(), (1.0, 1e4), (1.0,)
        ... )
        >>> found.temperature, found.table.shape
        (1.0, torch.Size([2, 1]))
    """
    check_data(X, Y)
    check_data(X_val, Y_val, "_val")
    check_count(num_draws=num_draws)
    if temperatures is None:
        temperatures = sorted({1.0, 10.0, 1e2, 1e3, 1e4, len(X) / subspace.dim})
    temperatures = tuple(float(t) for t in temperatures)
    prior_stds = tuple(float(s) for s in prior_stds)
    if not temperatures or not prior_stds:
        raise ValueError(
            "temperatures and prior_stds must hold at least one candidate each, but "
            f"are {temperatures} and {prior_stds}."
        )
    check_positive(temperatures=torch.tensor(temperatures))
    check_positive(prior_stds=torch.tensor(prior_stds))
    num_outputs = subspace.net.probe(X_val)
    Y_val = check_point_targets(likelihood, X_val, Y_val, num_outputs, "Y_val")
    refresh = batch_norm == "batch" and has_batch_norm(subspace.net.network)
    generator = fresh(generator, subspace.basis.device)
    start = generator.get_state()
    best, scores = None, []
    pairs = [(t, s) for t in temperatures for s in prior_stds]
    bar = tqdm(
        pairs, desc="tune_subspace", leave=False, disable=None if progress else True
    )
    for temperature, prior_std in bar:
        generator.set_state(start)
        result = sample_subspace(
            *(subspace, X, Y, likelihood),
            method=method,
            temperature=temperature,
            prior_std=prior_std,
            batch_size=batch_size,
            batch_norm=batch_norm,
            generator=generator,
            progress=False,
        )
        every = isinstance(result.posterior, EmpiricalWeights)
        draws = result.posterior.draw(None if every else num_draws, generator)
        if refresh:
            refresh_batch_norm(draws, even_batches(X, batch_size or _ROWS))
        score = mixture_log_density(likelihood, draws, X_val, Y_val, noise_val)
        scores.append(score)
        if torch.isfinite(score) and best_score(torch.stack(scores)) + 1 == len(scores):
            best = result  # the others, weights of many draws each, are let go
    table = torch.stack(scores)
    return SubspaceTuning(
        best,
        *pairs[best_score(table)],
        *(temperatures, prior_stds),
        table.reshape(len(temperatures), len(prior_stds)),
    )
