r"""Derivatives of a training loss in its parameters, as products that are never formed.

In: a loss as a function of (params, hparams), or of (params, hparams, batch) with
re-iterable batches. Out: the operator of its Hessian or of its Gauss-Newton matrix, and
the product with the mixed derivative in the hyperparameters. Memory is that of one
batch. Next: ``hypergradient`` solves with the operator.

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

from gpbridge.checks import check_choice
from gpbridge.selection.loss_gradient import Loss, mean_over
from gpbridge.types import Params


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

    Products differentiate the gradient once more, backwards. Without batches the graph
    of the gradient is kept, and a product costs about as much as a gradient; with
    batches it is built anew, which costs two, and memory is that of one batch.

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
        self._kept: Product | None = None

    def _size(self):
        return torch.Size((self.theta.numel(), self.theta.numel()))

    def _transpose_nonbatch(self):
        return self

    def _matmul(self, rhs):
        if rhs.dim() == 1:
            return self._product(rhs)
        columns = [self._product(v) for v in rhs.to(self.theta).mT]
        return torch.stack(columns, -1) if columns else torch.zeros_like(rhs)

    @torch.no_grad()
    def _product(self, v: Tensor) -> Tensor:
        direction = list(unflatten(v, self.like).values())
        if self.batches is None:
            if self._kept is None:
                self._kept = self._linearise()
            parts = self._kept(direction)
        else:
            parts = mean_over(
                self.batches, lambda *batch: self._linearise(*batch)(direction)
            )
        product = torch.cat([part.reshape(-1) for part in parts])
        return product + self.damping * v

    def _linearise(self, *batch: Any) -> Product:
        params = {
            name: p.detach().requires_grad_()
            for name, p in unflatten(self.theta, self.like).items()
        }
        with torch.enable_grad():
            if self.curvature == "hessian":
                return second_derivative(
                    self.loss(params, self.hparams, *batch), list(params.values())
                )
            return self._gauss_newton(params, batch)

    def _gauss_newton(self, params: Params, batch: tuple[Any, ...]) -> Product:
        w = list(params.values())
        f = self.loss.outputs(params, self.hparams, *batch)
        pull = transposed_derivative([f], w)
        # The transpose of u -> J'u is J: two backward passes make a forward one.
        u = torch.zeros_like(f).requires_grad_()
        slopes = torch.autograd.grad(f, w, u, create_graph=True, allow_unused=True)
        push = transposed_derivative(slopes, [u])
        # Leaves of their own, so that the two second derivatives are partial ones.
        f, w = f.detach().requires_grad_(), [p.detach().requires_grad_() for p in w]
        named = dict(zip(params, w, strict=True))
        value = self.loss.loss(f, named, self.hparams, *batch)
        in_outputs = second_derivative(value, [f])
        explicit = second_derivative(value, w)

        def product(direction: list[Tensor]) -> list[Tensor]:
            seen = pull(in_outputs(push(direction)))
            pairs = zip(seen, explicit(direction), strict=True)
            return [a + b for a, b in pairs]

        return product


Product = Callable[[list[Tensor]], list[Tensor]]
"""A linear map of a list of tensors."""


def second_derivative(value: Tensor, inputs: list[Tensor]) -> Product:
    """Products with the Hessian of a scalar in some leaves of its graph."""
    slopes = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
    return transposed_derivative(slopes, inputs)


def transposed_derivative(
    outputs: Sequence[Tensor | None], inputs: list[Tensor]
) -> Product:
    """Products with the transposed Jacobian; constants and None count as zero."""
    live = [i for i, o in enumerate(outputs) if o is not None and o.requires_grad]

    def product(cotangents: list[Tensor]) -> list[Tensor]:
        if not live:
            return [torch.zeros_like(x) for x in inputs]
        found = torch.autograd.grad(
            [outputs[i] for i in live],
            inputs,
            [cotangents[i] for i in live],
            retain_graph=True,
            allow_unused=True,
        )
        pairs = zip(found, inputs, strict=True)
        return [torch.zeros_like(x) if g is None else g for g, x in pairs]

    return product


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
    """Norm of the gradient over that of H w - gradient, the right-hand side for w.

    H without damping: what the training loss itself says.
    """
    theta = operator.theta
    wanted = (
        operator._matmul(theta[:, None])[:, 0] - operator.damping * theta - gradient
    )
    size = gradient.norm()
    return float(size / wanted.norm().clamp_min(torch.finfo(size.dtype).tiny))
