r"""The scale of SWAG's covariance, chosen on held-out data.

In: the moments of one run or several, and data that did not train them. Out: the
posterior at the scale of the highest mean log predictive density. Next: its draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor

from gpbridge.batch_norm import even_batches, has_batch_norm, refresh_batch_norm
from gpbridge.checks import check_count, warn_user
from gpbridge.dnn.multi_swag import MultiSWAG
from gpbridge.dnn.point_likelihood import (
    PointLikelihood,
    check_data,
    check_point_targets,
    mixture_log_density,
)
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.randomness import fresh
from gpbridge.weights import GaussianWeights, MixtureWeights

_ROWS = 4096  # of a pass for batch-norm statistics


class ScaleTuning(NamedTuple):
    """The posterior at the best scale, and the score of every scale.

    ``scores`` are mean held-out log predictive densities in nats per datum, one for
    each of ``scales``; ``scale`` is that of ``posterior``.
    """

    posterior: GaussianWeights | MixtureWeights
    scale: float
    scales: tuple[float, ...]
    scores: Tensor

    def __repr__(self) -> str:
        """The scale, and the score of each."""
        table = zip(self.scales, self.scores.tolist(), strict=True)
        scores = ", ".join(f"{scale:g}: {score:.4g}" for scale, score in table)
        return f"ScaleTuning(scale={self.scale:g}, scores={{{scores}}})"


def tune_scale(
    tracker: SWAG | MultiSWAG,
    X_val: Tensor,
    Y_val: Tensor,
    likelihood: Likelihood | PointLikelihood,
    scales: Sequence[float] = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0),
    *,
    diagonal: bool = True,
    num_draws: int = 30,
    X: Tensor | None = None,
    noise_val: Tensor | None = None,
    generator: Generator | None = None,
) -> ScaleTuning:
    r"""Choose :math:`\alpha` in SWAG's covariance by the held-out mixture density.

    .. math:: \frac1n \sum_i \log \frac1s \sum_j p(y_i \mid f(x_i, w_j)), \qquad
        w_j \sim N(\bar w, \alpha \Sigma)

    All scales share the noise of their draws, so that their scores differ by the scale
    alone. Scale zero is the average of the weights, SWA. Costs s passes over the
    held-out data per scale.

    Of several networks, all have one scale, that of the best mixture of all of them.

    Args:
        tracker: The moments of a run, or of several.
        X_val: Inputs that did not train the network, ``n x d``.
        Y_val: Their targets in the form of the likelihood.
        likelihood: A gpytorch likelihood that :mod:`gpbridge.likelihoods` knows, or a
            function of outputs ``s x n x m`` and targets that returns the log density
            of each datum, ``s x n``.
        scales: The candidates, zero or above.
        diagonal: As for :meth:`SWAG.posterior`.
        num_draws: s, of each network.
        X: Training inputs, for the batch-norm statistics of every draw; needed only if
            there is batch normalisation.
        noise_val: Noise variances of the held-out points, ``n``, for a likelihood with
            fixed ones, which has those of the training data.
        generator: Source of randomness.

    Returns:
        The best posterior with its scale and the table.

    Raises:
        ValueError: If a scale is negative, there is none, no score is finite, or X or
            ``noise_val`` is missing.

    Warns:
        UserWarning: If the largest candidate is the best, or there are fewer snapshots
            than the rank.

    Example:
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> network = torch.nn.Linear(1, 1)
        >>> tracker = SWAG(network, rank=2)
        >>> for _ in range(3):
        ...     tracker.update(network)
        >>> x = torch.linspace(-1, 1, 5)[:, None]
        >>> tune_scale(tracker, x, x, GaussianLikelihood()).scores.shape
        torch.Size([7])
    """
    scales = tuple(float(scale) for scale in scales)
    if not scales:
        raise ValueError("scales must hold at least one candidate, but is empty.")
    if not all(0 <= scale < float("inf") for scale in scales):
        raise ValueError(f"scales must be finite, zero or above, but are {scales}.")
    check_count(num_draws=num_draws)
    check_data(X_val, Y_val, "_val")
    trackers = list(tracker.trackers) if isinstance(tracker, MultiSWAG) else [tracker]
    _check_trackers(trackers)
    net = trackers[0].net
    num_outputs = net.probe(X_val)
    Y_val = check_point_targets(likelihood, X_val, Y_val, num_outputs, "Y_val")
    refresh = has_batch_norm(net.network)
    if refresh and X is None:
        raise ValueError(
            "The network has batch normalisation, whose statistics every draw needs "
            "of its own: pass the training inputs as X."
        )
    generator = fresh(generator)
    start = generator.get_state()
    best, scores = None, []
    for scale in scales:
        parts = [_posterior(each, scale, diagonal) for each in trackers]
        posterior = parts[0] if tracker is trackers[0] else MixtureWeights(parts)
        generator.set_state(start)
        draws = posterior.draw((num_draws if scale else 1) * len(parts), generator)
        if refresh:
            refresh_batch_norm(draws, even_batches(X, _ROWS))
        score = mixture_log_density(likelihood, draws, X_val, Y_val, noise_val)
        scores.append(score)
        if torch.isfinite(score) and best_score(torch.stack(scores)) + 1 == len(scores):
            best = posterior  # the others are let go
    table = torch.stack(scores)
    scale = scales[best_score(table)]
    if scale == max(scales) > 0 and len(scales) > 1:
        warn_user(
            f"The best scale is the largest candidate, {scale:g}: a larger one may be "
            f"better still. Pass scales=({scale:g}, {2 * scale:g}, {4 * scale:g}, "
            f"{16 * scale:g})."
        )
    return ScaleTuning(best, scale, scales, table)


def _check_trackers(trackers: Sequence[SWAG]) -> None:
    for tracker in trackers:
        if not isinstance(tracker, SWAG):
            raise TypeError(
                "tracker must be a SWAG or a MultiSWAG, but is a "
                f"{type(tracker).__name__}. Pass the tracker itself, not its posterior."
            )
    fewest = min(trackers, key=lambda tracker: tracker.num_columns)
    fewest.check_rank()  # once, and not at every scale


def _posterior(tracker: SWAG, scale: float, diagonal: bool) -> GaussianWeights:
    if not scale:
        return SWA.posterior(tracker)
    return tracker.gaussian(scale, diagonal)


def best_score(scores: Tensor) -> int:
    """Number of the highest finite score, the first of equal ones.

    Raises:
        ValueError: If there is none.
    """
    finite = torch.isfinite(scores)
    if not bool(finite.any()):
        raise ValueError(
            "No candidate has a finite log density on the held-out data: "
            f"{scores.flatten().tolist()[:8]}. Check the noise of the likelihood and "
            "the scale of the targets."
        )
    return int(torch.where(finite, scores, -torch.inf).argmax())
