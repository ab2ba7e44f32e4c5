r"""An encoder and a decoder as two conditional distributions.

.. math:: q(z \mid y) = N(\mu(y), \mathrm{diag}\, s^2(y)), \qquad
          p(y \mid z) = \prod_j p(y_j \mid f_j(z))

In: two modules of the user's and a gpytorch likelihood. Out: the distributions, and
log densities summed over pixels. What z is a priori is not known here.
Next: ``vae`` takes standard normals, ``gp_vae`` Gaussian processes.

References:
    Kingma and Welling, Auto-encoding variational Bayes, ICLR 2014, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from gpbridge.checks import (
    ShapeError,
    check_count,
    check_finite,
    check_floating,
    check_not_empty,
    check_same_dtype,
    check_tensor,
)
from gpbridge.frozen import copy_without_hooks

_LOG_VARIANCE_BOUND = 15.0  # beyond, exp leaves what float32 squares and inverts
_DECODED_ROWS = 20_000  # at once, where no gradient is kept


class Autoencoder(nn.Module):
    """Copies of an encoder, a decoder and a likelihood, with their shapes checked.

    Args:
        encoder: Maps data ``n x d`` (or ``n x input_shape``) to ``n x 2 latent_dim``:
            means, then log variances, which are clamped to +-15.
        decoder: Maps ``n x latent_dim`` to as many numbers per row as the data have, in
            any shape.
        latent_dim: The number l of latent dimensions.
        likelihood: Of one pixel given one output of the decoder, the same for all:
            ``GaussianLikelihood()`` with a learnt variance (default), or for pixels 0
            and 1 :class:`~gpbridge.likelihoods.LogisticLikelihood`.
        input_shape: Shape of one datum for the encoder, as (c, h, w).

    Raises:
        TypeError: If encoder or decoder is not a module.
        ValueError: If a module cannot be copied, or ``latent_dim`` is not a count.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        likelihood: Likelihood | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for name, module in {"encoder": encoder, "decoder": decoder}.items():
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"{name} must be a torch.nn.Module, but is {type(module).__name__}."
                )
        check_count(latent_dim=latent_dim)
        self.latent_dim = latent_dim
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.encoder = copy_without_hooks(encoder)
        self.decoder = copy_without_hooks(decoder)
        own = next((p for p in self.decoder.parameters()), torch.zeros(()))
        if likelihood is None:
            likelihood = GaussianLikelihood().to(own)
        self.likelihood = copy_without_hooks(likelihood)

    def encode(self, Y: Tensor) -> Independent:
        """The encoder's distribution of each latent row, event ``latent_dim``.

        Raises:
            ShapeError: If the encoder's outputs are not two per latent dimension.
        """
        outputs = self.encoder(self._shaped(Y))
        width = 2 * self.latent_dim
        shape = getattr(outputs, "shape", type(outputs).__name__)
        if shape != (len(Y), width):
            raise ShapeError(
                f"The encoder must return ``n x {width}``, a mean and a log variance "
                f"for each of latent_dim {self.latent_dim} dimensions, but returned "
                f"{tuple(shape) if isinstance(shape, torch.Size) else shape} for "
                f"{len(Y)} rows. Give it {width} outputs, or change latent_dim."
            )
        mean, log_variance = outputs.chunk(2, dim=-1)
        bound = _LOG_VARIANCE_BOUND
        std = (0.5 * log_variance.clamp(-bound, bound)).exp()
        return Independent(Normal(mean, std, validate_args=False), 1)

    def decode(self, Z: Tensor) -> Independent:
        """The distribution of the data at latent rows ``... x l``, event ``d``."""
        return Independent(self._pixels(self._decoded(Z).flatten(Z.dim() - 1)), 1)

    def log_prob(self, Y: Tensor, Z: Tensor) -> Tensor:
        """Log density of data ``n x d`` at latent rows ``... x n x l``, over pixels.

        Returns:
            Total nats of each datum, ``... x n``: a sum over pixels and not a mean, or
            else the divergence would count for more than it is.

        Raises:
            FloatingPointError: If the decoder returns NaN or Inf.
            ShapeError: If decoder and data differ in their number of pixels.
        """
        rows = Y.flatten(1)
        decoded = self._decoded(Z).flatten(Z.dim() - 1)
        if decoded.shape[-1] != rows.shape[-1]:
            raise ShapeError(
                f"The decoder must return {rows.shape[-1]} numbers per row as the data "
                f"have (shape {tuple(Y.shape)}), but returns {decoded.shape[-1]}."
            )
        return self._pixels(decoded).log_prob(rows).sum(-1)

    def check_data(self, Y: Tensor, name: str) -> None:
        """Require finite rows that encoder and likelihood can take."""
        check_tensor(**{name: Y})
        check_floating(**{name: Y})
        if Y.dim() < 2:
            raise ShapeError(
                f"{name} must be ``n x d`` or ``n x c x h x w``, but has shape "
                f"{tuple(Y.shape)}. For one datum try {name}[None]."
            )
        check_not_empty(**{name: Y})
        check_finite(**{name: Y})
        own = next((p.dtype for p in self.decoder.parameters()), Y.dtype)
        check_same_dtype(name, Y, own)
        with torch.no_grad():
            self._check_support(Y, name)

    def _check_support(self, Y: Tensor, name: str) -> None:
        zero = Y.new_zeros(1, Y[0].numel())
        support = self._pixels(zero).support
        outside = ~support.check(Y.flatten(1)).reshape(len(Y), -1)
        if outside.any():
            raise ValueError(
                f"{name} must lie in the support of {type(self.likelihood).__name__}, "
                f"{support}, but contains {Y.flatten(1)[outside][0].item():.4g}. "
                "Binarise the pixels, or choose GaussianLikelihood()."
            )

    def _shaped(self, Y: Tensor) -> Tensor:
        if self.input_shape is None:
            return Y
        if math.prod(self.input_shape) != Y[0].numel():
            raise ShapeError(
                f"input_shape {self.input_shape} has {math.prod(self.input_shape)} "
                f"numbers per row, but the data have shape {tuple(Y.shape)}."
            )
        return Y.reshape(len(Y), *self.input_shape)

    def _decoded(self, Z: Tensor) -> Tensor:
        """Outputs of the decoder in its own shape, ``... x pixel shape``."""
        outputs = self.decoder(Z.reshape(-1, Z.shape[-1]))
        return outputs.reshape(*Z.shape[:-1], *outputs.shape[1:])

    def _pixels(self, decoded: Tensor) -> Distribution:
        try:
            pixels = self.likelihood(decoded)
        except ValueError as error:
            if bool(torch.isfinite(decoded).all()):
                raise
            raise FloatingPointError(
                "The decoder returned NaN or Inf: its weights or the encoder's have "
                "diverged. Lower the learning rate, or standardise the data."
            ) from error
        if getattr(pixels, "batch_shape", None) != decoded.shape:
            raise ShapeError(
                "The likelihood must give a distribution of each pixel alone, but "
                f"{type(self.likelihood).__name__} gives {pixels} for outputs of shape "
                f"{tuple(decoded.shape)}. Try GaussianLikelihood()."
            )
        return pixels

    def _chunk(self, num_samples: int) -> int:
        return max(1, _DECODED_ROWS // num_samples)
