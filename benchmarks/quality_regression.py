"""Test scores of the default LinearizedGP beside its rivals on small tabular sets.

Protocol: at most 800 training and 1000 test points, standardised by the training part;
MLP 50-50 ReLU and MLP 50 tanh, trained with early stopping on 10% (``fit_map``'s
defaults); five splits. Scores in standardised units: RMSE, mean test NLL in nats per
point, coverage of the 95% interval. Differences are paired by split, after averaging
over the two architectures; the reference is the network with its validation residual
variance as noise. The rule was fixed on the first four sets; the others confirm it.
Run with ``python benchmarks/quality_regression.py --data PATH``, PATH a folder with
``uci/<name>.npz``; without it, only diabetes (from scikit-learn) is measured.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import problems
import timing
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.model import Model
from botorch.models.transforms import Normalize
from gpytorch.mlls import ExactMarginalLogLikelihood
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from gpbridge import LinearizedGP, metrics
from gpbridge.data import drop_constant_columns, holdout_rows, load_uci, standardize
from gpbridge.dnn import fit_map
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.selection import fit_evidence, fit_matern_plus_kernel
from gpbridge.types import FitResult

DEVELOPMENT = ("diabetes", "boston", "concrete", "energy")
CONFIRMATION = ("airfoil", "autompg", "naval", "power")
NETWORKS = {"50-50 ReLU": ((50, 50), nn.ReLU), "50 tanh": ((50,), nn.Tanh)}
REFERENCE = "network + validation noise"


class Score(NamedTuple):
    """What one model reached on one split."""

    nll: float
    rmse: float
    coverage: float
    seconds: float


class Split(NamedTuple):
    """Standardised parts, ``n x d`` and ``n x 1``."""

    X: Tensor
    Y: Tensor
    test_X: Tensor
    test_Y: Tensor


Predictive = tuple[Tensor, Tensor]  # mean and variance of y, noise included


def load(name: str, split: int, data: Path | None, limits: tuple[int, int]) -> Split:
    """One split, subsampled and standardised."""
    generator = torch.Generator().manual_seed(split)
    if name == "diabetes":
        X, y = (torch.tensor(part) for part in load_diabetes(return_X_y=True))
        rows, test = holdout_rows(len(X), 0.1, generator)
        parts = [X[rows], y[rows, None], X[test], y[test, None]]
    else:
        parts = list(load_uci(data / "uci", name, split))
    for start, limit in zip((0, 2), limits, strict=True):
        rows = torch.randperm(len(parts[start]), generator=generator)[:limit]
        parts[start], parts[start + 1] = parts[start][rows], parts[start + 1][rows]
    # Few rows can make further columns constant.
    parts[0], parts[2] = drop_constant_columns(parts[0], parts[2])
    X, scale_X = standardize(parts[0])
    Y, scale_Y = standardize(parts[1])
    return Split(X, Y, scale_X.transform(parts[2]), scale_Y.transform(parts[3]))


def network_predictive(fit: FitResult, split: Split) -> Predictive:
    """The reference: what a careful user has without a posterior."""
    with torch.no_grad():
        mean = fit.network(split.test_X)
    return mean, fit.validation_variance.expand_as(mean)


def linearized_predictive(fit: FitResult, split: Split, **options: str) -> Predictive:
    """The shipped default: condition on all rows, learn two hyperparameters."""
    model = LinearizedGP.from_fit(fit, split.X, split.Y, **options)
    fit_evidence(model)
    with torch.no_grad():
        predictive = model.predict(split.test_X)
    return predictive.mean.reshape(-1, 1), predictive.variance.reshape(-1, 1)


def stock_predictive(split: Split) -> Predictive:
    """BoTorch's default surrogate on inputs in the unit cube."""
    transform = Normalize(split.X.shape[-1])
    model = SingleTaskGP(split.X, split.Y, input_transform=transform)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 60}})
    return _predict(model, split)


def summed_predictive(split: Split, hidden: tuple[int, ...], seed: int) -> Predictive:
    """Matérn-5/2 plus the tangent kernel of an untrained network, three starts."""
    network = problems.mlp((split.X.shape[-1], *hidden, 1), nn.ReLU, seed).double()
    model = fit_matern_plus_kernel(split.X, split.Y, NeuralTangentKernel(network))
    return _predict(model, split)


def _predict(model: Model, split: Split) -> Predictive:
    with torch.no_grad():
        # One point at a time: the joint covariance is not needed.
        points = split.test_X.unsqueeze(-2)
        posterior = model.posterior(points, observation_noise=True)
        return posterior.mean.squeeze(-2), posterior.variance.squeeze(-2)


def score(predict: Callable[[], Predictive], test_Y: Tensor, spent: float) -> Score:
    """Scores of a model, with its CPU seconds and those that went before."""
    start = time.process_time()
    mean, variance = predict()
    taken = time.process_time() - start + spent
    return Score(
        float(metrics.gaussian_nll(mean, variance, test_Y)),
        float(metrics.rmse(mean, test_Y)),
        float(metrics.interval_coverage(mean, variance, test_Y)),
        taken,
    )


