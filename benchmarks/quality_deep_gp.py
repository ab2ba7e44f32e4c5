"""Test scores of deep GPs of depth 1, 2 and 3 beside an SVGP and an exact GP.

Protocol: the standard splits, standardised by the training part; a squared exponential
kernel with a lengthscale per input everywhere; 100 inducing points in each layer, Adam
at 1e-2, minibatches of 1000, as Salimbeni and Deisenroth (NeurIPS 2017) but for fewer
steps. The SVGP is gpytorch's own classes, k-means points, same steps. The exact GP sees
at most 2000 training points. Scores: test log density of the mixture in nats per point
and RMSE, both in the units of the data; differences from depth 1 are paired by split.
Run with ``python benchmarks/quality_deep_gp.py --data PATH``, PATH a folder with
``uci/<name>.npz``; without it, a synthetic set.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import problems
import timing
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean
from gpytorch.mlls import ExactMarginalLogLikelihood, VariationalELBO
from gpytorch.models import ApproximateGP
from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy
from torch import Tensor
from torch.distributions import Distribution, Normal

from gpbridge.centroids import centroids
from gpbridge.data import Minibatches, load_uci, standardize
from gpbridge.dnn import build_deep_gp, fit_deep_gp

BATCH = 1000
EXACT_POINTS = 2000


class Split(NamedTuple):
    """Standardised parts, and the unit of the targets."""

    X: Tensor
    Y: Tensor
    test_X: Tensor
    test_Y: Tensor
    unit: float


class Size(NamedTuple):
    """How long and how large."""

    steps: int
    num_inducing: int
    rows: int  # of training data at most


class Score(NamedTuple):
    """Of one split: nats per point and RMSE in the units of the data."""

    log_density: float
    rmse: float
    seconds: float


class SVGP(ApproximateGP):
    """The sparse GP of gpytorch's documentation."""

    def __init__(self, Z: Tensor) -> None:
        strategy = VariationalStrategy(
            self, Z, CholeskyVariationalDistribution(len(Z)), True
        )
        super().__init__(strategy)
        self.mean_module = ConstantMean()
        self.covar_module = ScaleKernel(RBFKernel(ard_num_dims=Z.shape[-1]))

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def load(name: str, number: int, data: Path | None, rows: int) -> Split:
    """A standardised split, of at most so many training rows."""
    if data is None:
        parts = problems.smooth_regression(rows, 100, torch.float64, number)
        X, Y, test_X, test_Y = parts
    else:
        X, Y, test_X, test_Y = load_uci(data / "uci", name, number)
    generator = torch.Generator().manual_seed(number)
    chosen = torch.randperm(len(X), generator=generator)[:rows]
    X, scale_X = standardize(X[chosen])
    Y, scale_Y = standardize(Y[chosen])
    unit = scale_Y.inverse_variance(torch.ones(1, 1).to(Y)).sqrt().item()
    return Split(X, Y, scale_X.transform(test_X), scale_Y.transform(test_Y), unit)


def exact_gp(split: Split, size: Size, seed: int) -> Callable[[Tensor], Distribution]:
    """Maximum likelihood on a part of the data."""
    X, Y = split.X[:EXACT_POINTS], split.Y[:EXACT_POINTS]
    kernel = ScaleKernel(RBFKernel(ard_num_dims=X.shape[-1]))
    model = SingleTaskGP(X, Y, covar_module=kernel, outcome_transform=None)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))

    def predict(x: Tensor) -> Distribution:
        f = model.posterior(x, observation_noise=True)
        return Normal(f.mean, f.variance.sqrt())

    return predict


def svgp(split: Split, size: Size, seed: int) -> Callable[[Tensor], Distribution]:
    """Gpytorch's own classes and loop."""
    generator = torch.Generator().manual_seed(seed)
    Z = centroids(split.X, size.num_inducing, generator)
    with torch.random.fork_rng(devices=[]):  # the first call draws from it
        model, likelihood = SVGP(Z).to(Z), GaussianLikelihood().to(Z)
        likelihood.noise = 1e-2
        objective = VariationalELBO(likelihood, model, len(split.X))
        params = [*model.parameters(), *likelihood.parameters()]
        optimizer = torch.optim.Adam(params, lr=1e-2)
        batches = Minibatches(
            split.X, split.Y[:, 0], batch_size=BATCH, generator=generator
        )
        for _ in range(epochs_of(split, size)):
            for X, y in batches:
                optimizer.zero_grad()
                (-objective(model(X), y)).backward()
                optimizer.step()
    model.eval(), likelihood.eval()

    def predict(x: Tensor) -> Distribution:
        f = model(x)
        std = (f.variance + likelihood.noise).sqrt()
        return Normal(f.mean[:, None], std[:, None])

    return predict


