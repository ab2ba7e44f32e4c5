r"""Calibrating a linearised classifier on held-out data, and the warning that is free.

Evidence does not choose a prior that predicts well: on a confident network the
posterior stays close to the prior and contradicts the labels it was conditioned on. A
joint choice of prior variance and temperature on held-out data does; one
eigendecomposition serves all candidates. In: a problem and held-out labels. Out: what
to adopt. Next: ``gp``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from gpytorch.constraints import Interval
from gpytorch.likelihoods import Likelihood
from torch import Tensor

from gpbridge.checks import warn_user
from gpbridge.features import TangentFeatures
from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.evidence import frozen_spectrum
from gpbridge.linearized.inference import Sampled
from gpbridge.linearized.predictive import (
    NETWORK_TEMPERATURES,
    PRIOR_VARIANCES,
    choose_calibration,
    class_log_probabilities,
    probabilities,
)
from gpbridge.linearized.problem import TangentProblem
from gpbridge.linearized.structures import Structure
from gpbridge.metrics import apply_temperature, fit_temperature
from gpbridge.prediction import apply_root
from gpbridge.spectral import Spectrum

_CHUNK_BYTES = 64 * 2**20  # features of one chunk of held-out points
_SEEN_SHARE = 0.5  # of held-out rows that may be among the rows conditioned on
_FACTORS = tuple(10 ** (k / 2) for k in range(-3, 4))  # of a sampled posterior's prior


class Calibration(NamedTuple):
    """What held-out data chose for the predictive distribution.

    ``gain`` is the mean held-out NLL saved per point against the network's own
    probabilities, with its standard error.
    """

    link: str
    prior_variance: float
    temperature: float
    gain: float
    gain_std_error: float


class TrainGap(NamedTuple):
    """Mean of 1 - q[y] over the training rows, 0 if predictions agree with the labels.

    A posterior whose gap exceeds the network's by more than 0.05 contradicts the data
    that it was conditioned on.
    """

    posterior: float
    network: float


def check_calibratable(likelihood: Likelihood, mean: str) -> None:
    """Require a classifier around the network's output.

    Raises:
        TypeError: If the model is a regression.
        ValueError: If its mean is another.
    """
    if is_gaussian(likelihood):
        raise TypeError(
            "calibrate is for classification; under Gaussian noise call "
            "gpbridge.selection.fit_evidence(model)."
        )
    if mean != "network":
        raise ValueError(
            "calibrate averages around the network's output, but the model has "
            f"mean={mean!r}. Build it with mean='network'."
        )


def check_held_out(X_val: Tensor, Y_val: Tensor, X: Tensor, Y: Tensor) -> None:
    """Require that most rows are not among the rows conditioned on.

    Rows may repeat in data by chance, so that a few only warn, with their number.

    Args:
        X_val: Held-out inputs ``n' x d``.
        Y_val: Their labels in canonical form.
        X: The inputs conditioned on.
        Y: Their labels in canonical form.

    Raises:
        ValueError: If more than half of the rows are.
    """
    conditioned_on = set(_row_hashes(X, Y))
    seen = sum(row in conditioned_on for row in _row_hashes(X_val, Y_val))
    if seen == 0:
        return
    count = "All" if seen == len(X_val) else f"{seen} of"
    message = (
        f"{count} {len(X_val)} rows of X_val are rows that the model was conditioned "
        "on, which cannot calibrate it. To keep the validation rows of a training run "
        "for calibrate, build the model with LinearizedGP.from_fit(..., rows='fit'); "
        "model.subset_rows(rows) leaves out any others."
    )
    if seen > _SEEN_SHARE * len(X_val):
        raise ValueError(message)
    warn_user(message)


def _row_hashes(X: Tensor, Y: Tensor) -> Iterator[int]:
    """One number for each pair of inputs and label, the same for equal ones."""
    rows = torch.cat([X, Y.reshape(len(X), -1).to(X)], -1).detach()
    rows = rows + 0.0  # minus zero becomes zero
    return (hash(row.tobytes()) for row in rows.cpu().numpy())


@torch.no_grad()
def find_calibration(
    problem: TangentProblem, Z_val: Tensor, labels: Tensor, prior_variance: Tensor
) -> Calibration | None:
    """Choose prior variance and temperature around the network's output.

    One eigendecomposition serves all candidates of an exact posterior. A sampled one is
    solved again for each, started from the one before; its candidates surround the
    model's own prior variance, three half decades to each side.

    Args:
        problem: A classifier with one prior group.
        Z_val: Held-out transformed inputs ``n' x d``.
        labels: Held-out labels in canonical form.
        prior_variance: The model's own.

    Returns:
        The choice, or None if the network's own probabilities stay.

    Raises:
        ValueError: If it has several prior groups.
    """
    check_one_group(problem)
    Z = Z_val.to(problem.net.dtype)
    logits = torch.cat([problem.net(z).double() for z in Z.split(256)])
    if isinstance(problem.inference, Sampled):
        candidates = tuple(float(prior_variance) * factor for factor in _FACTORS)
        covariance_of = _sampled_covariances(problem, Z)
    elif isinstance(problem.inference, Structure):
        candidates = PRIOR_VARIANCES
        covariance_of = _structured_covariances(problem, Z)
    else:
        problem.check_size("The eigendecomposition for calibration")
        candidates = PRIOR_VARIANCES
        covariance_of = _covariances(problem, frozen_spectrum(problem), Z)
    best = choose_calibration(
        problem.likelihood, logits, labels, covariance_of, candidates
    )
    if not best.adopted:
        warn_user(
            "calibrate keeps the network's own probabilities: the best candidate saves "
            f"{best.gain:.4f} nats per held-out point, less than one standard error "
            f"({best.gain_std_error:.4f})."
        )
        return None
    return Calibration(
        "pairwise" if best.prior_variance > 0 else "plugin",
        best.prior_variance,
        best.calibration_temperature,
        best.gain,
        best.gain_std_error,
    )


@torch.no_grad()
def temper_refinement(
    problem: TangentProblem,
    Z_val: Tensor,
    labels: Tensor,
    mean: Tensor,
    blocks: Tensor,
    prior_variance: Tensor,
) -> Calibration | None:
    """Choose a temperature for a refined posterior, with the guard of all calibration.

    Bounded as a network's: the refined prediction is nearly calibrated, and few
    held-out labels, all predicted correctly, must not sharpen it.

    Args:
        problem: A classifier with one prior group.
        Z_val: Held-out transformed inputs ``n' x d``.
        labels: Held-out labels in canonical form.
        mean: Refined mean there, ``n' x m``.
        blocks: Refined covariance there, ``n' x m x m``.
        prior_variance: The model's own.

    Returns:
        The choice, or None if the network's own probabilities are as good.
    """
    check_one_group(problem)
    classes = labels.reshape(-1, 1).long()
    Z = Z_val.to(problem.net.dtype)
    logits = torch.cat([problem.net(z).double() for z in Z.split(256)])
    likelihood = problem.likelihood
    network = class_log_probabilities(likelihood, logits, blocks, "plugin")
    logs = class_log_probabilities(likelihood, mean, blocks, "pairwise")
    temperature = fit_temperature(logs, classes[:, 0], NETWORK_TEMPERATURES)
    tempered = apply_temperature(logs, temperature)
    gains = (tempered - network).gather(-1, classes)[:, 0]
    gain, n = float(gains.mean()), len(gains)
    std_error = float(gains.std()) / n**0.5 if n > 1 else float("inf")
    if gain > std_error:
        variance = float(prior_variance)
        return Calibration("pairwise", variance, temperature, gain, std_error)
    warn_user(
        "calibrate drops the refinement and keeps the network's own probabilities: the "
        f"refined ones save {gain:.4f} nats per held-out point, less than one standard "
        f"error ({std_error:.4f})."
    )
    return None


def check_one_group(problem: TangentProblem) -> None:
    """Require one prior variance for all weights."""
    if len(problem.groups) > 1:
        raise ValueError(
            "calibrate chooses one prior variance, but the model has "
            f"{len(problem.groups)} groups. Build it with groups='all'."
        )


def calibrated_variance(calibration: Calibration, bounds: Interval) -> float:
    """The prior variance that was chosen, inside the bounds of the kernel's."""
    lower, upper = float(bounds.lower_bound), float(bounds.upper_bound)
    return min(max(calibration.prior_variance, lower), upper)


