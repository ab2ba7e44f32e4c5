r"""The covariance matrix :math:`H = K + \Sigma` of noisy observations, never held.

In: a kernel, inputs and noise variances. Out: a linear operator whose products evaluate
the kernel in tiles, and products with cross-covariances. Next: ``lazy_covariance``
makes such an operator of GPyTorch's own, and ``solvers`` solve with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gpytorch.kernels import Kernel
from linear_operator import LinearOperator
from torch import Tensor

from gpbridge import kernel_tiles, tile_products
from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_finite,
    check_inputs,
    check_tensor,
)
from gpbridge.partial_products import (
    Index,
    column_products,
    dense_columns,
    diagonal,
    exact_products,
    full_precision,
    has_cheap_columns,
    precision,
    principal_block,
    row_products,
    smallest_eigenvalue,
)

COMPUTE_DTYPES = (None, torch.float32, torch.float64)
_AMPLITUDE = 1e4  # in noise variances, up to which float32 tiles lose no pass


class _Held(NamedTuple):
    # LinearOperator.to(...) calls .to on whatever has one, which would convert the
    # caller's kernel in place.
    kernel: Kernel


class KernelMatrixOperator(LinearOperator):
    r"""The matrix :math:`H = k(X, X) + \mathrm{diag}(\sigma^2)` of any kernel.

    Use it where H does not fit into memory: a product with k columns evaluates
    :math:`n^2/2` kernel entries (each tile serves twice) and holds n k numbers and one
    tile. Kernels with f features, fewer than points, cost n f k instead, and their n f
    numbers are held up to 256 MiB; beyond, they are evaluated twice per product.
    Products are accumulated in float64. Gradients reach the inputs and the noise, by
    tiles that are evaluated again in the backward pass; kernel hyperparameters are
    constants here: :func:`~gpbridge.kernel_gradients.quadratic_form` has their
    derivatives.

    Args:
        X: Inputs ``batch_shape x n x d``.
        noise: Noise variances, ``batch_shape x n`` or one number; zero is allowed.
        kernel: One output per input, no batch shape; its hyperparameters are read at
            each product. What it depends on must be parameters or buffers.
        compute_dtype: Of the tiles; ``torch.float32`` is two to three times as fast,
            with an error of about 1e-6 outputscale per entry. Then
            :func:`~gpbridge.partial_products.exact_products` still are in X's dtype.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> H = KernelMatrixOperator(torch.zeros(2, 1), 0.5, kernel=RBFKernel())
        >>> H.to_dense()
        tensor([[1.5000, 1.0000],
                [1.0000, 1.5000]])
    """

    def __init__(
        self,
        X: Tensor,
        noise: Tensor | float,
        *,
        kernel: Kernel | _Held,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        held = kernel if isinstance(kernel, _Held) else _Held(kernel)
        noise = torch.as_tensor(noise, dtype=X.dtype, device=X.device)
        if noise.dim() == 0:
            noise = noise.expand(X.shape[:-1])
        _check(held.kernel, X, noise, compute_dtype)
        batch = torch.broadcast_shapes(X.shape[:-2], noise.shape[:-1])
        if X.shape[:-2] != batch:
            X = X.expand(*batch, *X.shape[-2:])
        if noise.shape[:-1] != batch:
            noise = noise.expand(*batch, noise.shape[-1])
        super().__init__(X, noise, kernel=held, compute_dtype=compute_dtype)
        self.X, self.noise = X, noise
        self.kernel, self.compute_dtype = held.kernel, compute_dtype
        self._prepared: dict[torch.dtype | None, kernel_tiles.Tiles] = {}
        self._state: Tensor | None = None  # of the kernel that was prepared

    def _size(self):
        return torch.Size((*self.X.shape[:-1], self.X.shape[-2]))

    def _transpose_nonbatch(self):
        return self

    def _tiles(self, dtype: torch.dtype | None) -> kernel_tiles.Tiles:
        # One look at the hyperparameters per product, all of them at once.
        state = kernel_tiles.state(self.kernel)
        if self._state is None or not torch.equal(state, self._state):
            self._state, self._prepared = state.clone(), {}
        if dtype not in self._prepared:
            self._prepared[dtype] = kernel_tiles.prepare(
                self.kernel,
                self.X.detach(),
                dtype=dtype,
                accuracy=kernel_tiles.distance_accuracy(self.kernel, self.noise),
            )
        return self._prepared[dtype]

    def _matmul(self, rhs):
        if rhs.dim() == 1:
            return self._matmul(rhs[:, None])[:, 0]
        batch = torch.broadcast_shapes(self.batch_shape, rhs.shape[:-2])
        if batch:
            each = self.expand(*batch, *self.matrix_shape)
            parts = zip(
                each.X.reshape(-1, *self.X.shape[-2:]),
                each.noise.reshape(-1, self.noise.shape[-1]),
                rhs.expand(*batch, *rhs.shape[-2:]).reshape(-1, *rhs.shape[-2:]),
                strict=True,
            )
            results = [self._alone(x, noise)._matmul(v) for x, noise, v in parts]
            if not results:
                return rhs.new_zeros(*batch, *rhs.shape[-2:])
            return torch.stack(results).reshape(*batch, *rhs.shape[-2:])
        asked = (self.X, self.noise, rhs)
        if torch.is_grad_enabled() and any(t.requires_grad for t in asked):
            return self._differentiable_product(rhs)
        return self._product(rhs, self.compute_dtype)

    def _alone(self, X: Tensor, noise: Tensor) -> KernelMatrixOperator:
        return self.__class__(X, noise, **self._kwargs)

    def _product(self, rhs: Tensor, dtype: torch.dtype | None) -> Tensor:
        product = tile_products.multiply_all(self._tiles(dtype), rhs)
        return (product + self.noise[:, None] * rhs).to(rhs.dtype)

    def _differentiable_product(self, rhs: Tensor) -> Tensor:
        step = tile_products.points_per_tile(self.X)
        parts = list(zip(self.X.split(step), rhs.split(step), strict=True))
        products = [
            sum(_ForgetfulTile.apply(self.kernel, x, z, v) for z, v in parts)
            for x, _ in parts
        ]
        return torch.cat(products) + self.noise[:, None] * rhs

    def _diagonal(self):
        return self.kernel(self.X, diag=True).to(self.X) + self.noise

    def to_dense(self):
        """Evaluate the matrix, by tiles where no gradient is asked for."""
        asked = torch.is_grad_enabled() and (
            self.X.requires_grad or self.noise.requires_grad
        )
        if asked or self.batch_shape:
            return self.kernel(self.X).to_dense() + torch.diag_embed(self.noise)
        return dense_columns(self, slice(0, len(self.X)))

    def _expand_batch(self, batch_shape):
        X = self.X.expand(*batch_shape, *self.X.shape[-2:])
        return self._alone(X, self.noise.expand(*batch_shape, self.noise.shape[-1]))


def covariance_operator(
    kernel: Kernel,
    X: Tensor,
    noise: Tensor | float,
    compute_dtype: torch.dtype | None = None,
) -> KernelMatrixOperator:
    """:class:`KernelMatrixOperator` of a kernel, in the usual order of arguments."""
    return KernelMatrixOperator(X, noise, kernel=kernel, compute_dtype=compute_dtype)


def solving_operator(
    kernel: Kernel,
    X: Tensor,
    noise: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> KernelMatrixOperator:
    r"""The covariance matrix in the precision that an iterative solver needs.

    Tiles in float32 are two to three times as fast, and solvers confirm every residual
    in the full precision. Where the amplitude of the kernel is above some 500 noise
    variances, distances are computed in float64, and above 10,000 all is: roundings
    would reach the smallest eigenvalues and slow the iteration down.

    Args:
        kernel: One output per input, no batch shape.
        X: Inputs ``n x d``, float64.
        noise: Noise variances ``n``.
        compute_dtype: Of the tiles; default float32 for kernels that have a fast form
            and an amplitude below 10,000 noise variances, else that of X.

    Returns:
        The operator.
    """
    dtype = working_dtype(kernel, noise, compute_dtype)
    return covariance_operator(kernel, X, noise, dtype)


@torch.no_grad()
def working_dtype(
    kernel: Kernel, noise: Tensor, compute_dtype: torch.dtype | None = None
) -> torch.dtype | None:
    """The rule of :func:`solving_operator`; None for the dtype of the inputs."""
    found = kernel_tiles.stationary_part(kernel)
    if compute_dtype is None and found is not None and noise.numel():
        if float(found[1]) <= _AMPLITUDE * noise.min().item():
            return torch.float32
    return compute_dtype


def cross_products(
    kernel: Kernel,
    X_test: Tensor,
    X: Tensor,
    V: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Product :math:`k(X_*, X) V` with a cross-covariance, without gradients.

    Args:
        kernel: One output per input, no batch shape.
        X_test: Test points ``t x d``.
        X: Points ``n x d``.
        V: Columns ``n x k``.
        compute_dtype: Of the tiles; default that of the points.

    Returns:
        The product ``t x k`` in the dtype of V; memory (t + n) k and one tile.
    """
    check_inputs(X_test, "X_test", X.shape[-1])
    tiles = kernel_tiles.prepare(kernel, X_test.detach(), X.detach(), compute_dtype)
    return tile_products.multiply_rows(tiles, V.detach()).to(V.dtype)


