r"""Hyperparameters of local subsets, a start for data that no factor fits.

In: a :class:`~gpbridge.SampledGP` and its data. Out: other hyperparameters. Next:
``iterative_mll`` goes on from them with all data.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gpbridge.checks import check_positive
from gpbridge.posterior_draws import mean_values
from gpbridge.representers import Data
from gpbridge.sampled import SampledGP
from gpbridge.selection.mll import log_prior


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


def fit_subsets(
    work: SampledGP,
    data: Data,
    options: SubsetStart,
    learning_rate: float,
    generator: Generator,
) -> None:
    """Replace the parameters by the average of those that subsets have.

    Args:
        work: The model whose parameters move.
        data: Its data as the kernel sees them.
        options: Sizes.
        learning_rate: Of Adam.
        generator: Source of the subsets.
    """
    spread = data.X.std(0, correction=0)
    scaled = data.X / torch.where(spread > 0, spread, 1.0)  # constant columns stay
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
    evidence = -0.5 * whitened.square().sum() - complexity
    return evidence + log_prior(local, evidence)
