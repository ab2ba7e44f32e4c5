r"""Which kernels have finitely many features, :math:`k = \phi(x) \phi(x')^\top`.

In: a kernel, composed of others or not. Out: whether its feature map is exact, as that
of a network is and that of random Fourier features of a stationary kernel is not, and
whether it depends on distances only. Next: ``invariant`` averages features, or
differences, where that is exact.
"""

from __future__ import annotations

from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    ProductKernel,
    RBFKernel,
    RFFKernel,
    RQKernel,
    ScaleKernel,
)
from torch import Tensor

from gpbridge.augmentation.base import Augmentation
from gpbridge.kernels.compositions import draw_feature_map, register_with_botorch
from gpbridge.kernels.deep import DeepKernel
from gpbridge.kernels.random_features import BasisMap

_FINITE = (LinearKernel, ConstantKernel, RFFKernel)
_ISOTROPIC = (RBFKernel, MaternKernel, RQKernel)


def has_exact_features(kernel: Kernel) -> bool:
    """Whether a kernel has finitely many features of one row per point.

    A kernel of the user's has if it has a method ``features``, and then must be
    registered with :func:`~gpbridge.kernels.draw_feature_map`.
    """
    averaged = isinstance(getattr(kernel, "augmentation", None), Augmentation)
    if averaged or isinstance(kernel, ScaleKernel | DeepKernel):
        return has_exact_features(kernel.base_kernel)
    if isinstance(kernel, AdditiveKernel | ProductKernel):
        return all(has_exact_features(part) for part in kernel.kernels)
    if type(kernel) in _FINITE:
        return True
    registered = draw_feature_map.dispatch(type(kernel)) is not _UNREGISTERED
    return callable(getattr(kernel, "features", None)) and registered


def is_isotropic(kernel: Kernel) -> bool:
    """Whether a kernel is known to be a function of the distance of two inputs."""
    if kernel.active_dims is not None:
        return False
    if isinstance(kernel, ScaleKernel):
        return is_isotropic(kernel.base_kernel)
    if isinstance(kernel, AdditiveKernel | ProductKernel):
        return all(is_isotropic(part) for part in kernel.kernels)
    return type(kernel) in _ISOTROPIC and kernel.ard_num_dims in (None, 1)


_UNREGISTERED = draw_feature_map.dispatch(object)


def _fourier_columns(kernel: RFFKernel, x: Tensor) -> Tensor:
    return kernel._featurize(x, normalize=True)


@draw_feature_map.register
def _own_frequencies(
    kernel: RFFKernel, num_inputs: int, num_features: int, generator=None
) -> BasisMap:
    # An RBF kernel by inheritance, but its frequencies are drawn already.
    if not hasattr(kernel, "randn_weights"):
        raise ValueError(
            "The frequencies of an RFFKernel without num_dims are drawn when it first "
            "meets inputs. Pass num_dims to have them from the start."
        )
    return BasisMap(kernel, _fourier_columns, 2 * kernel.num_samples)


register_with_botorch(RFFKernel)
