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
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from gpbridge.checks import ReliabilityWarning, check_count, warn_user
from gpbridge.dnn.inducing_posterior import InducingPosterior, refine
from gpbridge.dnn.latent_processes import LatentProcesses
from gpbridge.randomness import standard_normal


class Prediction(NamedTuple):
    """Mean and variance of each pixel, noise included, ``t x`` the decoder's shape."""

    mean: Tensor
    variance: Tensor


class GPPriorVAE(LatentProcesses):
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
        >>> from torch import nn
        >>> time = torch.linspace(0, 1, 8)[:, None]
        >>> Y = torch.cat([time.sin(), time.cos(), time], -1)
        >>> encoder, decoder = nn.Linear(3, 4), nn.Linear(2, 3)
        >>> model = GPPriorVAE(encoder, decoder, 2, RBFKernel(), time[::2])
        >>> model = model.condition(time, Y)
        >>> model.posterior(time[:3]).mean.shape, model.predict(time[:3]).mean.shape
        (torch.Size([3, 2]), torch.Size([3, 3]))
    """

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


def _seeded(generator: Generator | None, device: torch.device) -> Generator:
    return Generator(device).manual_seed(0) if generator is None else generator
