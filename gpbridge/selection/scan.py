r"""The evidence over a grid of one quantity, everything else refitted at each value.

Evidence as a function of an invariance, a period or a lengthscale has several maxima,
and ascent from one start ends in the nearest. A grid finds the right basin, since the
global maximum is where it should be; ascent from the best two or three local maxima of
the curve finds the rest.

In: a model, what to vary, a grid. Out: a :class:`ScanResult`, and the model at the best
point. Next: :func:`gpbridge.plots.plot_scan` draws the curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gpbridge.checks import NotConvergedWarning, check_finite, check_tensor, warn_user
from gpbridge.selection.ascent import (
    Ascent,
    ascend,
    load_buffers,
    load_values,
    parameter_values,
)
from gpbridge.selection.marginal_likelihood import log_evidence
from gpbridge.selection.named_values import Setter, read, setter_of

EvidenceFn = Callable[[nn.Module], Tensor]

_GOLDEN = (math.sqrt(5.0) - 1) / 2
_SEARCH_STEPS = 12  # of a golden section: the bracket shrinks by 300


class Polished(NamedTuple):
    """Where ascent from one local maximum of the grid ended; total nats."""

    start: float
    value: float | list[float]
    evidence: float


@dataclass(frozen=True)
class ScanResult:
    """The curve of a scan, and what became of its best points.

    Attributes:
        name: What was varied.
        grid: Its values, ascending, ``k``.
        evidence: Maximised over everything else, total nats, ``k``; minus infinity
            where it could not be computed.
        maxima: Places of the local maxima in the grid, the highest first; one for a
            plateau, and the ends of the grid count.
        polished: One record for each maximum that was followed up.
        best_value: The value at the best point found; a list where one grid value set
            several numbers that the polish moved apart.
        best_evidence: The evidence there, total nats.
    """

    name: str
    grid: Tensor
    evidence: Tensor
    maxima: tuple[int, ...]
    polished: tuple[Polished, ...]
    best_value: float | list[float]
    best_evidence: float

    def __repr__(self) -> str:
        """The best point and the number of maxima."""
        value = self.best_value
        shown = f"{value:.4g}" if isinstance(value, float) else f"{value}"
        return (
            f"{type(self).__name__}({self.name} = {shown}, log evidence "
            f"{self.best_evidence:.4f}; {len(self.grid)} grid values, "
            f"{len(self.maxima)} local maxima, {len(self.polished)} polished)"
        )


def scan(
    model: nn.Module,
    parameter: str | Setter,
    grid: Tensor | Sequence[float],
    evidence_fn: EvidenceFn = log_evidence,
    *,
    warm_start: bool = True,
    polish: int = 3,
    refit_steps: int = 20,
    polish_steps: int = 100,
    progress: bool = True,
) -> ScanResult:
    """Maximise the evidence along a grid of one quantity, then from its best maxima.

    At each grid value the quantity is set and held, and every other parameter with
    ``requires_grad`` takes L-BFGS steps. Then the best local maxima of the curve are
    followed: a named parameter is released and joins the ascent; a quantity behind a
    callable is searched by golden section between its neighbours on the grid, with
    refits. The model ends at the best point, in its earlier mode; nothing random.

    An evidence that is estimated by draws must use the same draws at every call: the
    best of noisy values is not the best model.

    Args:
        model: A model, or any module that contains the hyperparameters.
        parameter: A name in natural units as ``model.initialize`` takes it
            (``"covar_module.base_kernel.period_length"``), or ``setter(model, value)``
            that puts a value in place. Parameters that the setter moves are held.
            After an error parameters and buffers are put back; an attribute that is
            neither stays at the last value that was set.
        grid: At least two values; 18 or more over the range where maxima are many.
        evidence_fn: Total nats of the model; batches are summed. With hyperpriors:
            ``lambda model: log_evidence(model) + log_prior``.
        warm_start: Refit from the previous grid value; else from the model as it came.
        polish: How many local maxima to follow; 0 for none, as for a discrete grid.
        refit_steps: L-BFGS iterations at each grid value; 0 for none.
        polish_steps: L-BFGS iterations from each maximum.
        progress: Show a progress bar, if there is a terminal.

    Returns:
        The curve and its best point.

    Raises:
        ValueError: If the grid has fewer than two values, the model has no parameter
            of that name, or no grid value has a finite evidence.

    Warns:
        NotConvergedWarning: For grid values without a finite evidence, and if the best
            point still rose after ``polish_steps``.

    Example:
        >>> from botorch.models import SingleTaskGP
        >>> X = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None]
        >>> model = SingleTaskGP(X, torch.sin(6 * X))
        >>> found = scan(model, "covar_module.lengthscale", [0.1, 0.3, 1.0])
        >>> len(found.evidence)
        3
    """
    return _Scan(model, parameter, grid, evidence_fn, refit_steps).run(
        warm_start, polish, polish_steps, progress
    )


class _Scan:
    """A scan under way: the model, and which of its parameters are held."""

    def __init__(
        self,
        model: nn.Module,
        parameter: str | Setter,
        grid: Tensor | Sequence[float],
        evidence_fn: EvidenceFn,
        refit_steps: int,
    ) -> None:
        values = torch.as_tensor(grid, dtype=torch.float64).detach().cpu()
        check_tensor(grid=values)
        check_finite(grid=values.reshape(-1))
        self.grid = values.reshape(-1).unique()
        if len(self.grid) < 2:
            raise ValueError(
                "grid must hold at least two different values, but is "
                f"{self.grid.tolist()}."
            )
        self.model, self.evidence_fn, self.steps = model, evidence_fn, refit_steps
        self.named = isinstance(parameter, str)
        self.name = parameter if self.named else getattr(parameter, "__name__", "value")
        self.set = setter_of(parameter) if self.named else parameter
        self.initial = parameter_values(model)
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}
        self.required = {n: p.requires_grad for n, p in model.named_parameters()}

    def run(
        self, warm_start: bool, polish: int, polish_steps: int, progress: bool
    ) -> ScanResult:
        try:
            held = self._held()
            curve, states = self._along_the_grid(held, warm_start, progress)
            maxima = _local_maxima(curve)
            if not maxima:
                raise ValueError(
                    "No grid value has a finite evidence; parameters and buffers of "
                    "the model are as they were. Check the data, the noise and the "
                    "range of the grid."
                )
            polished, ends = [], []
            for place in maxima[:polish]:
                message = ""
                if self.named:
                    record, end, message = self._joint(
                        place, states[place], held, polish_steps, curve
                    )
                else:
                    record, end = self._golden(place, states[place], held, curve)
                polished.append(record)
                ends.append((record.evidence, record.value, end, message))
            place = maxima[0]
            start = float(self.grid[place])
            best = (float(curve[place]), start, (start, states[place]), "")
            best = max([best, *ends], key=lambda end: end[0])
            self._restore(*best[2], held)
        except BaseException:
            load_values(self.model, self.initial)
            load_buffers(self.model, self.buffers)
            raise
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(self.required.get(name, True))
        if best[3]:
            warn_user(
                f"The best point of {self.name} may not be the top: {best[3]}. Raise "
                "polish_steps.",
                NotConvergedWarning,
            )
        return ScanResult(
            self.name,
            self.grid,
            curve,
            tuple(maxima),
            tuple(polished),
            best[1],
            best[0],
        )

    def _held(self) -> set[str]:
        """Names of the parameters that the setter moves."""
        self.set(self.model, float(self.grid[0]))
        first = parameter_values(self.model)
        self.set(self.model, float(self.grid[-1]))
        moved = set()
        for name, value in parameter_values(self.model).items():
            before = first.get(name)
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{self.name} = {float(self.grid[-1]):g} makes the parameter "
                    f"{name} infinite or NaN. Keep the grid inside its bounds."
                )
            if before is not None and before.shape == value.shape:
                if not torch.equal(before, value):
                    moved.add(name)
        load_values(self.model, self.initial)
        return moved

    def _along_the_grid(
        self, held: set[str], warm_start: bool, progress: bool
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        self._hold(held)
        curve, states = [], []
        good = self.initial
        bar = tqdm(self.grid.tolist(), "scan", disable=None if progress else True)
        for value in bar:
            self._restore(value, good if warm_start else self.initial, held)
            curve.append(self._ascend(self.steps).value)
            states.append(parameter_values(self.model))
            if math.isfinite(curve[-1]):
                good = states[-1]
        failed = [
            v for v, e in zip(self.grid.tolist(), curve, strict=True) if e == -math.inf
        ]
        if failed and len(failed) < len(curve):
            warn_user(
                f"The evidence is not finite at {self.name} = "
                f"{', '.join(f'{v:g}' for v in failed)}; these values are left out.",
                NotConvergedWarning,
            )
        return torch.tensor(curve, dtype=torch.float64), states

    def _joint(
        self,
        place: int,
        state: dict[str, Tensor],
        held: set[str],
        steps: int,
        curve: Tensor,
    ) -> tuple[Polished, tuple, str]:
        """Ascent in all parameters, the scanned one among them; and what it says."""
        start = float(self.grid[place])
        self._restore(start, state, held)
        self._hold(set(), release=held)
        found, message = self._ascend(steps)
        end = parameter_values(self.model)
        if found < float(curve[place]):  # an ascent that broke down
            found, end = float(curve[place]), state
            self._restore(start, state, held)
        value = read(self.model, self.name)
        self._hold(held)
        return Polished(start, value, found), (None, end), message

    def _golden(
        self,
        place: int,
        state: dict[str, Tensor],
        held: set[str],
        curve: Tensor,
    ) -> tuple[Polished, tuple]:
        """Golden section between the neighbours, everything else refitted."""
        start = float(self.grid[place])
        low = float(self.grid[max(place - 1, 0)])
        high = float(self.grid[min(place + 1, len(self.grid) - 1)])
        best = (float(curve[place]), start, state)

        def at(value: float) -> float:
            nonlocal best
            self._restore(value, best[2], held)
            found = self._ascend(self.steps).value
            if found > best[0]:
                best = (found, value, parameter_values(self.model))
            return found

        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        at_left, at_right = at(left), at(right)
        for _ in range(_SEARCH_STEPS):
            if at_left >= at_right:
                high, right, at_right = right, left, at_left
                left = high - _GOLDEN * (high - low)
                at_left = at(left)
            else:
                low, left, at_left = left, right, at_right
                right = low + _GOLDEN * (high - low)
                at_right = at(right)
        return Polished(start, best[1], best[0]), (best[1], best[2])

    def _restore(
        self, value: float | None, state: dict[str, Tensor], held: set[str]
    ) -> None:
        """Put the value in place, then the rest; without one, everything as it was."""
        if value is not None:
            self.set(self.model, value)
            state = {name: v for name, v in state.items() if name not in held}
        load_values(self.model, state)

    def _hold(self, held: set[str], release: set[str] = frozenset()) -> None:
        for name, parameter in self.model.named_parameters():
            free = self.required.get(name, True) or name in release
            parameter.requires_grad_(free and name not in held)

    def _ascend(self, steps: int) -> Ascent:
        return ascend(self.model, lambda: self.evidence_fn(self.model).sum(), steps)


def _local_maxima(curve: Tensor) -> list[int]:
    """Places higher than both neighbours, the first of a plateau, highest first."""
    values = [-math.inf, *curve.tolist(), -math.inf]
    places = []
    for i in range(1, len(values) - 1):
        after = next((v for v in values[i + 1 :] if v != values[i]), -math.inf)
        if values[i] > values[i - 1] and values[i] > after:
            places.append(i - 1)
    return sorted(places, key=lambda place: -values[place + 1])
