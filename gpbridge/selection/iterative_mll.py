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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from gpbridge.checks import (
    NotConvergedWarning,
    check_choice,
    check_positive,
)
from gpbridge.kernel_operator import quadratic_form, working_dtype
from gpbridge.posterior_draws import mean_values, solve_columns
from gpbridge.randomness import standard_normal
from gpbridge.representers import Data, right_hand_sides
from gpbridge.sampled import SampledGP
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
        """Steps, passes and the last residual."""
        last = f", last residual {self.residuals[-1]:.1e}" if self.residuals else ""
        return (
            f"{type(self).__name__}({len(self.passes)} steps, "
            f"{self.total_passes:.0f} passes{last})"
        )

    @property
    def total_passes(self) -> float:
        """Over all steps."""
        return sum(self.passes)


@dataclass(frozen=True)
class SubsetStart:
    """Hyperparameters of local subsets as a start for very large data.

    Each subset holds the nearest neighbours of a random point, so that it sees short
    lengthscales as the whole data do; its evidence is exact. Unconstrained parameters
    are averaged over subsets.

    Args:
        size: Points of a subset.
        repeats: The number of subsets.
        steps: Adam steps on each of them.
    """

    size: int = 1000
    repeats: int = 3
    steps: int = 50

    def __post_init__(self) -> None:
        """Check the options."""
        check_positive(size=self.size, repeats=self.repeats, steps=self.steps)


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
    progress: bool = False,
) -> IterativeFit:
    r"""Learn the hyperparameters of a sampled GP by stochastic gradients, with Adam.

    One linear solve per step, for the targets and all probes together, from the last
    step's solution; plus one pass for the gradient. Give the solver a limit on its
    passes (a handful) to stop it early: solves then are unfinished, their error falls
    over the steps, and the record says how far they came. All in float64; parameters
    stay within their constraints, and priors on them are part of the objective.

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
        progress: Show a progress bar, if there is a terminal.

    Returns:
        Hyperparameters, passes and residuals by step.

    Raises:
        TypeError: If the model is not a SampledGP.
        ValueError: If an option is not one of its choices, or nothing is to be learnt.

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
    check_positive(num_probes=num_probes, steps=steps, learning_rate=learning_rate)
    if model._new is not None:
        raise ValueError(
            "The model was conditioned on a batch of observations, of which there is "
            "no one evidence. Fit the model that they were added to."
        )
    work = copy.deepcopy(model).double()
    work.num_samples = num_probes
    named = [(n, p) for n, p in work.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("No parameter of the model requires a gradient.")
    if generator is None:
        generator = Generator().manual_seed(int(model._seed))
    solver = model.solver if solver is None else solver
    prior, data = work._problem(work.covar_module, work.mean_module)
    if subset_start is not None:
        _fit_subsets(work, data, subset_start, learning_rate, generator)
    m, n = data.Y.shape[-1], len(data.X)
    probes = None
    if estimator == "standard":
        probes = standard_normal((n, num_probes), generator, data.X)
    fit = IterativeFit()
    optimizer = torch.optim.Adam([p for _, p in named], lr=learning_rate)
    value, own = None, estimator == "pathwise" and num_probes == model.num_samples
    if own and warm_start:
        value = model._warm_start()
    bar = tqdm(range(steps), desc="evidence", disable=None if progress else True)
    for step in bar:
        _record(fit.hyperparameters, _values(work))
        data = data._replace(noise=work.noise_variance.detach())
        with torch.no_grad():
            rhs = right_hand_sides(prior, work.mean_module, data, int(model._seed))
            if probes is not None:
                rhs = torch.cat([rhs[:, :m], probes], -1)
        start = value if warm_start else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            solution = solve_columns(
                work.covar_module,
                data.X,
                data.noise,
                rhs,
                solver,
                start,
                model.compute_dtype,
            )
        value = solution.value
        fit.passes.append(float(solution.passes))
        fit.residuals.append(solution.residual_norm)
        fit.converged.append(solution.converged)
        bar.set_postfix(residual=solution.residual_norm, refresh=False)
        if callback is not None:
            callback(step, solution)
        optimizer.zero_grad()
        right = value[:, m:] if probes is None else probes
        loss = -_surrogate(work, data, value[:, :m], value[:, m:], right)
        loss.backward()
        _record(fit.gradients, ((name, -p.grad) for name, p in named))
        optimizer.step()
    _record(fit.hyperparameters, _values(work))
    _copy_parameters(work, model)
    model._forget()
    model._initial = value if own else None
    if not solution.converged:
        warnings.warn(
            f"The solve of the last step ended at a relative residual of "
            f"{solution.residual_norm:.1e} after {solution.passes:.3g} passes. Give "
            "the solver more passes, or take more steps.",
            NotConvergedWarning,
            stacklevel=2,
        )
    return fit


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
        working_dtype(work.covar_module, work.noise_variance, work.compute_dtype),
    )
    total = 0.5 * quadratic + (v * mean_values(work.mean_module, data.X, m)).sum()
    return total + _log_priors(work)


def _log_priors(work: SampledGP) -> Tensor | float:
    return sum(
        prior.log_prob(closure(module)).sum()
        for _, module, prior, closure, _ in work.named_priors()
    )


def _fit_subsets(
    work: SampledGP,
    data: Data,
    options: SubsetStart,
    learning_rate: float,
    generator: Generator,
) -> None:
    """Replace the parameters by the average of those that subsets have."""
    scaled = data.X / data.X.std(0).clamp_min(torch.finfo(data.X.dtype).tiny)
    found: list[list[Tensor]] = []
    for _ in range(options.repeats):
        centre = torch.randint(
            len(scaled), (), generator=generator, device=generator.device
        )
        distance = (scaled - scaled[int(centre)]).square().sum(-1)
        size = min(options.size, len(scaled))
        rows = distance.topk(size, largest=False).indices
        local = copy.deepcopy(work)
        params = [p for p in local.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(params, lr=learning_rate)
        for _ in range(options.steps):
            optimizer.zero_grad()
            loss = -_exact_objective(local, data, rows)
            loss.backward()
            optimizer.step()
        found.append([p.detach() for p in params])
    own = [p for p in work.parameters() if p.requires_grad]
    for p, values in zip(own, zip(*found, strict=True), strict=True):
        p.data.copy_(torch.stack(values).mean(0))


def _exact_objective(local: SampledGP, data: Data, rows: Tensor) -> Tensor:
    """Log evidence of some rows, up to a constant, and log priors."""
    X, Y = data.X[rows], data.Y[rows]
    H = local.covar_module(X).to_dense() + torch.diag(local.noise_variance[rows])
    L = torch.linalg.cholesky(H)
    misfit = Y - mean_values(local.mean_module, X, Y.shape[-1])
    whitened = torch.linalg.solve_triangular(L, misfit, upper=False)
    complexity = Y.shape[-1] * L.diagonal().log().sum()
    return -0.5 * whitened.square().sum() - complexity + _log_priors(local)


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
