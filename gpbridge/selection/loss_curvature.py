r"""Derivatives of a training loss in its parameters, as products that are never formed.

In: a loss as a function of (params, hparams), or of (params, hparams, batch) with
re-iterable batches. Out: its value and gradient, the operator of its Hessian or of its
Gauss-Newton matrix, and the product with the mixed derivative in the hyperparameters.
Memory is that of one batch. Next: ``hypergradient`` solves with the operator.

References:
    Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994.
    Schraudolph, Fast curvature matrix-vector products for second-order gradient
    descent, Neural Computation 2002, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from linear_operator import LinearOperator
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from gpbridge.checks import ShapeError, check_choice
from gpbridge.types import Params

Loss = Callable[..., Tensor]
"""``loss(params, hparams)`` or ``loss(params, hparams, batch)``, a scalar."""

_COLUMNS = 64  # products that are computed at a time


@dataclass(frozen=True)
class CompositeLoss:
    r"""A loss of a model's outputs, so that its Gauss-Newton matrix is defined.

    .. math:: L(w, \lambda) = \ell(f(w, \lambda), w, \lambda)

    The Gauss-Newton matrix :math:`J^\top \nabla_f^2 \ell \, J + \nabla_w^2 \ell`, with
    the second derivative in w at fixed outputs, leaves out the curvature of f. It is
    positive semi-definite where :math:`\ell` is convex in f and in w, as squared errors
    and cross-entropies with weight decay are.

    Args:
        outputs: f, a function of (params, hparams) or (params, hparams, batch).
        loss: :math:`\ell`, a function of (outputs, params, hparams[, batch]).
    """

    outputs: Callable[..., Tensor]
    loss: Callable[..., Tensor]

    def __call__(self, params: Params, hparams: Params, *batch: Any) -> Tensor:
        """The loss, a scalar."""
        return self.loss(self.outputs(params, hparams, *batch), params, hparams, *batch)


class CurvatureOperator(LinearOperator):
    r"""The Hessian or Gauss-Newton matrix of a loss, plus damping, ``p x p``.

    A Hessian-vector product is the forward derivative of the gradient; it costs about
    two gradients per column and batch.

    Args:
        theta: The parameters as one vector ``p``, where the matrix is taken.
        damping: A number that is added to the diagonal.
        like: Parameters by name, whose shapes and order say how theta is split.
        hparams: The hyperparameters.
        loss: The training loss.
        curvature: ``"hessian"`` or ``"ggn"``.
        batches: Re-iterable batches, or None for a loss without.
    """

    def __init__(
        self,
        theta: Tensor,
        damping: Tensor,
        *,
        like: Params,
        hparams: Params,
        loss: Loss,
        curvature: str = "hessian",
        batches: Iterable[Any] | None = None,
    ) -> None:
        check_choice("curvature", curvature, ("hessian", "ggn"))
        if curvature == "ggn" and not isinstance(loss, CompositeLoss):
            raise TypeError(
                "curvature='ggn' needs to know the outputs of the model: pass "
                "train_loss=CompositeLoss(outputs, loss), not "
                f"{type(loss).__name__}."
            )
        super().__init__(
            theta,
            damping,
            like=like,
            hparams=hparams,
            loss=loss,
            curvature=curvature,
            batches=batches,
        )
        self.theta, self.damping = theta, damping
        self.like, self.hparams, self.loss = like, hparams, loss
        self.curvature, self.batches = curvature, batches

    def _size(self):
        return torch.Size((self.theta.numel(), self.theta.numel()))

    def _transpose_nonbatch(self):
        return self

    def _matmul(self, rhs):
        if rhs.dim() == 1:
            return self._product(rhs)
        columns = rhs.to(self.theta).mT
        if len(columns) == 1:
            return self._product(columns[0])[:, None]
        product = vmap(self._product, chunk_size=_COLUMNS)
        return product(columns).mT

    def _product(self, v: Tensor) -> Tensor:
        single = self._hessian if self.curvature == "hessian" else self._ggn
        direction = unflatten(v, self.like)
        (product,) = mean_over(
            self.batches, lambda *batch: (flatten(single(direction, batch)),)
        )
        return product + self.damping * v

    def _hessian(self, v: Params, batch: tuple[Any, ...]) -> Params:
        params = unflatten(self.theta, self.like)
        return push_forward(
            grad(lambda w: self.loss(w, self.hparams, *batch)), params, v
        )

    def _ggn(self, v: Params, batch: tuple[Any, ...]) -> Params:
        params, hparams, own = (
            unflatten(self.theta, self.like),
            self.hparams,
            self.loss.loss,
        )
        outputs, pull = vjp(lambda w: self.loss.outputs(w, hparams, *batch), params)
        moved = push_forward(lambda w: self.loss.outputs(w, hparams, *batch), params, v)
        weighted = push_forward(
            grad(lambda f: own(f, params, hparams, *batch)), outputs, moved
        )
        explicit = push_forward(
            grad(lambda w: own(outputs, w, hparams, *batch)), params, v
        )
        seen = pull(weighted)[0]
        return {name: seen[name] + explicit[name] for name in seen}


def push_forward(function: Callable, primal: Any, tangent: Any) -> Any:
    """Directional derivative; by two backward passes where there is no forward mode."""
    try:
        return jvp(function, (primal,), (tangent,))[1]
    except NotImplementedError:
        value, pull = vjp(function, primal)
        zeros = torch.utils._pytree.tree_map(torch.zeros_like, value)
        return vjp(lambda u: pull(u)[0], zeros)[1](tangent)[0]


def value_and_gradient(
    loss: Loss,
    params: Params,
    hparams: Params,
    batches: Iterable[Any] | None = None,
    name: str = "train_loss",
    wrt_hparams: bool = False,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Value and gradients; None where the loss does not read a tensor.

    Args:
        loss: The loss.
        params: Where to evaluate it.
        hparams: The hyperparameters.
        batches: Re-iterable batches, or None.
        name: Of the loss, for messages.
        wrt_hparams: Whether to differentiate in the hyperparameters too.

    Returns:
        The loss, its gradients in the parameters, and those in the hyperparameters.
    """
    w = {k: p.detach().requires_grad_() for k, p in params.items()}
    h = {k: p.detach().requires_grad_(wrt_hparams) for k, p in hparams.items()}
    wanted = [*w.values(), *(h.values() if wrt_hparams else ())]

    def one(*batch: Any) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            value = evaluated(loss, w, h, batch, name)
            if not value.requires_grad:
                return (value, *[None] * len(wanted))
            found = torch.autograd.grad(value, wanted, allow_unused=True)
        return (value.detach(), *found)

    value, *found = mean_over(batches, one, name)
    return value, found[: len(w)], found[len(w) :]


