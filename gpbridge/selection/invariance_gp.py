r"""Learning which transformations a Gaussian process is invariant to, by its evidence.

In: an exact or sparse GP whose kernel averages over orbits. Out: a copy of it at the
best of several optima, the law of its transformations there, and the table of starts.
Next: predict with ``KernelInvarianceFit.model``; :func:`gpbridge.plots.plot_scan` draws
the curve of a scan.

References:
    van der Wilk, Bauer, John and Hensman, Learning invariances using the marginal
    likelihood, NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from gpytorch.mlls import MarginalLogLikelihood, VariationalELBO
from gpytorch.models import GP, ApproximateGP, ExactGP
from torch import Generator, Tensor, nn

from gpbridge.augmentation.base import Augmentation
from gpbridge.checks import (
    NotConvergedWarning,
    check_count,
    check_positive,
    check_same_length,
    check_sequence,
    warn_user,
)
from gpbridge.selection.ascent import ascend
from gpbridge.selection.kernel_invariance_fit import (
    InvarianceStart,
    KernelInvarianceFit,
)
from gpbridge.selection.law_starts import (
    Start,
    by_name,
    check_starts,
    copy_of_model,
    default_starts,
    free_laws,
    free_names,
    learnt_values,
    short_name,
    value_of,
)
from gpbridge.selection.marginal_likelihood import log_evidence
from gpbridge.selection.mll import log_prior
from gpbridge.selection.multi_start import StartRecord, multi_start
from gpbridge.selection.scan import scan
from gpbridge.selection.sparse_fit import checked_data, fit_sparse_gp
from gpbridge.selection.variational_bound import likelihood_of

_SCAN_POINTS = 18  # the curve over a circle has four to six maxima
_START_POINTS = 4  # where each is a fit of its own


def learn_kernel_invariance(
    model: GP | MarginalLogLikelihood,
    data: tuple[Tensor, Tensor] | None = None,
    *,
    starts: Sequence[Start] | None = None,
    num_points: int | None = None,
    refit_steps: int = 10,
    polish: int = 3,
    polish_steps: int = 100,
    seed: int = 0,
    progress: bool = True,
    **fit_options: Any,
) -> KernelInvarianceFit:
    r"""Maximise the evidence in an invariance, from several starts.

    The evidence as a function of the half-width of a law has several maxima: ascent
    from one start, however small, ends in the nearest. For an exact GP and one number,
    each start is a point of a curve: the law is held there and everything else
    refitted; from the best local maxima of the curve law and all else ascend together
    (:func:`scan`). For a law of several numbers, and for a sparse GP, each start is a
    fit of everything (:func:`multi_start`). Only what has ``requires_grad`` moves.

    The draws of the law are fixed, so that values of different starts compare. The
    evidence of an exact GP is computed in float64 by Cholesky factors at any size, and
    maximised by L-BFGS with the log density of the hyperpriors.

    Cost: about ``starts * refit_steps + polish * polish_steps`` evidences with their
    gradients, each :math:`n^2 s^2` evaluations of the base kernel; for a sparse GP as
    many times :func:`fit_sparse_gp` as there are starts.

    Args:
        model: An exact GP with its data; a sparse GP, or its bound, as
            ``VariationalELBO`` and ``OrbitVariationalELBO``. It is copied. Its kernel
            contains an ``InvariantKernel`` or ``ConvolutionalKernel`` with a free law.
        data: Inputs ``n x d`` and targets; for a sparse GP only.
        starts: Values of the law in natural units: a number, or one for each of its
            parameters; where there are several laws, values by name. Default: evenly
            spaced below the caps, all at the same fraction of their cap.
        num_points: The number of these; default 18 for a scan, 4 for fits.
        refit_steps: L-BFGS iterations at each point of a scan; 0 holds everything else.
        polish: How many local maxima of a scan to follow.
        polish_steps: L-BFGS iterations from each of them, or from each start.
        seed: Of every fit of a sparse GP.
        progress: Show a progress bar, if there is a terminal.
        **fit_options: For a sparse GP, as for :func:`fit_sparse_gp`.

    Returns:
        The best optimum and the table of starts.

    Raises:
        TypeError: If the model is neither exact nor sparse, or options are of the
            other kind.
        ValueError: If the kernel has no free law, a start is outside of its cap, all
            starts fail, or a bound is for another number of rows than the data.
        ShapeError: If targets do not fit the likelihood of a sparse GP.

    Warns:
        NotConvergedWarning: For starts without a finite evidence; others go on. Also
            if the objective of the best one still rises where its fit ends.

    Example:
        >>> from botorch.models import SingleTaskGP
        >>> from gpytorch.kernels import RBFKernel
        >>> from gpbridge.augmentation import Rotation2d
        >>> from gpbridge.kernels import InvariantKernel
        >>> X = torch.linspace(-1, 1, 20).double().reshape(10, 2)
        >>> kernel = InvariantKernel(RBFKernel(), Rotation2d(8))
        >>> gp = SingleTaskGP(X, X.norm(dim=-1, keepdim=True), covar_module=kernel)
        >>> fit = learn_kernel_invariance(gp, starts=[0.5, 1.5, 2.5], polish=1)
        >>> fit.learnt["bound"].shape, len(fit.curve.evidence)
        (torch.Size([1]), 3)
    """
    objective = objective_of(model, data)
    gp = model if objective is None else objective.model
    laws = free_laws(gp)
    names = {f"{path}.{name}" for path, law in laws.items() for name in free_names(law)}
    check_count(
        polish_steps=polish_steps, polish=polish or 1, refit_steps=refit_steps or 1
    )
    if num_points is not None:
        check_count(num_points=num_points)
    if starts is not None:
        check_sequence(starts=starts)
    scanned = objective is None and len(names) == 1
    if scanned:
        (name,) = names
        path = name.rpartition(".")[0]
        scanned = value_of(laws[path], name[len(path) + 1 :]).numel() == 1
    count = num_points or (_SCAN_POINTS if scanned else _START_POINTS)
    given = default_starts(laws, count) if starts is None else list(starts)
    table = [by_name(start, laws) for start in given]
    check_starts(table, gp)
    scanned = scanned and len(table) > 1
    if objective is None:
        _refuse(fit_options, "of a sparse GP, but the model is exact")
        return _fit_exact(
            gp, laws, table, scanned, refit_steps, polish, polish_steps, progress
        )
    _refuse({"generator", "resume"} & set(fit_options), "of one fit; pass seed")
    return _fit_sparse(
        objective, laws, table, data, seed, {"progress": progress} | fit_options
    )


def _fit_exact(
    gp: ExactGP,
    laws: dict[str, Augmentation],
    table: list[dict[str, Tensor]],
    scanned: bool,
    refit_steps: int,
    polish: int,
    polish_steps: int,
    progress: bool,
) -> KernelInvarianceFit:
    dtype = gp.train_inputs[0].dtype
    own = copy_of_model(gp).train().double()

    def value(model: nn.Module) -> Tensor:
        evidence = log_evidence(model)
        return (evidence + log_prior(model, evidence)).sum()

    curve = None
    if scanned:
        (name,) = table[0]
        curve = scan(
            own,
            name,
            [float(start[name]) for start in table],
            value,
            polish=polish,
            refit_steps=refit_steps,
            polish_steps=polish_steps,
            progress=progress,
        )
        short = short_name(name, laws)
        rows = tuple(
            InvarianceStart(
                {short: torch.tensor([record.start]).double()},
                {short: torch.tensor([record.value]).double()},
                record.evidence,
            )
            for record in curve.polished
        )
    else:
        records = multi_start(
            _Objective(own),
            table,
            fit=lambda mll: _climb(mll.model, lambda: value(mll.model), polish_steps),
            score=lambda mll: float(value(mll.model).detach()),
        )
        rows = _rows(table, records, own, laws)
    with torch.no_grad():
        evidence = float(log_evidence(own).sum())
    return KernelInvarianceFit(
        own.to(dtype).eval(), None, learnt_values(own, laws), evidence, rows, curve
    )


def _fit_sparse(
    objective: MarginalLogLikelihood,
    laws: dict[str, Augmentation],
    table: list[dict[str, Tensor]],
    data: tuple[Tensor, Tensor],
    seed: int,
    options: dict[str, Any],
) -> KernelInvarianceFit:
    # At the door: what is wrong with the data is wrong at every start.
    X, Y = checked_data(objective, *data)
    check_count(**{k: options[k] for k in ("epochs", "batch_size") if k in options})
    rates = "learning_rate", "natural_rate"
    check_positive(**{k: options[k] for k in rates if k in options})
    own = copy_of_model(objective)

    def fit(elbo: MarginalLogLikelihood) -> None:
        generator = Generator(X.device).manual_seed(seed)
        fit_sparse_gp(elbo, X, Y, generator=generator, **options)

    def bound(elbo: MarginalLogLikelihood) -> Tensor:
        with torch.no_grad():
            return log_evidence(elbo.model, X, Y, elbo.likelihood).sum()

    def score(elbo: MarginalLogLikelihood) -> float:
        value = bound(elbo)
        return float(value + log_prior(elbo.model, value))

    records = multi_start(own, table, fit=fit, score=score)
    rows = _rows(table, records, own.model, laws)
    model, evidence = own.eval().model, float(bound(own))
    return KernelInvarianceFit(
        model, own, learnt_values(model, laws), evidence, rows, None
    )


def _climb(
    model: nn.Module, objective: Callable[[], Tensor], polish_steps: int
) -> None:
    message = ascend(model, objective, polish_steps).message
    if message:
        warn_user(f"{message}. Raise polish_steps.", NotConvergedWarning)


class _Objective(MarginalLogLikelihood):
    """What :func:`multi_start` needs of an objective: a model and its likelihood."""

    def __init__(self, model: ExactGP) -> None:
        super().__init__(model.likelihood, model)


def objective_of(
    model: object, data: tuple[Tensor, Tensor] | None
) -> MarginalLogLikelihood | None:
    """The bound of a sparse GP; None for an exact one."""
    gp = model.model if isinstance(model, MarginalLogLikelihood) else model
    if isinstance(gp, ExactGP):
        if model is not gp:
            raise TypeError(
                "The evidence of an exact GP is computed here in float64. Pass the "
                f"{type(gp).__name__} itself instead of its {type(model).__name__}."
            )
        if data is not None:
            raise TypeError(
                "data are for a sparse GP, but an exact one keeps its own. Leave them "
                "out."
            )
        return None
    if not isinstance(gp, ApproximateGP):
        raise TypeError(
            "model must be an exact GP (as SingleTaskGP), a sparse GP "
            "(gpbridge.inducing_gp.SparseGP) or the bound of one, but is "
            f"{type(gp).__name__}. For a network call learn_invariance."
        )
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise TypeError("A sparse GP keeps no data: pass data=(X, Y).")
    check_same_length(X=data[0], Y=data[1])
    likelihood = likelihood_of(gp, getattr(model, "likelihood", None))
    if all(likelihood is not module for module in gp.modules()):
        raise ValueError(
            "The likelihood must be a part of the model, whose state then has its "
            "parameters: model.likelihood = likelihood."
        )
    if model is not gp:
        return model
    return VariationalELBO(likelihood, gp, num_data=len(data[0]))


def _rows(
    table: list[dict[str, Tensor]],
    records: list[StartRecord],
    model: nn.Module,
    laws: dict[str, Augmentation],
) -> tuple[InvarianceStart, ...]:
    """What became of each start; the model keeps its state."""
    scratch = copy_of_model(model)
    rows = []
    for start, record in zip(table, records, strict=True):
        end = {}
        if record.state is not None:
            scratch.load_state_dict(record.state)
            end = learnt_values(scratch, laws)
        short = {short_name(name, laws): value for name, value in start.items()}
        rows.append(InvarianceStart(short, end, record.objective))
    return tuple(rows)


def _refuse(options: Mapping[str, Any] | set[str], why: str) -> None:
    if options:
        raise TypeError(f"{', '.join(sorted(options))}: options {why}.")
