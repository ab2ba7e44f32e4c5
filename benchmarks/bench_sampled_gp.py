"""SampledGP: against exact algebra, conjugate gradients, and its own scaling.

``exact``: mean and 256 samples against a Cholesky factor in float64 of the same system.
``cg``: the time to a relative residual of .01 in every column, mean and 64 samples,
in float64 and with tiles in float32 (which the solver checks in float64),
against CG of linear_operator with the kernel matrix in memory, which is how gpytorch
holds it. ``scaling``: time per pass, memory and residual as n grows, d = 8. ``mll``:
passes of 50 Adam steps on the evidence, pathwise and warm against standard and cold.
Sets are split 0, standardised by the training part, with
the Matern-3/2 hyperparameters that are published beside them, or learnt (``mll``).
Larger sets are in ``bench_large_gp.py``.
Run with ``python benchmarks/bench_sampled_gp.py --data PATH [--rows exact cg]``, PATH a
folder with ``uci/``; ``scaling`` needs none.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import problems
import timing
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from linear_operator import settings
from linear_operator.operators import DenseLinearOperator
from torch import Generator, Tensor

from gpbridge import SampledGP, metrics
from gpbridge.data import load_uci, standardize
from gpbridge.kernel_operator import covariance_operator, solving_operator
from gpbridge.partial_products import exact_products
from gpbridge.prior_draws import draw_prior
from gpbridge.representers import Data, right_hand_sides
from gpbridge.selection import fit_iterative
from gpbridge.solvers import (
    ConjugateGradients,
    Progress,
    SketchAndProject,
    choose_solver,
)

SETS = ("pol", "elevators")
TOLERANCE = 1e-2
RANKS = {"elevators": 600}  # of our CG; on pol it needs three times as many passes
SIZES = (500, 100, 15)  # of the peer's preconditioner
PATIENCE = 4  # times our best, after which a first peer is stopped


class Problem(NamedTuple):
    """A standardised split, ``n x d`` and ``n x 1``, and what its GP is."""

    X: Tensor
    Y: Tensor
    test_X: Tensor
    test_Y: Tensor
    kernel: Kernel
    noise: float


def load(data: Path, name: str, device: str, limit: int | None = None) -> Problem:
    """Split 0 with its published hyperparameters; ``limit`` keeps that many rows."""
    X, Y, test_X, test_Y = load_uci(data / "uci", name, drop_constant=False)
    if limit is not None:
        rows = torch.randperm(len(X), generator=Generator().manual_seed(0))[:limit]
        X, Y = X[rows], Y[rows]
    X, inputs = standardize(X)
    Y, targets = standardize(Y)
    parts = X, Y, inputs.transform(test_X), targets.transform(test_Y)
    published = json.loads((data / "uci/matern32_hyperparameters.json").read_text())
    values = published["sets"][name][0]
    kernel = ScaleKernel(MaternKernel(1.5, ard_num_dims=X.shape[-1])).double()
    kernel.base_kernel.lengthscale = torch.tensor(values["lengthscale"])
    kernel.outputscale = values["outputscale"]
    kernel = kernel.to(device).requires_grad_(False)
    return Problem(*(t.to(device) for t in parts), kernel, values["noise_variance"])


def sampled(problem: Problem, num_samples: int, **options: object) -> SampledGP:
    """The model of a problem, zero mean."""
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-6)).double()
    likelihood.noise = problem.noise
    return SampledGP(
        problem.X,
        problem.Y,
        problem.kernel,
        likelihood.to(problem.X.device),
        num_samples=num_samples,
        mean_module=ZeroMean(),
        **options,
    )


def clock(device: str | torch.device = "cpu") -> float:
    """CPU seconds of the process, or wall seconds once a GPU is idle."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def table(title: str, columns: Sequence[str]) -> None:
    """Head of a Markdown table whose rows come one by one."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |", flush=True)
    print(f"|{'---|' * len(columns)}", flush=True)


def row(*cells: object) -> None:
    """A row, with numbers in four digits."""
    shown = (f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
    print(f"| {' | '.join(shown)} |", flush=True)


# --- exact: the same system by a Cholesky factor


def factor(kernel: Kernel, X: Tensor, noise: float) -> Tensor:
    """Cholesky factor of the covariance of the targets, by the upstream kernel."""
    H = torch.cat([kernel(x, X).to_dense() for x in X.split(1000)])
    H.diagonal().add_(noise)
    return torch.linalg.cholesky(H)


def exact_moments(problem: Problem) -> tuple[Tensor, Tensor]:
    """Mean and variance of the latent function at the test points."""
    L = factor(problem.kernel, problem.X, problem.noise)
    cross = problem.kernel(problem.X, problem.test_X).to_dense()
    whitened = torch.linalg.solve_triangular(L, cross, upper=False)
    target = torch.linalg.solve_triangular(L, problem.Y, upper=False)
    variance = problem.kernel.outputscale - whitened.square().sum(0)
    return (whitened.mT @ target)[:, 0], variance


def scores(problem: Problem, mean: Tensor, variance: Tensor) -> tuple[float, float]:
    """RMSE and NLL of the targets; the noise is added here, once."""
    y = problem.test_Y[:, 0]
    nll = metrics.gaussian_nll(mean, variance + problem.noise, y).mean()
    return float(metrics.rmse(mean, y)), float(nll)


def against_exact(data: Path, device: str, smoke: bool, sets: Sequence[str]) -> None:
    """Test scores and variances, both sides."""
    samples = 16 if smoke else 256
    table(
        f"Mean and {samples} samples against exact Cholesky, float64",
        ("set", "n", "t", "RMSE, ours", "exact", "NLL, ours", "exact")
        + ("variance error, median", "passes", "residual", "seconds, ours", "exact"),
    )
    for name in sets:
        problem = load(data, name, device, 300 if smoke else None)
        start = clock(device)
        mean, variance = exact_moments(problem)
        exact_seconds = clock(device) - start
        start = clock(device)
        model = sampled(problem, samples)
        with torch.no_grad():
            parts = [model.posterior(x) for x in problem.test_X.split(200)]
            our_mean = torch.cat([p.mean[:, 0] for p in parts])
            our_variance = torch.cat([p.variance[:, 0] for p in parts])
        seconds = clock(device) - start
        rmse, nll = scores(problem, our_mean, our_variance)
        exact_rmse, exact_nll = scores(problem, mean, variance)
        error = float((our_variance / variance - 1).abs().median())
        facts = model.solution
        sizes = len(problem.X), len(problem.test_X)
        solve = facts.passes, facts.residual_norm, seconds, exact_seconds
        row(name, *sizes, rmse, exact_rmse, nll, exact_nll, f"{error:.2%}", *solve)


# --- cg: the time to one accuracy


class CountedMatrix(DenseLinearOperator):
    """A matrix that counts its products and gives up after ``limit`` seconds."""

    products, limit = 0, float("inf")

    def _matmul(self, rhs: Tensor) -> Tensor:
        CountedMatrix.products += 1
        if clock(rhs.device) > CountedMatrix.limit:
            raise TimeoutError
        return super()._matmul(rhs)


def peer_solve(
    problem: Problem, rhs: Tensor, size: int, dtype: torch.dtype, tolerance: float
) -> Tensor:
    """CG of linear_operator on a matrix in memory, preconditioned as by default."""
    X, kernel = problem.X.to(dtype), problem.kernel.to(dtype)
    try:
        H = CountedMatrix(kernel(X).to_dense()).add_diagonal(
            torch.full((len(X),), problem.noise, dtype=dtype, device=X.device)
        )
        with (
            settings.fast_computations(solves=True),  # botorch turns them off
            settings.cg_tolerance(tolerance),
            settings.max_cg_iterations(2000),
            settings.max_cholesky_size(1),
            settings.max_preconditioner_size(size),
            settings.min_preconditioning_size(1),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return H.solve(rhs.to(dtype)).double()
    finally:
        kernel.double()


def against_cg(data: Path, device: str, smoke: bool, sets: Sequence[str]) -> None:
    """Seconds of every solver until each column has a residual of .01."""
    samples = 8 if smoke else 64
    for name in sets:
        problem = load(data, name, device, 300 if smoke else None)
        prior = draw_prior(
            problem.kernel, problem.X.shape[-1], samples, generator=Generator()
        )
        noise = torch.full_like(problem.Y[:, 0], problem.noise)
        system = Data(problem.X, problem.Y, noise)
        rhs = right_hand_sides(prior, ZeroMean(), system, 0)
        H = covariance_operator(problem.kernel, problem.X, noise)

        def residual(value: Tensor, rhs: Tensor = rhs, H: object = H) -> float:
            # Exact and in float64, outside the clock, the same for both sides.
            left = (rhs - exact_products(H, value)).norm(dim=0) / rhs.norm(dim=0)
            return float(left.max())

        table(
            f"Mean and {samples} samples to a residual of .01, {name}, n={len(rhs)}",
            ("solver", "dtype", "seconds", "passes", "largest residual", "reached"),
        )
        default = choose_solver(H, TOLERANCE)
        rough = covariance_operator(problem.kernel, problem.X, noise, torch.float32)
        ours = {f"{default.name} (the default)": ("float64", default, H)}
        ours[f"{default.name}, float32 tiles"] = "float32", default, rough
        if name in RANKS:
            other = ConjugateGradients(TOLERANCE, preconditioner_rank=RANKS[name])
            ours[f"{other.name}, rank {RANKS[name]}"] = "float64", other, H
        times, theirs = {}, {}
        for label, (kind, solver, operator) in ours.items():
            start = clock(device)
            solution = solver(operator, rhs)
            seconds = clock(device) - start
            found = residual(solution.value)
            row(label, kind, seconds, solution.passes, found, found <= TOLERANCE)
            if found <= TOLERANCE:
                times[label] = seconds
        # A size that takes longer than another one needed is not the best.
        for size in SIZES:
            for dtype in (torch.float32, torch.float64):
                patience = 600.0
                if times and not smoke:
                    patience = PATIENCE * min(times.values())
                longest = min(theirs.values(), default=patience)
                options = size, dtype, longest
                found = _peer_seconds(problem, rhs, *options, residual)
                if found is not None:
                    theirs[f"size {size}, {str(dtype)[6:]}"] = found
                if theirs:
                    break
        if times and theirs:
            best, peer = min(times, key=times.get), min(theirs, key=theirs.get)
            mine, first = times[best], times.get(next(iter(ours)), float("nan"))
            print(
                f"\nPeer / ours: default {theirs[peer] / first:.2f}x, best ({best}) "
                f"{theirs[peer] / mine:.2f}x; the peer's best is {peer}.",
                flush=True,
            )
        else:
            print("\nOne side did not reach the tolerance.", flush=True)


def _peer_seconds(
    problem: Problem,
    rhs: Tensor,
    size: int,
    dtype: torch.dtype,
    longest: float,
    residual: Callable[[Tensor], float],
) -> float | None:
    """Rows of one size; its rule is a mean over columns, so it may need another try."""
    label, kind = f"linear_operator CG, preconditioner {size}", str(dtype)[6:]
    tolerance, device = TOLERANCE, rhs.device
    for _ in range(3):
        CountedMatrix.products = 0
        start = clock(device)
        CountedMatrix.limit = start + longest
        named = f"{label}, tolerance {tolerance:.2g}"
        try:
            value = peer_solve(problem, rhs, size, dtype, tolerance)
        except TimeoutError:
            row(named, kind, f"> {longest:.3g}", CountedMatrix.products, "", "stopped")
            return None
        seconds, passes = clock(device) - start, CountedMatrix.products
        found = residual(value)
        row(named, kind, seconds, passes, found, found <= TOLERANCE)
        if found <= TOLERANCE:
            return seconds
        if not found < 3 * TOLERANCE:
            return None  # round-off
        tolerance *= 0.9 * TOLERANCE / found
    return None


# --- scaling: time per pass and memory


def passes_at(n: int, passes: int, samples: int, device: str) -> None:
    """A fixed number of passes, in a process of its own, which prints its row."""
    X, Y, *_ = problems.smooth_regression(n, 1, torch.float64)
    X, Y = X.to(device), Y.to(device)
    kernel = ScaleKernel(MaternKernel(1.5)).double().to(device).requires_grad_(False)
    kernel.base_kernel.lengthscale, noise = 2.0, torch.full_like(Y[:, 0], 0.05)
    prior = draw_prior(kernel, 8, samples, generator=Generator())
    rhs = right_hand_sides(prior, ZeroMean(), Data(X, Y, noise), 0)
    times, residuals = [clock(device)], []

    def record(progress: Progress) -> None:
        times.append(clock(device))
        residuals.append(f"{float(progress.residual_norms.max()):.3f}")

    solver = SketchAndProject(1e-9, max_passes=passes, callback=record)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = solver(solving_operator(kernel, X, noise), rhs)
    each = (times[-1] - times[0]) / len(residuals)
    row(n, each, 1e9 * each / n**2, ", ".join(residuals), solution.residual_norm)


def scaling(device: str, smoke: bool, sizes: Sequence[int]) -> None:
    """Time per pass, memory and residuals as n grows."""
    samples, passes = 8, 5
    sizes = (500, 1000) if smoke else sizes
    table(
        f"{passes} passes of SketchAndProject, {samples} samples, d = 8 (3 from 50k)",
        ("n", "seconds per pass", "ns per entry", "residual estimates", "exact"),
    )
    peaks = []
    for n in sizes:
        run = n, 3 if n >= 50_000 else passes, samples, device
        peaks.append(timing.peak_memory(passes_at, *run))
    for n, peak in zip(sizes, peaks, strict=True):
        print(f"\nPeak memory at n = {n}: {timing.show_memory(peak)}", flush=True)


# --- mll: passes of a fit of the hyperparameters


def log_evidence(model: SampledGP, X: Tensor, Y: Tensor) -> float:
    """Exact, in nats per point."""
    with torch.no_grad():
        noise = float(model.likelihood.noise)
        L = factor(model.covar_module, X, noise)
        whitened = torch.linalg.solve_triangular(L, Y, upper=False)
    normal = torch.distributions.Normal(0.0, 1.0)
    value = normal.log_prob(whitened).sum() - L.diagonal().log().sum()
    return float(value) / len(X)


def learning(
    data: Path, device: str, smoke: bool, sizes: Sequence[int], sets: Sequence[str]
) -> None:
    """Passes of Adam steps and the exact evidence at their end."""
    steps, probes, early = (3 if smoke else 50), 8, 3
    sizes = (300,) if smoke else sizes
    ways = {
        f"pathwise, warm, at most {early} passes": ("pathwise", True, early),
        "standard, cold, to the tolerance": ("standard", False, 200),
        "the same by conjugate gradients": ("standard", False, None),
    }
    table(
        f"{steps} Adam steps on the evidence, {probes} probes, tolerance {TOLERANCE}",
        ("set", "n", "way", "passes", "steps converged", "log evidence per point")
        + ("seconds",),
    )
    for name, n in ((name, n) for n in sizes for name in sets):
        problem = load(data, name, device, n)
        for way, (estimator, warm, limit) in ways.items():
            if n > 5000 and limit == 200:
                continue  # it needed as many passes as conjugate gradients
            kernel = ScaleKernel(MaternKernel(1.5, ard_num_dims=problem.X.shape[-1]))
            model = sampled(
                problem._replace(kernel=kernel.double().to(device), noise=0.5),
                probes,
            )
            solver = ConjugateGradients(TOLERANCE)
            if limit is not None:
                # As many blocks as the default has at n = 12 000.
                solver = SketchAndProject(
                    TOLERANCE, max_passes=limit, block_size=max(n // 12, 50)
                )
            start = clock(device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fit = fit_iterative(
                    model,
                    estimator=estimator,
                    steps=steps,
                    solver=solver,
                    warm_start=warm,
                )
            seconds = clock(device) - start
            value = log_evidence(model, problem.X, problem.Y)
            done = f"{sum(fit.converged)}/{steps}"
            row(name, n, way, fit.total_passes, done, value, seconds)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--scaling-sizes",
        type=int,
        nargs="+",
        default=(25_000, 50_000, 100_000, 200_000),
    )
    parser.add_argument("--mll-sizes", type=int, nargs="+", default=(1000, 13500))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    names = ("exact", "cg", "scaling", "mll")
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    timing.one_thread()
    common = arguments.device, arguments.smoke
    if arguments.data is None:
        print("Only scaling: the other parts need --data PATH with uci/.")
    parts = {
        "exact": lambda data: against_exact(data, *common, arguments.sets),
        "cg": lambda data: against_cg(data, *common, arguments.sets),
        "scaling": lambda _: scaling(*common, arguments.scaling_sizes),
        "mll": lambda data: learning(
            data, *common, arguments.mll_sizes, arguments.sets
        ),
    }
    for name in arguments.rows:
        if name == "scaling" or arguments.data is not None:
            parts[name](arguments.data and Path(arguments.data))


if __name__ == "__main__":
    main()
