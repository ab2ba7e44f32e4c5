r"""Marginal likelihood maximised by linear solves, at any number of points.

.. math::
    \partial \log p(y) = \tfrac12 v_y^\top \partial H v_y
    - \tfrac12 \mathrm{tr}(H^{-1} \partial H), \qquad v_y = H^{-1} (y - m)

with the trace by probes z: standard, :math:`z \sim N(0, I)` and :math:`u^\top \partial
H z`; pathwise, :math:`z \sim N(0, H)` and :math:`u^\top \partial H u`, both with
:math:`u = H^{-1} z`. Pathwise probes are noisy prior draws, so that their solutions are
the representer weights of posterior samples. Base draws are fixed, so that each solve
starts from the last one and an unfinished solve makes progress over the steps.

In: a :class:`~gpbridge.SampledGP`. Out: the same model with other hyperparameters.

References:
    Lin, Padhy, Mlodozeniec, Antorán, Hernández-Lobato, Improving linear system solvers
    for hyperparameter optimisation in iterative Gaussian processes, NeurIPS 2024, eqs.
    (5), (8) and (9).
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from gpbridge.checks import (
    NotConvergedWarning,
    check_choice,
    check_count,
    check_positive,
    warn_user,
)
from gpbridge.kernel_gradients import quadratic_form
from gpbridge.posterior_draws import mean_values, solve_columns
from gpbridge.randomness import standard_normal
from gpbridge.representers import Data, right_hand_sides
from gpbridge.sampled import SampledGP
from gpbridge.selection.subset_start import SubsetStart, fit_subsets, log_priors
from gpbridge.storage import load_state, save_state
from gpbridge.tracing import ordinary_tensors
from gpbridge.types import Solution, Solver


@dataclass(frozen=True)
class IterativeFit:
    """The record of a fit.

    There is no value of the evidence in it: the gradient is estimated, the value is
    not. Where n allows, ``selection.log_evidence`` computes it for an exact GP with the
    same hyperparameters.

    Attributes:
        hyperparameters: By name, the values before each step and after the last one.
        gradients: By name, the estimated gradients of the log evidence with respect to
            the unconstrained parameters, total nats, one per step.
        passes: Visits to all entries of the matrix, per step; gradients not included.
        residuals: Largest relative residual of each step's solve.
        converged: Whether each step's solve reached the solver's tolerance.
    """

    hyperparameters: dict[str, list[Tensor]] = field(default_factory=dict)
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    passes: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    converged: list[bool] = field(default_factory=list)

    def __repr__(self) -> str:
        """Steps, passes, the last residual, and where the hyperparameters ended."""
        last = f", last residual {self.residuals[-1]:.1e}" if self.residuals else ""
        final = "".join(
            f", {name.rpartition('.')[-1]} {_shown(values[-1])}"
            for name, values in self.hyperparameters.items()
        )
        return (
            f"{type(self).__name__}({len(self.passes)} steps, "
            f"{self.total_passes:.0f} passes{last}{final})"
        )

    @property
    def total_passes(self) -> float:
        """Over all steps."""
        return sum(self.passes)


@ordinary_tensors()
def fit_iterative(
    model: SampledGP,
    *,
    estimator: str = "pathwise",
    num_probes: int | None = None,
    steps: int = 100,
    learning_rate: float = 0.1,
    solver: Solver | None = None,
    warm_start: bool = True,
    subset_start: SubsetStart | None = None,
    generator: Generator | None = None,
    callback: Callable[[int, Solution], None] | None = None,
    checkpoint: str | PathLike | None = None,
    progress: bool = True,
) -> IterativeFit:
    r"""Learn the hyperparameters of a sampled GP by stochastic gradients, with Adam.

    One linear solve per step, for the targets and all probes together, from the last
    step's solution; plus one pass for the gradient. Give the solver a limit on its
    passes (a handful) to stop it early: solves then are unfinished, their error falls
    over the steps, and the record says how far they came. Solutions and hyperparameters
    are float64, kernel entries as the model's ``compute_dtype`` says; parameters stay
    within their constraints, and priors on them are part of the objective.

    With the pathwise estimator and the model's own number of samples, the last solution
    is where the model's posterior starts from. Fixed probes make gradients noisy but
    the same noise at each step, so that the end point differs from the optimum of the
    evidence by a little; Fourier features of own frequencies do not bias it further.

    Args:
        model: The model; it gets the hyperparameters of the last step.
        estimator: ``"pathwise"`` or ``"standard"``.
        num_probes: Default the number of the model's samples.
        steps: Adam steps.
        learning_rate: Of Adam, for the unconstrained parameters.
        solver: Default the model's.
        warm_start: Whether a solve starts from the last solution.
        subset_start: Fit subsets of the data first.
        generator: Source of standard probes and of subsets; default a fixed seed.
            Pathwise probes are the model's own base draws.
        callback: Called after each solve with the number of the step and the solution.
        checkpoint: A file that is written after each step. If it is there, the run
            goes on from it, to the same numbers as without the interruption; more
            ``steps`` prolong a finished run. It holds n (1 + s) numbers.
        progress: Show a progress bar, if there is a terminal.

    Returns:
        Hyperparameters, passes and residuals by step.

    Raises:
        TypeError: If the model is not a SampledGP.
        ValueError: If an option is not one of its choices, nothing is to be learnt, or
            the checkpoint is of other data or options.
        FileNotFoundError: If the folder of the checkpoint does not exist.

    Warns:
        NotConvergedWarning: If the last solve ended above the solver's tolerance.

    Example:
        >>> from gpytorch.kernels import MaternKernel, ScaleKernel
        >>> X = torch.linspace(0, 1, 20).unsqueeze(-1).double()
        >>> model = SampledGP(X, torch.sin(6 * X), ScaleKernel(MaternKernel(2.5)))
        >>> len(fit_iterative(model, steps=3).residuals)
        3
    """
    if not isinstance(model, SampledGP):
        raise TypeError(
            "fit_iterative needs a gpbridge.SampledGP, but model is "
            f"{type(model).__name__}. Build one from the same data and kernel."
        )
    check_choice("estimator", estimator, ("pathwise", "standard"))
    num_probes = model.num_samples if num_probes is None else num_probes
    check_count(num_probes=num_probes, steps=steps)
    check_positive(learning_rate=learning_rate)
    if subset_start is not None and not isinstance(subset_start, SubsetStart):
        raise TypeError(
            f"subset_start must be a SubsetStart(...), but is {subset_start!r}."
        )
    if checkpoint is not None and not Path(checkpoint).absolute().parent.is_dir():
        raise FileNotFoundError(
            f"The folder of checkpoint={str(checkpoint)!r} does not exist."
        )
    if model.has_batch_data:
        raise ValueError(
            "The model was conditioned on a batch of observations, of which there is "
            "no one evidence. Fit the model that they were added to."
        )
    if generator is None:
        generator = Generator().manual_seed(model.seed)
    solver = model.solver if solver is None else solver
    ascent = _Ascent(model, estimator, num_probes, learning_rate, solver, warm_start)
    if checkpoint is None or not Path(checkpoint).exists():
        ascent.start(subset_start, generator)
    else:
        ascent.load_state_dict(load_state(checkpoint, model.train_inputs[0].device))
    fit, solution = ascent.fit, ascent.solution
    done = len(fit.passes)
    bar = tqdm(
        range(done, steps),
        desc="evidence",
        initial=done,
        total=steps,
        disable=None if progress else True,
    )
    for step in bar:
        solution = ascent.solve()
        bar.set_postfix(residual=solution.residual_norm, refresh=False)
        if callback is not None:
            callback(step, solution)
        ascent.move()
        if checkpoint is not None:
            save_state(ascent.state_dict(), checkpoint)
    _copy_parameters(ascent.work, model)
    model.start_from(ascent.value if ascent.own else None)
    if not solution.converged:
        warn_user(
            f"The solve of the last step ended at a relative residual of "
            f"{solution.residual_norm:.1e} after {solution.passes:.3g} passes. Give "
            "the solver more passes, or take more steps.",
            NotConvergedWarning,
        )
    return fit


class _Ascent:
    """Everything that one step leaves to the next."""

    def __init__(
        self,
        model: SampledGP,
        estimator: str,
        num_probes: int,
        learning_rate: float,
        solver: Solver | None,
        warm_start: bool,
    ) -> None:
        self.estimator, self.learning_rate = estimator, learning_rate
        self.solver, self.warm_start = solver, warm_start
        self.work = copy.deepcopy(model).double()
        self.work.num_samples = num_probes
        # Whether the last solution is one of the model's own system.
        self.own = estimator == "pathwise" and num_probes == model.num_samples
        named = self.work.named_parameters()
        self.named = [(name, p) for name, p in named if p.requires_grad]
        if not self.named:
            raise ValueError("No parameter of the model requires a gradient.")
        params = [p for _, p in self.named]
        self.optimizer = torch.optim.Adam(params, lr=learning_rate)
        work = self.work
        self.prior, self.data = work.system(work.covar_module, work.mean_module)
        self.fit = IterativeFit()
        self.value = model.warm_start() if self.own and warm_start else None
        self.probes: Tensor | None = None  # of the standard estimator
        self.solution: Solution | None = None  # of the last step

    def start(self, subsets: SubsetStart | None, generator: Generator) -> None:
        """Do what a resumed run does not repeat."""
        if subsets is not None:
            fit_subsets(self.work, self.data, subsets, self.learning_rate, generator)
        if self.estimator == "standard":
            shape = len(self.data.X), self.work.num_samples
            self.probes = standard_normal(shape, generator, self.data.X)
        _record(self.fit.hyperparameters, _values(self.work))

    def solve(self) -> Solution:
        """Solve at the present hyperparameters."""
        work, fit = self.work, self.fit
        self.data = self.data._replace(noise=work.noise_variance.detach())
        m = self.data.Y.shape[-1]
        with torch.no_grad():
            rhs = right_hand_sides(self.prior, work.mean_module, self.data, work.seed)
            if self.probes is not None:
                rhs = torch.cat([rhs[:, :m], self.probes], -1)
        if not bool(torch.isfinite(rhs).all()):
            raise ValueError(
                f"After {len(fit.passes)} steps the hyperparameters are extreme, and "
                f"draws from the prior overflow: {self.extremes()}. Lower "
                f"learning_rate, which is {self.learning_rate:g}; 0.1 is usual."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            self.solution = solution = solve_columns(
                work.covar_module,
                self.data.X,
                self.data.noise,
                rhs,
                self.solver,
                self.value if self.warm_start else None,
                work.compute_dtype,
            )
        self.value = solution.value
        fit.passes.append(float(solution.passes))
        fit.residuals.append(solution.residual_norm)
        fit.converged.append(solution.converged)
        return solution

    def extremes(self) -> str:
        """Each hyperparameter's largest value."""
        values = _values(self.work)
        return ", ".join(f"{name} = {value.max():.3g}" for name, value in values)

    def move(self) -> None:
        """One step of Adam along the gradient that the solution gives."""
        m = self.data.Y.shape[-1]
        mean, probes = self.value[:, :m], self.value[:, m:]
        right = probes if self.probes is None else self.probes
        self.optimizer.zero_grad()
        loss = -_surrogate(self.work, self.data, mean, probes, right)
        loss.backward()
        _record(self.fit.gradients, ((name, -p.grad) for name, p in self.named))
        self.optimizer.step()
        _record(self.fit.hyperparameters, _values(self.work))

    def key(self) -> dict[str, object]:
        """What a resumed run must have in common with the interrupted one."""
        data = _checksum(torch.cat([self.data.X, self.data.Y], -1))
        return {
            "estimator": self.estimator,
            "num_probes": self.work.num_samples,
            "learning_rate": self.learning_rate,
            "solver": repr(self.solver),
            "warm_start": self.warm_start,
            "seed": self.work.seed,
            "data": f"{tuple(self.data.X.shape)}, checksum {data:x}",
            "model": _structure(self.work),
        }

    def state_dict(self) -> dict[str, object]:
        """Plain tensors and numbers."""
        return {
            "key": self.key(),
            "parameters": [p.detach() for _, p in self.named],
            "optimizer": self.optimizer.state_dict(),
            "value": self.value,
            "probes": self.probes,
            "solution": tuple(self.solution._replace(value=None)),
            "fit": vars(self.fit),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where another run stopped, to the same numbers."""
        for name, own in self.key().items():
            theirs = state["key"].get(name)
            if theirs == own:
                continue
            if name == "model":  # only what differs
                theirs, own = set(theirs) - set(own), set(own) - set(theirs)
            raise ValueError(
                f"The checkpoint is of another run: its {name} is {theirs}, and now "
                f"{own}. Pass the same options and data, or another file."
            )
        with torch.no_grad():
            for (_, p), value in zip(self.named, state["parameters"], strict=True):
                p.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        device = self.data.X.device
        self.value = state["value"].to(device)
        self.probes = state["probes"]
        if self.probes is not None:
            self.probes = self.probes.to(device)
        self.solution = Solution(*state["solution"])
        self.fit = IterativeFit(**state["fit"])


def _shown(value: Tensor) -> str:
    if value.numel() == 1:
        return f"{value.item():.3g}"
    return f"{value.min().item():.3g} to {value.max().item():.3g}"


def _structure(work: SampledGP) -> list[str]:
    """Modules with their plain options, shapes, and the values that are not learnt."""
    found = [f"num_features={work.num_features}", f"compute_dtype={work.compute_dtype}"]
    for part in ("covar_module", "mean_module", "likelihood"):
        for name, module in getattr(work, part).named_modules():
            options = {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, int | float | str) and key != "training"
            }
            noise = getattr(module, "noise", None)
            if isinstance(noise, Tensor) and "noise" in vars(module):  # is fixed
                options["noise"] = f"checksum {_checksum(noise):x}"
            shown = f"{part}.{name}".rstrip(".")
            found.append(f"{shown}: {type(module).__name__} {options}")
    for name, p in work.named_parameters():
        value = "learnt" if p.requires_grad else f"checksum {_checksum(p):x}"
        found.append(f"{name}: {tuple(p.shape)}, {value}")
    found += [f"{name}: {prior}" for name, _, prior, *_ in work.named_priors()]
    return found


def _checksum(value: Tensor) -> int:
    return zlib.crc32(value.detach().double().cpu().numpy().tobytes())


def _surrogate(
    work: SampledGP, data: Data, v: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    """A function with the gradient of the log evidence; its value means nothing."""
    m = data.Y.shape[-1]
    # One trace per output; pathwise probes come for each of them.
    weight = m / left.shape[-1]
    quadratic = quadratic_form(
        work.covar_module,
        data.X,
        work.noise_variance,
        torch.cat([v, -weight * left], -1),
        torch.cat([v, right], -1),
    )
    total = 0.5 * quadratic + (v * mean_values(work.mean_module, data.X, m)).sum()
    return total + log_priors(work)


def _values(work: SampledGP) -> Iterator[tuple[str, Tensor]]:
    """Hyperparameters as the user knows them."""
    for name, p, constraint in work.named_parameters_and_constraints():
        if p.requires_grad:
            value = p if constraint is None else constraint.transform(p)
            yield name.replace("raw_", ""), value


def _record(lists: dict[str, list[Tensor]], values: object) -> None:
    for name, value in values:
        lists.setdefault(name, []).append(value.detach().clone())


def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        pairs = zip(source.parameters(), target.parameters(), strict=True)
        for theirs, own in pairs:
            own.copy_(theirs)
