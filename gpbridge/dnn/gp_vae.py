r"""Autoencoders whose latent dimensions are Gaussian processes over auxiliary inputs.

Images of a rotating object are not independent: what is known about each (its angle,
its time, which object it shows) correlates their latent rows. In: two modules, a
gpytorch kernel, inducing points. Out: a :class:`GPPriorVAE`, which predicts at
auxiliary inputs without an image. Next: ``gp_vae_fit`` trains it.

References:
    Casale, Dalca, Saglietti, Listgarten, Fusi, Gaussian process prior variational
    autoencoders, NeurIPS 2018. Pearce, The Gaussian process prior VAE for interpretable
    latent dynamics from pixels, AABI 2020. Jazbec, Ashman, Fortuin, Pearce, Mandt,
    Rätsch, Scalable Gaussian process variational autoencoders, AISTATS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor, nn

from gpbridge.checks import (
    ReliabilityWarning,
    ShapeError,
    check_count,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_device,
    check_same_length,
    warn_user,
)
from gpbridge.dnn.autoencoder import Autoencoder
from gpbridge.dnn.inducing_posterior import (
    InducingPosterior,
    evidence_of,
    posterior_of,
    refine,
    whiten,
)
from gpbridge.frozen import copy_without_hooks
from gpbridge.randomness import standard_normal


class Prediction(NamedTuple):
    """Mean and variance of each pixel, noise included, ``t x`` the decoder's shape."""

    mean: Tensor
    variance: Tensor


