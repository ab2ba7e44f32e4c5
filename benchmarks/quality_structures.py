"""Calibration of every curvature structure, ours and the peer's, on the same networks.

Digits (MLP 64-64-64-10, 1297 images, 500 tests) and 10,000 images of MNIST and of
Fashion-MNIST (small CNN, p = 20,522; the first 2,000 test images), float32. A network
trains on 90% with weight decay 5e-4; the other 10% give the network its temperature,
choose our prior and temperature (``calibrate``), and the peer's prior (grid search of
21 precisions by held-out NLL; or its evidence, 100 steps). Scores: accuracy, NLL, ECE
(15 bins), AUROC of the largest probability against other data: noise for digits, MNIST
and Fashion-MNIST for each other. Differences are paired by network.
Run with ``python benchmarks/quality_structures.py --data PATH [--sets digits]``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import image_networks
import peers
import problems
import quality_classification
import timing
import torch
from quality_classification import Problem, Score, scores
from torch import Tensor, nn

from gpbridge import LinearizedGP, metrics
from gpbridge.data import holdout_rows, load_images
from gpbridge.dnn import fit_map
from gpbridge.linearized import Diagonal, Exact, Kronecker, LowRank

BATCH = 100
OURS = {
    "Kronecker": Kronecker(),
    "EKFAC": Kronecker(eigenvalue_correction=True),
    "diagonal": Diagonal(),
    "low rank 200": LowRank(200),
}
THEIRS = {  # subset of weights, Hessian structure
    "kron": ("all", "kron"),
    "diag": ("all", "diag"),
    "last layer": ("last_layer", "full"),
}
PRECISIONS = torch.logspace(-4, 4, 21)


class Trained(NamedTuple):
    """A network, and who has seen what."""

    network: nn.Module
    problem: Problem
    rows: Tensor
    held_out: Tensor
    image: tuple[int, ...] | None

    def shaped(self, X: Tensor) -> Tensor:
        return X if self.image is None else X.unflatten(-1, self.image)

    def logits(self, X: Tensor) -> Tensor:
        with torch.no_grad():
            parts = self.shaped(X).split(500)
            return torch.cat([self.network(x) for x in parts])


def images(name: str, seed: int, data: Path, smoke: bool) -> Problem:
    """Standardised flat images of one set, tests, and tests of the other set."""
    n, t = (200, 50) if smoke else (10_000, 2_000)
    other = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}[name]
    X, y, test_X, test_y = load_images(data / "images", name, num_test=t)
    _, _, other_X, _ = load_images(data / "images", other, num_train=1, num_test=t)
    rows = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))[:n]
    center, scale = X[rows].mean(), X[rows].std()
    parts = [((x - center) / scale).flatten(1) for x in (X[rows], test_X, other_X)]
    return Problem(parts[0], y[rows], parts[1], test_y, parts[2])


def trained(name: str, seed: int, data: Path, smoke: bool) -> Trained:
    """One network of a set, trained on nine tenths."""
    if name == "digits":
        limits = (150, 50) if smoke else (1297, 500)
        problem = quality_classification.digits(seed, limits)
        network, image = problems.mlp((64, 64, 64, 10), nn.ReLU, seed), None
        epochs = 150
    else:
        problem = images(name, seed, data, smoke)
        network, image, epochs = image_networks.cnn(seed), (1, 28, 28), 15
    generator = torch.Generator().manual_seed(seed)
    rows, held_out = holdout_rows(len(problem.X), 0.1, generator)
    fit = fit_map(
        network,
        problem.X,
        problem.y,
        epochs=2 if smoke else epochs,
        validation_rows=held_out,
        input_shape=image,
        generator=generator,
        weight_decay=5e-4,
        early_stopping=False,
        schedule="cosine",
        learning_rate=1e-2 if name == "digits" else 1e-3,
        batch_size=100,
        progress=False,
    )
    return Trained(fit.network, problem, rows, held_out, image)


def our_models(own: Trained) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Every structure, and the exact last layer, calibrated; probabilities at X."""
    X, y = own.problem.X, own.problem.y
    options = {name: {"inference": structure} for name, structure in OURS.items()}
    options["last layer"] = {"inference": Exact(), "parameters": "last_layer"}
    for name, chosen in options.items():
        model = LinearizedGP(
            own.network, X[own.rows], y[own.rows], input_shape=own.image, **chosen
        )
        model.calibrate(X[own.held_out], y[own.held_out])

        def probabilities(x: Tensor, model: LinearizedGP = model) -> Tensor:
            with torch.no_grad():
                return model.predict(x).probs.to(x)

        yield f"ours, {name}", probabilities


