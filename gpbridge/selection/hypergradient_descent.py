r"""Hyperparameters learnt on a held-out loss, by steps along its hypergradient.

Each step trains to a minimum from where the last step ended, takes the hypergradient
there, its solve started at the last solution, and moves the hyperparameters by Adam.

In: two losses, parameters and hyperparameters. Out: the best hyperparameters with their
parameters, and the history. Next: ``held_out_problem`` builds the losses of a network.

References:
    Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit
    differentiation, AISTATS 2020, algorithm 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from gpbridge.checks import (
    NotConvergedWarning,
    check_count,
    check_positive,
    warn_user,
)
from gpbridge.dnn.divergence import DivergedError
from gpbridge.selection.hypergradient import (
    DEFAULT_SOLVER,
    NonFiniteLossError,
    hypergradient,
)
from gpbridge.selection.inner_training import LBFGSTraining
from gpbridge.selection.loss_gradient import Loss
from gpbridge.types import Params, Solver

Training = Callable[[Loss, Params, Params, Any], Params]
"""``train(loss, params, hparams, batches)`` gives the parameters at a minimum."""


class OuterStep(NamedTuple):
    """Hyperparameters that a step trained with, and what it found there."""

    hparams: Params
    val_loss: float
    train_loss: float
    gradient_norm: float
    relative_inner_gradient: float
    residual: float
    iterations: int
    converged: bool


class HypergradientDescent:
    r"""Learn hyperparameters on a held-out loss.

    The held-out loss that is reached is optimistic, as that of any selection; the more
    hyperparameters, the more. Judge the result on data of its own.

    Args:
        train_loss: As for :func:`~gpbridge.selection.hypergradient`.
        val_loss: Likewise.
        params: Where training starts; copied.
        hparams: Where the search starts; copied. A step moves each number by about the
            learning rate, so they should be of order one: logs of positive numbers.
        train: How to train: :class:`~gpbridge.selection.LBFGSTraining`, or a function
            of (loss, params, hparams, batches) that returns parameters.
        learning_rate: Of Adam.
        solver: As for ``hypergradient``.
        curvature: Likewise.
        damping: Likewise.
        inner_tolerance: Likewise; steps beyond it are counted in one warning per run.
        train_batches: Likewise.
        val_batches: Likewise.

    Attributes:
        history: One :class:`OuterStep` per step.
        params: Parameters of the last step, at the hyperparameters of its record.
        hparams: Hyperparameters of the next step.
        best: Record and parameters of the step of least held-out loss.

    Example:
        >>> X = torch.eye(3).double()
        >>> def train_loss(w, h):
        ...     decay = h["s"].exp()
        ...     return (w["w"] - 1).square().sum() + decay * w["w"].square().sum()
        >>> def val_loss(w, h):
        ...     return (w["w"] - 0.5).square().sum()
        >>> start = {"w": torch.zeros(3).double()}, {"s": torch.tensor(-1.0).double()}
        >>> descent = HypergradientDescent(train_loss, val_loss, *start)
        >>> _ = descent.run(60, progress=False)
        >>> bool(descent.best.step.hparams["s"].abs() < 0.02)  # w is 1 / (1 + exp(s))
        True
    """

    def __init__(
        self,
        train_loss: Loss,
        val_loss: Loss,
        params: Params,
        hparams: Params,
        *,
        train: Training | None = None,
        learning_rate: float = 0.1,
        solver: Solver = DEFAULT_SOLVER,
        curvature: str = "hessian",
        damping: float = 0.0,
        inner_tolerance: float = 1e-2,
        train_batches: Iterable[Any] | None = None,
        val_batches: Iterable[Any] | None = None,
    ) -> None:
        check_positive(learning_rate=learning_rate)
        self.train_loss, self.val_loss = train_loss, val_loss
        self.params = {k: p.detach().clone() for k, p in params.items()}
        self.hparams = {k: h.detach().clone() for k, h in hparams.items()}
        self.train = LBFGSTraining(curvature=curvature) if train is None else train
        self.train_batches = train_batches
        self.options = {
            "solver": solver,
            "curvature": curvature,
            "damping": damping,
            "inner_tolerance": inner_tolerance,
            "train_batches": train_batches,
            "val_batches": val_batches,
        }
        self.history: list[OuterStep] = []
        self.best: Best | None = None
        self._solution: Params | None = None
        self._optimizer = torch.optim.Adam(
            [h.requires_grad_() for h in self.hparams.values()], lr=learning_rate
        )

    def run(
        self, num_steps: int = 50, tolerance: float = 1e-4, progress: bool = True
    ) -> list[OuterStep]:
        """Step until no hyperparameter matters, to first order.

        Args:
            num_steps: At most so many.
            tolerance: Ends the run where a unit of each hyperparameter would change the
                held-out loss by less than this share of it.
            progress: Whether to show a bar in a terminal.

        Returns:
            The history, steps of earlier runs included.

        Raises:
            DivergedError: If a loss or a derivative is NaN or infinite. Parameters and
                hyperparameters are those of the last record again, and the learning
                rate is a tenth: another run goes on from there.

        Warns:
            NotConvergedWarning: If steps had an inner training or a solve that did not
                converge.
        """  # noqa: DOC502
        check_count(num_steps=num_steps)
        check_positive(tolerance=tolerance)
        steps, limit = [], self.options["inner_tolerance"]
        bar = tqdm(
            range(num_steps),
            desc="hypergradient descent",
            leave=False,
            disable=None if progress else True,
        )
        try:
            for _ in bar:
                step = self.step()
                steps.append(step)
                bar.set_postfix_str(f"held-out loss {step.val_loss:.4g}", refresh=False)
                # A gradient away from the minimum is no reason to stop.
                known = step.converged and step.relative_inner_gradient <= limit
                if known and step.gradient_norm <= tolerance * abs(step.val_loss):
                    break
        finally:
            bar.close()
            self._warn(steps)
        return self.history

    def step(self) -> OuterStep:
        """Train, differentiate, move.

        Where the hyperparameters are those of the last record, after a step that had to
        be taken back, the new record replaces it.

        Raises:
            DivergedError: As in :meth:`run`.
        """  # noqa: DOC502
        hparams = {k: h.detach().clone() for k, h in self.hparams.items()}
        try:
            params = self.train(
                self.train_loss, self.params, hparams, self.train_batches
            )
            with warnings.catch_warnings():  # one at the end of a run
                warnings.simplefilter("ignore", NotConvergedWarning)
                found = hypergradient(
                    self.train_loss,
                    self.val_loss,
                    params,
                    hparams,
                    initial=self._solution,
                    **self.options,
                )
        except NonFiniteLossError as error:
            self._go_back(error)
        record = OuterStep(
            hparams,
            found.val_loss,
            found.train_loss,
            math.sqrt(sum(float(g.square().sum()) for g in found.grads.values())),
            found.relative_inner_gradient,
            found.residual,
            found.iterations,
            found.converged,
        )
        self.params, self._solution = params, found.solution
        if self._is_last(hparams):
            self.history.pop()
        self.history.append(record)
        if self.best is None or record.val_loss < self.best.step.val_loss:
            self.best = Best(record, {k: p.clone() for k, p in params.items()})
        for name, h in self.hparams.items():
            h.grad = found.grads[name]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return record

    def trace(self, name: str) -> Tensor:
        """One column of the history, to plot: ``steps``, or ``steps x size``.

        Args:
            name: Of a hyperparameter, or of a number in :class:`OuterStep`.

        Returns:
            The values, on the CPU.

        Raises:
            ValueError: If nothing has this name.
        """
        if name in self.hparams:
            rows = [step.hparams[name].detach().cpu() for step in self.history]
            return torch.stack([row.squeeze() for row in rows])
        if name not in OuterStep._fields[1:]:
            names = ", ".join((*self.hparams, *OuterStep._fields[1:]))
            raise ValueError(f"name must be one of {names}, but is {name!r}.")
        return torch.tensor([float(getattr(step, name)) for step in self.history])

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as plain tensors and numbers."""
        best = self.best
        return {
            "params": {k: p.clone() for k, p in self.params.items()},
            "hparams": {k: h.detach().clone() for k, h in self.hparams.items()},
            "optimizer": _cloned(self._optimizer.state_dict()),
            "solution": self._solution,
            "history": [step._asdict() for step in self.history],
            "best": None if best is None else (best.step._asdict(), best.params),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another descent of the same losses stopped.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: If it is not a state of this class, or one of other names.
        """
        wanted = self.state_dict()
        missing = sorted(wanted.keys() - state.keys())
        if missing:
            raise ValueError(
                f"state lacks {', '.join(missing)}: it must be what state_dict() of a "
                "HypergradientDescent returned."
            )
        for group in ("params", "hparams"):
            own, other = (
                {k: tuple(v.shape) for k, v in each[group].items()}
                for each in (wanted, state)
            )
            if own != other:
                raise ValueError(
                    f"state is of other {group}: it has {other}, and this descent "
                    f"{own}."
                )
        self.params = {k: state["params"][k].to(p) for k, p in self.params.items()}
        with torch.no_grad():
            for name, h in self.hparams.items():
                h.copy_(state["hparams"][name])
        # Upstream's loader keeps references, which the next step would write to.
        self._optimizer.load_state_dict(_cloned(state["optimizer"]))
        self._solution = _cloned(state["solution"])
        self.history = [OuterStep(**step) for step in state["history"]]
        self.best = None
        if state["best"] is not None:
            self.best = Best(OuterStep(**state["best"][0]), _cloned(state["best"][1]))

    def _is_last(self, hparams: Params) -> bool:
        if not self.history:
            return False
        last = self.history[-1].hparams
        return all(torch.equal(h, last[k]) for k, h in hparams.items())

    def _go_back(self, error: NonFiniteLossError) -> None:
        tried = {k: h.detach().tolist() for k, h in self.hparams.items()}
        remedy = "Start at other hyperparameters."
        if self.history and not self._is_last(self.hparams):
            with torch.no_grad():
                for name, h in self.hparams.items():
                    h.copy_(self.history[-1].hparams[name])
            group = self._optimizer.param_groups[0]
            rate, group["lr"] = group["lr"], group["lr"] / 10
            remedy = (
                "Parameters and hyperparameters are those of the last record again, "
                f"and the learning rate is {group['lr']:g} (it was {rate:g}): call run "
                "to go on."
            )
        raise DivergedError(
            f"Step {len(self.history)} met a value that is not finite at {tried}: "
            f"{error} {remedy}",
            self,
        ) from error

    def _warn(self, steps: list[OuterStep]) -> None:
        limit = self.options["inner_tolerance"]
        loose = [s for s in steps if not s.relative_inner_gradient <= limit]
        if loose:
            worst = max(s.relative_inner_gradient for s in loose)
            warn_user(
                f"In {len(loose)} of {len(steps)} steps the inner training did not "
                f"converge: the relative inner gradient was up to {worst:.1e}, and not "
                f"{limit:.1e}. Train longer (LBFGSTraining(max_iterations=...)), in "
                "float64, or raise inner_tolerance.",
                NotConvergedWarning,
            )
        failed = [s for s in steps if not s.converged]
        if failed:
            worst = max(s.residual for s in failed)
            warn_user(
                f"In {len(failed)} of {len(steps)} steps the linear solve did not "
                f"converge: the relative residual was up to {worst:.1e}. Allow the "
                "solver more iterations or terms, or raise damping.",
                NotConvergedWarning,
            )


class Best(NamedTuple):
    """The step of least held-out loss, and the parameters that it trained."""

    step: OuterStep
    params: Params


def _cloned(value: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value
    )
