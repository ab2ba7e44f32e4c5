"""Are two independently trained CNNs on Fashion-MNIST connected by a curve of low loss?

Two networks with batch norm train on 10,000 images from different seeds. A Bezier curve
with one free control point (with ``--chain`` also a chain of two pieces) starts on the
straight line and trains on the same images with the same decay. Losses at 31 times, on
the training images and on 10,000 test images, with batch-norm statistics taken anew
from the training images at each time. A barrier is the largest loss minus the mean of
those at the ends. A pair takes about four CPU minutes.

Run with ``python benchmarks/quality_mode_connectivity.py --data PATH``, PATH a folder
with ``images/fashion_mnist.npz``.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import timing
import torch
from torch import Tensor, nn

from gpbridge.data import load_images
from gpbridge.dnn import BezierCurve, PolyChain, curve_losses, fit_curve, fit_map
from gpbridge.dnn.loss_surface import CurveLosses

DECAY = 5e-4
SHAPE = (1, 28, 28)
GOAL = 0.1  # of the line's barrier


def cnn(seed: int) -> nn.Sequential:
    """Three strided convolutions with batch norm, p = 12,786."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 12, 4, stride=2, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


def show(
    seed: int, path: str, part: str, found: CurveLosses, line: CurveLosses
) -> float:
    """Print a row of the table; the barrier as a share of the line's."""
    share = found.barrier() / line.barrier()
    error = found.error
    print(
        f"| {seed} | {path} | {part} | {found.loss[0]:.3f}, {found.loss[-1]:.3f} "
        f"| {found.loss.max():.3f} | {found.mean_loss:.3f} | {found.barrier():.3f} "
        f"| {100 * share:.1f}% | {100 * error[[0, -1]].mean():.2f} "
        f"| {100 * error.max():.2f} | {found.length:.1f} |",
        flush=True,
    )
    return share


def main() -> None:
    """Train, measure, and print a row for each path and part of the data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12, help="of each network")
    parser.add_argument("--curve-epochs", type=int, default=30)
    parser.add_argument("--times", type=int, default=31)
    parser.add_argument("--chain", action="store_true", help="a PolyChain as well")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one seed")
    given = parser.parse_args()
    if given.data is None:
        parser.error("Fashion-MNIST needs --data PATH with images/fashion_mnist.npz")
    timing.one_thread()
    n, times, seeds = 10_000, given.times, given.seeds
    if given.smoke:
        n, times, seeds, given.epochs, given.curve_epochs = 300, 5, 1, 2, 2
    X, y, test_X, test_y = load_images(
        Path(given.data) / "images", "fashion_mnist", num_train=n, num_test=n
    )
    X, test_X = X.flatten(1), test_X.flatten(1)
    batches = list(X.split(500))
    print(
        "| seed | path | part | loss at the ends | largest | mean | barrier | of the "
        "line's | error % at the ends | largest | length |"
    )
    print("|" + "---|" * 11)

    def train(seed: int) -> nn.Module:
        fit = fit_map(
            cnn(seed),
            X,
            y,
            epochs=given.epochs,
            weight_decay=DECAY,
            early_stopping=False,
            schedule="cosine",
            input_shape=SHAPE,
            generator=torch.Generator().manual_seed(seed),
            progress=False,
        )
        return fit.network

    def measure(path: nn.Module, inputs: Tensor, labels: Tensor) -> CurveLosses:
        # One network at a time: on a CPU, vmapped convolutions lose to a loop.
        return curve_losses(
            path, inputs, labels, t=times, batches=batches, chunk_size=1
        )

    worst, spent = 0.0, {}
    for seed in range(given.first_seed, given.first_seed + seeds):
        begin = time.process_time()
        ends = train(2 * seed), train(2 * seed + 1)
        spent["ends"] = time.process_time() - begin
        line = PolyChain(*ends, num_bends=2, input_shape=SHAPE)
        paths = {"line": line, "Bezier": BezierCurve(*ends, input_shape=SHAPE)}
        if given.chain:
            paths["chain"] = PolyChain(*ends, input_shape=SHAPE)
        base = {}
        for name, path in paths.items():
            begin = time.process_time()
            if name != "line":
                fit_curve(
                    path,
                    X,
                    y,
                    epochs=given.curve_epochs,
                    learning_rate=0.05,
                    weight_decay=DECAY,
                    generator=torch.Generator().manual_seed(seed),
                    progress=False,
                )
                spent[f"fitting {name}"] = time.process_time() - begin
            begin = time.process_time()
            for part, data in (("train", (X, y)), ("test", (test_X, test_y))):
                found = measure(path, *data)
                share = show(seed, name, part, found, base.setdefault(part, found))
                if name == "Bezier":
                    worst = max(worst, share)
            spent[f"measuring {name}"] = time.process_time() - begin
    verdict = "reached" if worst <= GOAL else "not reached"
    print(
        f"\nBezier: at most {100 * worst:.1f}% of the line's barrier; the goal of "
        f"{100 * GOAL:.0f}% is {verdict}."
    )
    print(", ".join(f"{key} {value:.0f} s" for key, value in spent.items()))


if __name__ == "__main__":
    main()
