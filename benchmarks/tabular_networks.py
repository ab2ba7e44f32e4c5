"""Heteroscedastic networks on all splits of a table at once.

In: a set and its splits. Out: standardised data ``k x n x d``, a network with a head
for mean and variance, scores of draws in the units of published tables.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from gpbridge import metrics
from gpbridge.data import drop_constant_columns, load_uci, standardize
from gpbridge.heteroscedastic import HeteroscedasticGaussianLikelihood
from gpbridge.predictive_mixture import decompose, predictive

LIKELIHOOD = HeteroscedasticGaussianLikelihood(floor=1e-7)


class Splits(NamedTuple):
    """Standardised parts of k splits, and the unit of the targets of each, ``k``."""

    X: Tensor
    Y: Tensor
    test_X: Tensor
    test_Y: Tensor
    unit: Tensor


class Score(NamedTuple):
    """Of one split, in the units of the table: log likelihood in nats per point."""

    rmse: float
    log_likelihood: float
    mixture_log_likelihood: float
    coverage: float


class HeteroscedasticMLP(nn.Module):
    """One hidden layer, and a head whose variance has a part that all points share.

    Outputs are the mean and a raw variance whose softplus is
    ``softplus(raw) + softplus(shared)``.
    """

    def __init__(self, num_inputs: int, hidden: int = 50, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_inputs, hidden)
        self.head = nn.Linear(hidden, 2)
        self.shared = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, X: Tensor) -> Tensor:
        """Mean and raw variance, ``n x 2``."""
        mean, raw = self.head(self.dropout(torch.relu(self.hidden(X)))).split(1, -1)
        variance = softplus(raw) + softplus(self.shared)
        return torch.cat([mean, variance + torch.log(-torch.expm1(-variance))], -1)


def published_splits(data: Path, name: str, count: int) -> Splits:
    """Random 90/10 splits, standardised by all rows, as in the published protocol."""
    arrays = np.load(data / "uci" / f"{name}.npz")
    X = torch.from_numpy(arrays["X"]).double()
    y = torch.from_numpy(arrays["y"]).double()[:, None]
    unit = y.std(correction=0) + 1e-6
    X = (X - X.mean(0)) / (X.std(0, correction=0) + 1e-6)
    y = (y - y.mean()) / unit
    n, parts = int(0.9 * len(X)), []
    for split in range(1, count + 1):
        order = torch.from_numpy(np.random.RandomState(split).permutation(len(X)))
        rows, test = order[:n], order[n:]
        parts.append([X[rows], y[rows], X[test], y[test], unit])
    return Splits(*(torch.stack(column) for column in zip(*parts, strict=True)))


def standard_splits(data: Path, name: str, count: int) -> Splits:
    """The splits that come with the set, standardised by their training part."""
    parts = []
    for split in range(count):
        X, Y, test_X, test_Y = load_uci(data / "uci", name, split)
        X, test_X = drop_constant_columns(X, test_X)
        X, scale_X = standardize(X)
        Y, scale_Y = standardize(Y)
        unit = scale_Y.inverse_variance(torch.ones(1, 1)).sqrt().squeeze().double()
        parts.append([X, Y, scale_X.transform(test_X), scale_Y.transform(test_Y), unit])
    return Splits(*(torch.stack(column) for column in zip(*parts, strict=True)))


def score(outputs: Tensor, Y: Tensor, unit: Tensor) -> Score:
    """Scores of draws' outputs ``s x t x 2``; moments are those of the mixture."""
    moments = decompose(LIKELIHOOD, outputs)
    mixture = predictive(LIKELIHOOD, outputs).log_prob(Y).mean()
    return gaussian_score(moments.mean, moments.variance, Y, unit, mixture)


def gaussian_score(
    mean: Tensor, variance: Tensor, Y: Tensor, unit: Tensor, mixture: Tensor | None
) -> Score:
    """Scores of a normal predictive, ``t x 1``, in the units of the table."""
    change = math.log(float(unit))
    normal = -float(metrics.gaussian_nll(mean, variance, Y)) - change
    return Score(
        float(unit * metrics.rmse(mean, Y)),
        normal,
        normal if mixture is None else float(mixture) - change,
        float(metrics.interval_coverage(mean, variance, Y)),
    )
