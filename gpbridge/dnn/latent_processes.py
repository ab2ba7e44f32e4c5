"""Gaussian processes as the prior of the latent rows of an autoencoder.

In: an autoencoder, a gpytorch kernel, inducing points. Out: the posterior of latent
functions given data with auxiliary inputs, on these data or kept for predictions. Next:
``gp_vae`` bounds the evidence with it, and predicts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from torch import Tensor, nn

from gpbridge.checks import (
    ShapeError,
    check_count,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_device,
    check_same_length,
)
from gpbridge.dnn.autoencoder import Autoencoder
from gpbridge.dnn.inducing_posterior import (
    InducingPosterior,
    evidence_of,
    posterior_of,
    whiten,
)
from gpbridge.frozen import copy_without_hooks


class LatentProcesses(Autoencoder):
    """An autoencoder and the Gaussian processes of its latent dimensions.

    The base of :class:`~gpbridge.dnn.GPPriorVAE`, whose arguments these are.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        kernel: Kernel,
        inducing_points: Tensor,
        likelihood: Likelihood | None = None,
        *,
        latent_noise_variance: float = 0.1,
        embedding: nn.Module | None = None,
        input_shape: Sequence[int] | None = None,
        learn_inducing_points: bool = True,
    ) -> None:
        super().__init__(encoder, decoder, latent_dim, likelihood, input_shape)
        check_inputs(inducing_points, "inducing_points")
        if inducing_points.dim() != 2 or not len(inducing_points):
            raise ShapeError(
                "inducing_points must be ``m x e`` with one row or more, but have "
                f"shape {tuple(inducing_points.shape)}."
            )
        if kernel.batch_shape not in (torch.Size(), torch.Size([latent_dim])):
            raise ShapeError(
                "The kernel must have an empty batch_shape, or one kernel for each of "
                f"latent_dim {latent_dim} dimensions, but has batch_shape "
                f"{tuple(kernel.batch_shape)}."
            )
        self.kernel = copy_without_hooks(kernel).double()
        self.embedding = None if embedding is None else copy_without_hooks(embedding)
        self.log_latent_noise: nn.Parameter | None = None
        if latent_noise_variance != 0:
            check_positive(latent_noise_variance=latent_noise_variance)
            start = inducing_points.new_full(
                (latent_dim,), math.log(latent_noise_variance), dtype=torch.float64
            )
            self.log_latent_noise = nn.Parameter(start)
        points = inducing_points.detach().double().clone()
        self.inducing_points = nn.Parameter(points, requires_grad=learn_inducing_points)
        # Of all data, as condition() left it; at first the prior.
        m = len(points)
        self.register_buffer("posterior_mean", points.new_zeros(latent_dim, m))
        identity = torch.eye(m).to(points).repeat(latent_dim, 1, 1)
        self.register_buffer("posterior_factor", identity)
        self.register_buffer("num_conditioned", torch.zeros((), dtype=torch.long))

    @property
    def latent_noise_variance(self) -> Tensor:
        """The variance alpha of each latent dimension, ``l``."""
        if self.log_latent_noise is None:
            return self.inducing_points.new_zeros(self.latent_dim)
        return self.log_latent_noise.exp()

    def infer(
        self, X_aux: Tensor, Y: Tensor, *, num_data: int | None = None
    ) -> InducingPosterior:
        """The posterior of the inducing values given data that stand for N of them."""
        self._check(X_aux, Y)
        num_data = len(Y) if num_data is None else num_data
        check_count(num_data=num_data)
        cross, _ = self._covariances(X_aux)
        return self._conditioned(cross, self._sites(Y), num_data)

    def _sites(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo-observations and their noise variances, ``l x n`` in float64."""
        q = self.encode(Y)
        return q.mean.mT.double(), q.variance.mT.double()

    def _conditioned(
        self, cross: Tensor, sites: tuple[Tensor, Tensor], num_data: int
    ) -> InducingPosterior:
        targets, variance = sites
        noise = variance + self.latent_noise_variance[:, None]
        terms = evidence_of(cross, targets, noise, num_data / targets.shape[-1])
        return posterior_of(*terms)

    @torch.no_grad()
    def condition(self, X_aux: Tensor, Y: Tensor, batch_size: int = 1000) -> Self:
        """Keep the posterior given these data, and no others, for predictions.

        :func:`~gpbridge.dnn.gp_vae_fit.fit_gp_vae` does so with its data; after
        changing parameters in another way, do it again. Before the first time
        predictions are the prior's.

        Args:
            X_aux: Auxiliary inputs ``n x a``.
            Y: Data ``n x d``.
            batch_size: Rows encoded at once; what is kept is a sum over them.

        Returns:
            The model.
        """
        self._check(X_aux, Y)
        check_count(batch_size=batch_size)
        sums = (0.0, 0.0)
        for aux, rows in zip(X_aux.split(batch_size), Y.split(batch_size), strict=True):
            cross, _ = self._covariances(aux)
            targets, noise = self._sites(rows)
            noise = noise + self.latent_noise_variance[:, None]
            terms = evidence_of(cross, targets, noise)
            sums = (sums[0] + terms[0], sums[1] + terms[1])
        q = posterior_of(*sums)
        self.posterior_mean.copy_(q.mean)
        self.posterior_factor.copy_(q.factor)
        self.num_conditioned.fill_(len(Y))
        return self

    def posterior(self, X_aux: Tensor) -> MultitaskMultivariateNormal:
        """Latent functions f at auxiliary inputs, jointly: mean ``t x l``.

        Latent dimensions are independent of one another, and latent noise is not in it.
        Differentiable in the inputs.
        """
        self._check_aux(X_aux)
        inputs = self._embedded(X_aux)
        cross, _ = self._covariances(X_aux)
        joint = self._kept().joint(cross, self.kernel(inputs).to_dense())
        return MultitaskMultivariateNormal.from_batch_mvn(joint)

    def _kept(self) -> InducingPosterior:
        return InducingPosterior(self.posterior_mean, self.posterior_factor)

    def _predicted(self, X_aux: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of z at new points each alone, ``l x t``."""
        mean, variance = self._kept().marginal(*self._covariances(X_aux))
        return mean, variance + self.latent_noise_variance[:, None]

    def _covariances(self, X_aux: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened cross covariances ``... x m x t``, prior variances ``... x t``."""
        Z, inputs = self.inducing_points, self._embedded(X_aux)
        cross = whiten(self.kernel(Z).to_dense(), self.kernel(Z, inputs).to_dense())
        return cross, self.kernel(inputs, diag=True)

    def _embedded(self, X_aux: Tensor) -> Tensor:
        inputs = X_aux if self.embedding is None else self.embedding(X_aux)
        width = self.inducing_points.shape[-1]
        if inputs.shape != (len(X_aux), width):
            source = "X_aux" if self.embedding is None else "The embedding of X_aux"
            raise ShapeError(
                f"{source} must be ``n x {width}`` as the inducing points are "
                f"(shape {tuple(self.inducing_points.shape)}), but has shape "
                f"{tuple(inputs.shape)}."
            )
        return inputs.to(self.inducing_points)

    def _check(self, X_aux: Tensor, Y: Tensor) -> None:
        self._check_aux(X_aux)
        self.check_data(Y, "Y")
        check_same_length(X_aux=X_aux, Y=Y)
        check_same_device(X_aux=X_aux, Y=Y)

    def _check_aux(self, X_aux: Tensor) -> None:
        check_inputs(X_aux, "X_aux")
        check_not_empty(X_aux=X_aux)