def run(split: Split, architecture: str, seed: int, epochs: int) -> dict[str, Score]:
    """All models on one split with one architecture."""
    hidden, activation = NETWORKS[architecture]
    network = problems.mlp((split.X.shape[-1], *hidden, 1), activation, seed).double()
    start = time.process_time()
    fit = fit_map(
        network,
        split.X,
        split.Y,
        epochs=epochs,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )
    trained = time.process_time() - start
    last = {"parameters": "last_layer", "noise": "validation"}
    models: dict[str, tuple[Callable[[], Predictive], float]] = {
        REFERENCE: (lambda: network_predictive(fit, split), trained),
        "LinearizedGP": (lambda: linearized_predictive(fit, split), trained),
        "last layer": (lambda: linearized_predictive(fit, split, **last), trained),
    }
    if architecture == "50-50 ReLU":  # the others need one architecture only
        models["SingleTaskGP"] = (lambda: stock_predictive(split), 0.0)
        models["Matérn + NTK (untrained)"] = (
            lambda: summed_predictive(split, hidden, seed),
            0.0,
        )
    return {
        name: score(predict, split.test_Y, spent)
        for name, (predict, spent) in models.items()
    }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over splits and its standard error."""
    tensor = torch.tensor(values, dtype=torch.float64)
    error = float(tensor.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
    return float(tensor.mean()), error


def averaged(results: list[dict[str, Score]]) -> dict[str, Score]:
    """Average over the architectures of one split."""
    names = {name: None for result in results for name in result}
    return {
        name: Score(
            *(
                sum(values) / len(values)
                for values in zip(
                    *(result[name] for result in results if name in result),
                    strict=True,
                )
            )
        )
        for name in names
    }


def print_tables(results: dict[str, list[dict[str, Score]]]) -> None:
    """Per set and model, then the verdict on the rule."""
    print("\n| set | model | NLL | paired difference | RMSE | coverage | CPU s |")
    print("|---|---|---|---|---|---|---|")
    differences: dict[str, dict[str, tuple[float, float]]] = {}
    coverages: dict[str, dict[str, float]] = {}
    for name, splits in results.items():
        for model in splits[0]:
            own = [split[model] for split in splits]
            reference = [split[REFERENCE] for split in splits]
            pairs = zip(own, reference, strict=True)
            gap, error = mean_and_error([a.nll - b.nll for a, b in pairs])
            means = [sum(column) / len(own) for column in zip(*own, strict=True)]
            differences.setdefault(model, {})[name] = (gap, error)
            coverages.setdefault(model, {})[name] = means[2]
            print(
                f"| {name} | {model} | {means[0]:.3f} | {gap:+.3f} ± {error:.3f} "
                f"| {means[1]:.3f} | {means[2]:.3f} | {means[3]:.1f} |"
            )
    print("\n| model | sets | mean difference | worst set | worse by .02 | coverage |")
    print("|---|---|---|---|---|---|")
    for label, names in (("fixed on", DEVELOPMENT), ("confirmed on", CONFIRMATION)):
        used = [name for name in names if name in results]
        for model in differences if used else ():
            gaps = {name: differences[model][name][0] for name in used}
            covered = [coverages[model][name] for name in used]
            worst = max(gaps, key=gaps.get)
            worse = sum(gap > 0.02 for gap in gaps.values())
            print(
                f"| {model} | {label} {', '.join(used)} "
                f"| {sum(gaps.values()) / len(gaps):+.3f} "
                f"| {worst} {gaps[worst]:+.3f} | {worse} of {len(used)} "
                f"| {min(covered):.3f} to {max(covered):.3f} |"
            )


def main() -> None:
    """Measure, printing each split as it ends, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--sets", nargs="+", default=[*DEVELOPMENT, *CONFIRMATION])
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one split")
    arguments = parser.parse_args()
    timing.one_thread()
    sets, splits, epochs, limits = arguments.sets, arguments.splits, 300, (800, 1000)
    if arguments.smoke:
        sets, splits, epochs, limits = ["diabetes"], 1, 3, (60, 30)
    if arguments.data is None and any(name != "diabetes" for name in sets):
        print("Only diabetes: the other sets need --data PATH with uci/<name>.npz.")
        sets = ["diabetes"]
    results: dict[str, list[dict[str, Score]]] = {}
    for name in sets:
        for number in range(splits):
            data = arguments.data and Path(arguments.data)
            split = load(name, number, data, limits)
            result = averaged(
                [run(split, network, number, epochs) for network in NETWORKS]
            )
            results.setdefault(name, []).append(result)
            shown = ", ".join(f"{key} {value.nll:.3f}" for key, value in result.items())
            print(f"{name} {number}: {shown}", flush=True)
    print_tables(results)


if __name__ == "__main__":
    main()
