"""Does a network's evidence find the augmentation that its data have? Two circles.

Two classes on circles of which an arc is seen; the half-width of the rotations that the
evidence learns, against half the arc. The evidence has several optima in it: each run
is the better of two starts by evidence, 9 degrees (the default of the law) and 135
(three quarters of its cap). Labels depend on the radius alone, so that a wider law than
the arc may have the larger evidence. Where learning ends depends on the number of
epochs: weights and law take turns, and a run whose rate falls sooner stops below.
Images are in ``quality_invariance_images.py``. Run with
``python benchmarks/quality_invariance.py``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import timing
import torch
from torch import Tensor, nn

from gpbridge.augmentation import Rotation2d
from gpbridge.selection import learn_invariance_from

TARGETS = {120: (40.0, 70.0), 360: (170.0, 180.0), 20: (0.0, 5.0)}


def rings(n: int, arc: float, seed: int) -> tuple[Tensor, Tensor]:
    """Half of the points at radius 1/2; a third of the others at 0, the rest at 1."""
    generator = torch.Generator().manual_seed(seed)
    half = n // 2
    radius, label = torch.full((n,), 0.5), torch.zeros(n, dtype=torch.long)
    label[half:], radius[half:] = 1, 1.0
    radius[half + (n - half) * 2 // 3 :] = 0.0
    angle = torch.rand(n, generator=generator) * math.radians(arc)
    X = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    return X + 0.06 * torch.randn(n, 2, generator=generator), label


def seeded(seed: int, build: type, *arguments: object) -> nn.Module:
    """A module with initial weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*arguments)


def toy_network() -> nn.Sequential:
    """2-50-2 with tanh."""
    return nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))


class Run(NamedTuple):
    """Half-widths in degrees and evidences in nats, the larger evidence first."""

    widths: list[float]
    evidences: list[float]
    seconds: float  # of the processor, for all starts


def toy(arc: float, seed: int, epochs: int, orbit: str, starts: Sequence[float]) -> Run:
    """Learn from all starts."""
    start = time.process_time()
    fits = learn_invariance_from(
        [math.radians(degrees) for degrees in starts],
        seeded(seed, toy_network),
        rings(150, arc, seed),
        Rotation2d(30),
        orbit=orbit,
        epochs=epochs,
        learning_rate=0.05,
        batch_size=150,
        progress=False,
    )
    spent = time.process_time() - start
    widths = [math.degrees(fit.learnt["bound"].item()) for fit in fits]
    return Run(widths, [float(fit.evidence.value) for fit in fits], spent)


def toy_table(arguments: argparse.Namespace) -> None:
    """Print the half-widths of some arcs."""
    print("\n### Toy: learnt half-width, degrees (150 points, 30 samples)\n")
    print(
        "| arc | orbits | half-width by seed | of the other starts | evidence |", end=""
    )
    print(" CPU s | target | reached |\n|---|---|---|---|---|---|---|---|")
    for arc in arguments.arcs:
        low, high = TARGETS[arc]
        for orbit in arguments.orbits:
            runs = [
                toy(arc, seed, arguments.epochs, orbit, arguments.starts)
                for seed in range(arguments.seeds)
            ]
            for run in runs:
                print(f"<!-- {arc} {orbit} {run} -->")
            best = ", ".join(f"{run.widths[0]:.1f}" for run in runs)
            rest = [[f"{width:.1f}" for width in run.widths[1:]] for run in runs]
            reached = all(low <= run.widths[0] <= high for run in runs)
            print(
                f"| {arc} | {orbit} | {best} | {', '.join(map(' '.join, rest))} "
                f"| {statistics.mean(run.evidences[0] for run in runs):.1f} "
                f"| {max(run.seconds for run in runs):.0f} | {low:g} to {high:g} "
                f"| {'yes' if reached else 'no'} |",
                flush=True,
            )


def main() -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arcs", type=int, nargs="*", default=list(TARGETS))
    orbits = ["fixed", "per_datum"]
    parser.add_argument("--orbits", nargs="*", choices=orbits, default=orbits)
    parser.add_argument("--starts", type=float, nargs="*", default=[9.0, 135.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--smoke", action="store_true", help="tiny, means nothing")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.seeds, arguments.epochs = 1, 2
    timing.one_thread()
    toy_table(arguments)


if __name__ == "__main__":
    main()