def mixed_product(
    loss: Loss,
    params: Params,
    hparams: Params,
    direction: Params,
    batches: Iterable[Any] | None = None,
) -> list[Tensor | None]:
    r"""Gradient in the hyperparameters of :math:`p^\top \nabla_w L(w, \lambda)`.

    None for a hyperparameter that the gradient in w does not depend on.
    """

    def one(*batch: Any) -> tuple[Tensor | None, ...]:
        w = {k: p.detach().requires_grad_() for k, p in params.items()}
        h = {k: p.detach().requires_grad_() for k, p in hparams.items()}
        with torch.enable_grad():
            value = loss(w, h, *batch)
            slopes = torch.autograd.grad(value, list(w.values()), create_graph=True)
            pairs = zip(slopes, direction.values(), strict=True)
            product = sum((g * p).sum() for g, p in pairs)
            if not product.requires_grad:
                return (None,) * len(h)
            return torch.autograd.grad(product, list(h.values()), allow_unused=True)

    return mean_over(batches, one)


def evaluated(
    loss: Loss, params: Params, hparams: Params, batch: Sequence[Any], name: str
) -> Tensor:
    """The loss, checked to be a scalar; a wrong name is explained."""
    try:
        value = loss(params, hparams, *batch)
    except KeyError as error:
        raise ValueError(
            f"{name} looked up {error}, which is neither in params "
            f"({', '.join(params)}) nor in hparams ({', '.join(hparams)}). Names must "
            "be the same in the losses and in the dictionaries."
        ) from error
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must return a tensor, but returned {type(value).__name__}."
        )
    if value.numel() != 1:
        raise ShapeError(
            f"{name} must return one number, but returned shape {tuple(value.shape)}. "
            "Take the mean over data."
        )
    return value.reshape(())


def mean_over(
    batches: Iterable[Any] | None,
    function: Callable[..., Sequence[Tensor | None]],
    name: str = "train_loss",
) -> Sequence[Tensor | None]:
    """Mean over batches, weighted by their rows, of a tuple of tensors or None."""
    if batches is None:
        return function()
    total: list[Tensor | None] | None = None
    count = 0
    for batch in batches:
        rows = _rows(batch)
        parts = function(batch)
        if total is None:
            total = [None] * len(parts)
        for i, part in enumerate(parts):
            if part is not None:
                total[i] = rows * part if total[i] is None else total[i] + rows * part
        count += rows
    if not count:
        raise ValueError(
            f"The batches of {name} have no rows. A generator that was used up has "
            "none left: pass a list or a loader, which every product passes over anew."
        )
    return [None if part is None else part / count for part in total]


def _rows(batch: Any) -> int:
    first = batch
    while not isinstance(first, Tensor):
        if isinstance(first, dict) and first:
            first = next(iter(first.values()))
        elif isinstance(first, list | tuple) and first:
            first = first[0]
        else:
            raise TypeError(
                "A batch must be a tensor, or a tuple or dict that begins with one, "
                f"but holds {type(first).__name__}."
            )
    return len(first)


def flatten(params: Params) -> Tensor:
    """Tensors by name as one vector ``p``."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """A vector ``p`` as tensors by name."""
    parts = vector.split([p.numel() for p in like.values()])
    return {
        name: part.reshape(p.shape)
        for (name, p), part in zip(like.items(), parts, strict=True)
    }


def zeros_for_none(values: Sequence[Tensor | None], like: Params) -> Params:
    """Gradients by name, zero where there is none."""
    return {
        k: torch.zeros_like(p) if g is None else g.detach()
        for (k, p), g in zip(like.items(), values, strict=True)
    }


@torch.no_grad()
def relative_inner_gradient(operator: CurvatureOperator, gradient: Tensor) -> float:
    """Norm of the gradient over that of H w - gradient, the right-hand side for w."""
    wanted = operator._matmul(operator.theta[:, None])[:, 0] - gradient
    size = gradient.norm()
    return float(size / wanted.norm().clamp_min(torch.finfo(size.dtype).tiny))
