r"""Gradients of a held-out loss in the hyperparameters of training.

At a minimum :math:`w^*(\lambda)` of the training loss the implicit function theorem
gives

.. math::
    \frac{d L_V}{d \lambda} = \partial_\lambda L_V
    - (\nabla^2_w L_T^{-1} \nabla_w L_V)^\top \, \partial_\lambda \nabla_w L_T ,

one linear solve with the curvature of the training loss and one product with its mixed
derivative, however many hyperparameters there are and however the minimum was found.

In: two losses, parameters at the minimum, hyperparameters. Out: a
:class:`Hypergradient`. Next: ``hypergradient_descent`` follows it.

References:
    Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit
    differentiation, AISTATS 2020, theorem 1. Pedregosa, Hyperparameter optimization
    with approximate gradient, ICML 2016, algorithm 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpbridge.checks import (
    NotConvergedWarning,
    check_choice,
    check_finite,
    check_floating,
    check_positive,
    check_tensor,
    warn_user,
)
from gpbridge.selection.loss_curvature import (
    CurvatureOperator,
    flatten,
    mixed_product,
    relative_inner_gradient,
    unflatten,
    zeros_for_none,
)
from gpbridge.selection.loss_gradient import Loss, value_and_gradient
from gpbridge.solvers import ConjugateGradients
from gpbridge.solvers.factors import IndefiniteError
from gpbridge.types import Params, Solver

DEFAULT_SOLVER = ConjugateGradients(tolerance=1e-4, preconditioner_rank=0)


class NonFiniteLossError(ValueError):
    """A loss or its gradient is NaN or infinite where it was evaluated."""


@dataclass(frozen=True)
class Hypergradient:
    """A gradient in hyperparameters, and the facts that say whether to believe it.

    Attributes:
        grads: The gradient, by name, each of the shape of its hyperparameter.
        direct: The part through the held-out loss itself, by name.
        train_loss: At the given parameters.
        val_loss: The held-out loss there.
        inner_gradient_norm: Norm of the gradient of the training loss, which is zero at
            a minimum.
        relative_inner_gradient: The same over the norm of H w - gradient: the relative
            residual of w as the solution of the quadratic problem around it. It is 1
            for untrained zeros, and does not depend on the units of loss or parameters.
        expected_val_change: What a Newton step to the minimum would change in the
            held-out loss, to first order: zero at the minimum.
        residual: Relative residual of the linear solve, recomputed.
        iterations: Of the solver.
        converged: Whether the solver reached its tolerance.
        solution: The solution by name, which starts the next solve.
    """

    grads: Params
    direct: Params
    train_loss: float
    val_loss: float
    inner_gradient_norm: float
    relative_inner_gradient: float
    expected_val_change: float
    residual: float
    iterations: int
    converged: bool
    solution: Params

    def __repr__(self) -> str:
        """Norms of the gradients, and how well they are known."""
        shown = ", ".join(f"{k} {float(g.norm()):.3g}" for k, g in self.grads.items())
        return (
            f"{type(self).__name__}(norms: {shown}; held-out loss {self.val_loss:.4g}, "
            f"relative inner gradient {self.relative_inner_gradient:.1e}, residual "
            f"{self.residual:.1e} after {self.iterations} iterations)"
        )


def hypergradient(
    train_loss: Loss,
    val_loss: Loss,
    params: Params,
    hparams: Params,
    *,
    solver: Solver = DEFAULT_SOLVER,
    curvature: str = "hessian",
    damping: float = 0.0,
    train_batches: Iterable[Any] | None = None,
    val_batches: Iterable[Any] | None = None,
    initial: Params | None = None,
    inner_tolerance: float = 1e-2,
) -> Hypergradient:
    r"""Differentiate a held-out loss at the minimum of a training loss.

    The parameters must minimise the training loss; a warning says if they do not. Cost:
    about one gradient of the training loss per iteration of the solver. Losses must be
    deterministic: no dropout, no fresh noise, batch normalisation by fixed statistics.

    Args:
        train_loss: Function of (params, hparams) or (params, hparams, batch), a scalar,
            twice differentiable; a mean over data. A
            :class:`~gpbridge.selection.CompositeLoss` for ``curvature="ggn"``.
        val_loss: The same of held-out data, differentiable once.
        params: Parameters by name, at the minimum. They are read, never changed.
        hparams: Hyperparameters by name, floating tensors of any shape. In log space
            positive ones stay positive.
        solver: How to solve with the curvature: ``ConjugateGradients()`` (default),
            ``Cholesky()`` (forms the p x p matrix, exact), or
            :class:`~gpbridge.selection.NeumannSeries`.
        curvature: ``"hessian"``, or ``"ggn"``, which is never negative but leaves out
            the curvature of the network, so that the gradient is biased.
        damping: Added to the diagonal of the curvature; biased towards zero by it.
        train_batches: Batches for ``train_loss``, passed over anew for each product: a
            list, or a loader without shuffling or augmentation of its own. The mean
            over batches is weighted by their rows.
        val_batches: The same for ``val_loss``.
        initial: ``solution`` of a similar problem, to start the solver.
        inner_tolerance: Relative inner gradient above which a warning says that the
            training has not converged. To first order the error of the parameters is
            the same share of them where the curvature is well conditioned.

    Returns:
        The gradient and its diagnostics.

    Raises:
        ValueError: If a name is wrong, or a tensor has no effect on any loss.
        NonFiniteLossError: If a loss or a derivative is NaN or infinite.
        IndefiniteError: If a curvature is negative.
        TypeError: If ``curvature="ggn"`` and the loss is not composite.

    Warns:
        NotConvergedWarning: If the solver or the inner training did not converge.

    Example:
        >>> X = torch.eye(3).double()
        >>> def train(params, hparams):
        ...     misfit = (X @ params["w"] - 1).square().sum()
        ...     return misfit + hparams["decay"] * params["w"].square().sum()
        >>> def held_out(params, hparams):
        ...     return params["w"].square().sum()
        >>> decay = torch.ones(()).double()
        >>> w = torch.full((3,), 0.5).double()  # 1 / (1 + decay)
        >>> hypergradient(train, held_out, {"w": w}, {"decay": decay}).grads["decay"]
        tensor(-0.7500, dtype=torch.float64)
    """
    _check_arguments(params, hparams, curvature, damping, inner_tolerance)
    operator = CurvatureOperator(
        flatten(params).detach(),
        flatten(params).new_tensor(damping),
        like={k: p.detach() for k, p in params.items()},
        hparams={k: p.detach() for k, p in hparams.items()},
        loss=train_loss,
        curvature=curvature,
        batches=train_batches,
    )
    value_T, slopes_T, _ = value_and_gradient(
        train_loss, params, hparams, train_batches
    )
    value_V, slopes_V, direct = value_and_gradient(
        val_loss, params, hparams, val_batches, "val_loss", wrt_hparams=True
    )
    unread = [k for k, g in zip(params, slopes_T, strict=True) if g is None]
    if unread:
        raise ValueError(
            f"train_loss does not depend on params {', '.join(unread)}, so that "
            "nothing determines them. Leave them out of params, or check the names."
        )
    g_T = torch.cat([g.reshape(-1) for g in slopes_T])
    g_V = flatten(zeros_for_none(slopes_V, params))
    for name, value, slope in (
        ("train_loss", value_T, g_T),
        ("val_loss", value_V, g_V),
    ):
        _check_loss(name, value, slope)
    relative = relative_inner_gradient(operator, g_T)
    solution = _solve(solver, operator, g_V, initial, params)
    p = solution.value[:, 0]
    indirect = mixed_product(
        train_loss, params, hparams, unflatten(p, params), train_batches
    )
    _check_hparams_matter(hparams, direct, indirect)
    direct = zeros_for_none(direct, hparams)
    indirect = zeros_for_none(indirect, hparams)
    grads = {k: direct[k] - indirect[k] for k in hparams}
    for name, g in grads.items():
        if not bool(torch.isfinite(g).all()):
            raise NonFiniteLossError(
                f"The hypergradient of {name} is not finite: the losses are, but not "
                "their derivatives in it. Check it for square roots at zero."
            )
    _warn(solver, solution, relative, inner_tolerance, p, g_T, float(value_V))
    return Hypergradient(
        grads=grads,
        direct=direct,
        train_loss=float(value_T),
        val_loss=float(value_V),
        inner_gradient_norm=float(g_T.norm()),
        relative_inner_gradient=relative,
        expected_val_change=-float(p @ g_T),
        residual=solution.residual_norm,
        iterations=solution.iterations,
        converged=solution.converged,
        solution=unflatten(p, params),
    )


def _solve(solver, operator, g_V, initial, params):
    start = None
    if initial is not None:
        if initial.keys() != params.keys():
            raise ValueError(
                f"initial must have the names of params, {', '.join(params)}, but has "
                f"{', '.join(initial)}. Pass .solution of an earlier result."
            )
        start = flatten({k: initial[k] for k in params})[:, None]
    try:
        # Its remedies are those of kernel matrices.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            return solver(operator, g_V[:, None], start)
    except IndefiniteError as error:
        remedy = "larger damping"
        if operator.curvature == "hessian":
            remedy = "curvature='ggn' (with a CompositeLoss), or larger damping"
        raise IndefiniteError(
            f"The {operator.curvature} of train_loss has negative curvature: the "
            "parameters are not at a minimum, or at one that is no minimum in "
            f"some direction. Train further, or try {remedy}; damping is "
            f"{float(operator.damping):g}. ({error.args[0].split('. ')[0]}.)"
        ) from error


def _warn(solver, solution, relative, inner_tolerance, p, g_T, value_V) -> None:
    if not solution.converged:
        warn_user(
            f"{getattr(solver, '__name__', type(solver).__name__)} stopped after "
            f"{solution.iterations} iterations at a relative residual of "
            f"{solution.residual_norm:.1e}, above its tolerance: the hypergradient is "
            "approximate. Allow more iterations or terms, or raise damping or the "
            "tolerance.",
            NotConvergedWarning,
        )
    if not relative <= inner_tolerance:
        warn_user(
            f"The inner training has not converged: the gradient of train_loss has "
            f"norm {float(g_T.norm()):.1e}, a relative {relative:.1e} and not "
            f"{inner_tolerance:.1e}, and the way to the minimum would change the "
            f"held-out loss {value_V:.4g} by about {-float(p @ g_T):.1e}. The implicit "
            "function theorem holds at a minimum only: train further, in float64 if "
            "float32 no longer improves, or raise inner_tolerance.",
            NotConvergedWarning,
        )


def _check_hparams_matter(hparams, direct, indirect) -> None:
    triples = zip(hparams, direct, indirect, strict=True)
    idle = [k for k, d, i in triples if d is None and i is None]
    if idle:
        raise ValueError(
            f"hparams {', '.join(idle)} have no effect: neither val_loss nor the "
            "gradient of train_loss in params depends on them. Leave them out, check "
            "the names, and that the losses do not detach them."
        )


def _check_loss(name: str, value: Tensor, slope: Tensor) -> None:
    if not bool(torch.isfinite(value)) or not bool(torch.isfinite(slope).all()):
        bad = int((~torch.isfinite(slope)).sum())
        raise NonFiniteLossError(
            f"{name} is {float(value)} and {bad} of {slope.numel()} entries of its "
            "gradient are not finite. Check the data and the hyperparameters."
        )


def _check_arguments(params, hparams, curvature, damping, inner_tolerance) -> None:
    check_choice("curvature", curvature, ("hessian", "ggn"))
    check_positive(inner_tolerance=inner_tolerance)
    if not (0 <= damping < float("inf")):
        raise ValueError(f"damping must be zero or positive, but is {damping}.")
    for name, group in (("params", params), ("hparams", hparams)):
        if not isinstance(group, dict):
            raise TypeError(
                f"{name} must be a dict of tensors by name, but is "
                f"{type(group).__name__}. Of a module pass "
                "dict(module.named_parameters())."
            )
        if not group:
            raise ValueError(f"{name} is empty. Pass at least one tensor by name.")
        named = {f"{name}[{k!r}]": v for k, v in group.items()}
        check_tensor(**named)
        check_floating(**named)
        check_finite(**named)
    first = next(iter(params.values()))
    for k, p in params.items():
        if p.dtype != first.dtype or p.device != first.device:
            raise TypeError(
                f"params must share one dtype and device, but {k} is {p.dtype} on "
                f"{p.device} and the first is {first.dtype} on {first.device}."
            )
