r"""What acquisition functions need of frozen draws: each of them once, everywhere.

In: values of s functions at candidates. Out: an ensemble posterior that also knows its
covariance, a sampler that takes every member once and at each position of a batch the
same, and single draws as models, for Thompson sampling.
Next: ``surrogates`` answers with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.deterministic import DeterministicModel
from botorch.models.model import Model
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors.ensemble import EnsemblePosterior
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.index_sampler import IndexSampler
from gpytorch.distributions import MultivariateNormal
from torch import Generator, Size, Tensor

from gpbridge.batch_norm import inputs_of
from gpbridge.checks import check_count
from gpbridge.function_draws import evaluate, freeze, refreshed
from gpbridge.function_space import draw_moments
from gpbridge.outcomes import latent_distribution
from gpbridge.types import WeightPosterior


class DrawsPosterior(EnsemblePosterior):
    r"""The joint posterior of frozen functions at candidates, multimodal as it is.

    Mean, variance and samples are upstream's: a sample is one function, at all q points
    and outputs together. The variance is divided by s - 1.

    Args:
        values: ``batch_shape x s x q x m``.
        weights: Of the members, ``s``; default equal.
    """

    @property
    def distribution(self) -> MultivariateNormal:
        """The Gaussian with the moments of equally weighted members."""
        mean, covariance = draw_moments(self.values.movedim(-3, 0))
        return latent_distribution(mean, covariance, self.dtype)

    def transformed(
        self, transform: PosteriorTransform, X: Tensor | None = None
    ) -> DrawsPosterior:
        """Apply a transform of outcomes to each member.

        Exact, where upstream's transforms of posteriors are for Gaussians only.

        Args:
            transform: With a rule for outcomes, ``evaluate``.
            X: The candidates ``batch_shape x q x d``, for transforms that use them.

        Returns:
            A posterior of ``batch_shape x q x 1`` values if the transform scalarises.
        """
        each = None
        if X is not None:  # once per member
            each = X.unsqueeze(-3).expand(*self.values.shape[:-1], X.shape[-1])
        values = transform.evaluate(self.values, each)
        if getattr(transform, "scalarize", False):
            values = values.unsqueeze(-1)
        return DrawsPosterior(values, self._weights)


class EnumeratingSampler(IndexSampler):
    r"""Takes the members of an ensemble in turn, the same at every position of a batch.

    As many samples as members make an acquisition value the exact average over the
    ensemble. Upstream's sampler draws members with replacement, and for each t-batch
    position anew, so that the value of a candidate depends on where in the batch it
    stands.

    Other numbers of samples, and unequal weights, are served by a systematic sample:
    member i comes :math:`s w_i` times, up to one more or less. Nothing is random.

    Args:
        sample_shape: ``torch.Size([s])``; with s members each comes once.
        seed: Taken for the sake of upstream's signature; nothing depends on it.

    Example:
        >>> posterior = DrawsPosterior(torch.tensor([1.0, 2.0, 6.0]).reshape(3, 1, 1))
        >>> EnumeratingSampler(torch.Size([3]))(posterior).flatten()
        tensor([1., 2., 6.])
    """

    def __init__(self, sample_shape: Size, seed: int | None = None) -> None:
        # Without a seed upstream draws one from the global random state.
        super().__init__(sample_shape, 0 if seed is None else seed)

    def _construct_base_samples(self, posterior: EnsemblePosterior) -> None:
        s, shape = self.sample_shape.numel(), posterior.batch_shape
        # Midpoints of s equal parts of the unit interval, away from the boundaries
        # between members by more than rounding.
        midpoints = (torch.arange(s, dtype=torch.float64) + 0.5) / s
        bounds = posterior.weights.detach().double().cpu().cumsum(-1)
        members = torch.searchsorted(bounds, midpoints)
        members = members.clamp_max(posterior.ensemble_size - 1).to(posterior.device)
        members = members.reshape(*self.sample_shape, *[1] * len(shape))
        self.register_buffer("base_samples", members.expand(*self.sample_shape, *shape))


@GetSampler.register(DrawsPosterior)
def _(posterior, sample_shape, *, seed=None):
    return EnumeratingSampler(Size([posterior.ensemble_size]), seed)


class ThompsonDraw(DeterministicModel):
    r"""One function of a posterior, as a model without uncertainty.

    Its maximiser is a Thompson sample: ``optimize_acqf(PosteriorMean(draw), ...)``. For
    q candidates take q draws and maximise each.

    Args:
        posterior: What has a ``draw``: a posterior over weights, or a GP of this
            library, whose draws are in the caller's units already.
        num_outputs: The number m of outputs.
        generator: Source of the draw. Without one it is fresh.
        input_transform: A botorch transform, fitted, under which the network of a
            posterior over weights was trained.
        outcome_transform: Likewise, of the targets.
        batches: Training inputs ``b x d`` in the caller's units, for the batch-norm
            statistics of the draw.

    Raises:
        TypeError: If nothing can be drawn.
        ValueError: If the posterior is a model with transforms of its own, and others
            are passed.

    Warns:
        ReliabilityWarning: If batch norm has the statistics of other weights.

    Example:
        >>> from gpbridge.functional import FunctionalNet
        >>> from gpbridge.weights import GaussianWeights
        >>> net = FunctionalNet(torch.nn.Linear(2, 1))
        >>> weights = GaussianWeights(net, torch.zeros(3), variance=torch.ones(3))
        >>> ThompsonDraw(weights).posterior(torch.zeros(4, 2)).mean.shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        posterior: WeightPosterior,
        num_outputs: int = 1,
        generator: Generator | None = None,
        *,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
        batches: Iterable[Tensor | Sequence[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        check_count(num_outputs=num_outputs)
        passed = input_transform is not None or outcome_transform is not None
        if isinstance(posterior, Model):
            _check_model(posterior, passed)
        self._num_outputs = num_outputs
        # Under upstream's names they would be applied twice.
        self.before = None if input_transform is None else input_transform.eval()
        self.after = None if outcome_transform is None else outcome_transform.eval()
        if batches is not None:
            batches = map(self._prepared, inputs_of(batches))
        self.draws = refreshed(freeze(posterior, 1, generator), batches)

    @property
    def batch_shape(self) -> Size:
        """None: one function."""
        return Size()

    def forward(self, X: Tensor) -> Tensor:
        """The function, ``... x n x d`` to ``... x n x m``, in the caller's units."""
        Z = self._prepared(X)
        values = evaluate(self.draws, Z)[0]
        return values if self.after is None else self.after.untransform(values, X=Z)[0]

    def _prepared(self, X: Tensor) -> Tensor:
        return X if self.before is None else self.before(X)


def _check_model(posterior: Model, passed: bool) -> None:
    name = type(posterior).__name__
    if not hasattr(posterior, "draw"):
        raise TypeError(
            f"posterior is a {name}, which has no draw(num_samples, generator). Pass "
            "the posterior over weights that it was built of, with its "
            "input_transform= and outcome_transform=."
        )
    if passed:
        raise ValueError(
            f"posterior is a {name}, whose draws are in the caller's units already. "
            "Leave out input_transform and outcome_transform."
        )
