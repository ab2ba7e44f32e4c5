r"""The log likelihood of all data as a function of coordinates of a subspace.

.. math:: \ell(z) = \frac1T \sum_i \log p(y_i \mid f(x_i, \hat w + B^\top z))

In: a subspace, data, a likelihood, a temperature. Out: one number per chain, summed
over data in double precision, chunk by chunk, and its gradient. Next:
``subspace_inference`` samples it or fits a Gaussian to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from torch import Tensor, nn

from gpbridge.batch_norm import has_batch_norm, norm_layers
from gpbridge.checks import check_choice, check_count, check_positive
from gpbridge.dnn.point_likelihood import (
    PointLikelihood,
    check_data,
    check_point_targets,
    point_log_density,
)
from gpbridge.dnn.subspace import Subspace
from gpbridge.draws import WeightDraws
from gpbridge.functional import FunctionalNet
from gpbridge.stacked_layers import stack_layers

_ROWS = 4096  # of data in one pass, by default


class SubspaceLikelihood(nn.Module):
    r"""A sum over data of log densities, of all chains in one vectorised pass.

    Per-datum terms are summed, so that a short last batch weighs what its data weigh. A
    call costs a pass over the data for each chain.

    A temperature T above one makes the likelihood flatter, as if there were n / T data.
    Unless T is one, what follows from it is not Bayes' rule for the stated likelihood.

    Args:
        subspace: The weights as a function of z.
        X: Inputs ``n x d``.
        Y: Targets in the form of the likelihood.
        likelihood: A gpytorch likelihood that :mod:`gpbridge.likelihoods` knows, or a
            function of outputs ``c x n x m`` and targets that returns the log density
            of each datum, ``c x n``.
        temperature: T.
        batch_size: Most rows in one pass; the passes are of equal size, up to one row.
        batch_norm: What layers of batch normalisation do, if there are any. Their
            stored statistics belong to other weights, so that with ``"batch"`` they
            normalise by the rows of a pass, the same for every call; draws then need
            :func:`gpbridge.batch_norm.refresh_batch_norm`. ``"stored"`` keeps the
            statistics.

    Raises:
        ShapeError: If rows do not agree.
        ValueError: If the temperature is not positive, or an option is unknown.

    Example:
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> subspace = Subspace.random(FunctionalNet(nn.Linear(1, 1)), None, 2)
        >>> X = torch.linspace(-1, 1, 20)[:, None]
        >>> target = SubspaceLikelihood(subspace, X, 3 * X, GaussianLikelihood())
        >>> target(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        subspace: Subspace,
        X: Tensor,
        Y: Tensor,
        likelihood: Likelihood | PointLikelihood,
        *,
        temperature: float = 1.0,
        batch_size: int | None = None,
        batch_norm: str = "batch",
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        check_choice("batch_norm", batch_norm, ("batch", "stored"))
        if batch_size is not None:
            check_count(batch_size=batch_size)
        check_data(X, Y)
        num_outputs = subspace.net.probe(X)
        Y = check_point_targets(likelihood, X, Y, num_outputs)
        self.subspace, self.likelihood = subspace, likelihood
        self.net, self.temperature = subspace.net, float(temperature)
        self.num_chunks = math.ceil(len(X) / (batch_size or _ROWS))
        if batch_norm == "batch" and has_batch_norm(self.net.network):
            if len(X) < 2 * self.num_chunks:
                raise ValueError(
                    f"Batch normalisation needs at least 2 rows in every pass, but "
                    f"{len(X)} rows make {self.num_chunks} passes. Raise batch_size, "
                    'or pass batch_norm="stored".'
                )
            self.net = _by_batches(self.net)
        self.register_buffer("X", X.detach())
        self.register_buffer("Y", Y.detach())

    @property
    def num_data(self) -> int:
        """The number n of data."""
        return len(self.X)

    def forward(self, z: Tensor) -> Tensor:
        """Evaluate at coordinates, ``c x r`` to ``c``, float64."""
        params = self.subspace.weights(z)
        return sum(self._terms(params)) / self.temperature

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Value ``c`` and gradient in z, ``c x r``, holding one pass at a time."""
        z = z.detach().requires_grad_()
        value, gradient = 0.0, torch.zeros_like(z)
        for chunk in range(self.num_chunks):
            with torch.enable_grad():
                term = self._term(self.subspace.weights(z), chunk)
                (part,) = torch.autograd.grad(term.sum(), z)
            value, gradient = value + term.detach(), gradient + part
        return value / self.temperature, gradient / self.temperature

    def _terms(self, weights: Tensor) -> Iterator[Tensor]:
        for chunk in range(self.num_chunks):
            yield self._term(weights, chunk)

    def _term(self, weights: Tensor, chunk: int) -> Tensor:
        """Sum over the data of one pass, ``c``."""
        X, Y = (t.tensor_split(self.num_chunks)[chunk] for t in (self.X, self.Y))
        noise = None
        if isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            noise = self.likelihood.noise_covar.noise
            noise = noise.tensor_split(self.num_chunks, -1)[chunk]
        net = self.net
        # Faster, but only where nothing is to be converted on the way.
        if net.vectorized and X.dtype == weights.dtype == net.dtype:
            each = X.expand(len(weights), *X.shape)
            outputs = stack_layers(net)(net.unflatten(weights), each)
        else:
            outputs = WeightDraws(net, weights)(X)
        return point_log_density(self.likelihood, outputs, Y, noise).double().sum(-1)


def _by_batches(net: FunctionalNet) -> FunctionalNet:
    """A copy whose batch-norm layers have no statistics, and so take those of a batch.

    In train mode they would also write to their buffers, which no draw shares.
    """
    own = copy.deepcopy(net)
    for module in norm_layers(own.network).values():
        module.track_running_stats = False
        module.running_mean = module.running_var = None
        module.num_batches_tracked = None
    return own
