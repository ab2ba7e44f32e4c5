"""How a method chooses the next experiments: fit a surrogate, maximise an acquisition.

``propose`` is one iteration. Fitting starts from the last surrogate where it can; an
acquisition function is a sample average over frozen samples, maximised by L-BFGS from
several starts, over categories by descents that change one at a time. Thompson sampling
takes as many functions as experiments are asked for.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.acquisition.multi_objective.logei import (
    qLogNoisyExpectedHypervolumeImprovement,
)
from botorch.fit import fit_gpytorch_mll
from botorch.models import MixedSingleTaskGP, SingleTaskGP
from botorch.models.model import Model
from botorch.models.transforms import Normalize
from botorch.optim import optimize_acqf, optimize_acqf_discrete_local_search
from botorch.optim.initializers import initialize_q_batch
from botorch.sampling.get_sampler import get_sampler
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Generator, Tensor

from bayesopt.problems import Problem
from gpbridge.acquisition import thompson_sample
from gpbridge.checks import ReliabilityWarning
from gpbridge.surrogates import (
    DeepKernelSurrogate,
    DropoutSurrogate,
    EnsembleSurrogate,
    InfiniteWidthSurrogate,
    LastLayerSurrogate,
    LinearizedSurrogate,
    MaternTangentSurrogate,
    Recipe,
    SGHMCSurrogate,
    SubspaceSurrogate,
    SWAGSurrogate,
    TangentSurrogate,
    tanh_network,
)


@dataclass(frozen=True)
class Settings:
    """Effort of an iteration; equal for every method."""

    epochs: int = 300
    update_epochs: int = 100
    num_samples: int = 128
    num_restarts: int = 4
    raw_samples: int = 128
    maxiter: int = 50
    candidates: int = 2000  # of Thompson sampling
    iterations: int | None = None  # instead of the problem's


SMOKE = Settings(5, 3, 16, 1, 8, 3, 20, iterations=2)


class Proposal(NamedTuple):
    """Experiments to run next, ``q x d``, and the surrogate that chose them."""

    X: Tensor
    model: Model
    notes: list[str]


class Gaussian:
    """botorch's own process with its defaults, fitted anew each time.

    Categories are for its mixed sibling, whose kernel counts how many differ.
    """

    def fit(self, problem: Problem, X: Tensor, Y: Tensor, last: Model | None) -> Model:
        if problem.categories:
            model = MixedSingleTaskGP(X, Y, cat_dims=list(problem.categories))
        else:
            scale = Normalize(problem.dim, bounds=problem.bounds)
            model = SingleTaskGP(X, Y, input_transform=scale)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model


class Recipes:
    """A recipe of the library with its defaults and the problem's network."""

    def __init__(self, kind: type[Recipe], settings: Settings, seed: int, **options):
        self.kind, self.settings = kind, settings
        self.seed, self.options = seed, options

    def fit(self, problem: Problem, X: Tensor, Y: Tensor, last: Model | None) -> Model:
        if last is not None:
            return last.surrogate_fit.recipe.update(last, X, Y)
        given = {
            "bounds": problem.bounds,
            "categories": problem.categories,
            "network": problem.network,
            "epochs": self.settings.epochs,
            "update_epochs": self.settings.update_epochs,
            "seed": self.seed,
        }
        return self.kind(**given | self.options).fit(X, Y)


SHORTLIST = {
    "LinearizedSurrogate": LinearizedSurrogate,
    "MaternTangentSurrogate": MaternTangentSurrogate,
    "DeepKernelSurrogate": DeepKernelSurrogate,
    "EnsembleSurrogate": EnsembleSurrogate,
}
OTHERS = {
    "LastLayerSurrogate": LastLayerSurrogate,
    "TangentSurrogate": TangentSurrogate,
    "InfiniteWidthSurrogate": InfiniteWidthSurrogate,
    "DropoutSurrogate": DropoutSurrogate,
    "SWAGSurrogate": SWAGSurrogate,
    "SubspaceSurrogate": SubspaceSurrogate,
    "SGHMCSurrogate": SGHMCSurrogate,
}
GP = "SingleTaskGP"
DESIGNS = ("random", "Sobol")
DENSE = " (dense)"  # ends the name of a method that is not shown the problem's network


def surrogate(method: str, settings: Settings, seed: int) -> Gaussian | Recipes:
    """What fits the surrogate of a method."""
    if method == GP:
        return Gaussian()
    kinds = SHORTLIST | OTHERS
    kind = kinds.get(method.removesuffix(DENSE))
    if kind is None:
        names = ", ".join((*DESIGNS, GP, *kinds))
        raise ValueError(f"method must be one of {names}, but is {method!r}.")
    options = {"network": tanh_network} if method.endswith(DENSE) else {}
    return Recipes(kind, settings, seed, **options)


