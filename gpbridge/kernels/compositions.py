r"""Feature maps of kernels, of their sums and of their products.

In: a kernel with finitely many features (``kernel.features(X)``), or a sum or product
of kernels, ours and gpytorch's mixed. Out: botorch feature maps with
:math:`\phi(x) \phi(x')^\top = k(x, x')`, exact where that is possible, registered with
botorch's pathwise generators. Also here: whether two inputs of a kernel are one.
Next: ``feature`` is the first kernel that uses all of it; ``random_features`` has the
stationary kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch

import torch
from botorch.sampling.pathwise.features import gen_kernel_features
from botorch.sampling.pathwise.features.generators import GenKernelFeatures
from botorch.sampling.pathwise.features.maps import FeatureMap, KernelFeatureMap
from botorch.sampling.pathwise.utils import (
    ChainedTransform,
    FeatureSelector,
    OutputscaleTransform,
    SineCosineTransform,
)
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    ProductKernel,
    ScaleKernel,
)
from torch import Generator, Size, Tensor, nn

from gpbridge.checks import check_memory
from gpbridge.randomness import fresh

PRODUCT_FEATURES = 2**18  # columns; at 1000 points in float64 this is 2 GiB


def same_inputs(x1: Tensor, x2: Tensor) -> bool:
    """Whether a kernel may reuse the features of one argument for the other."""
    # Equal values are not enough where gradients flow: the derivative in x1 of
    # phi(x1) phi(x2)' is half that of phi(x1) phi(x1)'. Both must be the same memory.
    if x1 is x2:
        return True
    if x1.shape != x2.shape or x1.requires_grad != x2.requires_grad:
        return False
    if x1.data_ptr() == x2.data_ptr() and x1.stride() == x2.stride():
        return True  # without waiting for the device, as a comparison of values does
    return not x1.requires_grad and torch.equal(x1, x2)


class ExactFeatureMap(FeatureMap):
    r"""The finite feature map of a kernel that has one, without approximation.

    Args:
        kernel: A kernel with a method ``features`` from ``... x n x d`` inputs, their
            columns already selected, to ``... x n x f`` features, prior scale included.
        num_outputs: The number f of features.
    """

    def __init__(self, kernel: Kernel, num_outputs: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.num_outputs = num_outputs
        # Upstream chains its own transforms to these, so None would not do.
        self.input_transform = nn.Identity()
        self.output_transform = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the features, ``... x n x f``."""
        if self.kernel.active_dims is not None:
            x = x.index_select(-1, self.kernel.active_dims)
        return self.kernel.features(x)

    @property
    def batch_shape(self) -> Size:
        """The batch shape of the kernel."""
        return self.kernel.batch_shape


