"""Does a network's evidence find the augmentation that its data have? Two circles.

Two classes on circles of which an arc is seen; the half-width of the rotations that the
evidence learns, against half the arc. Where learning ends depends on the number of
epochs: weights and law take turns, and a run whose rate falls sooner stops below.
Images are in ``quality_invariance_images.py``. Run with
``python benchmarks/quality_invariance.py``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import timing
import torch
from torch import Tensor, nn

from gpbridge.augmentation import Rotation2d
from gpbridge.selection import learn_invariance

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


def toy(arc: float, seed: int, epochs: int, orbit: str) -> tuple[float, float, float]:
    """Learnt half-width in degrees, last evidence in nats, CPU seconds."""
    start = time.process_time()
    fit = learn_invariance(
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
    return math.degrees(fit.learnt["bound"].item()), float(fit.evidence.value), spent


def toy_table(seeds: int, epochs: int) -> None:
    """Print the half-widths of all arcs."""
    print("\n### Toy: learnt half-width, degrees (150 points, 30 samples)\n")
    print("| arc | orbits | half-width by seed | evidence | CPU s | target | reached |")
    print("|---|---|---|---|---|---|---|")
    for arc, (low, high) in TARGETS.items():
        for orbit in ("fixed", "per_datum"):
            runs = [toy(arc, seed, epochs, orbit) for seed in range(seeds)]
            widths = [width for width, _, _ in runs]
            shown = ", ".join(f"{width:.1f}" for width in widths)
            reached = all(low <= width <= high for width in widths)
            print(
                f"| {arc} | {orbit} | {shown} "
                f"| {statistics.mean(run[1] for run in runs):.1f} "
                f"| {max(run[2] for run in runs):.0f} | {low:g} to {high:g} "
                f"| {'yes' if reached else 'no'} |",
                flush=True,
            )


def main() -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--smoke", action="store_true", help="tiny, means nothing")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.seeds, arguments.epochs = 1, 2
    timing.one_thread()
    toy_table(arguments.seeds, arguments.epochs)


if __name__ == "__main__":
    main()