def deep_gp(depth: int) -> Callable[..., Callable[[Tensor], Distribution]]:
    """Our builder and fit."""

    def fitted(split: Split, size: Size, seed: int) -> Callable[[Tensor], Distribution]:
        generator = torch.Generator().manual_seed(seed)
        model = build_deep_gp(
            split.X, depth=depth, num_inducing=size.num_inducing, generator=generator
        )
        epochs = epochs_of(split, size)
        options = {"epochs": epochs, "batch_size": BATCH, "num_samples": 2}
        fit = fit_deep_gp(model, split.X, split.Y, generator=generator, **options)
        return fit.model.predict

    return fitted


MODELS = {
    "exact GP": exact_gp,
    "SVGP of gpytorch": svgp,
    "depth 1": deep_gp(1),
    "depth 2": deep_gp(2),
    "depth 3": deep_gp(3),
}


def epochs_of(split: Split, size: Size) -> int:
    """As many as make the number of steps."""
    return max(1, size.steps // -(-len(split.X) // BATCH))


def run(split: Split, size: Size, seed: int) -> dict[str, Score]:
    """All models on one split."""
    scores = {}
    for name, fit in MODELS.items():
        result: list[Callable[[Tensor], Distribution]] = []
        seconds = timing.seconds(
            lambda fit=fit, result=result: result.append(fit(split, size, seed))
        )
        with torch.no_grad():
            parts = [result[0](x) for x in split.test_X.split(1000)]
        mean = torch.cat([part.mean for part in parts])
        targets = split.test_Y.split(1000)
        density = [p.log_prob(y) for p, y in zip(parts, targets, strict=True)]
        scores[name] = Score(
            float(torch.cat(density).mean()) - math.log(split.unit),
            split.unit * float((mean - split.test_Y).square().mean().sqrt()),
            seconds,
        )
    return scores


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    column = torch.tensor(values)
    error = (
        column.std() / len(values) ** 0.5 if len(values) > 1 else column.new_zeros(())
    )
    return float(column.mean()), float(error)


def main() -> None:
    """Measure, printing each split as it ends, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--sets", nargs="+", default=["energy", "power"])
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one split")
    arguments = parser.parse_args()
    timing.one_thread()
    sets, splits = arguments.sets, arguments.splits
    size = Size(arguments.steps, 100, 10_000)
    if arguments.smoke:
        sets, splits, size = sets[:1], 1, Size(5, 10, 60)
    data = arguments.data and Path(arguments.data)
    if data is None:
        print("A synthetic set: UCI needs --data PATH with uci/<name>.npz.")
        sets = ["synthetic"]
        size = size._replace(rows=min(size.rows, 1000))
    results: dict[str, list[dict[str, Score]]] = {}
    for name in sets:
        for number in range(splits):
            result = run(load(name, number, data, size.rows), size, number)
            results.setdefault(name, []).append(result)
            shown = ", ".join(f"{k} {v.log_density:.3f}" for k, v in result.items())
            print(f"{name} {number}: {shown}", flush=True)
    print("\n| set | model | log density | less depth 1 | RMSE | CPU s |")
    print("|---|---|---|---|---|---|")
    for name, splits_of in results.items():
        for model in MODELS:
            own = [split[model] for split in splits_of]
            base = [split["depth 1"] for split in splits_of]
            pairs = zip(own, base, strict=True)
            gap, error = mean_and_error(
                [a.log_density - b.log_density for a, b in pairs]
            )
            means = [sum(column) / len(own) for column in zip(*own, strict=True)]
            print(
                f"| {name} | {model} | {means[0]:.3f} | {gap:+.3f} ± {error:.3f} "
                f"| {means[1]:.4g} | {means[2]:.0f} |"
            )


if __name__ == "__main__":
    main()
