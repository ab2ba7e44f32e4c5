r"""What acquisition functions need of frozen draws: each of them once, everywhere.

In: values of s functions at candidates. Out: an ensemble posterior that also knows its
covariance, and a sampler that takes every member once and at each position of a batch
the same. Next: ``surrogates`` answers with them.
"""

from __future__ import annotations

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.posteriors.ensemble import EnsemblePosterior
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.index_sampler import IndexSampler
from gpytorch.distributions import MultivariateNormal
from torch import Size, Tensor

from gpbridge.function_space import draw_moments
from gpbridge.outcomes import latent_distribution


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
