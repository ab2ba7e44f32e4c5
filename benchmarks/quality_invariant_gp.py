"""Do invariant Gaussian processes find the invariance, and does it pay?

Three tables. *Recovery*: targets drawn from an invariant GP whose half-width is known
(150 points of an annulus, four outputs, noise of known standard deviation); the
half-width by ``learn_kernel_invariance``, everything else learnt, too. *Digits*: those
of scikit-learn, turned by angles uniform on [-90, 90] or [-180, 180] degrees, ten
outputs in {-0.2, 1.8} that share an exact GP; an invariant kernel against a squared
exponential one, both by the same scan of two starts (of half-width, of lengthscale)
with the same numbers of steps. *MNIST*, means of 2 x 2 pixels, turned by up to 90
degrees: a sparse GP for the same ten outputs, by the number of training images; both
kernels from two starts (of half-width, of lengthscale) with the same steps of L-BFGS
on the bound with optimal inducing variables, values of f at training images
(``--variables images``) or of the base function at elements of their orbits
(``elements``), whose places stay. Nothing is chosen by any score but the evidence.

Accuracy is of images that are turned in the same way and seen once, at the end. Seconds
are of the processor, the two kernels in turn in one process. Run with
``python benchmarks/quality_invariant_gp.py --data PATH``, PATH a folder with
``images/mnist.npz``; without it there is no third table.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from shared_kernel_gps import CollapsedGP, SharedGP, posterior_mean
from torch import Generator, Tensor
from turned_digits import Images, digits, mnist, rotation

from gpbridge.augmentation import (
    Rotation2d,
    median_orbit_distance,
)
from gpbridge.inducing_points import initial_inducing_points
from gpbridge.kernels import InvariantKernel
from gpbridge.selection import learn_kernel_invariance, log_evidence, scan
from gpbridge.selection.ascent import ascend

# -- recovery --------------------------------------------------------------------------


def annulus(n: int, true: float, std: float, seed: int) -> tuple[Tensor, Tensor]:
    """Points, and four draws of an invariant GP with half-width ``true``, ``4 x n``."""
    generator = Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    radius = 0.3 + 1.2 * torch.rand(n, **options)
    angle = 2 * math.pi * torch.rand(n, **options)
    X = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    base = RBFKernel().double()
    base.lengthscale = 0.5
    kernel = InvariantKernel(base, Rotation2d(64, init=true).double())
    with torch.no_grad():
        K = kernel(X).to_dense() + 1e-9 * torch.eye(n, dtype=torch.float64)
    f = torch.linalg.cholesky(K) @ torch.randn(n, 4, **options)
    return X, (f + std * torch.randn(n, 4, **options)).mT.contiguous()


def recovery(seeds: int, n: int, points: int, stds: tuple[float, ...]) -> None:
    """Print learnt half-widths against the true ones."""
    print(f"\n### Half-width recovered, degrees ({n} points, 4 outputs)\n")
    print("| noise std | true | learnt by seed | worst error | start at 5° | CPU s |")
    print("|---|---|---|---|---|---|")
    for std in stds:
        for true in (30.0, 60.0, 120.0):
            found, single, spent = [], [], []
            for seed in range(seeds):
                X, Y = annulus(n, math.radians(true), std, seed)
                kernel = InvariantKernel(RBFKernel(), Rotation2d(32))
                model = SharedGP(X, Y, ScaleKernel(kernel), 0.1)
                start = time.process_time()
                fit = learn_kernel_invariance(model, num_points=points, progress=False)
                spent.append(time.process_time() - start)
                found.append(math.degrees(fit.learnt["bound"].item()))
                one = learn_kernel_invariance(
                    model, starts=[math.radians(5)], progress=False
                )
                single.append(math.degrees(one.learnt["bound"].item()))
            error = max(abs(value / true - 1) for value in found)
            print(
                f"| {std:g} | {true:g} | {', '.join(f'{v:.1f}' for v in found)} "
                f"| {100 * error:.1f} % | {', '.join(f'{v:.1f}' for v in single)} "
                f"| {statistics.mean(spent):.0f} |",
                flush=True,
            )


# -- digits ----------------------------------------------------------------------------


class Score(NamedTuple):
    """Accuracy in percent, evidence in nats per output and image, and what it took."""

    accuracy: float
    nats: float
    degrees: float
    seconds: float


def fit_digits(invariant: bool, images: Images, steps: tuple[int, int]) -> Score:
    """Fit one kernel by a scan of two starts and a polish, and score it."""
    X, Y = images.X, images.Y.mT.contiguous()
    base = RBFKernel()
    refit, polish = steps
    options = {"refit_steps": refit, "polish": 1, "polish_steps": polish}
    start = time.process_time()
    if invariant:
        law = rotation(12, 12, 20.0)
        base.lengthscale = float(median_orbit_distance(law, X))
        model = SharedGP(X, Y, ScaleKernel(InvariantKernel(base, law)), 0.05)
        starts = [math.radians(20), math.radians(120)]
        fit = learn_kernel_invariance(model, starts=starts, progress=False, **options)
        model, evidence = fit.model, fit.evidence
        degrees = math.degrees(fit.learnt["bound"].item())
    else:
        median = float(torch.pdist(X).median())
        model = SharedGP(X, Y, ScaleKernel(base), 0.05)
        name = "covar_module.base_kernel.lengthscale"
        found = scan(
            model,
            name,
            [median / 2, median],
            lambda model: log_evidence(model).sum(),
            progress=False,
            **options,
        )
        evidence, degrees = found.best_evidence, math.nan
    seconds = time.process_time() - start
    right = posterior_mean(model, images.test_X).argmax(-1) == images.test_y
    accuracy = 100 * float(right.double().mean())
    return Score(accuracy, evidence / Y.numel(), degrees, seconds)


def digits_table(
    cases: tuple[tuple[int, int], ...],
    num_test: int,
    seeds: int,
    steps: tuple[int, int],
) -> None:
    """Print both kernels, and what the invariant one gains."""
    print("\n### Digits, turned (mean and standard deviation of the seeds)\n")
    print(
        "| angles | n | kernel | accuracy, % | nats per output | half-width | CPU s |"
    )
    print("|---|---|---|---|---|---|---|")
    for degrees, n in cases:
        rows: dict[bool, list[Score]] = {False: [], True: []}
        for seed in range(seeds):
            images = digits(degrees, n, num_test, seed)
            for invariant in rows:
                score = fit_digits(invariant, images, steps)
                rows[invariant].append(score)
                print(f"<!-- {degrees} {seed} {invariant} {score} -->", flush=True)
        for invariant, scores in rows.items():
            name = "invariant" if invariant else "squared exponential"
            widths = ", ".join(f"{score.degrees:.0f}" for score in scores)
            print(
                f"| ±{degrees}° | {n} | {name} "
                f"| {spread([s.accuracy for s in scores], 1)} "
                f"| {spread([s.nats for s in scores], 3)} "
                f"| {widths if invariant else '-'} "
                f"| {spread([s.seconds for s in scores], 1)} |",
                flush=True,
            )
        pairs = list(zip(rows[True], rows[False], strict=True))
        print(
            f"| ±{degrees}° | {n} | gain, worst seed "
            f"| {min(a.accuracy - b.accuracy for a, b in pairs):+.1f} "
            f"| {min(a.nats - b.nats for a, b in pairs):+.3f} | "
            f"| {max(a.seconds / b.seconds for a, b in pairs):.1f} times |",
            flush=True,
        )


def spread(values: list[float], decimals: int) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):.{decimals}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}"


# -- MNIST -----------------------------------------------------------------------------


def fit_mnist(
    invariant: bool, images: Images, n: int, options: argparse.Namespace
) -> Score:
    """The better of two starts, of the half-width or of the lengthscale."""
    X, Y = images.X[:n], images.Y[:n]
    start = time.process_time()
    found = []
    for value in (30.0, 100.0) if invariant else (0.5, 1.0):
        base = RBFKernel()
        if invariant:
            law = rotation(14, 6, value)
            base.lengthscale = 0.5 * float(median_orbit_distance(law, X))
            kernel = ScaleKernel(InvariantKernel(base, law))
        else:
            base.lengthscale = value * float(torch.pdist(X).median())
            kernel = ScaleKernel(base)
        elements = invariant and options.variables == "elements"
        most = len(X) * law.num_samples if elements else len(X)
        number = min(options.inducing, most)
        Z = X[:number]
        if elements:
            generator = Generator().manual_seed(0)
            Z = initial_inducing_points(kernel, X, number, generator)
        model = CollapsedGP(kernel, Z, elements)
        bound = ascend(model, partial(model.bound, X, Y), options.steps)
        width = math.degrees(law.bound.item()) if invariant else math.nan
        found.append((bound, width, model))
    bound, width, model = max(found, key=lambda end: end[0])
    seconds = time.process_time() - start
    right = model.mean(X, Y, images.test_X).argmax(-1) == images.test_y
    return Score(100 * float(right.double().mean()), bound / Y.numel(), width, seconds)


def mnist_table(
    path: Path, sizes: tuple[int, ...], num_test: int, options: argparse.Namespace
) -> None:
    """Print both kernels by the number of training images."""
    print(
        f"\n### MNIST, turned by up to 90°, {options.inducing} inducing variables "
        f"({options.variables}), "
        f"{options.steps} steps from each of two starts\n"
    )
    print("| n | kernel | accuracy, % | bound per output | half-width | CPU s |")
    print("|---|---|---|---|---|---|")
    rows: dict[tuple[int, bool], list[Score]] = {}
    for seed in range(options.seeds):
        images = mnist(path, max(sizes), num_test, seed)
        for n in sizes:
            for invariant in (False, True):
                score = fit_mnist(invariant, images, n, options)
                rows.setdefault((n, invariant), []).append(score)
                print(f"<!-- {n} {seed} {invariant} {score} -->", flush=True)
    for (n, invariant), scores in sorted(rows.items()):
        name = "invariant" if invariant else "squared exponential"
        widths = ", ".join(f"{score.degrees:.0f}" for score in scores)
        print(
            f"| {n} | {name} | {spread([s.accuracy for s in scores], 1)} "
            f"| {spread([s.nats for s in scores], 3)} "
            f"| {widths if invariant else '-'} "
            f"| {spread([s.seconds for s in scores], 1)} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30, help="sparse")
    parser.add_argument("--inducing", type=int, default=400)
    parser.add_argument("--sizes", type=int, nargs="*", default=(100, 300, 1000))
    choices = ("images", "elements")
    parser.add_argument("--variables", choices=choices, default="images")
    parser.add_argument("--smoke", action="store_true", help="tiny")
    tables = ("recovery", "digits", "mnist")
    parser.add_argument("--only", choices=tables, nargs="*", default=tables)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    smoke = options.smoke
    if smoke:
        options.seeds, options.steps, options.inducing = 1, 3, 10
    if "recovery" in options.only:
        n, points = (40, 3) if smoke else (150, 18)
        recovery(options.seeds, n, points, (0.1,) if smoke else (0.1, 0.2))
    if "digits" in options.only:
        cases = ((90, 30),) if smoke else ((90, 300), (180, 200))
        steps = (1, 2) if smoke else (5, 30)
        digits_table(cases, 50 if smoke else 600, options.seeds, steps)
    if "mnist" in options.only and options.data is not None:
        path = Path(options.data) / "images"
        sizes = (20, 40) if smoke else tuple(options.sizes)
        mnist_table(path, sizes, 100 if smoke else 2000, options)


if __name__ == "__main__":
    main()
