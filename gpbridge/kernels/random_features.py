r"""Random Fourier features of stationary kernels, and exact features of two more.

A stationary kernel is the Fourier transform of a distribution of frequencies, so that
sines and cosines at :math:`l` frequencies drawn from it give

.. math::
    \phi(x) \phi(x')^\top = \frac{s}{l} \sum_{i=1}^{l} \cos(w_i^\top (x - x') / \ell)
    \approx k(x, x').

In: an RBF, Matérn, linear or constant kernel of gpytorch. Out: its feature map,
registered with ``draw_feature_map``. Frequencies are drawn for lengthscale one, once;
lengthscales and scales are read from the kernel at each call. Next: ``prior_draws``
multiplies features with random weights.

References:
    Rahimi and Recht, Random features for large-scale kernel machines, NeurIPS 2007.
    Sutherland and Schneider, On the error of random Fourier features, UAI 2015: pairs
    of sine and cosine have the smaller error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from botorch.exceptions.errors import UnsupportedError
from botorch.sampling.pathwise.features.maps import FeatureMap, KernelFeatureMap
from botorch.sampling.pathwise.utils import (
    ChainedTransform,
    FeatureSelector,
    InverseLengthscaleTransform,
    SineCosineTransform,
)
from botorch.utils.sampling import draw_sobol_normal_samples
from gpytorch.kernels import (
    ConstantKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    RBFKernel,
)
from torch import Generator, Size, Tensor, nn
from torch.quasirandom import SobolEngine

from gpbridge.kernels.compositions import (
    draw_feature_map,
    register_with_botorch,
)
from gpbridge.randomness import fresh, standard_normal


class BasisMap(FeatureMap):
    r"""An exact basis of a kernel that upstream defines without one.

    Args:
        kernel: The kernel; its hyperparameters are read at each call.
        basis: From the kernel and ``... x n x d`` columns to ``... x n x f`` features.
        num_outputs: The number f of features.
    """

    def __init__(
        self,
        kernel: Kernel,
        basis: Callable[[Kernel, Tensor], Tensor],
        num_outputs: int,
    ) -> None:
        super().__init__()
        self.kernel, self.basis, self.num_outputs = kernel, basis, num_outputs
        # Upstream chains its own transforms to these, so None would not do.
        self.input_transform = nn.Identity()
        self.output_transform = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the features, ``... x n x f``."""
        if self.kernel.active_dims is not None:
            x = x.index_select(-1, self.kernel.active_dims)
        return self.basis(self.kernel, x)

    @property
    def batch_shape(self) -> Size:
        """The batch shape of the kernel."""
        return self.kernel.batch_shape


@draw_feature_map.register
def _draw_rbf(
    kernel: RBFKernel,
    num_inputs: int,
    num_features: int,
    generator: Generator | None = None,
) -> KernelFeatureMap:
    return fourier_map(kernel, num_inputs, num_features, generator)


@draw_feature_map.register
def _draw_matern(
    kernel: MaternKernel,
    num_inputs: int,
    num_features: int,
    generator: Generator | None = None,
) -> KernelFeatureMap:
    # The spectral measure is a Student distribution with 2 nu degrees of freedom.
    degrees = round(2 * kernel.nu)
    return fourier_map(kernel, num_inputs, num_features, generator, degrees)


@draw_feature_map.register
def _draw_linear(
    kernel: LinearKernel,
    num_inputs: int,
    num_features: int,
    generator: Generator | None = None,
) -> BasisMap:
    width = num_inputs if kernel.active_dims is None else len(kernel.active_dims)
    return BasisMap(kernel, _scaled_columns, width)


@draw_feature_map.register
def _draw_constant(
    kernel: ConstantKernel,
    num_inputs: int,
    num_features: int,
    generator: Generator | None = None,
) -> BasisMap:
    return BasisMap(kernel, _constant_column, 1)


register_with_botorch(LinearKernel)
register_with_botorch(ConstantKernel)


def fourier_map(
    kernel: Kernel,
    num_inputs: int,
    num_features: int,
    generator: Generator | None = None,
    degrees: int | None = None,
) -> KernelFeatureMap:
    r"""Fourier features with normal frequencies, or Student's.

    A Student vector is a normal one divided by the root of a chi-square variable over
    its degrees of freedom, one variable for the whole vector. One per input column
    would belong to another kernel, which is not a function of the distance.

    Args:
        kernel: A stationary kernel with lengthscales.
        num_inputs: The number d of input columns.
        num_features: An even number, a sine and a cosine per frequency.
        generator: Source of the frequencies; fresh ones if None.
        degrees: Degrees of freedom, None for normal frequencies.

    Returns:
        The map, which follows the lengthscales of the kernel.

    Raises:
        UnsupportedError: If the number of features is odd.
    """
    if num_features % 2:
        raise UnsupportedError(
            "num_features must be even, a sine and a cosine per frequency, but is "
            f"{num_features}."
        )
    input_transform = InverseLengthscaleTransform(kernel)
    if kernel.active_dims is not None:
        num_inputs = len(kernel.active_dims)
        input_transform = ChainedTransform(
            input_transform, FeatureSelector(indices=kernel.active_dims)
        )
    frequencies, batch = num_features // 2, kernel.batch_shape
    generator = fresh(generator)
    weight = _normal_rows(batch.numel() * frequencies, num_inputs, generator)
    if degrees is not None:
        chi2 = standard_normal((len(weight), degrees), generator, weight)
        chi2 = chi2.square().sum(-1)
        weight = weight * (chi2 / degrees).rsqrt()[:, None]
    lengthscale = kernel.lengthscale.detach()
    return KernelFeatureMap(
        kernel=kernel,
        weight=weight.reshape(*batch, frequencies, num_inputs).to(lengthscale),
        input_transform=input_transform,
        output_transform=SineCosineTransform(
            lengthscale.new_tensor((2 / num_features) ** 0.5)
        ),
    )


def _normal_rows(num_rows: int, width: int, generator: Generator) -> Tensor:
    """Quasi-random normals where the sequence has enough columns."""
    if width > SobolEngine.MAXDIM - 1:
        like = torch.empty((), dtype=torch.float64)
        return standard_normal((num_rows, width), generator, like)
    device = generator.device
    seed = torch.randint(2**31 - 1, (), generator=generator, device=device)
    return draw_sobol_normal_samples(
        d=width, n=num_rows, dtype=torch.float64, seed=int(seed)
    )


def _scaled_columns(kernel: LinearKernel, x: Tensor) -> Tensor:
    return x * kernel.variance.sqrt()  # batch x 1 x (1 or d)


def _constant_column(kernel: ConstantKernel, x: Tensor) -> Tensor:
    root = kernel.constant.sqrt()[..., None]  # batch x 1 x 1
    batch = torch.broadcast_shapes(root.shape[:-2], x.shape[:-2])
    return root.expand(*batch, x.shape[-2], 1)
