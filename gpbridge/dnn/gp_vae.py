r"""Autoencoders whose latent dimensions are Gaussian processes over auxiliary inputs.

Images of a rotating object are not independent: what is known about each (its angle,
its time, which object it shows) correlates their latent rows. In: two modules, a
gpytorch kernel, inducing points. Out: a :class:`GPPriorVAE`, a trained one from
:func:`fit_gp_vae`, and predictions at auxiliary inputs without an image.

References:
    Casale, Dalca, Saglietti, Listgarten, Fusi, Gaussian process prior variational
    autoencoders, NeurIPS 2018. Pearce, The Gaussian process prior VAE for interpretable
    latent dynamics from pixels, AABI 2020. Jazbec, Ashman, Fortuin, Pearce, Mandt,
    Rätsch, Scalable Gaussian process variational autoencoders, AISTATS 2021.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor, nn

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_count,
    check_inputs,
    check_not_empty,
    check_same_device,
    check_same_length,
)
from gpbridge.dnn.autoencoder import Autoencoder
from gpbridge.dnn.elbo_training import Callback, ELBOFit, ascend_elbo
from gpbridge.dnn.inducing_posterior import (
    InducingPosterior,
    condition_inducing,
    whiten,
)
from gpbridge.frozen import copy_without_hooks
from gpbridge.randomness import fresh, standard_normal


class Prediction(NamedTuple):
    """Mean and variance of each pixel, noise included, ``t x`` the decoder's shape."""

    mean: Tensor
    variance: Tensor


