r"""The scale of SWAG's covariance, chosen on held-out data.

In: the moments of a run and data that did not train it. Out: the posterior at the scale
of the highest mean log predictive density. Next: its draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor

from gpbridge.batch_norm import even_batches, has_batch_norm, refresh_batch_norm
from gpbridge.checks import check_count, check_positive
from gpbridge.dnn.point_likelihood import (
    PointLikelihood,
    check_data,
    check_point_targets,
    mixture_log_density,
)
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.randomness import fresh
from gpbridge.weights import GaussianWeights

_ROWS = 4096  # of a pass for batch-norm statistics


class ScaleTuning(NamedTuple):
    """The posterior at the best scale, and the score of every scale.

    ``scores`` are mean held-out log predictive densities in nats per datum, one for
    each of ``scales``; ``scale`` is that of ``posterior``.
    """

    posterior: GaussianWeights
    scale: float
    scales: tuple[float, ...]
    scores: Tensor

    def __repr__(self) -> str:
        """The scale, and the score of each."""
        table = zip(self.scales, self.scores.tolist(), strict=True)
        scores = ", ".join(f"{scale:g}: {score:.4g}" for scale, score in table)
        return f"ScaleTuning(scale={self.scale:g}, scores={{{scores}}})"


def tune_scale(
    tracker: SWAG,
    X_val: Tensor,
    Y_val: Tensor,
    likelihood: Likelihood | PointLikelihood,
    scales: Sequence[float] = (0.0, 0.1, 0.25, 0.5, 1.0),
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

    Args:
        tracker: The moments of a run.
        X_val: Inputs that did not train the network, ``n x d``.
        Y_val: Their targets in the form of the likelihood.
        likelihood: A gpytorch likelihood that :mod:`gpbridge.likelihoods` knows, or a
            function of outputs ``s x n x m`` and targets that returns the log density
            of each datum, ``s x n``.
        scales: The candidates, zero or above.
        diagonal: As for :meth:`SWAG.posterior`.
        num_draws: s.
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

    Example:
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> network = torch.nn.Linear(1, 1)
        >>> tracker = SWAG(network, rank=2)
        >>> for _ in range(3):
        ...     tracker.update(network)
        >>> x = torch.linspace(-1, 1, 5)[:, None]
        >>> tune_scale(tracker, x, x, GaussianLikelihood()).scores.shape
        torch.Size([5])
    """
    scales = tuple(float(scale) for scale in scales)
    if not scales:
        raise ValueError("scales must hold at least one candidate, but is empty.")
    check_positive(**{"scales": torch.tensor([s for s in scales if s != 0] or [1.0])})
    check_count(num_draws=num_draws)
    check_data(X_val, Y_val, "_val")
    num_outputs = tracker.net.probe(X_val)
    Y_val = check_point_targets(likelihood, X_val, Y_val, num_outputs, "Y_val")
    refresh = has_batch_norm(tracker.net.network)
    if refresh and X is None:
        raise ValueError(
            "The network has batch normalisation, whose statistics every draw needs "
            "of its own: pass the training inputs as X."
        )
    generator = fresh(generator)
    start = generator.get_state()
    best, scores = None, []
    for scale in scales:
        posterior = (
            tracker.posterior(scale, diagonal) if scale else SWA.posterior(tracker)
        )
        generator.set_state(start)
        draws = posterior.draw(num_draws if scale else 1, generator)
        if refresh:
            refresh_batch_norm(draws, even_batches(X, _ROWS))
        score = mixture_log_density(likelihood, draws, X_val, Y_val, noise_val)
        scores.append(score)
        if torch.isfinite(score) and best_score(torch.stack(scores)) + 1 == len(scores):
            best = posterior  # the others are let go
    table = torch.stack(scores)
    return ScaleTuning(best, scales[best_score(table)], scales, table)


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