def peer_models(own: Trained) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The peer's structures, tuned by its evidence and by grid search."""
    X, y = own.problem.X, own.problem.y
    fit = peers.loader(own.shaped(X[own.rows]), y[own.rows])
    held = peers.loader(own.shaped(X[own.held_out]), y[own.held_out])
    for name, (subset, structure) in THEIRS.items():
        for method in ("marglik", "gridsearch"):
            fitted = peers.laplace.Laplace(
                peers.copy.deepcopy(own.network),
                "classification",
                subset_of_weights=subset,
                hessian_structure=structure,
                backend=peers.BackPackGGN,
            )
            fitted.fit(fit)
            if method == "marglik":
                fitted.optimize_prior_precision(method="marglik", n_steps=100)
            else:
                best = min(
                    ((peer_nll(fitted, held, p), p) for p in PRECISIONS),
                    key=lambda pair: pair[0],
                )
                fitted.prior_precision = best[1]

            def probabilities(x: Tensor, fitted: object = fitted) -> Tensor:
                parts = own.shaped(x).split(BATCH)
                predict = peers.predict
                found = [predict(fitted, z, link_approx="probit") for z in parts]
                return torch.cat(found).detach()

            yield f"laplace-torch, {name}, {method}", probabilities


def peer_nll(fitted: object, held: object, precision: Tensor) -> float:
    """Held-out NLL of the peer at a prior precision; infinite where it fails."""
    fitted.prior_precision = precision
    total = count = 0.0
    for x, y in held:
        try:
            q = peers.predict(fitted, x, link_approx="probit").detach()
        except torch.linalg.LinAlgError:  # a small precision, a singular last layer
            return float("inf")
        total += float(-q.gather(-1, y[:, None]).clamp_min(1e-30).log().sum())
        count += len(y)
    return total / count if total == total else float("inf")


def plain_models(own: Trained) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The network, and the network with a temperature."""
    logits = own.logits(own.problem.X[own.held_out])
    labels = own.problem.y[own.held_out]
    T = metrics.fit_temperature(logits.log_softmax(-1), labels, bounds=(0.5, 10.0))
    yield "MAP", lambda x: own.logits(x).softmax(-1)
    yield "MAP + temperature", lambda x: (own.logits(x) / T).softmax(-1)


def print_table(name: str, results: dict[str, list[Score]]) -> None:
    """Means, and differences from MAP with their spread."""
    print(f"\n### {name}\n")
    print("| model | accuracy | NLL | ECE | AUROC | NLL - MAP | ECE - MAP |")
    print("|---|---|---|---|---|---|---|")
    base = torch.tensor(results["MAP"])
    for model, found in results.items():
        table = torch.tensor(found)
        means = " | ".join(f"{value:.4f}" for value in table.mean(0).tolist())
        change = table - base
        shown = [
            f"{change[:, k].mean():+.4f} ({change[:, k].min():+.4f} to "
            f"{change[:, k].max():+.4f})"
            for k in (1, 2)
        ]
        print(f"| {model} | {means} | {shown[0]} | {shown[1]} |", flush=True)


def main() -> None:
    """Print one table per set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    sets = ("digits", "mnist", "fashion_mnist")
    parser.add_argument("--sets", nargs="+", default=sets, choices=sets)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one network")
    arguments = parser.parse_args()
    timing.one_thread()
    warnings.simplefilter("ignore")
    sources = [plain_models, our_models]
    if peers.laplace is None:
        print(f"Without the peer: {peers.INSTALL}")
    else:
        sources.append(peer_models)
    for name in arguments.sets:
        results: dict[str, list[Score]] = {}
        for seed in [0] if arguments.smoke else arguments.seeds:
            own = trained(name, seed, arguments.data, arguments.smoke)
            problem = own.problem
            for source in sources:
                start = time.process_time()
                for model, probabilities in source(own):
                    q, other = map(probabilities, (problem.test_X, problem.other_X))
                    found = scores(q, other, problem.test_y)
                    results.setdefault(model, []).append(found)
                    taken = time.process_time() - start
                    print(f"{name} {seed} {model}: {found} ({taken:.0f} s)", flush=True)
                    start = time.process_time()
        print_table(name, results)


if __name__ == "__main__":
    main()
