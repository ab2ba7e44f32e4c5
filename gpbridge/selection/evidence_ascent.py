r"""One step of the ascent on a marginal likelihood by linear solves, and its state.

.. math::
    \partial \log p(y) = \tfrac12 v_y^\top \partial H v_y
    - \tfrac12 \mathrm{tr}(H^{-1} \partial H), \qquad v_y = H^{-1} (y - m)

with the trace by probes z: standard, :math:`z \sim N(0, I)` and :math:`u^\top \partial
H z`; pathwise, :math:`z \sim N(0, H)` and :math:`u^\top \partial H u`, both with
:math:`u = H^{-1} z`. Pathwise probes are noisy prior draws, so that their solutions are
the representer weights of posterior samples. Base draws are fixed, so that each solve
starts from the last one.

In: a :class:`~gpbridge.SampledGP`. Out: its hyperparameters moved by Adam, a record of
every step, and a state from which another process goes on. Next: ``iterative_mll`` runs
it.

References:
    Lin, Padhy, Mlodozeniec, Antorán, Hernández-Lobato, Improving linear system solvers
    for hyperparameter optimisation in iterative Gaussian processes, NeurIPS 2024, eqs.
    (5), (8) and (9).
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Generator, Tensor

from gpbridge.checks import NotConvergedWarning
from gpbridge.dnn.divergence import DivergedError
from gpbridge.kernel_gradients import quadratic_form
from gpbridge.posterior_draws import mean_values, solve_columns
from gpbridge.randomness import standard_normal
from gpbridge.representers import Data, right_hand_sides
from gpbridge.sampled import SampledGP
from gpbridge.selection.mll import log_prior
from gpbridge.selection.subset_start import SubsetStart, fit_subsets
from gpbridge.types import Solution, Solver

_TINY = 1e-12  # beyond what data in any units ask for


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


class EvidenceAscent:
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
        self.good = [p.detach().clone() for p in params]  # of the last solve

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
            self._stop("draws from the prior overflow")
        self.good = [p.detach().clone() for _, p in self.named]
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

    def _stop(self, why: str) -> NoReturn:
        """Go back to where the last solve was, and say what went wrong."""
        shown = ", ".join(f"{name} = {_shown(v)}" for name, v in _values(self.work))
        with torch.no_grad():
            for (_, p), value in zip(self.named, self.good, strict=True):
                p.copy_(value)
        raise DivergedError(
            f"After {len(self.fit.passes)} steps the hyperparameters are extreme, and "
            f"{why}: {shown}. The model has those of the last solve, and .last_good of "
            "this error is the record. Lower learning_rate, which is "
            f"{self.learning_rate:g}; 0.1 is usual.",
            self.fit,
        )

    def tiny(self) -> str:
        """Hyperparameters that are all but zero, with their values; empty if none."""
        values = [(name, v.abs().min().item()) for name, v in _positive(self.work)]
        return ", ".join(f"{name} = {v:.2g}" for name, v in values if v < _TINY)

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
        if any(bool((v == 0).any()) for _, v in _positive(self.work)):
            self._stop("one is zero, where no gradient leads back")
        if not all(bool(torch.isfinite(v).all()) for _, v in _values(self.work)):
            self._stop("one is not finite")
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
        # Adam moves what it is given in place.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
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
    return total + log_prior(work, total)


def _values(work: SampledGP) -> Iterator[tuple[str, Tensor]]:
    """Hyperparameters as the user knows them."""
    for name, p, constraint in work.named_parameters_and_constraints():
        if p.requires_grad:
            value = p if constraint is None else constraint.transform(p)
            yield name.replace("raw_", ""), value


def _positive(work: SampledGP) -> Iterator[tuple[str, Tensor]]:
    """Those that are bounded by zero."""
    for name, p, constraint in work.named_parameters_and_constraints():
        if p.requires_grad and constraint is not None:
            if bool((constraint.lower_bound == 0).all()):
                yield name.replace("raw_", ""), constraint.transform(p)


def _record(lists: dict[str, list[Tensor]], values: object) -> None:
    for name, value in values:
        lists.setdefault(name, []).append(value.detach().clone())