class _ForgetfulTile(torch.autograd.Function):
    """Product of a tile with columns, which is evaluated again in the backward pass."""

    # Not a checkpoint, whose hooks torch.func refuses inside a kernel.
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, x: Tensor, z: Tensor, v: Tensor) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(x, z, v)
        return kernel(x, z).to_dense() @ v

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        # Views, since on the diagonal both sets of points are one tensor.
        args = [t.view_as(t) if again else t.detach() for t in ctx.saved_tensors]
        with torch.enable_grad():
            if not again:
                args = [t.requires_grad_() for t in args]
            x, z, v = args
            product = ctx.kernel(x, z).to_dense() @ v
        wanted = [t for t in args if t.requires_grad]
        found = iter(
            torch.autograd.grad(
                product, wanted, gradient, create_graph=again, allow_unused=True
            )
        )
        return None, *(next(found) if t.requires_grad else None for t in args)


def _check(kernel: Kernel, X: Tensor, noise: Tensor, dtype: object) -> None:
    check_tensor(X=X)
    check_finite(X=X)
    if X.dim() < 2:
        raise ShapeError(
            f"X must be ``... x n x d``, but has shape {tuple(X.shape)}. "
            "For one input dimension try X[:, None]."
        )
    if noise.shape[-1] != X.shape[-2]:
        raise ShapeError(
            f"noise must be one number or one variance per row of X, but its shape is "
            f"{tuple(noise.shape)} and that of X {tuple(X.shape)}."
        )
    if not bool((noise >= 0).all()):
        raise ValueError(
            f"noise is a variance and must be at least zero, but is as low as "
            f"{noise.min().item()}."
        )
    check_choice("compute_dtype", dtype, COMPUTE_DTYPES)
    if kernel.batch_shape:
        raise ShapeError(
            f"kernel must have no batch shape, but has {tuple(kernel.batch_shape)}. "
            "Build one operator for each member of the batch."
        )
    point = X.detach().reshape(-1, X.shape[-1])[:1]
    outputs = kernel.num_outputs_per_input(point, point)
    if outputs != 1:
        raise ShapeError(
            f"kernel must have one output per input, but has {outputs}. Pass a linear "
            "operator of the joint covariance instead; solvers take any."
        )