class GPPriorVAE(Autoencoder):
    r"""A variational autoencoder with latent rows that Gaussian processes correlate.

    .. math:: z_{il} = f_l(x_i) + \varepsilon_{il}, \qquad f_l \sim GP(0, k_l), \qquad
              \varepsilon_{il} \sim N(0, \alpha_l)

    The encoder's outputs are pseudo-observations
    :math:`N(\tilde y_{il} \mid z_{il}, \tilde s_{il}^2)`. With them the posteriors of
    the inducing values u of f, and of :math:`z_i` given f, are Gaussian in closed form;
    the bound of all data is

    .. math::
        \log p(Y) \ge \sum_i \mathbb{E}_q \Bigl[ \log p(y_i \mid z_i)
        - \mathrm{KL}(q(z_i \mid f_i) \,\|\, p(z_i \mid f_i)) \Bigr]
        - \sum_l \mathrm{KL}(q(u_l) \,\|\, p(u_l)) .

    The latent noise :math:`\alpha` is that of Casale et al.: what the auxiliary inputs
    leave open about a datum. Without it (zero) this is the bound of Jazbec et al.: the
    cross entropy with the encoder and the Gaussian part of the sparse bound (Hensman
    et al., UAI 2013, eq. (4)) are expectations under one q and cancel. Predictions are
    then too certain where the kernel does not explain all. With an inducing point at
    every datum it is the dense bound of Pearce, of the kernel plus the noise.

    Everything given is copied. Kernel and inducing points are kept in float64; modules
    stay as they are. A step costs l (b m^2 + m^3) beside encoder and decoder.

    Args:
        encoder: Maps data ``n x d`` to ``n x 2 latent_dim``: pseudo-observations, then
            their log noise variances.
        decoder: Maps ``n x latent_dim`` to the numbers of ``n`` data.
        latent_dim: The number l of latent functions.
        kernel: Any gpytorch kernel, one for all latent functions, or with
            ``batch_shape=[latent_dim]`` one for each. A product over columns is a
            product kernel with ``active_dims``.
        inducing_points: Where the inducing values are, ``m x e``, in the inputs of the
            kernel.
        likelihood: Of a pixel, as in :class:`~gpbridge.dnn.autoencoder.Autoencoder`.
        latent_noise_variance: The first value of each alpha, which is learnt; 0 for
            none.
        embedding: Maps auxiliary inputs ``n x a`` to inputs of the kernel ``n x e``; it
            is trained too. A learnt vector per object goes here. None leaves them.
        input_shape: Shape of one datum for the encoder.
        learn_inducing_points: Whether they are parameters.

    Raises:
        ShapeError: If kernel and latent dimensions do not fit.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> time = torch.linspace(0, 1, 8)[:, None]
        >>> Y = torch.cat([time.sin(), time.cos(), time], -1)
        >>> encoder, decoder = nn.Linear(3, 4), nn.Linear(2, 3)
        >>> model = GPPriorVAE(encoder, decoder, 2, RBFKernel(), time[::2])
        >>> model = model.condition(time, Y)
        >>> model.posterior(time[:3]).mean.shape, model.predict(time[:3]).mean.shape
        (torch.Size([3, 2]), torch.Size([3, 3]))
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

    def elbo(
        self,
        X_aux: Tensor,
        Y: Tensor,
        *,
        num_data: int | None = None,
        support: tuple[Tensor, Tensor] | None = None,
        num_samples: int = 1,
        generator: Generator | None = None,
    ) -> Tensor:
        r"""The lower bound per datum, on all data or on a minibatch.

        With q from all data as ``support``, a minibatch's bound is an unbiased estimate
        of that of all data: the mean over equal minibatches is it, up to the latent
        draws. Without a support, q comes from the minibatch, each datum counted N / b
        times, as Jazbec et al. train: then the mean over minibatches is another
        number than the bound of all data and no bound, since each q has seen the data
        it is scored on as N / b copies. The two agree for b = N. A support drawn
        independently of the batch gives a bound again, whatever its size.

        Args:
            X_aux: Auxiliary inputs ``b x a``.
            Y: Data ``b x d``.
            num_data: The number N of all data; default b.
            support: Auxiliary inputs and data that q(u) is made of, N of them or
                standing for N; default the batch.
            num_samples: Latent draws per datum.
            generator: Source of randomness; without one draws are fresh.

        Returns:
            Nats per datum, differentiable in all parameters.
        """
        self._check(X_aux, Y)
        check_count(num_samples=num_samples)
        num_data = len(Y) if num_data is None else num_data
        check_count(num_data=num_data)
        cross, variance = self._covariances(X_aux)
        sites = self._sites(Y)
        if support is None:
            q = self._conditioned(cross, sites, num_data)
        else:
            q = self.infer(*support, num_data=num_data)
        noise = (num_samples, generator)
        return self._elbo(q, cross, variance, sites, Y, num_data, *noise)

    def _elbo(
        self,
        q: InducingPosterior,
        cross: Tensor,
        variance: Tensor,
        sites: tuple[Tensor, Tensor],
        Y: Tensor,
        num_data: int,
        num_samples: int,
        generator: Generator | None,
    ) -> Tensor:
        f = q.marginal(cross, variance)
        mean, variance, local = refine(*f, *sites, self.latent_noise_variance[:, None])
        mean, std = mean.mT.to(Y), variance.sqrt().mT.to(Y)  # b x l
        noise = standard_normal((num_samples, *mean.shape), generator, mean)
        fit = self.log_prob(Y, mean + std * noise).mean()
        return fit - (local.sum() / len(Y) + q.divergence().sum() / num_data).to(fit)

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
    def condition(self, X_aux: Tensor, Y: Tensor, batch_size: int = 1000) -> GPPriorVAE:
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

    @torch.no_grad()
    def predict(
        self, X_aux: Tensor, num_samples: int = 64, generator: Generator | None = None
    ) -> Prediction:
        """Moments of the data at auxiliary inputs, by latent draws at each point.

        Args:
            X_aux: Auxiliary inputs ``t x a``; no data are needed there.
            num_samples: Latent draws per point.
            generator: Source of randomness; None is a fresh one with seed 0, so that
                two calls agree.

        Returns:
            Means and variances of the pixels, observation noise included.

        Warns:
            ReliabilityWarning: If there was no :meth:`condition`; it is the prior then.
        """
        self._check_aux(X_aux)
        self._warn_of_prior()
        check_count(num_samples=num_samples)
        like = next(self.decoder.parameters())
        generator = _seeded(generator, like.device)
        means, variances = [], []
        for rows in X_aux.split(self._chunk(num_samples)):
            mean, variance = (part.mT.to(like) for part in self._predicted(rows))
            noise = standard_normal((num_samples, *mean.shape), generator, mean)
            pixels = self._pixels(self._decoded(mean + variance.sqrt() * noise))
            means.append(pixels.mean.mean(0))
            spread = pixels.mean.var(0, correction=0)
            variances.append(pixels.variance.mean(0) + spread)
        return Prediction(torch.cat(means), torch.cat(variances))

    @torch.no_grad()
    def log_likelihood(
        self,
        X_aux: Tensor,
        Y: Tensor,
        num_importance: int = 100,
        generator: Generator | None = None,
    ) -> Tensor:
        r"""Importance weighted bound of each new datum's log predictive density.

        .. math:: \log \frac1k \sum_{s=1}^k \frac{p(y \mid z_s) q(z_s)}{r(z_s)},
                  \quad z_s \sim r(z) \propto q(z) \, N(\tilde y \mid z, \tilde s^2)

        Here q(z) is the Gaussian process posterior at the auxiliary input, given the
        data of :meth:`condition` only, with latent noise, and r that posterior after
        the datum's own pseudo-observation. The expectation is at most
        :math:`\log \int p(y \mid z) q(z) dz`, for any encoder, never falls with k, and
        approaches it.

        Args:
            X_aux: Auxiliary inputs of the new data, ``t x a``.
            Y: The data, ``t x d``, each scored alone.
            num_importance: The number k of draws.
            generator: As for :meth:`predict`.

        Returns:
            Nats, ``t``, without gradients.
        """
        self._check(X_aux, Y)
        check_count(num_importance=num_importance)
        self._warn_of_prior()
        generator = _seeded(generator, Y.device)
        bounds, size = [], self._chunk(num_importance)
        for aux, rows in zip(X_aux.split(size), Y.split(size), strict=True):
            mean, variance = (part.mT for part in self._predicted(aux))
            target, spread = (part.mT for part in self._sites(rows))
            precision = 1 / variance + 1 / spread
            shift = (target - mean) / spread / precision
            noise = standard_normal((num_importance, *mean.shape), generator, mean)
            Z = mean + shift + noise / precision.sqrt()
            # log q(z) - log r(z), without the 2 pi that both have.
            distance = noise.square() - (Z - mean).square() / variance
            ratio = 0.5 * (distance - (variance * precision).log()).sum(-1)
            weights = self.log_prob(rows, Z.to(rows)) + ratio
            bounds.append(weights.logsumexp(0) - math.log(num_importance))
        return torch.cat(bounds).to(Y)

    def _warn_of_prior(self) -> None:
        if not int(self.num_conditioned):
            warn_user(
                "The model has seen no data, so this is a prediction of its prior. "
                "Call condition(X_aux, Y) before.",
                ReliabilityWarning,
            )

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


def _seeded(generator: Generator | None, device: torch.device) -> Generator:
    return Generator(device).manual_seed(0) if generator is None else generator
