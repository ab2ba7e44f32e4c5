r"""Fits from several starts, of which the evidence chooses one.

In: a marginal log likelihood and starting values of its hyperparameters. Out: the model
at the best optimum found, and a record of every start. Here too is the strongest plain
GP measured on small tables: a Matérn kernel plus the kernel of an untrained network.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from botorch.exceptions.errors import ModelFittingError
from botorch.exceptions.warnings import OptimizationWarning
from botorch.models.transforms.input import InputTransform
from botorch.optim.fit import fit_gpytorch_mll_scipy
from botorch.utils.constraints import LogTransformedInterval
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood, MarginalLogLikelihood
from gpytorch.settings import max_cholesky_size
from torch import Tensor

from gpbridge.checks import (
    NotConvergedWarning,
    ShapeError,
    check_inputs,
    check_not_empty,
    check_same_length,
    warn_user,
)
from gpbridge.kernels.matern import dimension_scaled_matern
from gpbridge.models import NetworkKernelGP
from gpbridge.selection.evidence import ALWAYS_CHOLESKY

Start = Mapping[str, float | Tensor]

_UNFINISHED = OptimizationWarning, NotConvergedWarning  # said once, of the best start

MATERN_PLUS_STARTS = ((0.0, -1.0, -4.0), (-8.0, 0.0, -7.0), (-2.0, 0.0, -2.0))
"""Log variance of the network's kernel, of the Matérn kernel, and of the noise."""


@dataclass(frozen=True)
class StartRecord:
    """What became of one start.

    Attributes:
        objective: The value reached, in total nats; minus infinity after a failure.
        converged: Whether the optimiser said that it was done.
        message: The error or warning, or nothing.
        state: The ``state_dict`` of the model at the end, None after a failure.
    """

    objective: float
    converged: bool
    message: str
    state: dict[str, Tensor] | None


def objective(mll: MarginalLogLikelihood) -> float:
    """Value of a marginal log likelihood in total nats, as its optimiser sees it.

    Hyperpriors and added loss terms are included, so that optima of one objective are
    compared by that objective. The evidence alone is ``log_evidence``.

    Args:
        mll: Of an exact GP, in any mode; the mode is put back.

    Returns:
        The value summed over data and over a batch of independent outputs.
    """
    training = mll.training
    mll.train()
    model = mll.model
    with torch.no_grad(), max_cholesky_size(ALWAYS_CHOLESKY):
        per_datum = mll(model(*model.train_inputs), model.train_targets)
    mll.train(training)
    return float(per_datum.sum()) * model.train_targets.shape[-1]


def multi_start(
    mll: MarginalLogLikelihood,
    starts: Sequence[Start],
    *,
    fit: Callable[[MarginalLogLikelihood], object] = fit_gpytorch_mll_scipy,
    score: Callable[[MarginalLogLikelihood], float] = objective,
) -> list[StartRecord]:
    r"""Fit from each start and keep the optimum with the highest score.

    The evidence of a GP has several optima, "all is noise" among them; one start can
    end in a poor one. Values not named in a start are those that the model had when
    this was called, so ``{}`` is the model as it came. The result is deterministic,
    provided that ``fit`` is: the default is L-BFGS-B without the random restarts of
    ``fit_gpytorch_mll``. The model ends in eval mode with the best state loaded.

    Args:
        mll: The objective, of a model and its likelihood; an exact GP for the default
            ``score``. Exact Cholesky factors are used at any size.
        starts: For each start, values by name: hyperparameters as ``model.initialize``
            takes them (``"likelihood.noise": 0.1``), or entries of
            ``model.state_dict()`` (``"likelihood.noise_covar.raw_noise"``).
        fit: Maximises the objective in place; may raise.
        score: What to compare, higher is better.

    Returns:
        One record per start, in their order.

    Raises:
        ValueError: If there are no starts or one names what the model does not have.
        ModelFittingError: If every start fails.

    Warns:
        NotConvergedWarning: For each start that fails, and if the best one stopped
            before it converged.

    Example:
        >>> X = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
        >>> model = NetworkKernelGP(X, torch.sin(6 * X))
        >>> mll = ExactMarginalLogLikelihood(model.likelihood, model)
        >>> records = multi_start(mll, [{}, {"likelihood.noise": 0.5}])
        >>> len(records)
        2
    """
    if not starts:
        raise ValueError("starts must name at least one start; {} is the model itself.")
    model = mll.model
    initial = copy.deepcopy(model.state_dict())
    try:
        for start in starts:  # a misspelt name is an error now, not a failed start
            _apply(model, start)
            model.load_state_dict(initial)
    except BaseException:
        model.load_state_dict(initial)
        raise
    records = []
    for number, start in enumerate(starts):
        model.load_state_dict(initial)
        _apply(model, start)
        record = _run(mll, fit, score)
        records.append(record)
        if record.state is None:
            warn_user(
                f"Start {number} of {len(starts)} failed: {record.message}",
                NotConvergedWarning,
            )
    best = max(records, key=lambda record: record.objective)
    if best.state is None:
        model.load_state_dict(initial)
        raise ModelFittingError(
            f"All {len(starts)} starts failed; the model is as it was. The first said: "
            f"{records[0].message} Check the data for duplicates and the scale of the "
            "targets, or raise the noise."
        )
    model.load_state_dict(best.state)
    mll.eval()
    if not best.converged:
        warn_user(
            f"The best of {len(starts)} starts did not converge: {best.message} Its "
            "objective may still rise; fit again from its state.",
            NotConvergedWarning,
        )
    return records


