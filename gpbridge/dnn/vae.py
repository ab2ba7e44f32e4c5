r"""Variational autoencoders: latent standard normals, a decoder, an encoder.

In: two modules and data. Out: a :class:`VAE` with its evidence lower bound, and a
trained one from :func:`fit_vae`. Next: ``gp_vae`` replaces the prior by Gaussian
processes over what is known about each datum.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import Independent

from gpbridge.checks import check_count, check_positive
from gpbridge.dnn.autoencoder import Autoencoder
from gpbridge.dnn.elbo_training import ELBOFit, ascend_elbo
from gpbridge.dnn.training import Callback, isolated_randomness
from gpbridge.randomness import fresh, standard_normal


class VAE(Autoencoder):
    r"""A variational autoencoder with the prior :math:`z \sim N(0, I)`.

    .. math::
        \log p(y) \ge \mathbb{E}_{q(z \mid y)} \log p(y \mid z)
        - \mathrm{KL}(q(z \mid y) \,\|\, N(0, I))

    Both terms are sums, over pixels and over latent dimensions; only data are averaged
    over. A mean over pixels would multiply the weight of the divergence by their
    number. The caller's modules are copied and never changed. Arguments are those of
    :class:`~gpbridge.dnn.autoencoder.Autoencoder`.

    Example:
        >>> encoder, decoder = torch.nn.Linear(5, 4), torch.nn.Linear(2, 5)
        >>> vae = VAE(encoder, decoder, latent_dim=2)
        >>> generator = torch.Generator().manual_seed(0)
        >>> Y = torch.randn(8, 5, generator=generator)
        >>> vae = fit_vae(vae, Y, epochs=2, generator=generator).model
        >>> vae.reconstruct(Y).shape, vae.log_likelihood(Y, generator=generator).shape
        (torch.Size([8, 5]), torch.Size([8]))

    References:
        Kingma and Welling, Auto-encoding variational Bayes, ICLR 2014, eq. (10) and
        appendix B. Burda, Grosse, Salakhutdinov, Importance weighted autoencoders,
        ICLR 2016, eq. (8).
    """

    def elbo(
        self, Y: Tensor, num_samples: int = 1, generator: Generator | None = None
    ) -> Tensor:
        """The lower bound, mean over data, differentiable.

        Args:
            Y: Data ``b x d`` or ``b x input_shape``. The mean of the bounds of equal
                minibatches is the bound of all: it is a mean over data.
            num_samples: Latent draws per datum.
            generator: Source of randomness; without one draws are fresh.

        Returns:
            Nats per datum.

        Raises:
            InputDataError: If there are no rows, or NaN among them.
            ShapeError: If encoder, decoder and data do not fit.
        """
        self.check_data(Y, "Y")
        check_count(num_samples=num_samples)
        return self._elbo(Y, num_samples, generator)

    def _elbo(self, Y: Tensor, num_samples: int, generator: Generator | None) -> Tensor:
        q = self.encode(Y)
        noise = standard_normal((num_samples, *q.mean.shape), generator, q.mean)
        Z = q.mean + q.stddev * noise
        return (self.log_prob(Y, Z).mean(0) - divergence(q)).mean()

    @torch.no_grad()
    def log_likelihood(
        self, Y: Tensor, num_importance: int = 100, generator: Generator | None = None
    ) -> Tensor:
        r"""Importance weighted bound of each datum's log density.

        .. math:: \log \frac1k \sum_{s=1}^k
                  \frac{p(y \mid z_s) p(z_s)}{q(z_s \mid y)}, \quad z_s \sim q(z \mid y)

        Its expectation is at most :math:`\log p(y)`, never falls with k, and approaches
        it. For k = 1 it is the bound of :meth:`elbo`.

        Args:
            Y: Data, ``n x d`` or ``n x input_shape``.
            num_importance: The number k of draws; all of a datum are decoded at once.
            generator: Source of randomness.

        Returns:
            Nats, ``n``, without gradients.
        """
        self.check_data(Y, "Y")
        check_count(num_importance=num_importance)
        generator = fresh(generator, Y.device)
        bounds = []
        for rows in Y.split(self._chunk(num_importance)):
            q = self.encode(rows)
            noise = standard_normal((num_importance, *q.mean.shape), generator, q.mean)
            Z = q.mean + q.stddev * noise
            # log N(z; 0, I) - log q(z), without the 2 pi that both have.
            ratio = 0.5 * (noise.square() - Z.square()).sum(-1) + q.stddev.log().sum(-1)
            weights = self.log_prob(rows, Z) + ratio
            bounds.append(weights.logsumexp(0) - math.log(num_importance))
        return torch.cat(bounds)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        generator: Generator | None = None,
        observation_noise: bool = False,
    ) -> Tensor:
        """New data from the prior, ``s x`` the decoder's shape.

        Args:
            num_samples: How many.
            generator: Source of randomness.
            observation_noise: Whether to draw pixels, or else to return their means.

        Returns:
            The data.
        """
        check_count(num_samples=num_samples)
        like = next(self.decoder.parameters())
        generator = fresh(generator, like.device)
        Z = standard_normal((num_samples, self.latent_dim), generator, like)
        pixels = self._pixels(self._decoded(Z))
        if not observation_noise:
            return pixels.mean
        with isolated_randomness(generator, like.device):  # distributions take none
            return pixels.sample()

    @torch.no_grad()
    def reconstruct(self, Y: Tensor) -> Tensor:
        """Decoded means of the encoder's means, in the shape of the data."""
        self.check_data(Y, "Y")
        return self.decode(self.encode(Y).mean).mean.reshape(Y.shape)