# --- what block-coordinate solvers ask for


@row_products.register
def _(operator: KernelMatrixOperator, index: Index, V: Tensor) -> Tensor:
    tiles = operator._tiles(operator.compute_dtype)
    product = tile_products.multiply_rows(tiles, V, index)
    return (product + operator.noise.detach()[index, None] * V[index]).to(V.dtype)


@column_products.register
def _(operator: KernelMatrixOperator, index: Index, U: Tensor) -> Tensor:
    tiles = operator._tiles(operator.compute_dtype)
    product = tile_products.multiply_columns(tiles, U, index)
    product[index] += operator.noise.detach()[index, None] * U
    return product.to(U.dtype)


@principal_block.register
def _(operator: KernelMatrixOperator, index: Index) -> Tensor:
    # In the full dtype: blocks are factorised.
    block = tile_products.dense_block(operator._tiles(None), index)
    block.diagonal().add_(operator.noise.detach()[index])
    return block


@dense_columns.register
def _(operator: KernelMatrixOperator, index: Index) -> Tensor:
    tiles = operator._tiles(operator.compute_dtype)
    columns = tile_products.dense_rows(tiles, index).to(operator.dtype)  # b x n
    noise = operator.noise.detach()
    rows = torch.arange(len(noise), device=noise.device)[index]
    columns[torch.arange(len(rows), device=rows.device), rows] += noise[index]
    return columns.mT


@has_cheap_columns.register
def _(operator: KernelMatrixOperator) -> bool:
    return True


@smallest_eigenvalue.register
def _(operator: KernelMatrixOperator) -> float:
    return operator.noise.min().item() if operator.noise.numel() else 0.0


@diagonal.register
def _(operator: KernelMatrixOperator) -> Tensor:
    with torch.no_grad():
        return operator._diagonal()


@exact_products.register
def _(operator: KernelMatrixOperator, V: Tensor) -> Tensor:
    with torch.no_grad():
        if operator.batch_shape:
            return full_precision(operator)._matmul(V)
        return operator._product(V, None)


@full_precision.register
def _(operator: KernelMatrixOperator) -> KernelMatrixOperator:
    if operator.compute_dtype in (None, operator.dtype):
        return operator
    return KernelMatrixOperator(operator.X, operator.noise, kernel=operator.kernel)


@precision.register
def _(operator: KernelMatrixOperator) -> float:
    return torch.finfo(operator.compute_dtype or operator.dtype).eps
