"""Hyperparameters of a GP of any size, by ascent on its marginal likelihood.

Gradients come from linear solves (``evidence_ascent``); an unfinished solve makes
progress over the steps, since each starts from the last one.

In: a :class:`~gpbridge.SampledGP`. Out: the same model with other hyperparameters, and
the record of the fit.

References:
    Lin, Padhy, Mlodozeniec, Antorán, Hernández-Lobato, Improving linear system solvers
    for hyperparameter optimisation in iterative Gaussian processes, NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from torch import Generator, nn
from tqdm import tqdm

from gpbridge.checks import (
    NotConvergedWarning,
    ReliabilityWarning,
    check_choice,
    check_count,
    check_positive,
    warn_user,
)
from gpbridge.dnn.divergence import DivergedError
from gpbridge.sampled import SampledGP
from gpbridge.selection.evidence_ascent import EvidenceAscent, IterativeFit
from gpbridge.selection.subset_start import SubsetStart
from gpbridge.storage import load_state, save_state
from gpbridge.tracing import ordinary_tensors
from gpbridge.types import Solution, Solver


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
        DivergedError: If hyperparameters become zero, infinite, or so large that draws
            overflow. The model then has those of the last solve, and ``last_good`` is
            the record.

    Warns:
        ReliabilityWarning: If a hyperparameter ends all but zero.
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
    ascent = EvidenceAscent(
        model, estimator, num_probes, learning_rate, solver, warm_start
    )
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
        try:
            solution = ascent.solve()
            bar.set_postfix(residual=solution.residual_norm, refresh=False)
            if callback is not None:
                callback(step, solution)
            ascent.move()
        except DivergedError:
            bar.close()
            _copy_parameters(ascent.work, model)
            raise
        if checkpoint is not None:
            save_state(ascent.state_dict(), checkpoint)
    _copy_parameters(ascent.work, model)
    model.start_from(ascent.value if ascent.own else None)
    if ascent.tiny():
        warn_user(
            f"The fit ended at {ascent.tiny()}, where a kernel is all but zero or the "
            f"identity. Lower learning_rate, which is {learning_rate:g} (0.1 is "
            "usual), or put a prior on it.",
            ReliabilityWarning,
        )
    if not solution.converged:
        warn_user(
            f"The solve of the last step ended at a relative residual of "
            f"{solution.residual_norm:.1e} after {solution.passes:.3g} passes. Give "
            "the solver more passes, or take more steps.",
            NotConvergedWarning,
        )
    return fit


def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        pairs = zip(source.parameters(), target.parameters(), strict=True)
        for theirs, own in pairs:
            own.copy_(theirs)