def _run(mll: MarginalLogLikelihood, fit: Callable, score: Callable) -> StartRecord:
    mll.train()
    try:
        with (
            max_cholesky_size(ALWAYS_CHOLESKY),
            warnings.catch_warnings(record=True) as caught,
        ):
            for category in _UNFINISHED:
                warnings.simplefilter("always", category)
            fit(mll)
        value = score(mll)
    except (RuntimeError, ValueError, ArithmeticError, ModelFittingError) as error:
        return StartRecord(-math.inf, False, f"{type(error).__name__}: {error}", None)
    messages = []
    for warning in caught:
        if issubclass(warning.category, _UNFINISHED):
            messages.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if not math.isfinite(value):
        return StartRecord(-math.inf, False, f"The objective is {value}.", None)
    state = copy.deepcopy(mll.model.state_dict())
    return StartRecord(value, not messages, " ".join(messages), state)


def _apply(model: torch.nn.Module, start: Start) -> None:
    state = model.state_dict()
    for name, value in start.items():
        if name in state:
            with torch.no_grad():
                state[name].copy_(torch.as_tensor(value).expand_as(state[name]))
            continue
        try:
            model.initialize(**{name: value})
        except AttributeError as error:
            raise ValueError(
                f"starts names {name!r}, which the model does not have. It has "
                f"{[key for key, _ in model.named_parameters()]}, and these names "
                "without raw_ for values in natural units."
            ) from error


def fit_matern_plus_kernel(
    train_X: Tensor,
    train_Y: Tensor,
    kernel: Kernel,
    *,
    starts: Sequence[tuple[float, float, float] | Start] = MATERN_PLUS_STARTS,
    noise_floor: float = 1e-6,
    input_transform: InputTransform | None = None,
) -> NetworkKernelGP:
    r"""A GP with a Matérn-5/2 ARD kernel plus a given one, usually of a network.

    .. math:: k = a\, k_{network} / \bar k + b\, k_{Matern}, \qquad
        \bar k = \tfrac1n \sum_i k_{network}(x_i, x_i)

    With the tangent kernel of an *untrained* network this tied or beat the stock
    ``SingleTaskGP`` on nine regression sets: no target is used twice, and the network's
    part extrapolates where a stationary kernel returns to its mean. The given kernel's
    own parameters are held as they are; a, b, the lengthscales, the mean and the noise
    are learnt by evidence from several starts. Lengthscales have the prior and bound of
    ``SingleTaskGP``, in units of the range of each column, so that the unit cube and
    standardised inputs give the same Matérn part. Targets are standardised. Everything
    positive is searched on a log scale, which takes a tenth of the steps.

    Time n³ per step, memory n².

    Args:
        train_X: Inputs ``n x d``.
        train_Y: Targets ``n x 1``.
        kernel: The kernel to add; a copy is used.
        starts: For each start log a, log b and the log of the noise variance, in units
            of the variance of the targets; or values by name, as for
            :func:`multi_start`.
        noise_floor: Smallest noise variance, in the same units.
        input_transform: As for ``SingleTaskGP``; ``kernel`` sees transformed inputs.

    Returns:
        The fitted model in eval mode. Its ``starts`` attribute holds the records.

    Raises:
        ShapeError: If the targets are not ``n x 1``.
        ValueError: If the kernel vanishes on the data.
    """
    check_inputs(train_X)
    check_inputs(train_Y, "train_Y")
    check_not_empty(train_X=train_X)
    check_same_length(train_X=train_X, train_Y=train_Y)
    if train_X.dim() != 2 or train_Y.shape[-1] != 1:
        raise ShapeError(
            "train_X must be ``n x d`` and train_Y ``n x 1``, but they have shapes "
            f"{tuple(train_X.shape)} and {tuple(train_Y.shape)}. Fit one model per "
            "output and join them in a ModelListGP."
        )
    X = train_X if input_transform is None else input_transform(train_X)
    kernel = copy.deepcopy(kernel).to(train_X).requires_grad_(False)
    with torch.no_grad():
        size = float(kernel(X, diag=True).mean())
    if not 0 < size < math.inf:
        raise ValueError(
            f"The kernel has mean variance {size} on train_X, but must be positive and "
            "finite. Check its network and the scale of the inputs."
        )
    likelihood = GaussianLikelihood(
        noise_constraint=LogTransformedInterval(noise_floor, 10.0, initial_value=0.1)
    )
    bounds = math.exp(-16.0), math.exp(10.0)
    network_part = ScaleKernel(
        kernel,
        outputscale_constraint=LogTransformedInterval(*(b / size for b in bounds)),
    )
    extent = X.amax(0) - X.amin(0)
    extent = torch.where(extent > 0, extent, torch.ones_like(extent))
    matern_part = ScaleKernel(
        dimension_scaled_matern(extent, X.shape[-1]),
        outputscale_constraint=LogTransformedInterval(*bounds),
    )
    model = NetworkKernelGP(
        train_X,
        train_Y,
        likelihood=likelihood,
        covar_module=network_part + matern_part,
        input_transform=input_transform,
    )
    model.starts = multi_start(
        ExactMarginalLogLikelihood(likelihood, model),
        [
            start if isinstance(start, Mapping) else _matern_plus_start(size, *start)
            for start in starts
        ],
    )
    return model.eval()


def _matern_plus_start(
    size: float, log_a: float, log_b: float, log_noise: float
) -> Start:
    return {
        "covar_module.kernels.0.outputscale": math.exp(log_a) / size,
        "covar_module.kernels.1.outputscale": math.exp(log_b),
        "likelihood.noise": math.exp(log_noise),
    }
