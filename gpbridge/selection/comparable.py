r"""Whether evidences of two models are probabilities of the same numbers.

In: models. Out: what was measured of each, with targets in their original units; an
error that names two models and says why they cannot stand in one table, or notes.
Next: ``compare`` makes the table.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from botorch.models.approximate_gp import ApproximateGPyTorchModel
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    Likelihood,
    SoftmaxLikelihood,
    _GaussianLikelihoodBase,
)
from gpytorch.models import GP, ApproximateGP
from torch import Tensor, nn

from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.selection.marginal_likelihood import (
    APPROXIMATION,
    EXACT,
    EvidenceParts,
    evidence_parts,
)
from gpbridge.selection.outcome_units import evaluating, original_units

Entry = GP | nn.Module | tuple[nn.Module, Likelihood]

_LABELS = (BernoulliLikelihood, LogisticLikelihood, SoftmaxLikelihood)


class Measured(NamedTuple):
    """What is known of one model before it meets the others."""

    parts: EvidenceParts
    likelihood: Likelihood
    targets: Tensor  # original units, n x m
    log_jacobian: Tensor  # of the outcome transform at the targets, n x m


def measure(name: str, entry: Entry, data: tuple[Tensor, Tensor] | None) -> Measured:
    """Evidence and targets of one model.

    Args:
        name: What errors call it.
        entry: The model, perhaps with its likelihood.
        data: All inputs and targets, for a model that keeps none.

    Returns:
        What a comparison needs.

    Raises:
        ValueError: If it is a batch of models, or its data are missing.
    """
    model, likelihood = entry if isinstance(entry, tuple) else (entry, None)
    likelihood = getattr(model, "likelihood", likelihood)
    if isinstance(model, ApproximateGP | ApproximateGPyTorchModel):
        if data is None:
            raise ValueError(
                f"{name!r} is a variational GP, which keeps no data. Pass data=(X, Y), "
                "all training inputs and targets."
            )
        X, Y = data
        parts = evidence_parts(model, X, Y, likelihood)
        targets = Y[:, None] if Y.dim() == 1 else Y
        if hasattr(model, "outcome_transform"):
            with evaluating(model):
                targets, _ = model.outcome_transform(targets)
    else:
        parts = evidence_parts(model)
        X, targets = model.train_inputs[0], model.train_targets
        if parts.value.dim() > 0:
            if not _outputs_are_a_batch(model) or parts.value.dim() > 1:
                raise ValueError(
                    f"{name!r} is a batch of models, {tuple(parts.value.shape)}. "
                    "Compare one model of the batch at a time."
                )
            X, targets = X[0], targets.mT
        targets = targets[:, None] if targets.dim() == 1 else targets
    original, log_jacobian = original_units(model, targets, X)
    return Measured(parts, likelihood, original, log_jacobian)


def _outputs_are_a_batch(model: nn.Module) -> bool:
    """Whether botorch keeps several independent outputs in the batch, ``m x n``."""
    many = getattr(model, "_num_outputs", 1) > 1
    return many and model.train_inputs[0].dim() == 3


def check_comparable(measured: dict[str, Measured]) -> list[str]:
    """Refuse what has no common unit, and say what to keep in mind of the rest.

    Args:
        measured: Models by name.

    Returns:
        Sentences for the user.

    Raises:
        ValueError: If two models do not have the same targets or kind of likelihood.
    """
    (first, one), *others = measured.items()
    notes = []
    for name, two in others:
        pair = f"{first!r} and {name!r} cannot be compared"
        kinds = type(one.likelihood).__name__, type(two.likelihood).__name__
        labels = [isinstance(m.likelihood, _LABELS) for m in (one, two)]
        if labels[0] != labels[1]:
            raise ValueError(
                f"{pair}: {kinds[0]} and {kinds[1]} give a probability of labels and a "
                "density of numbers, in no common unit."
            )
        counts = one.targets.numel(), two.targets.numel()
        if counts[0] != counts[1]:
            raise ValueError(
                f"{pair}: they have {counts[0]} and {counts[1]} targets. Build both on "
                "the same data."
            )
        _check_same_targets(pair, one.targets, two.targets)
        gaussian = [
            isinstance(m.likelihood, _GaussianLikelihoodBase) for m in (one, two)
        ]
        if kinds[0] != kinds[1] and not all(gaussian):
            notes.append(
                f"{first!r} has a {kinds[0]} and {name!r} a {kinds[1]}: evidences of "
                "the same data, but by approximations of different quality."
            )
    return [*notes, *_note_on_kinds(measured)]


def _note_on_kinds(measured: dict[str, Measured]) -> list[str]:
    kinds = {name: m.parts.kind for name, m in measured.items()}
    loose = [
        f"{name!r} ({kind}{_error(measured[name].parts)})"
        for name, kind in kinds.items()
        if kind != EXACT
    ]
    alike = set(kinds.values()) == {APPROXIMATION}
    if len(kinds) == 1 or not loose or alike:
        return []
    return [
        f"The evidence is not exact for {', '.join(loose)}. A bound may lie far below "
        "the evidence and an approximation on either side, so that model weights tell "
        "of their quality too."
    ]


def _error(parts: EvidenceParts) -> str:
    error = float(torch.as_tensor(parts.standard_error).square().sum().sqrt())
    return f", standard error {error:.2g} nats" if error else ""


def _check_same_targets(pair: str, a: Tensor, b: Tensor) -> None:
    a, b = (t.detach().cpu().double().reshape(-1) for t in (a, b))
    scale = float(a.std(correction=0)) or 1.0
    # What transforms in float32 leave; other data differ by more.
    if float((a - b).abs().max()) <= 1e-4 * scale:
        return
    slope = float(b.std(correction=0)) / scale
    shift = float(b.mean() - slope * a.mean())
    if slope and float((slope * a + shift - b).abs().max()) <= 1e-4 * slope * scale:
        added = f" plus {shift:.4g}" if abs(shift) > 1e-9 * scale else ""
        raise ValueError(
            f"{pair}: the targets of the second are {slope:.4g} times those of the "
            f"first{added}, which moves its evidence by "
            f"{-len(a) * math.log(slope):+.4g} nats. Give both the same targets and "
            "scale by outcome_transform, which is accounted for."
        )
    if float((a.sort().values - b.sort().values).abs().max()) <= 1e-4 * scale:
        raise ValueError(
            f"{pair}: they have the same targets in another order. Build both on data "
            "in one order."
        )
    raise ValueError(
        f"{pair}: their targets differ, by up to {float((a - b).abs().max()):.4g}. "
        "Build both on the same data."
    )
