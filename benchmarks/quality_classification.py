"""Calibration of the LinearizedGP on digits and on 2000 Fashion-MNIST images.

Every network trains on 90% of the training part; the other 10% calibrate, in the same
way for the network's temperature and for ``LinearizedGP.calibrate``. Scores on 500
digits or 2000 images: accuracy, NLL, ECE (15 bins), and the AUROC of the largest
probability against other data: uniform noise for digits, MNIST for Fashion-MNIST.
Differences are paired by network. The rule was fixed on digits; Fashion-MNIST confirms
it. Run with ``python benchmarks/quality_classification.py --data PATH``, PATH a folder
with ``images/<name>.npz``; without it, only digits (from scikit-learn) are measured.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import problems
import timing
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from gpbridge import LinearizedGP, metrics
from gpbridge.data import holdout_rows, load_images
from gpbridge.dnn import fit_map

MODELS = ("MAP", "MAP + temperature", "LinearizedGP, calibrated")
TRAINING = {  # options of fit_map
    "no decay": {"weight_decay": 0.0},
    "decay 5e-4": {"weight_decay": 5e-4},
    "early stop": {"weight_decay": 0.0, "early_stopping": True},
}


class Problem(NamedTuple):
    """Flat images ``n x d``, labels ``n``, and images of another kind."""

    X: Tensor
    y: Tensor
    test_X: Tensor
    test_y: Tensor
    other_X: Tensor


class Score(NamedTuple):
    """What one model reached with one network."""

    accuracy: float
    nll: float
    ece: float
    auroc: float


def digits(seed: int, limits: tuple[int, int]) -> Problem:
    """1297 and 500 images of 8 x 8 pixels."""
    X, y = load_digits(return_X_y=True)
    X, y = torch.tensor(X, dtype=torch.float32) / 16, torch.tensor(y)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(X), generator=generator)
    train, test = order[500:][: limits[0]], order[:500][: limits[1]]
    noise = torch.rand(len(test), X.shape[1], generator=generator)
    return Problem(X[train], y[train], X[test], y[test], noise)


def fashion(seed: int, limits: tuple[int, int], data: Path, pooled: bool) -> Problem:
    """2000 and 2000 images, 28 x 28 pixels or their 2 x 2 means."""
    generator = torch.Generator().manual_seed(seed)
    X, y, test_X, test_y = load_images(data / "images", "fashion_mnist")
    _, _, other_X, _ = load_images(data / "images", "mnist", num_train=1)
    parts = []
    for images, limit in zip((X, test_X, other_X), (*limits, limits[1]), strict=True):
        rows = torch.randperm(len(images), generator=generator)[:limit]
        chosen = F.avg_pool2d(images[rows], 2) if pooled else images[rows]
        parts.append((chosen.flatten(1), rows))
    (X, rows), (test_X, test_rows), (other_X, _) = parts
    return Problem(X, y[rows], test_X, test_y[test_rows], other_X)


def fashion_cnn(seed: int) -> nn.Sequential:
    """Two strided convolutions on 28 x 28 images, p = 1686."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(6, 16, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def scores(probabilities: Tensor, other: Tensor, labels: Tensor) -> Score:
    """All scores of one model."""
    doubt = 1 - torch.cat([probabilities, other]).amax(-1)
    is_other = torch.arange(len(doubt)) >= len(labels)
    return Score(
        float(metrics.accuracy(probabilities, labels)),
        float(metrics.categorical_nll(probabilities, labels)),
        float(metrics.expected_calibration_error(probabilities, labels)),
        float(metrics.auroc(doubt, is_other)),
    )


