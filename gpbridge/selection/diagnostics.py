"""What a fitted regression says about whether to trust it, free after the fit.

In: a model whose hyperparameters were learnt by evidence. Out: numbers with measured
thresholds, and warnings that name a remedy. Next: ``evidence`` calls this.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gpbridge.checks import ReliabilityWarning, warn_user
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.mode import find_mode
from gpbridge.linearized.structures import Structure
from gpbridge.types import Evidence

_NOISE_RATIO = 1.2
_PRUNED = 0.1
_INTERPOLATING = 0.95


class Diagnostics(NamedTuple):
    """Free diagnostics of a Gaussian regression.

    Attributes:
        noise_ratio: Learnt noise over the network's mean squared training error. Above
            1.2 the features were overfitted: measured on 108 networks, test NLL is then
            worse than the network's in 26 to 75 %, below in 3 %.
        mean_shift: Root mean square of (linear mean - network output) on the training
            points, in units of the noise standard deviation. Above 1 the network is not
            at its optimum, and its output should not be the mean.
        group_ratio: Smallest over largest prior variance of the groups. Below 0.1
            layers were pruned and the model is overconfident.
        effective_dimension: Directions that the data determine, at most n m.
    """

    noise_ratio: float
    mean_shift: float
    group_ratio: float
    effective_dimension: float


@torch.no_grad()
def diagnose(model: LinearizedGP, result: Evidence, warn: bool = True) -> Diagnostics:
    """Compute the diagnostics of a regression, and warn where one is out of bounds.

    Args:
        model: A fitted model with Gaussian noise.
        result: Its evidence.
        warn: Whether to warn.

    Returns:
        The diagnostics.

    Warns:
        ReliabilityWarning: For each diagnostic out of bounds.
    """
    problem = model.problem
    targets, outputs = problem.Y, problem.outputs
    noise = model.noise_variance.double()
    misfit = targets - outputs
    if model.fit_result is not None:
        misfit = misfit[model.fit_result.fit_rows]
    error = misfit.square().mean(0)
    linear = find_mode(problem, model.prior_variance).values
    shift = ((linear - outputs).square() / noise).mean().sqrt()
    variance = model.prior_variance.detach()
    found = Diagnostics(
        float((noise / error).max()) if noise.dim() == 1 else float("nan"),
        float(shift),
        float(variance.min() / variance.max()),
        float(result.effective_dimension),
    )
    if warn:
        for message in _messages(model, found):
            warn_user(message, ReliabilityWarning)
    return found


def _messages(model: LinearizedGP, found: Diagnostics) -> list[str]:
    messages = []
    count = model.problem.outputs.numel()
    if model.noise == "learn" and found.noise_ratio > _NOISE_RATIO:
        messages.append(
            f"The learnt noise is {found.noise_ratio:.2f} times the network's training "
            "error (expected at most 1.2): the network's features are overfitted. "
            "Train with early stopping (gpbridge.dnn.fit_map) or with matched weight "
            "decay (gpbridge.selection.MatchedWeightDecay)."
        )
    if model.mean == "network" and found.mean_shift > 1:
        chosen = model.fit_result is not None
        remedy = (
            "The validation rows chose its mean all the same: train longer, and trust "
            "the mean more than the variances."
            if chosen
            else "Use mean='linear_model'."
        )
        messages.append(
            f"The network's output is {found.mean_shift:.1f} noise standard deviations "
            "from the linear model's mean on the training data (expected at most 1), "
            f"so the network is not at its optimum. {remedy}"
        )
    if found.group_ratio < _PRUNED:
        messages.append(
            f"The smallest prior variance is {found.group_ratio:.1e} of the largest: "
            "layers were pruned and the posterior is overconfident, whatever the "
            "evidence says. Use groups='all'."
        )
    exact = not isinstance(model.inference, Structure)  # which may count too many
    if exact and found.effective_dimension > _INTERPOLATING * count:
        messages.append(
            f"The data determine {found.effective_dimension:.0f} directions of {count} "
            "observations: the model interpolates, and its noise is not interpretable. "
            "Check for duplicates or noise-free data."
        )
    return messages
