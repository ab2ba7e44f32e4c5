r"""Hyperparameters by maximising the evidence (type-II maximum likelihood).

For one prior variance, with one noise variance or with R frozen, one eigendecomposition
makes every step linear in the number of data; else the gradient of the exact evidence
is followed with cached Gram matrices. Several starts, the best by evidence. Every
search stays inside the bounds of the hyperparameters, so that the value returned is the
value the model has. In: a model. Out: the same model, fitted. Next: ``weight_decay``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from botorch.optim.core import scipy_minimize
from botorch.optim.fit import fit_gpytorch_mll_scipy
from gpytorch import Module
from gpytorch.constraints import Interval
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.evidence import (
    frozen_spectrum,
    noise_spectrum,
    spectral_evidence,
)
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.noise import check_noise_is_known
from gpbridge.linearized.structures import Structure
from gpbridge.metrics import gaussian_nll
from gpbridge.selection.diagnostics import diagnose
from gpbridge.selection.mll import LaplaceEvidence, log_prior
from gpbridge.types import Evidence

# Log prior variance (of the kernel scaled to unit mean diagonal) and log noise: the
# surface has a basin where all is noise and one where all is signal.
STARTS = ((0.0, -3.0), (3.0, -6.0), (-3.0, -1.0))

ALWAYS_CHOLESKY = 2**31  # upstream turns to stochastic evidence above a size


def fit_evidence(model: LinearizedGP, warn: bool = True) -> Evidence:
    """Learn prior variances and noise of a linearised network.

    The safe default for regression. With ``select="validation"`` (the default of
    ``LinearizedGP.from_fit`` where there are validation rows) the linear model and the
    network's output are compared on those rows first, each with hyperparameters fitted
    on the other rows, and the better one is fitted on all. For classification evidence
    does not choose well calibrated probabilities: use ``model.calibrate``.

    Priors that are registered on hyperparameters count, as in gpytorch: their log
    densities are added to what is maximised, not to the evidence that comes back.

    Cost: one eigendecomposition of the smaller of ``n m x n m`` and ``p x p`` for one
    prior variance and one noise, one Cholesky factorisation per step otherwise.

    Args:
        model: The model, fitted in place.
        warn: Whether to warn when a diagnostic says that the fit is not to be trusted.

    Returns:
        The evidence at the optimum, in total nats: the same as ``model.evidence()``.

    Raises:
        TypeError: If the model is another.
        ValueError: If the mean is the network's output and the noise would be learnt.
        MemoryError: If the exact evidence needs more than the memory budget.
        NotImplementedError: If the model was conditioned on further observations.
    """
    if not isinstance(model, LinearizedGP):
        raise TypeError(
            "fit_evidence needs a gpbridge.LinearizedGP, but model is "
            f"{type(model).__name__}. For an ExactGP use botorch's fit_gpytorch_mll."
        )
    model.eval()
    model.check_all_data_is_training_data("What fit_evidence maximises")
    if not isinstance(model.inference, Structure):
        model.problem.check_size("Learning hyperparameters by the exact evidence")
    if model.select == "validation":
        _select(model)
    check_noise_is_known(model.likelihood, model.mean)
    _search(model)
    model.fitted = "evidence"
    model.calibration = None  # it belonged to another prior variance
    with torch.no_grad():
        result = model.evidence()
    if is_gaussian(model.likelihood):
        model.diagnostics = diagnose(model, result, warn)
    return result


def _search(model: LinearizedGP) -> None:
    single = len(model.covar_module.groups) == 1
    priors = [(owner, closure) for _, owner, _, closure, _ in model.named_priors()]
    if isinstance(model.inference, Structure):
        _search_gradient(model)
    elif (
        single
        and isinstance(model.likelihood, GaussianLikelihood)
        and all(_is_on_noise(model, *prior) for prior in priors)
    ):
        _search_noise_spectrum(model)
    elif single and not is_gaussian(model.likelihood) and not priors:
        _search_frozen_spectrum(model)
    else:
        _search_gradient(model)


@torch.no_grad()
def _is_on_noise(model: LinearizedGP, owner: Module, closure: Callable) -> bool:
    """Whether a prior is on the noise variance itself, and not on its logarithm."""
    if owner is not model.likelihood.noise_covar:
        return False
    kept = owner.raw_noise.detach().clone()
    same = []
    for shift in (0.0, 0.5):  # at one value functions may agree by chance
        owner.raw_noise.copy_(kept + shift)
        same.append(torch.equal(closure(owner), owner.noise))
    owner.raw_noise.copy_(kept)
    return all(same)


def _log_bounds(constraint: Interval) -> tuple[float, float]:
    lower = max(float(constraint.lower_bound), 1e-30)
    upper = min(float(constraint.upper_bound), 1e30)
    # A value on the bound of a transformed parameter is at infinity.
    return math.log(lower) + 1e-4, math.log(upper) - 1e-4


def _search_noise_spectrum(model: LinearizedGP) -> None:
    """One prior variance and one noise variance, each step linear in n."""
    spectrum = noise_spectrum(model.problem)
    size = float(spectrum.eigenvalues.sum()) / spectrum.count
    noise_covar = model.likelihood.noise_covar
    learn_noise = noise_covar.raw_noise.requires_grad
    learn_prior = model.covar_module.raw_prior_variance.requires_grad
    both = (model.prior_variance, model.noise_variance)
    now = tuple(math.log(float(value.detach())) for value in both)
    bounds = {
        "s": _log_bounds(model.covar_module.raw_prior_variance_constraint),
        "v": _log_bounds(noise_covar.raw_noise_constraint),
    }
    if not learn_prior:
        bounds["s"] = (now[0], now[0])
    if not learn_noise:
        bounds["v"] = (now[1], now[1])
    scale = float(model.problem.Y.var(correction=0)) or 1.0
    starts = [now] + [
        (s + math.log(scale / size), v + math.log(scale)) for s, v in STARTS
    ]
    priors = [prior for _, _, prior, *_ in model.named_priors()]

    def objective(s: Tensor, v: Tensor) -> Tensor:
        hyperprior = sum(prior.log_prob(v).sum() for prior in priors)
        return spectrum.log_evidence(s, v) + hyperprior

    like = spectrum.eigenvalues
    best = max(
        (_climb(objective, start, bounds, like) for start in starts),
        key=lambda found: found[0],
    )
    if learn_prior:
        model.prior_variance = math.exp(best[1])
    if learn_noise:
        raw = noise_covar.raw_noise
        value = torch.tensor([math.exp(best[2])], dtype=raw.dtype, device=raw.device)
        model.likelihood.noise = value


def _climb(
    objective: Callable[[Tensor, Tensor], Tensor],
    start: tuple[float, float],
    bounds: dict[str, tuple[float, float]],
    like: Tensor,
) -> tuple[float, float, float]:
    parameters = {
        name: torch.tensor(
            min(max(value, bounds[name][0]), bounds[name][1]),
            dtype=like.dtype,
            device=like.device,
            requires_grad=True,
        )
        for name, value in zip(("s", "v"), start, strict=True)
    }

    def closure() -> tuple[Tensor, list[Tensor]]:
        s, v = parameters.values()
        loss = -objective(s.exp(), v.exp())
        return loss, list(torch.autograd.grad(loss, [s, v]))

    result = scipy_minimize(closure, parameters, bounds)
    s, v = (float(p.detach()) for p in parameters.values())
    return -float(result.fval), s, v


def _search_frozen_spectrum(model: LinearizedGP) -> None:
    """One prior variance under labels: one spectrum, warm-started optima."""
    problem = model.problem
    spectrum = frozen_spectrum(problem)
    raw = model.covar_module.raw_prior_variance
    if not raw.requires_grad:
        return
    low, high = _log_bounds(model.covar_module.raw_prior_variance_constraint)
    size = float(spectrum.eigenvalues.sum()) / problem.outputs.numel()
    mode = None

    def loss_at(log_variance: Tensor) -> Tensor:
        nonlocal mode
        variance = log_variance.exp().to(problem.outputs.device)
        found, mode = spectral_evidence(problem, variance, spectrum, mode)
        return -found.value

    starts = [float(model.prior_variance.detach().log()), -math.log(size)]
    trials = [torch.tensor([min(max(s, low), high)]).double() for s in starts]
    with torch.no_grad():
        best = min(trials, key=lambda trial: float(loss_at(trial)))
    parameter = best.requires_grad_()

    def closure() -> tuple[Tensor, list[Tensor]]:
        loss = loss_at(parameter)
        return loss, list(torch.autograd.grad(loss, [parameter]))

    scipy_minimize(
        closure,
        {"s": parameter},
        {"s": (low, high)},
        options={"maxiter": 30, "ftol": 1e-7},
    )
    model.prior_variance = float(parameter.detach().exp())


def _search_gradient(model: LinearizedGP) -> None:
    """Several groups or noises: the exact gradient, from several starts."""
    mll = LaplaceEvidence(model.likelihood, model)
    first = {k: v.detach().clone() for k, v in mll.named_parameters()}
    best_value, best_state = -math.inf, first
    learn_prior = model.covar_module.raw_prior_variance.requires_grad
    for factor in (None, 0.1, 10.0) if learn_prior else (None,):
        with torch.no_grad():
            for name, parameter in mll.named_parameters():
                parameter.copy_(first[name])
        if factor is not None:
            model.prior_variance = _clamped(model, model.prior_variance * factor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            fit_gpytorch_mll_scipy(mll, options={"maxiter": 200})
        with torch.no_grad():
            value = model.log_evidence()
            value = float(value + log_prior(model, value))
        if math.isfinite(value) and value > best_value:
            best_value = value
            best_state = {k: v.detach().clone() for k, v in mll.named_parameters()}
    with torch.no_grad():
        for name, parameter in mll.named_parameters():
            parameter.copy_(best_state[name])
    model.eval()


def _clamped(model: LinearizedGP, value: Tensor) -> Tensor:
    constraint = model.covar_module.raw_prior_variance_constraint
    return torch.clamp(
        value.detach(), float(constraint.lower_bound), float(constraint.upper_bound)
    )


def _select(model: LinearizedGP) -> None:
    """Keep the linear model or the network's output, by validation NLL.

    Both are fitted on the fit rows and scored on rows they have not seen.
    """
    rows = model.fit_result.validation_rows
    scores = {}
    for mean, noise in (("linear_model", "learn"), ("network", "fit_residual")):
        candidate = model.subset_rows(model.fit_result.fit_rows)
        candidate.use_mean(mean, noise)
        _search(candidate)
        scores[mean] = _held_out_nll(candidate, model, rows)
    model.validation_nll = scores
    if scores["network"] < scores["linear_model"]:
        model.use_mean("network", "fit_residual")
    else:
        model.use_mean("linear_model", "learn")


def _held_out_nll(candidate: LinearizedGP, model: LinearizedGP, rows: Tensor) -> float:
    """Mean NLL per point in transformed units, outputs summed."""
    X, Y = model.train_inputs[0][rows], model.problem.Y[rows]
    mean, blocks = candidate.marginals(X)
    variance = blocks.diagonal(dim1=-2, dim2=-1) + candidate.noise_variance.double()
    return float(gaussian_nll(mean, variance, Y))