def run(
    problem: Problem,
    network: nn.Module,
    training: str,
    seed: int,
    epochs: int,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[dict[str, Score], bool]:
    """The three models with one network, and whether calibration was adopted."""
    generator = torch.Generator().manual_seed(seed)
    rows, held_out = holdout_rows(len(problem.X), 0.1, generator)
    options = {"early_stopping": False, "schedule": "cosine", "learning_rate": 1e-2}
    fit = fit_map(
        network,
        problem.X,
        problem.y,
        epochs=epochs,
        validation_rows=held_out,
        input_shape=input_shape,
        generator=generator,
        progress=False,
        **(options | TRAINING[training]),
    )

    def logits(X: Tensor) -> Tensor:
        with torch.no_grad():
            return fit.network(
                X if input_shape is None else X.unflatten(-1, input_shape)
            )

    X_val, y_val = problem.X[held_out], problem.y[held_out]
    temperature = metrics.fit_temperature(
        logits(X_val).log_softmax(-1), y_val, bounds=(0.5, 10.0)
    )
    # The held-out rows must stay unseen by the posterior that they calibrate.
    model = LinearizedGP(
        fit.network, problem.X[rows], problem.y[rows], input_shape=input_shape
    )
    model.calibrate(X_val, y_val)
    parts = problem.test_X, problem.other_X
    with torch.no_grad():
        calibrated = [model.predict(X).probs.to(X) for X in parts]
    plain = [logits(X).softmax(-1) for X in parts]
    cooled = [(logits(X) / temperature).softmax(-1) for X in parts]
    result = {
        name: scores(*probabilities, problem.test_y)
        for name, probabilities in zip(MODELS, (plain, cooled, calibrated), strict=True)
    }
    return result, not torch.allclose(plain[0], calibrated[0], atol=1e-5)


def print_tables(results: dict[str, list[tuple[dict[str, Score], bool]]]) -> None:
    """Means per kind of network, then paired differences per data set."""
    print("\n| network | model | accuracy | NLL | ECE | AUROC | adopted |")
    print("|---|---|---|---|---|---|---|")
    for kind, runs in results.items():
        for model in MODELS:
            columns = zip(*(scored[model] for scored, _ in runs), strict=True)
            means = " | ".join(f"{sum(c) / len(runs):.3f}" for c in columns)
            adopted = sum(flag for _, flag in runs) if model == MODELS[-1] else ""
            total = f" of {len(runs)}" if model == MODELS[-1] else ""
            print(f"| {kind} | {model} | {means} | {adopted}{total} |")
    print("\nAgainst MAP on the same network, mean (worst network):\n")
    print(
        "| data | model | NLL | ECE | AUROC | NLL worse by .003 | ECE worse by .005 |"
    )
    print("|---|---|---|---|---|---|---|")
    for data in dict.fromkeys(kind.split(" ")[0] for kind in results):
        runs = [
            run
            for kind, group in results.items()
            if kind.startswith(data)
            for run in group
        ]
        for model in MODELS[1:]:
            pairs = [(scored[model], scored["MAP"]) for scored, _ in runs]
            nll = [a.nll - b.nll for a, b in pairs]
            ece = [a.ece - b.ece for a, b in pairs]
            area = [a.auroc - b.auroc for a, b in pairs]
            print(
                f"| {data} | {model} | {sum(nll) / len(nll):+.3f} ({max(nll):+.3f}) "
                f"| {sum(ece) / len(ece):+.3f} ({max(ece):+.3f}) "
                f"| {sum(area) / len(area):+.3f} ({min(area):+.3f}) "
                f"| {sum(x > 0.003 for x in nll)} of {len(nll)} "
                f"| {sum(x > 0.005 for x in ece)} of {len(ece)} |"
            )
        areas = [
            scored[MODELS[-1]].auroc - scored["MAP"].auroc
            for scored, flag in runs
            if flag
        ]
        if areas:
            mean = sum(areas) / len(areas)
            print(f"\nAUROC where adopted ({len(areas)} networks): {mean:+.3f}\n")


def main() -> None:
    """Measure, printing each network as it ends, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one network")
    arguments = parser.parse_args()
    timing.one_thread()
    seeds, epochs, digit_limits, image_limits = arguments.seeds, 150, (1297, 500), None
    kinds = [("digits MLP", training) for training in TRAINING]
    if arguments.data is None:
        print("Only digits: Fashion-MNIST needs --data PATH with images/<name>.npz.")
    else:
        image_limits = (2000, 2000)
        kinds += [("fashion MLP", training) for training in TRAINING]
        kinds += [("fashion CNN", "decay 5e-4")]
    if arguments.smoke:
        seeds, epochs, digit_limits, kinds = 1, 2, (100, 40), kinds[:1]
    results: dict[str, list[tuple[dict[str, Score], bool]]] = {}
    for kind, training in kinds:
        for seed in range(seeds):
            shape = None
            if kind == "digits MLP":
                problem = digits(seed, digit_limits)
                network = problems.mlp((64, 20, 20, 10), nn.ReLU, seed)
            elif kind == "fashion MLP":
                problem = fashion(seed, image_limits, Path(arguments.data), pooled=True)
                network = problems.mlp((196, 10, 10, 10), nn.ReLU, seed)
            else:
                problem = fashion(
                    seed, image_limits, Path(arguments.data), pooled=False
                )
                network, shape = fashion_cnn(seed), (1, 28, 28)
            start = time.process_time()
            result = run(problem, network, training, seed, epochs, shape)
            results.setdefault(f"{kind}, {training}", []).append(result)
            shown = ", ".join(
                f"{key} {value.nll:.3f}" for key, value in result[0].items()
            )
            taken = time.process_time() - start
            print(
                f"{kind}, {training}, {seed}: NLL {shown} ({taken:.0f} s)", flush=True
            )
    print_tables(results)


if __name__ == "__main__":
    main()
