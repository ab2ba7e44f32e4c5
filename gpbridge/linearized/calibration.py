r"""Calibrating a linearised classifier on held-out data, and the warning that is free.

Evidence does not choose a prior that predicts well: on a confident network the
posterior stays close to the prior and contradicts the labels it was conditioned on. A
joint choice of prior variance and temperature on held-out data does; one
eigendecomposition serves all candidates. In: a model and held-out labels. Out: what was
adopted. Next: ``gp``.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gpbridge.checks import check_inputs, check_not_empty, check_same_dtype
from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.evidence import frozen_spectrum
from gpbridge.linearized.predictive import choose_calibration, probabilities
from gpbridge.linearized.problem import TangentProblem
from gpbridge.prediction import apply_root
from gpbridge.spectral import Spectrum
from gpbridge.targets import check_targets

if TYPE_CHECKING:
    from gpbridge.linearized.gp import LinearizedGP


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


@torch.no_grad()
def calibrate(model: LinearizedGP, X_val: Tensor, Y_val: Tensor) -> Calibration | None:
    """Choose prior variance and temperature, and set them if they are adopted.

    Args:
        model: A classifier with one prior group.
        X_val: Held-out inputs ``n' x d``.
        Y_val: Held-out labels.

    Returns:
        The choice, or None if the network's own probabilities stay.

    Raises:
        TypeError: If the model is a regression.
        ValueError: If the model has several prior groups, or another mean than the
            network's output.
    """
    if is_gaussian(model.likelihood):
        raise TypeError(
            "calibrate is for classification; under Gaussian noise call "
            "gpbridge.selection.fit_evidence(model)."
        )
    if len(model.covar_module.groups) > 1:
        raise ValueError(
            "calibrate chooses one prior variance, but the model has "
            f"{len(model.covar_module.groups)} groups. Build it with groups='all'."
        )
    if model.mean != "network":
        raise ValueError(
            "calibrate averages around the network's output, but the model has mean="
            f"{model.mean!r}. Build it with mean='network'."
        )
    model.eval()
    check_inputs(X_val, "X_val", model.train_inputs[0].shape[-1])
    check_not_empty(X_val=X_val)
    check_same_dtype("X_val", X_val, model.train_inputs[0].dtype)
    labels = check_targets(
        model.likelihood,
        Y_val,
        model.num_outputs,
        len(X_val),
        dtype=X_val.dtype,
        name="Y_val",
    )
    problem = model.problem
    problem.check_size("The eigendecomposition for calibration")
    Z = model.transform_inputs(X_val).to(problem.net.dtype)
    spectrum = frozen_spectrum(problem)
    covariance_of = _covariances(problem, spectrum, Z)
    logits = problem.net(Z).double()
    best = choose_calibration(model.likelihood, logits, labels, covariance_of)
    if not best.adopted:
        warnings.warn(
            "calibrate keeps the network's own probabilities: the best candidate saves "
            f"{best.gain:.4f} nats per held-out point, less than one standard error "
            f"({best.gain_std_error:.4f}).",
            stacklevel=3,
        )
        model.calibration = None
        return None
    link = "pairwise" if best.prior_variance > 0 else "plugin"
    if best.prior_variance > 0:
        lower = model.covar_module.raw_prior_variance_constraint.lower_bound
        upper = model.covar_module.raw_prior_variance_constraint.upper_bound
        model.prior_variance = min(max(best.prior_variance, float(lower)), float(upper))
    model.fitted = "calibrate"
    model.calibration = Calibration(
        link,
        best.prior_variance,
        best.calibration_temperature,
        best.gain,
        best.gain_std_error,
    )
    return model.calibration


def _covariances(problem: TangentProblem, spectrum: Spectrum, Z: Tensor):
    """Posterior covariance at held-out points as a function of the prior variance."""
    parts = []
    for z in Z.split(256):
        features = problem.features(z, problem.unit_std)
        m = features.value.shape[-1]
        if problem.space == "weight":
            seen = features.rows().double() @ spectrum.vectors
            parts.append((seen.unflatten(0, (-1, m)), None))
        else:
            train = problem.features(problem.X, problem.unit_std)
            cross = features.gram(train).double()
            whitened = apply_root(problem.root().mT, cross.mT).mT
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
def train_gap(model: LinearizedGP) -> TrainGap:
    """Compare predictions on the training rows with their labels.

    Args:
        model: A classifier.

    Returns:
        The gap of the posterior with the pairwise link, and of the network.

    Raises:
        TypeError: If the model is a regression.
    """
    if is_gaussian(model.likelihood):
        raise TypeError("train_gap is for classification.")
    problem = model.problem
    labels = problem.Y.reshape(len(problem.X), -1)
    mean, blocks = model.marginals(model.train_inputs[0])
    gaps = []
    for link, center in (("pairwise", mean), ("plugin", problem.outputs)):
        q = probabilities(model.likelihood, center, blocks, link)
        if q.shape[-1] == 1:
            right = torch.where(labels > 0.5, q, 1 - q)
        else:
            right = q.gather(-1, labels.long())
        gaps.append(float(1 - right.mean()))
    return TrainGap(*gaps)