class SumFeatureMap(FeatureMap):
    r"""Direct sum :math:`\phi = [\phi_1, \dots, \phi_k]`: the kernels add.

    Args:
        maps: The feature maps of the summands.
    """

    def __init__(self, maps: Sequence[FeatureMap]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)
        self.input_transform = nn.Identity()
        self.output_transform = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the features, ``... x n x (f_1 + ... + f_k)``."""
        blocks = [feature_map(x) for feature_map in self.maps]
        batch = torch.broadcast_shapes(*(block.shape[:-1] for block in blocks))
        return torch.cat([b.expand(*batch, b.shape[-1]) for b in blocks], dim=-1)

    @property
    def num_outputs(self) -> int:
        """The sum of the numbers of features."""
        return sum(feature_map.num_outputs for feature_map in self.maps)

    @property
    def batch_shape(self) -> Size:
        """The common batch shape."""
        return torch.broadcast_shapes(*(m.batch_shape for m in self.maps))


class ProductFeatureMap(FeatureMap):
    r"""Row-wise Kronecker product :math:`\phi_1 \otimes \phi_2`: the kernels multiply.

    Random Fourier features are not crossed but merged. The product of stationary
    kernels has the convolution of their spectral measures, so frequencies add,
    and each exact feature meets frequencies of its own:

    .. math:: k_1 k_2 = \sum_j \phi_j(x) \phi_j(x')\,
        E\bigl[\cos\bigl((w_1 + w_2)^\top (x - x')\bigr)\bigr].

    This is unbiased with as many columns as there are frequencies, where crossing all
    features squares their number.

    Args:
        exact: Maps that are crossed.
        fourier: Maps whose phases are added; each with as many frequencies as the
            exact maps have features together, or a multiple.
    """

    def __init__(
        self, exact: Sequence[FeatureMap], fourier: Sequence[KernelFeatureMap] = ()
    ) -> None:
        super().__init__()
        self.exact = nn.ModuleList(exact)
        self.fourier = nn.ModuleList(fourier)
        self.input_transform = nn.Identity()
        self.output_transform = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the features, ``... x n x f``."""
        product = x.new_ones(*x.shape[:-1], 1)
        for feature_map in self.exact:
            block = feature_map(x)
            product = (product[..., :, None] * block[..., None, :]).flatten(-2)
        if not self.fourier:
            return product
        phase, scale = 0, 1
        for feature_map in self.fourier:
            phase = phase + feature_map.forward(feature_map.input_transform(x))
            scale = scale * amplitude(feature_map)
        repeats = phase.shape[-1] // product.shape[-1]
        product = product.repeat_interleave(repeats, -1) * scale / repeats**0.5
        return torch.cat([product * phase.sin(), product * phase.cos()], dim=-1)

    @property
    def num_outputs(self) -> int:
        """The number of columns."""
        if self.fourier:
            return 2 * self.fourier[0].weight.shape[-2]
        return math.prod(feature_map.num_outputs for feature_map in self.exact)

    @property
    def batch_shape(self) -> Size:
        """The common batch shape."""
        maps = [*self.exact, *self.fourier]
        return torch.broadcast_shapes(*(m.batch_shape for m in maps))


@singledispatch
def draw_feature_map(
    kernel: Kernel,
    num_inputs: int,
    num_features: int,
    generator: Generator | None = None,
) -> FeatureMap:
    r"""Features with :math:`\phi(x) \phi(x')^\top \approx k(x, x')`, by kernel type.

    Exact for kernels with finitely many features, random Fourier features for
    stationary ones (:mod:`~gpbridge.kernels.random_features`), and recursive through
    scales, sums and products. As botorch's ``gen_kernel_features``, with an explicit
    source of randomness; a kernel that is registered only there draws as it does there.

    For features of your own, :class:`~gpbridge.kernels.FeatureKernel` is a kernel with
    all of this. To register another type of kernel, give it a method ``features`` and
    return an :class:`ExactFeatureMap`, as below; or return any botorch ``FeatureMap``
    with the attributes ``num_outputs`` (the number f), ``batch_shape``,
    ``input_transform`` and ``output_transform`` (``Identity`` and not None, since
    scales chain theirs to them), whose ``forward`` selects the ``active_dims``.

    What is drawn does not depend on the hyperparameters: the map reads them from the
    kernel at each call, so that the same base draws serve all their values.

    Args:
        kernel: The kernel; the map follows its hyperparameters.
        num_inputs: The number d of input columns.
        num_features: Fourier features of each part that needs them, an even number.
        generator: Source of the frequencies. Without one, they are fresh on each call.

    Returns:
        A map from ``... x n x d`` to ``... x n x f``.

    Raises:
        NotImplementedError: If the kernel has no feature map; says which ones have.

    Example:
        >>> class Squares(Kernel):
        ...     def features(self, x):
        ...         return x**2
        ...     def forward(self, x1, x2, **options):
        ...         return self.features(x1) @ self.features(x2).mT
        >>> @draw_feature_map.register
        ... def _(kernel: Squares, num_inputs, num_features, generator=None):
        ...     return ExactFeatureMap(kernel, num_inputs)
        >>> draw_feature_map(ScaleKernel(Squares()), 3, 0)(torch.ones(5, 3)).shape
        torch.Size([5, 3])
    """
    if GenKernelFeatures.dispatch(type(kernel)) is None:
        known = {
            *draw_feature_map.registry,
            *(kind for (kind,) in GenKernelFeatures.funcs),
        }
        names = sorted(kind.__name__ for kind in known - {object, Kernel})
        raise NotImplementedError(
            f"{type(kernel).__name__} has no feature map; {', '.join(names)} have one. "
            "Register yours: @draw_feature_map.register on a function of (kernel, "
            "num_inputs, num_features, generator) that returns an ExactFeatureMap (see "
            "the example of draw_feature_map), or take a FeatureKernel."
        )
    return gen_kernel_features(kernel, num_inputs=num_inputs, num_outputs=num_features)


@draw_feature_map.register
def _draw_scaled(
    kernel: ScaleKernel, num_inputs: int, num_features: int, generator=None
) -> FeatureMap:
    active_dims, base = kernel.active_dims, kernel.base_kernel
    # Upstream copies the columns of the base kernel to the scale and selects them once.
    inherited = active_dims is not None and base.active_dims is not None
    if active_dims is not None and not inherited:
        num_inputs = len(active_dims)
    feature_map = draw_feature_map(base, num_inputs, num_features, generator)
    if active_dims is not None and not inherited:
        feature_map.input_transform = ChainedTransform(
            feature_map.input_transform, FeatureSelector(indices=active_dims)
        )
    feature_map.output_transform = ChainedTransform(
        OutputscaleTransform(kernel), feature_map.output_transform
    )
    return feature_map


@draw_feature_map.register
def _draw_sum(
    kernel: AdditiveKernel, num_inputs: int, num_features: int, generator=None
) -> SumFeatureMap:
    parts = kernel.kernels
    return SumFeatureMap(
        [draw_feature_map(part, num_inputs, num_features, generator) for part in parts]
    )


@draw_feature_map.register
def _draw_product(
    kernel: ProductKernel, num_inputs: int, num_features: int, generator=None
) -> ProductFeatureMap:
    generator = fresh(generator)
    exact, stationary, columns = [], [], 1
    for part in kernel.kernels:
        feature_map = draw_feature_map(part, num_inputs, num_features, generator)
        if is_fourier(feature_map):
            stationary.append(part)
        else:
            exact.append(feature_map)
            columns *= feature_map.num_outputs
    frequencies = columns * max(1, num_features // (2 * columns))
    _check_columns(2 * frequencies if stationary else columns)
    fourier = []
    for part in stationary:
        feature_map = draw_feature_map(part, num_inputs, 2 * frequencies, generator)
        # Quasi-random points of the same index share their leading digits, in every
        # scrambling. Paired as they come, the frequencies of two factors would agree in
        # sign for all pairs or for none; in random order they are independent.
        order = torch.randperm(
            frequencies, generator=generator, device=generator.device
        )
        weight = feature_map.weight
        feature_map.weight = weight[..., order.to(weight.device), :]
        fourier.append(feature_map)
    return ProductFeatureMap(exact, fourier)


def register_with_botorch(kernel_type: type[Kernel]) -> None:
    """Let botorch's pathwise package find the :func:`draw_feature_map` of a kernel.

    It takes no generator: all that it draws comes from torch's global one, here too.
    """
    draw = draw_feature_map.dispatch(kernel_type)

    def generate(kernel: Kernel, *, num_inputs: int, num_outputs: int) -> FeatureMap:
        return draw(kernel, num_inputs, num_outputs, torch.default_generator)

    GenKernelFeatures.register(kernel_type)(generate)


for _composition in (AdditiveKernel, ProductKernel):
    if GenKernelFeatures.dispatch(_composition) is None:  # upstream's, if it has one
        register_with_botorch(_composition)


def amplitude(feature_map: KernelFeatureMap) -> Tensor:
    """Prior standard deviation of a Fourier map, ``batch x 1 x 1``."""
    # At phase zero the cosines are one and the sines vanish.
    zeros = feature_map.weight.new_zeros(1, feature_map.weight.shape[-2])
    return feature_map.output_transform(zeros).norm(dim=-1, keepdim=True)


def is_fourier(feature_map: FeatureMap) -> bool:
    """Whether the features are sines and cosines, of one frequency per pair."""
    if not isinstance(feature_map, KernelFeatureMap) or feature_map.bias is not None:
        return False
    return isinstance(sine_cosine(feature_map), SineCosineTransform)


def sine_cosine(feature_map: KernelFeatureMap) -> nn.Module | None:
    """The innermost transform of the outputs, sines and cosines for Fourier maps."""
    innermost = feature_map.output_transform
    while isinstance(innermost, ChainedTransform):
        innermost = innermost.transforms[-1]
    return innermost


def _check_columns(columns: int) -> None:
    check_memory(
        f"The feature map of a product of kernels, {columns} columns at 1000 points,",
        8e3 * columns,
        8e3 * PRODUCT_FEATURES,
        "Multiply kernels with fewer features, or draw from the posterior at fixed "
        "points, posterior(X).rsample().",
    )