def divergence(q: Independent) -> Tensor:
    """KL divergence of diagonal Gaussians from N(0, I), summed over l, ``n`` nats."""
    variance = q.variance
    return 0.5 * (q.mean.square() + variance - variance.log() - 1).sum(-1)


def fit_vae(
    vae: VAE,
    Y: Tensor,
    *,
    epochs: int = 200,
    learning_rate: float = 1e-3,
    likelihood_learning_rate: float = 1e-2,
    batch_size: int = 100,
    num_samples: int = 1,
    generator: Generator | None = None,
    resume: dict[str, Any] | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> ELBOFit:
    """Train a copy of a VAE on its lower bound by Adam.

    Args:
        vae: The model, which stays as it is.
        Y: Data ``n x d`` or ``n x input_shape``.
        epochs: Passes over the data, after those of ``resume``.
        learning_rate: Of Adam, for encoder and decoder.
        likelihood_learning_rate: For the likelihood: a noise variance is one number,
            with far to go.
        batch_size: Rows per step.
        num_samples: Latent draws per datum and step.
        generator: Source of all randomness; None is a fresh one with seed 0.
        resume: The ``state`` of a fit before, of the same data and a model built alike,
            to go on from: with the same public attributes of its modules. What they
            count as they are called belongs in a buffer, or behind an underscore.
        progress: Whether to show a bar, if there is a terminal.
        callback: Called after every epoch with (epoch, model in eval mode, entries of
            the history); True ends training.

    Returns:
        The trained model, the bounds of the epochs, and the state to resume from.

    Raises:
        DivergedError: If the bound or a weight becomes NaN or infinite; its
            ``last_good`` is the fit at the last good epoch.
        InputDataError: If there are no data, or NaN among them.

    Warns:
        RuntimeWarning: If the keyboard interrupts: the last good epoch is returned.
    """  # noqa: DOC502
    vae.check_data(Y, "Y")
    check_count(num_samples=num_samples)
    check_positive(likelihood_learning_rate=likelihood_learning_rate)
    own = copy.deepcopy(vae)
    own.log_prob(Y[:2], own.encode(Y[:2]).mean)  # shapes, before any training
    networks = [*own.encoder.parameters(), *own.decoder.parameters()]
    others = list(own.likelihood.parameters())
    return ascend_elbo(
        own,
        lambda rows, generator: own._elbo(Y[rows], num_samples, generator),
        (Y,),
        groups=[(networks, learning_rate), (others, likelihood_learning_rate)],
        epochs=epochs,
        batch_size=batch_size,
        generator=generator,
        resume=resume,
        progress=progress,
        callback=callback,
        name="fit_vae",
        usual_rate=1e-3,
    )
