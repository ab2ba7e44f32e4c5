"""One iteration of Bayesian optimisation: every surrogate recipe against SingleTaskGP.

Hartmann-6, n = 200, float64. An iteration is what a loop does after each observation:
refit, then optimise qLogEI for one candidate. The stock surrogate fits from scratch, as
BoTorch loops do; recipes ``update`` a model of the first 199 rows. All else is equal:
128 samples (for ensembles each member once), restarts, raw samples and iterations.
Run with ``python benchmarks/bench_surrogates.py [--smoke]``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import timing
import torch
from botorch import fit_gpytorch_mll
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.models import SingleTaskGP
from botorch.models.model import Model
from botorch.optim import optimize_acqf
from botorch.sampling.get_sampler import get_sampler
from botorch.test_functions import Hartmann
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

from gpbridge import surrogates
from gpbridge.surrogates import Recipe

TARGETS = {  # at most three times SingleTaskGP's time
    "LinearizedSurrogate": 1 / 3,
    "EnsembleSurrogate": 1 / 3,
    "DeepKernelSurrogate": 1 / 3,
}


def experiments(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, outcomes to be maximised, and bounds."""
    function = Hartmann(dim=6, negate=True).double()
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(n, 6, generator=generator, dtype=torch.float64)
    return X, function(X).unsqueeze(-1), function.bounds


def stock(X: Tensor, Y: Tensor) -> Model:
    """BoTorch's default surrogate, fitted as in its tutorials."""
    model = SingleTaskGP(X, Y)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def recipes(bounds: Tensor, smoke: bool) -> dict[str, Recipe]:
    """Every recipe with its defaults; in smoke size with next to no training."""
    names = [name for name in surrogates.__all__ if name.endswith("Surrogate")]
    found = {}
    for name in names:
        options = {"bounds": bounds}
        if smoke:
            options |= {"epochs": 3, "update_epochs": 2}
        if name == "SGHMCSurrogate" and smoke:
            options |= {"steps_per_cycle": 10, "samples_per_cycle": 2}
        found[name] = getattr(surrogates, name)(**options)
    return found


def candidate(model: Model, best: Tensor, bounds: Tensor, smoke: bool) -> Tensor:
    """The maximiser of qLogEI, from the same starts for every model."""
    with torch.no_grad():
        posterior = model.posterior(bounds[:1])
    sampler = get_sampler(posterior, torch.Size([128]), seed=0)
    function = qLogExpectedImprovement(model, best_f=best, sampler=sampler)
    found, _ = optimize_acqf(
        function,
        bounds,
        q=1,
        num_restarts=2 if smoke else 10,
        raw_samples=4 if smoke else 256,
        options={"maxiter": 2 if smoke else 50, "seed": 0},
    )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of recipes")
    arguments = parser.parse_args()
    timing.one_thread()
    torch.manual_seed(0)
    n, repeats = (30, 1) if arguments.smoke else (200, arguments.repeats)
    X, Y, bounds = experiments(n)
    best, smoke = Y.max(), arguments.smoke
    parts: dict[str, Callable[[], Model]] = {"SingleTaskGP": lambda: stock(X, Y)}
    for name, recipe in recipes(bounds, smoke).items():
        if arguments.only and name not in arguments.only:
            continue
        last = recipe.fit(X[:-1], Y[:-1])
        parts[name] = lambda recipe=recipe, last=last: recipe.update(last, X, Y)
    models = {}

    def refit(name: str) -> None:
        models[name] = parts[name]()

    tasks = {}
    for name in parts:
        tasks[f"{name} refit"] = lambda name=name: refit(name)
        tasks[f"{name} acquisition"] = lambda name=name: candidate(
            models[name], best, bounds, smoke
        )
    times = timing.interleave(tasks, repeats)
    whole = {
        name: [
            a + b
            for a, b in zip(
                times[f"{name} refit"], times[f"{name} acquisition"], strict=True
            )
        ]
        for name in parts
    }
    rows = [
        timing.compare(
            f"iteration, n={n}, d=6, {name}",
            "SingleTaskGP",
            whole[name],
            whole["SingleTaskGP"],
            TARGETS.get(name),
        )
        for name in parts
        if name != "SingleTaskGP"
    ]
    timing.print_rows("Surrogates", rows, [_halves(name, times) for name in parts])


def _halves(name: str, times: dict[str, list[float]]) -> str:
    shown = [
        timing.show_seconds(statistics.median(times[f"{name} {half}"]))
        for half in ("refit", "acquisition")
    ]
    return f"{name}: refit {shown[0]}, acquisition {shown[1]}."


if __name__ == "__main__":
    main()