def still_valid(
    calibration: Calibration | None, prior_variance: Tensor, bounds: Interval
) -> Calibration | None:
    """What held-out data chose, unless the prior variance was changed since."""
    if calibration is None or calibration.link == "plugin":
        return calibration
    chosen = calibrated_variance(calibration, bounds)
    now = float(prior_variance.detach())
    return calibration if abs(now - chosen) <= 1e-6 * chosen else None


def link_and_temperature(
    link: str | None, calibration: Calibration | None, refined: bool = False
) -> tuple[str, float]:
    """The link that ``predict`` uses when asked for one or none, and its temperature.

    A temperature that was chosen for an average is not that of the network's own
    probabilities, nor the other way round.
    """
    if calibration is None:
        return link or ("pairwise" if refined else "plugin"), 1.0
    link = link or calibration.link
    same = (link == "plugin") == (calibration.link == "plugin")
    return link, calibration.temperature if same else 1.0


def warn_about_gap(link: str, gap: TrainGap) -> None:
    """Warn where an average without calibration contradicts the training labels."""
    if gap.posterior > gap.network + 0.05:
        warn_user(
            f"link={link!r} without calibration: on the training data the predictive "
            f"contradicts the labels by {gap.posterior:.3f} on average, the network by "
            f"{gap.network:.3f}. Pass held-out data to calibrate()."
        )