class GPPriorVAE(Autoencoder):
    r"""A variational autoencoder with priors :math:`z_l \sim GP(0, k_l)`.

    The encoder's outputs are pseudo-observations of the latent functions,
    :math:`N(\tilde y_l(y_i) \mid z_l(x_i), \tilde s_l^2(y_i))`. With them the posterior
    of the inducing values is Gaussian in closed form, and the bound of all data is

    .. math::
        \log p(Y) \ge \sum_i \mathbb{E}_{q(z_i)} \log p(y_i \mid z_i)
        - \sum_l \mathrm{KL}(q(u_l) \,\|\, p(u_l)) .

    This is the bound of Jazbec et al.: their cross entropy with the encoder and the
    Gaussian part of their sparse bound (Hensman et al., UAI 2013, eq. (4)) are
    expectations under one q and cancel. With an inducing point at every datum it is
    the dense bound of Pearce.

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
        >>> model = fit_gp_vae(model, time, Y, epochs=2).model
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
        points = inducing_points.detach().double().clone()
        self.inducing_points = nn.Parameter(points, requires_grad=learn_inducing_points)
        # Of all data, as condition() left it; at first the prior.
        m = len(points)
        self.register_buffer("posterior_mean", points.new_zeros(latent_dim, m))
        identity = torch.eye(m).to(points).repeat(latent_dim, 1, 1)
        self.register_buffer("posterior_factor", identity)
        self.register_buffer("num_conditioned", torch.zeros((), dtype=torch.long))

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
        it is scored on as N / b copies. The two agree for b = N. A support
        drawn independently of the batch gives a bound again, whatever its size.

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
        if support is None:
            q = self._conditioned(cross, Y, num_data)
        else:
            self._check(*support)
            q = self.infer(*support, num_data=num_data)
        return self._elbo(cross, variance, q, Y, num_data, num_samples, generator)

    def _elbo(
        self,
        cross: Tensor,
        variance: Tensor,
        q: InducingPosterior,
        Y: Tensor,
        num_data: int,
        num_samples: int,
        generator: Generator | None,
    ) -> Tensor:
        mean, variance = (part.mT.to(Y) for part in q.marginal(cross, variance))
        noise = standard_normal((num_samples, *mean.shape), generator, mean)
        fit = self.log_prob(Y, mean + variance.sqrt() * noise).mean()
        return fit - (q.divergence().sum() / num_data).to(fit)

    def infer(
        self, X_aux: Tensor, Y: Tensor, *, num_data: int | None = None
    ) -> InducingPosterior:
        """The posterior of the inducing values given data that stand for N of them."""
        cross, _ = self._covariances(X_aux)
        return self._conditioned(cross, Y, len(Y) if num_data is None else num_data)

    def _conditioned(
        self, cross: Tensor, Y: Tensor, num_data: int
    ) -> InducingPosterior:
        q = self.encode(Y)
        targets, variance = (part.mT.to(cross) for part in (q.mean, q.variance))
        return condition_inducing(cross, targets, variance, num_data / len(Y))

    @torch.no_grad()
    def condition(self, X_aux: Tensor, Y: Tensor) -> GPPriorVAE:
        """Keep the posterior given these data, and no others, for predictions.

        :func:`fit_gp_vae` does so with its data; after changing parameters in another
        way, do it again. Before the first time predictions are the prior's.

        Returns:
            The model.
        """
        self._check(X_aux, Y)
        q = self.infer(X_aux, Y)
        self.posterior_mean.copy_(q.mean)
        self.posterior_factor.copy_(q.factor)
        self.num_conditioned.fill_(len(Y))
        return self

    def posterior(self, X_aux: Tensor) -> MultitaskMultivariateNormal:
        """Latent functions at auxiliary inputs, jointly: mean ``t x l``.

        Latent dimensions are independent of one another. Differentiable in the inputs.
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
            generator: Source of randomness.

        Returns:
            Means and variances of the pixels, observation noise included.
        """
        self._check_aux(X_aux)
        check_count(num_samples=num_samples)
        like = next(self.decoder.parameters())
        generator = fresh(generator, like.device)
        means, variances = [], []
        for rows in X_aux.split(self._chunk(num_samples)):
            mean, variance = self._marginal(self._kept(), rows, like)
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
        data of :meth:`condition` only, and r that posterior after the datum's own
        pseudo-observation. The expectation is at most :math:`\log \int p(y \mid z)
        q(z) dz`, for any encoder, never falls with k, and approaches it.

        Args:
            X_aux: Auxiliary inputs of the new data, ``t x a``.
            Y: The data, ``t x d``, each scored alone.
            num_importance: The number k of draws.
            generator: Source of randomness.

        Returns:
            Nats, ``t``, without gradients.
        """
        self._check(X_aux, Y)
        check_count(num_importance=num_importance)
        generator = fresh(generator, Y.device)
        bounds, size = [], self._chunk(num_importance)
        for aux, rows in zip(X_aux.split(size), Y.split(size), strict=True):
            mean, variance = self._marginal(self._kept(), aux, self.inducing_points)
            site = self.encode(rows)
            precision = 1 / variance + 1 / site.variance.to(variance)
            shift = (site.mean.to(mean) - mean) / site.variance.to(mean) / precision
            noise = standard_normal((num_importance, *mean.shape), generator, mean)
            Z = mean + shift + noise / precision.sqrt()
            # log q(z) - log r(z), without the 2 pi that both have.
            distance = noise.square() - (Z - mean).square() / variance
            ratio = 0.5 * (distance - (variance * precision).log()).sum(-1)
            weights = self.log_prob(rows, Z.to(rows)) + ratio
            bounds.append(weights.logsumexp(0) - math.log(num_importance))
        return torch.cat(bounds).to(Y)

    def _kept(self) -> InducingPosterior:
        return InducingPosterior(self.posterior_mean, self.posterior_factor)

    def _marginal(
        self, q: InducingPosterior, X_aux: Tensor, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Latent means and variances at each point, ``t x l``."""
        mean, variance = q.marginal(*self._covariances(X_aux))
        return mean.mT.to(like), variance.mT.to(like)

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


def fit_gp_vae(
    model: GPPriorVAE,
    X_aux: Tensor,
    Y: Tensor,
    *,
    epochs: int = 200,
    learning_rate: float = 1e-3,
    prior_learning_rate: float = 1e-2,
    batch_size: int | None = None,
    support: str = "data",
    num_samples: int = 1,
    generator: Generator | None = None,
    resume: dict[str, Any] | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> ELBOFit:
    """Train a copy of the model on its lower bound by Adam, and condition it.

    Args:
        model: The model, which stays as it is.
        X_aux: Auxiliary inputs ``n x a``.
        Y: Data ``n x d`` or ``n x input_shape``.
        epochs: Passes over the data, after those of ``resume``.
        learning_rate: Of encoder and decoder.
        prior_learning_rate: Of kernel, embedding, inducing points and likelihood, which
            are few numbers on scales of their own.
        batch_size: Rows per step; None takes all.
        support: What q(u) is made of in each step: ``"data"``, all of them, which costs
            a pass of the encoder over all and l N m^2, and has unbiased gradients; or
            ``"batch"``, as Jazbec et al., l b m^2 and biased.
        num_samples: Latent draws per datum and step.
        generator: Source of all randomness; None is a fresh one with seed 0.
        resume: The ``state`` of a fit before, to go on from.
        progress: Whether to show a bar, if there is a terminal.
        callback: Called after every epoch with (epoch, model in eval mode, entries of
            the history); True ends training. Its model is not conditioned.

    Returns:
        The trained model, conditioned on these data, and the state to resume from.

    Raises:
        InputDataError: If there are no data, or NaN among them.
        RuntimeError: If the bound is not finite in the first epoch.

    Warns:
        RuntimeWarning: If the bound becomes NaN later, or the keyboard interrupts: the
            last good epoch is returned.
    """
    model._check(X_aux, Y)
    check_choice("support", support, ("data", "batch"))
    check_count(num_samples=num_samples)
    own, n = copy.deepcopy(model), len(Y)
    own.log_prob(Y[:2], own.encode(Y[:2]).mean)  # shapes, before any training
    own._covariances(X_aux[:2])

    def elbo(rows: Tensor, generator: Generator) -> Tensor:
        if support == "batch":
            cross, variance = own._covariances(X_aux[rows])
            q = own._conditioned(cross, Y[rows], n)
        else:
            cross, variance = own._covariances(X_aux)
            q = own._conditioned(cross, Y, n)
            cross, variance = cross[..., rows], variance[..., rows]
        return own._elbo(cross, variance, q, Y[rows], n, num_samples, generator)

    networks = [*own.encoder.parameters(), *own.decoder.parameters()]
    shared = {id(p) for p in networks}
    others = [p for p in own.parameters() if id(p) not in shared]
    fit = ascend_elbo(
        own,
        elbo,
        n,
        Y.device,
        groups=[(networks, learning_rate), (others, prior_learning_rate)],
        epochs=epochs,
        batch_size=n if batch_size is None else batch_size,
        generator=generator,
        resume=resume,
        progress=progress,
        callback=callback,
        name="fit_gp_vae",
    )
    own.condition(X_aux, Y)
    return fit
