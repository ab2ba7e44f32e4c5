"""The variational refinement of a linearised classifier, without held-out data.

Networks of about 2000 weights on 1297 digits and on 2000 images of MNIST and
Fashion-MNIST (2 x 2 means), trained on 90% with weight decay 5e-4 of the mean loss; the
other 10% serve the rows that say so: one temperature (TS) and ``calibrate``. Laplace
and the refinement take the prior variance of the training, 1 / (n 5e-4). Scores on 500
digits or 1000 images: NLL, ECE (15 bins) and the AUROC of the largest probability
against other data (uniform noise, Fashion-MNIST, MNIST). Differences are paired with
MAP on the same network. Run with ``python benchmarks/quality_refinement.py --data
PATH``, PATH a folder with ``images/<name>.npz``; without it, only digits are measured.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

import problems
import timing
import torch
from quality_classification import Problem, Score, digits, scores
from torch import Tensor, nn
from torch.nn import functional as F

from gpbridge import LinearizedGP
from gpbridge.data import holdout_rows, load_images
from gpbridge.dnn import fit_map
from gpbridge.metrics import apply_temperature, fit_temperature

WEIGHT_DECAY = 5e-4
STEPS = 6
OTHERS = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}
ORDER = (
    *("MAP", "MAP + TS", "Laplace", "refined, 1 step", f"refined, {STEPS} steps"),
    *("refined + TS", "refined, then calibrate", "calibrate"),
)


def images(name: str, seed: int, limits: tuple[int, int], data: Path) -> Problem:
    """Images of one kind, and as many test images of the other."""
    generator = torch.Generator().manual_seed(seed)
    X, y, test_X, test_y = load_images(data / "images", name)
    other_X = load_images(data / "images", OTHERS[name], num_train=1)[2]
    parts = []
    for part, limit in zip((X, test_X, other_X), (*limits, limits[1]), strict=True):
        rows = torch.randperm(len(part), generator=generator)[:limit]
        parts.append((F.avg_pool2d(part[rows], 2).flatten(1), rows))
    (X, rows), (test_X, test_rows), (other_X, _) = parts
    return Problem(X, y[rows], test_X, test_y[test_rows], other_X)


def run(problem: Problem, network: nn.Module, seed: int, epochs: int):
    """Scores of all methods with one network, and seconds of the parts."""
    generator = torch.Generator().manual_seed(seed)
    rows, held_out = holdout_rows(len(problem.X), 0.1, generator)
    fit = fit_map(
        network,
        problem.X,
        problem.y,
        epochs=epochs,
        weight_decay=WEIGHT_DECAY,
        early_stopping=False,
        schedule="cosine",
        learning_rate=1e-2,
        validation_rows=held_out,
        generator=generator,
        progress=False,
    )
    X, y = problem.X[rows], problem.y[rows]
    X_val, y_val = problem.X[held_out], problem.y[held_out]
    parts = problem.test_X, problem.other_X

    def score(logs_of) -> Score:
        return scores(*(logs_of(part).exp().float() for part in parts), problem.test_y)

    def tempered(logs_of) -> Score:
        kept = fit_temperature(logs_of(X_val), y_val, bounds=(0.5, 10.0))
        return score(lambda part: apply_temperature(logs_of(part), kept))

    def plain(part: Tensor) -> Tensor:
        with torch.no_grad():
            return fit.network(part).log_softmax(-1)

    result = {"MAP": score(plain), "MAP + TS": tempered(plain)}
    model = LinearizedGP(fit.network, X, y)
    model.prior_variance = 1 / (len(X) * WEIGHT_DECAY)

    def averaged(part: Tensor) -> Tensor:
        return model.predict(part, link="pairwise").logits

    start = time.process_time()
    result["Laplace"] = score(averaged)
    laplace, gaps = time.process_time() - start, [model.train_gap]
    start = time.process_time()
    for steps, name in ((1, ORDER[3]), (STEPS - 1, ORDER[4])):
        model.refine(max_steps=steps, progress=False)
        result[name] = score(averaged)
        gaps.append(model.train_gap)
    seconds = laplace, time.process_time() - start
    result["refined + TS"] = tempered(averaged)
    model.calibrate(X_val, y_val)
    result["refined, then calibrate"] = score(lambda part: model.predict(part).logits)
    calibrated = LinearizedGP(fit.network, X, y)
    calibrated.calibrate(X_val, y_val)
    result["calibrate"] = score(lambda part: calibrated.predict(part).logits)
    return result, gaps, seconds


def print_table(name: str, results: list[dict[str, Score]]) -> None:
    """Means, then paired differences from MAP with the worst network."""
    print(f"\n{name}, {len(results)} networks\n")
    print("| method | accuracy | NLL | ECE | AUROC | NLL - MAP (worst) | ECE - MAP |")
    print("|---|---|---|---|---|---|---|")
    for method in ORDER:
        own, plain = [r[method] for r in results], [r["MAP"] for r in results]
        columns = zip(*own, strict=True)
        means = " | ".join(f"{sum(c) / len(own):.3f}" for c in columns)
        nll = [a.nll - b.nll for a, b in zip(own, plain, strict=True)]
        ece = [a.ece - b.ece for a, b in zip(own, plain, strict=True)]
        print(
            f"| {method} | {means} | {sum(nll) / len(nll):+.3f} ({max(nll):+.3f}) "
            f"| {sum(ece) / len(ece):+.3f} ({max(ece):+.3f}) |",
            flush=True,
        )


def main() -> None:
    """Measure, printing each network as it ends, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one network")
    arguments = parser.parse_args()
    timing.one_thread()
    warnings.simplefilter("ignore")  # guards speak; the tables show what they did
    names = ["digits", "mnist", "fashion_mnist"]
    seeds, epochs, limits = arguments.seeds, 150, ((1297, 500), (2000, 1000))
    if arguments.data is None:
        print("Only digits: the others need --data PATH with images/<name>.npz.")
        names = names[:1]
    if arguments.smoke:
        names, seeds, epochs, limits = names[:1], 1, 20, ((60, 40), (60, 40))
    results: dict[str, list[dict[str, Score]]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            if name == "digits":
                problem, widths = digits(seed, limits[0]), (64, 20, 20, 10)
            else:
                problem = images(name, seed, limits[1], Path(arguments.data))
                widths = (196, 10, 10, 10)
            network = problems.mlp(widths, nn.ReLU, seed)
            result, gaps, seconds = run(problem, network, seed, epochs)
            results[name].append(result)
            shown = ", ".join(
                f"{key} {s.nll:.3f}/{s.ece:.3f}" for key, s in result.items()
            )
            shrunk = " ".join(f"{gap.posterior:.3f}" for gap in gaps)
            print(
                f"{name}, {seed}: NLL/ECE {shown}; train gap {gaps[0].network:.3f}, "
                f"{shrunk}; {seconds[0]:.0f} s and {seconds[1]:.0f} s",
                flush=True,
            )
    for name in names:
        print_table(name, results[name])


if __name__ == "__main__":
    main()