def _sampled_covariances(problem: TangentProblem, Z: Tensor):
    """The same from draws, solved for each prior variance."""
    one = problem.feature_std(Z.new_ones(()))

    def covariance(prior_variance: float) -> Tensor:
        draws = problem.draws(torch.tensor([prior_variance], device=Z.device))
        weights = draws.std[:, None] * draws.omega / draws.omega.shape[-1] ** 0.5
        blocks = []
        for z in Z.split(256):
            F = problem.features(z, one).matmul(weights.to(z)).double()
            blocks.append(F @ F.mT)
        return torch.cat(blocks)

    return covariance


def _structured_covariances(problem: TangentProblem, Z: Tensor):
    """The same by a structure, which a prior variance shifts."""
    per_point = Z.element_size() * problem.derivatives_per_point
    chunks = Z.split(max(1, min(256, _CHUNK_BYTES // per_point)))

    def features_of(z: Tensor) -> TangentFeatures:
        return problem.features(z, problem.unit_std)

    kept = per_point * len(Z) <= problem.inference.memory_budget / 4
    held = [features_of(z) for z in chunks] if kept else None

    def covariance(prior_variance: float) -> Tensor:
        variance = torch.tensor([prior_variance], device=Z.device).double()
        strategy = problem.structured_strategy(variance)
        parts = map(features_of, chunks) if held is None else held
        return torch.cat([strategy.unit_blocks(part, variance) for part in parts])

    return covariance


def _covariances(problem: TangentProblem, spectrum: Spectrum, Z: Tensor):
    """Posterior covariance at held-out points as a function of the prior variance."""
    parts = []
    if problem.space == "function":
        train, root = problem.features(problem.X, problem.unit_std), problem.root()
    for z in Z.split(256):
        features = problem.features(z, problem.unit_std)
        m = features.value.shape[-1]
        if problem.space == "weight":
            seen = features.rows().double() @ spectrum.vectors
            parts.append((seen.unflatten(0, (-1, m)), None))
        else:
            cross = features.gram(train).double()
            whitened = apply_root(root.mT, cross.mT).mT
            seen = whitened @ spectrum.vectors
            parts.append((seen.unflatten(0, (-1, m)), features.blocks().double()))

    def covariance(prior_variance: float) -> Tensor:
        s = torch.tensor(prior_variance, dtype=torch.float64)
        shrunk = s / (1 + s * spectrum.eigenvalues)
        blocks = []
        for seen, prior in parts:
            if prior is None:
                blocks.append((seen * shrunk) @ seen.mT)
            else:
                blocks.append(s * prior - (seen * (s * shrunk)) @ seen.mT)
        return torch.cat(blocks)

    return covariance


@torch.no_grad()
def training_gap(problem: TangentProblem, mean: Tensor, blocks: Tensor) -> TrainGap:
    """Compare predictions on the training rows with their labels.

    Args:
        problem: A classifier.
        mean: Posterior mean at its inputs, ``n x m``.
        blocks: Posterior covariance there, ``n x m x m``.

    Returns:
        The gap of the posterior with the pairwise link, and of the network.
    """
    labels = problem.Y.reshape(len(problem.X), -1)
    gaps = []
    for link, center in (("pairwise", mean), ("plugin", problem.outputs)):
        q = probabilities(problem.likelihood, center, blocks, link)
        if q.shape[-1] == 1:
            right = torch.where(labels > 0.5, q, 1 - q)
        else:
            right = q.gather(-1, labels.long())
        gaps.append(float(1 - right.mean()))
    return TrainGap(*gaps)
