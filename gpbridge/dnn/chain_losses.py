r"""The losses that drive Markov chains over weights, one for each chain.

In: a network, data, a likelihood and a prior. Out: the negative log posterior per datum
of every chain, each on a batch of its own, in one vectorised pass. Next: ``chains``
descends it with noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from torch import Generator, Tensor, nn
from torch.func import vmap

from gpbridge.checks import (
    check_count,
    check_finite,
    check_inputs,
    check_not_empty,
    check_same_length,
    check_tensor,
)
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.dnn.run_key import checksum, structure
from gpbridge.functional import FunctionalNet, Parameters
from gpbridge.likelihoods import is_gaussian
from gpbridge.targets import check_targets, default_likelihood


class ChainLosses(nn.Module):
    r"""Losses of chains on batches of their own.

    .. math::
        - \frac1b \sum_{i \in B} \log p(y_i \mid f(x_i, w)) - \frac{T}{N} \log p(w)

    Data are buffers: they move with the module, and are not part of its state. The
    arguments are those of :class:`~gpbridge.dnn.SGMCMC`.
    """

    def __init__(
        self,
        network: nn.Module,
        train_X: Tensor,
        train_Y: Tensor,
        likelihood: Likelihood | None,
        *,
        batch_size: int,
        prior: nn.Module | None,
        likelihood_temperature: float,
        parameters: Parameters,
        input_shape: Sequence[int] | None,
    ) -> None:
        super().__init__()
        check_count(batch_size=batch_size)
        check_inputs(train_X)
        check_tensor(train_Y=train_Y)
        check_not_empty(train_X=train_X)
        check_same_length(train_X=train_X, train_Y=train_Y)
        check_finite(train_Y=train_Y)
        if train_X.dim() > 2:
            input_shape = train_X.shape[1:] if input_shape is None else input_shape
            train_X = train_X.flatten(1)
        net = FunctionalNet(network, parameters, input_shape)
        num_outputs, n = net.probe(train_X), len(train_X)
        if likelihood is None:
            likelihood = default_likelihood(train_Y, num_outputs, train_X.dtype)
        Y = check_targets(likelihood, train_Y, num_outputs, n, train_X.dtype)
        self.log_posterior = LogPosterior(
            net, likelihood, n, prior, likelihood_temperature, "mean"
        )
        noise = None
        if isinstance(likelihood, FixedNoiseGaussianLikelihood):
            noise = likelihood.noise_covar.noise.detach()
        self.register_buffer("X", train_X.detach(), persistent=False)
        self.register_buffer("Y", Y.detach(), persistent=False)
        self.register_buffer("noise", noise, persistent=False)
        self.batch_size = min(batch_size, n)

    @property
    def net(self) -> FunctionalNet:
        """The network as a function of its random weights."""
        return self.log_posterior.net

    @property
    def data(self) -> list[Tensor]:
        """Inputs, targets, and the noise variances of points that have their own."""
        return [v for v in (self.X, self.Y, self.noise) if v is not None]

    def usual_rate(self) -> float:
        """In units of the noise, to which curvatures are inverse, where it is small."""
        likelihood = self.log_posterior.likelihood
        noise = getattr(likelihood, "noise", None) if is_gaussian(likelihood) else None
        return 0.01 if noise is None else 0.01 * min(1.0, float(noise.detach().min()))

    def forward(self, weights: Tensor, generator: Generator) -> Tensor:
        """The loss of each chain, ``chains``, at weights ``chains x p``."""
        n, batch, dim = len(self.X), self.data, None
        if self.batch_size < n:
            shape = len(weights), self.batch_size
            rows = torch.randint(
                n, shape, generator=generator, device=generator.device
            ).to(self.X.device)
            batch, dim = [tensor[rows] for tensor in batch], 0
        if self.net.vectorized:
            dims = (0, *[dim] * len(batch))
            return vmap(self._loss, dims)(weights, *batch)
        each = [
            self._loss(own, *(t if dim is None else t[chain] for t in batch))
            for chain, own in enumerate(weights)
        ]
        return torch.stack(each)

    def _loss(self, weights: Tensor, *batch: Tensor) -> Tensor:
        value = self.log_posterior(self.net.unflatten(weights), *batch)
        return -self.log_posterior.likelihood_temperature * value

    def key(self) -> dict[str, Any]:
        """What losses of a continued run must have in common with those before."""
        return {
            "network": structure(self.net.network, set(self.net.names)),
            "data": [checksum(part) for part in self.data],
            "batch size": self.batch_size,
            "likelihood": type(self.log_posterior.likelihood).__name__,
            "temperature": self.log_posterior.likelihood_temperature,
        }