def propose(
    problem: Problem,
    fitter: Gaussian | Recipes,
    acquisition: str,
    X: Tensor,
    Y: Tensor,
    last: Model | None,
    settings: Settings,
    seed: int,
) -> Proposal:
    """One iteration.

    All random numbers follow from ``seed``, the global ones included, which botorch
    draws from.
    """
    notes: list[str] = []
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        torch.manual_seed(seed)
        model = fitter.fit(problem, X, Y, last)
        chosen = suggest(problem, model, acquisition, X, Y, settings, seed)
    for warning in seen:
        if issubclass(warning.category, ReliabilityWarning):
            notes.append(str(warning.message))
    return Proposal(chosen, model, notes)


def suggest(
    problem: Problem,
    model: Model,
    acquisition: str,
    X: Tensor,
    Y: Tensor,
    settings: Settings,
    seed: int,
) -> Tensor:
    """Where to look next, ``q x d``."""
    if acquisition == "thompson":
        return thompson(problem, model, X, Y, settings, seed)
    function = improvement(problem, model, X, Y, settings, seed)
    if problem.categories:
        choices = [torch.arange(c).to(X) for c in problem.categories.values()]
        return optimize_acqf_discrete_local_search(
            function,
            choices,
            q=problem.batch_size,
            num_restarts=settings.num_restarts,
            raw_samples=settings.raw_samples,
            X_avoid=X,
        )[0]
    return optimize_acqf(
        function,
        problem.bounds,
        q=problem.batch_size,
        num_restarts=settings.num_restarts,
        batch_initial_conditions=starts(problem, function, X, Y, settings, seed),
        options={"maxiter": settings.maxiter},
    )[0]


def starts(
    problem: Problem,
    function: AcquisitionFunction,
    X: Tensor,
    Y: Tensor,
    settings: Settings,
    seed: int,
) -> Tensor:
    """Starts of an ascent, ``r x q x d``: the more promising of many candidates.

    Upstream can draw candidates around the best inputs too, but not for models that
    keep no training inputs; these are the same for all.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (settings.raw_samples, problem.batch_size)
    candidates = candidate_inputs(problem, X, Y, math.prod(shape), generator)
    order = torch.randperm(len(candidates), generator=generator)
    candidates = candidates[order].reshape(*shape, problem.dim)
    with torch.no_grad():
        values = torch.cat([function(part) for part in candidates.split(32)])
    return initialize_q_batch(candidates, values, settings.num_restarts)[0]


def improvement(
    problem: Problem, model: Model, X: Tensor, Y: Tensor, settings: Settings, seed: int
) -> AcquisitionFunction:
    """Expected improvement of the best value, or of the hypervolume."""
    with torch.no_grad():
        posterior = model.posterior(X[:1])
    sampler = get_sampler(posterior, torch.Size([settings.num_samples]), seed=seed)
    if problem.ref_point is None:
        return qLogExpectedImprovement(model, best_f=Y.max(), sampler=sampler)
    return qLogNoisyExpectedHypervolumeImprovement(
        model,
        ref_point=list(problem.ref_point),
        X_baseline=X,
        sampler=sampler,
        prune_baseline=True,
        cache_root=False,
    )


def thompson(
    problem: Problem, model: Model, X: Tensor, Y: Tensor, settings: Settings, seed: int
) -> Tensor:
    """Maximisers of functions drawn from the posterior, ascended from many starts."""
    if problem.ref_point is not None:
        raise ValueError(
            f"Thompson sampling here is for one outcome, but {problem.name} has "
            f"{len(problem.ref_point)}. Choose the acquisition 'improvement'."
        )
    generator = torch.Generator().manual_seed(seed)
    candidates = candidate_inputs(problem, X, Y, settings.candidates, generator)
    q = problem.batch_size
    if problem.categories:  # among choices a joint sample is exact for every kernel
        with torch.no_grad():
            values = model.posterior(candidates).rsample(torch.Size([q]))[..., 0]
        return candidates[values.argmax(-1)]
    return thompson_sample(
        *(model, problem.bounds, q),
        starts=candidates,
        num_restarts=settings.num_restarts,
        raw_samples=settings.raw_samples,
        max_evaluations=settings.maxiter,
        generator=generator,
    ).candidates


def candidate_inputs(
    problem: Problem, X: Tensor, Y: Tensor, count: int, generator: Generator
) -> Tensor:
    """Candidates ``count x d``: half fill the space, half are near the best so far.

    The latter differ from one of the leaders in about five columns, by a normal number
    of a tenth of the width, or by another category.
    """
    U = torch.rand(count, problem.dim, generator=generator).to(X)
    candidates = problem.to_inputs(U)
    near = candidates[count // 2 :]
    rows = problem.leaders(Y)
    chosen = torch.randint(len(rows), (len(near),), generator=generator)
    best = X[rows[chosen]]
    moved = torch.rand(near.shape, generator=generator) < min(1.0, 5 / problem.dim)
    if not problem.categories:
        low, high = problem.bounds
        step = 0.1 * (high - low) * torch.randn(near.shape, generator=generator).to(X)
        near = torch.minimum(torch.maximum(best + step, low), high)
    candidates[count // 2 :] = torch.where(moved, near, best)
    return candidates
