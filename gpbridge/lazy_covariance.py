"""GPyTorch's lazy covariance, with products.

In: ``kernel(X)``, alone or with noise on its diagonal. Out: a
:class:`~gpbridge.kernel_operator.KernelMatrixOperator`. Next: ``solvers``, which take
what upstream's models hold.
"""

from __future__ import annotations

import copy

from gpytorch.kernels import GridKernel, InducingPointKernel, Kernel, ScaleKernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from linear_operator import LinearOperator
from linear_operator.operators import DiagLinearOperator, SumLinearOperator
from torch import Tensor, equal

from gpbridge.kernel_operator import KernelMatrixOperator


def tiled(operator: LinearOperator | Tensor) -> LinearOperator | Tensor:
    """GPyTorch's lazy covariance as an operator that has products.

    Upstream's ``kernel(X)`` is a promise: without its checkpointing setting it has no
    products, and a solver would have to evaluate it whole. Here ``kernel(X)``, alone or
    in a sum with diagonals (``kernel(X).add_diagonal(noise)``,
    ``likelihood(mvn).lazy_covariance_matrix``), becomes a
    :class:`~gpbridge.kernel_operator.KernelMatrixOperator` with that noise. Constants:
    no gradient is carried.

    Args:
        operator: Any operator or tensor, ``... x n x n``.

    Returns:
        The operator in tiles, if the kernel has one set of inputs ``n x d``, one output
        per input, no batch shape and no structure of its own (inducing points, grids);
        evaluated, if lazy kernels occur in it in another way; else as it came.
    """
    lazy, noise = None, 0.0
    for part in _summands(operator):
        if isinstance(part, DiagLinearOperator):
            noise = noise + part._diagonal().detach()
        elif lazy is None and isinstance(part, LazyEvaluatedKernelTensor):
            lazy = part
        else:
            lazy = None
            break
    if lazy is not None and _tileable(lazy, noise):
        X = lazy.x1.detach()
        return KernelMatrixOperator(X, noise, kernel=_of_selected(lazy.kernel))
    return operator.evaluate_kernel() if _holds_lazy_kernels(operator) else operator


def _summands(operator: LinearOperator | Tensor) -> list[LinearOperator | Tensor]:
    if not isinstance(operator, SumLinearOperator):
        return [operator]
    return [part for term in operator.linear_ops for part in _summands(term)]


def _tileable(lazy: LazyEvaluatedKernelTensor, noise: Tensor | float) -> bool:
    a, b, kernel = lazy.x1, lazy.x2, lazy.kernel
    if lazy.last_dim_is_batch or lazy.params or a.dim() != 2 or kernel.batch_shape:
        return False
    # Their matrices cost less as upstream evaluates them, or exist as a whole only.
    if any(isinstance(k, GridKernel | InducingPointKernel) for k in kernel.modules()):
        return False
    if isinstance(noise, Tensor) and (noise.dim() > 1 or bool((noise < 0).any())):
        return False
    same = a is b or (a.shape == b.shape and equal(a, b))
    return same and kernel.num_outputs_per_input(a, b) == 1


def _of_selected(kernel: Kernel) -> Kernel:
    """The kernel as a function of columns that upstream has already selected."""
    if kernel.active_dims is None:
        return kernel
    kernel = copy.deepcopy(kernel)
    kernel.active_dims, inner = None, kernel
    while isinstance(inner, ScaleKernel):  # which holds the columns twice
        inner = inner.base_kernel
        inner.active_dims = None
    return kernel


def _holds_lazy_kernels(operator: object) -> bool:
    if isinstance(operator, LazyEvaluatedKernelTensor):
        return True
    parts = operator._args if isinstance(operator, LinearOperator) else ()
    return any(_holds_lazy_kernels(part) for part in parts)
