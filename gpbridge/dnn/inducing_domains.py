r"""Where the inducing values of a layer live: in the layer's inputs, or elsewhere.

A sparse GP needs three covariances: of the data, of the inducing values u, and of both.
For most kernels u = f(Z) with Z among the inputs, and all three are the kernel's. For
an invariant or convolutional kernel u is the value of the base function at a patch.

Whoever registers the three rules below for a kernel can put it into a deep GP. In: a
kernel and points. Out: covariances, first points. Next: ``deep_gp_layer``.
"""

from __future__ import annotations

from functools import singledispatch

from gpytorch.kernels import Kernel, ScaleKernel
from torch import Generator, Tensor

from gpbridge.dnn.centroids import centroids


@singledispatch
def inducing_covariance(kernel: Kernel, Z: Tensor) -> Tensor:
    """Covariance of the inducing values, ``(h x) M x M``."""
    return kernel(Z).to_dense()


@singledispatch
def cross_covariance(kernel: Kernel, Z: Tensor, X: Tensor) -> Tensor:
    """Covariance of inducing values and the function at rows, ``(h x) M x n``."""
    return kernel(Z, X).to_dense()


@singledispatch
def initial_inducing_points(
    kernel: Kernel, X: Tensor, num_points: int, generator: Generator
) -> Tensor:
    """First inducing points ``M x e`` of a kernel, given its inputs ``n x d``."""
    return centroids(X, num_points, generator)


def has_own_domain(kernel: Kernel) -> bool:
    """Whether inducing points of a kernel are other things than its inputs."""
    while isinstance(kernel, ScaleKernel):
        kernel = kernel.base_kernel
    rule = inducing_covariance.dispatch(type(kernel))
    return rule is not inducing_covariance.dispatch(Kernel)


# A variance outside scales the inducing values, too.


@inducing_covariance.register(ScaleKernel)
def _(kernel, Z):
    if not has_own_domain(kernel):
        return kernel(Z).to_dense()
    return kernel.outputscale[..., None, None] * inducing_covariance(
        kernel.base_kernel, Z
    )


@cross_covariance.register(ScaleKernel)
def _(kernel, Z, X):
    if not has_own_domain(kernel):
        return kernel(Z, X).to_dense()
    return kernel.outputscale[..., None, None] * cross_covariance(
        kernel.base_kernel, Z, X
    )


@initial_inducing_points.register(ScaleKernel)
def _(kernel, X, num_points, generator):
    return initial_inducing_points(kernel.base_kernel, X, num_points, generator)
