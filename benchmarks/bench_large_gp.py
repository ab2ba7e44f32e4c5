"""SampledGP where no factor fits: kin40k and protein, 36,000 and 41,157 points.

``fit``: hyperparameters by ``fit_iterative`` from a subset start, kept in a file.
``predict``: mean and 64 samples at those hyperparameters, each in a process of its own
whose peak memory is shown, against CG of linear_operator with rows of the kernel
computed anew at each product (as many products as ours needed passes; gpytorch would
hold the matrix, 10 to 13 GiB), and against gpytorch's SVGP with 1024 inducing points,
which learns its own. ``curves``: residual and test error of every solver over passes,
in one figure. Matern-3/2 with one lengthscale per input; inputs and targets
standardised by the training part of split 0.
Run with ``python benchmarks/bench_large_gp.py --data PATH --out FOLDER``, PATH a folder
with ``uci/``; ``--rows`` and ``--sets`` choose.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path

import timing
import torch
from bench_sampled_gp import Problem, clock, row, sampled, scores, table
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean, ZeroMean
from gpytorch.mlls import VariationalELBO
from gpytorch.models import ApproximateGP
from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy
from linear_operator import LinearOperator, settings
from matplotlib import pyplot as plt
from torch import Generator, Tensor

from gpbridge.data import load_uci, standardize
from gpbridge.kernel_operator import (
    covariance_operator,
    cross_products,
    solving_operator,
)
from gpbridge.partial_products import exact_products
from gpbridge.prior_draws import draw_prior
from gpbridge.representers import Data, right_hand_sides
from gpbridge.selection import SubsetStart, fit_iterative
from gpbridge.solvers import (
    AlternatingProjections,
    ConjugateGradients,
    Progress,
    SketchAndProject,
    StochasticDualDescent,
    StochasticGradientDescent,
)

SETS = {"kin40k": "kin40k", "protein": "protein_evans"}
SAMPLES, CURVE_SAMPLES, CURVE_PASSES = 64, 8, 16
BATCH, EPOCHS, INDUCING = 1024, 60, 1024  # of SVGP


def load(data: Path, name: str, device: str, limit: int | None) -> Problem:
    """Split 0, standardised; the kernel has the values it starts from."""
    X, Y, test_X, test_Y = load_uci(data / "uci", SETS[name])
    if limit is not None:
        rows = torch.randperm(len(X), generator=Generator().manual_seed(0))[:limit]
        X, Y = X[rows], Y[rows]
    X, inputs = standardize(X)
    Y, targets = standardize(Y)
    kernel = ScaleKernel(MaternKernel(1.5, ard_num_dims=X.shape[-1])).double()
    kernel.to(device).requires_grad_(False)
    parts = X, Y, inputs.transform(test_X), targets.transform(test_Y)
    return Problem(*(t.to(device) for t in parts), kernel, 0.1)


def learnt(data: Path, name: str, device: str, limit: int | None, out: Path) -> Problem:
    """The problem with the hyperparameters of the file."""
    problem = load(data, name, device, limit)
    values = json.loads((out / f"{name}.json").read_text())
    kernel = problem.kernel
    kernel.base_kernel.lengthscale = torch.tensor(values["lengthscale"])
    kernel.outputscale = values["outputscale"]
    return problem._replace(noise=values["noise"])


# --- fit


def fit(data: Path, name: str, device: str, smoke: bool, out: Path) -> None:
    """Hyperparameters from subsets, then from all data by a few warm, early solves."""
    problem = load(data, name, device, 600 if smoke else None)
    problem.kernel.requires_grad_(True)
    model = sampled(problem, 8)
    subsets = SubsetStart(200 if smoke else 2000, repeats=3, steps=60)
    solver = SketchAndProject(1e-2, max_passes=3)
    start, wall = clock(device), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = fit_iterative(
            model,
            steps=3 if smoke else 10,
            learning_rate=0.05,
            solver=solver,
            subset_start=subsets,
        )
    seconds, wall = clock(device) - start, time.perf_counter() - wall
    kernel = model.covar_module
    values = {
        "lengthscale": kernel.base_kernel.lengthscale.flatten().tolist(),
        "outputscale": float(kernel.outputscale),
        "noise": float(model.likelihood.noise),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(values))
    shown = [f"{v:.2g}" for v in values["lengthscale"]]
    row(
        name,
        len(problem.X),
        record.total_passes,
        seconds,
        wall,
        values["noise"],
        values["outputscale"],
        " ".join(shown),
    )


# --- predict


def ours(data: Path, name: str, device: str, smoke: bool, out: Path) -> None:
    """Mean and samples by the default solver, at the learnt hyperparameters."""
    problem = learnt(data, name, device, 600 if smoke else None, out)
    start = clock(device)
    solver = SketchAndProject(1e-2) if smoke else None
    model = sampled(problem, SAMPLES, solver=solver)
    with torch.no_grad():
        mean, variance = model.marginals(problem.test_X)
    seconds, facts = clock(device) - start, model.solution
    found = scores(problem, mean[:, 0], variance[:, 0])
    (out / f"{name}.passes").write_text(str(facts.passes))
    label = f"gpbridge, {SAMPLES} samples"
    row(name, len(problem.X), label, *found, facts.passes, facts.residual_norm, seconds)


class RecomputedRows(LinearOperator):
    """A kernel matrix as upstream's kernel gives it, 500 rows at a time."""

    def __init__(self, X: Tensor, *, kernel: object) -> None:
        super().__init__(X, kernel=kernel)
        self.X, self.kernel = X, kernel[0]

    def _size(self):
        return torch.Size((len(self.X), len(self.X)))

    def _transpose_nonbatch(self):
        return self

    def _matmul(self, rhs: Tensor) -> Tensor:
        parts = (self.kernel(x, self.X).to_dense() @ rhs for x in self.X.split(500))
        return torch.cat(list(parts))

    def _diagonal(self):
        return self.kernel(self.X, diag=True)

    def _get_indices(self, row_index, col_index, *batch_indices):
        return self.kernel(self.X[row_index], self.X[col_index], diag=True)


@torch.no_grad()
def peer_cg(data: Path, name: str, device: str, smoke: bool, out: Path) -> None:
    """CG of linear_operator, float32, for as many products as ours needed passes."""
    problem = learnt(data, name, device, 600 if smoke else None, out)
    limit = max(25, round(float((out / f"{name}.passes").read_text())))
    start = clock(device)
    generator = Generator().manual_seed(0)
    prior = draw_prior(
        problem.kernel, problem.X.shape[-1], SAMPLES, generator=generator
    )
    noise = torch.full_like(problem.Y[:, 0], problem.noise)
    system = Data(problem.X, problem.Y, noise)
    rhs = right_hand_sides(prior, ZeroMean(), system, 0)
    kernel = problem.kernel.float()
    H = RecomputedRows(problem.X.float(), kernel=(kernel,))
    H = H.add_diagonal(noise.float())
    with (
        settings.fast_computations(solves=True),
        settings.cg_tolerance(1e-2),
        settings.max_cg_iterations(limit),
        settings.max_cholesky_size(1),
        settings.max_preconditioner_size(100),
        settings.min_preconditioning_size(1),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        value = H.solve(rhs.float()).double()
    kernel.double()
    moved = cross_products(kernel, problem.test_X, problem.X, value)
    drawn = prior(problem.test_X)[..., 0].mT - moved[:, 1:]
    mean, variance = moved[:, 0], drawn.square().mean(-1)
    seconds = clock(device) - start
    exact = covariance_operator(kernel, problem.X, noise)
    residual = rhs - exact_products(exact, value)
    worst = float((residual.norm(dim=0) / rhs.norm(dim=0)).max())
    label = f"linear_operator CG, float32, at most {limit} products"
    found = scores(problem, mean, variance)
    row(name, len(problem.X), label, *found, limit, worst, seconds)


class SVGP(ApproximateGP):
    """Whitened, with a full covariance of the inducing values."""

    def __init__(self, Z: Tensor) -> None:
        distribution = CholeskyVariationalDistribution(len(Z))
        super().__init__(
            VariationalStrategy(self, Z, distribution, learn_inducing_locations=True)
        )
        self.mean_module = ConstantMean()
        self.covar_module = ScaleKernel(MaternKernel(1.5, ard_num_dims=Z.shape[-1]))

    def forward(self, X: Tensor) -> MultivariateNormal:
        """The prior."""
        return MultivariateNormal(self.mean_module(X), self.covar_module(X))


def svgp(data: Path, name: str, device: str, smoke: bool, out: Path) -> None:
    """Adam 0.01 on minibatches, divided by ten after three and four fifths."""
    problem = load(data, name, device, 600 if smoke else None)
    X, y = problem.X.float(), problem.Y[:, 0].float()
    generator = Generator().manual_seed(0)
    start = clock(device)
    chosen = torch.randperm(len(X), generator=generator)[:INDUCING]
    model = SVGP(X[chosen.to(device)].clone()).to(device)
    likelihood = GaussianLikelihood().to(device)
    params = [*model.parameters(), *likelihood.parameters()]
    epochs = 2 if smoke else EPOCHS
    optimizer = torch.optim.Adam(params, lr=0.01)
    steps = [3 * epochs // 5, 4 * epochs // 5]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, 0.1)
    objective = VariationalELBO(likelihood, model, len(X))
    for _ in range(epochs):
        order = torch.randperm(len(X), generator=generator).to(device)
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            (-objective(model(X[rows]), y[rows])).backward()
            optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        parts = [model(x) for x in problem.test_X.float().split(1000)]
        mean = torch.cat([p.mean for p in parts]).double()
        variance = torch.cat([p.variance for p in parts]).double()
    seconds = clock(device) - start
    found = scores(problem._replace(noise=float(likelihood.noise)), mean, variance)
    label = f"SVGP, {INDUCING} points, {epochs} epochs, learns its own"
    row(name, len(X), label, *found, "", "", seconds)


# --- curves


def curves(data: Path, name: str, device: str, smoke: bool, out: Path) -> None:
    """Residual and test error of the mean, for all solvers, over passes."""
    problem = learnt(data, name, device, 600 if smoke else None, out)
    generator = Generator().manual_seed(0)
    prior = draw_prior(
        problem.kernel, problem.X.shape[-1], CURVE_SAMPLES, generator=generator
    )
    noise = torch.full_like(problem.Y[:, 0], problem.noise)
    rhs = right_hand_sides(prior, ZeroMean(), Data(problem.X, problem.Y, noise), 0)
    H = solving_operator(problem.kernel, problem.X, noise)
    limit = 5 if smoke else CURVE_PASSES
    solvers = (
        SketchAndProject(1e-2, max_passes=limit),
        ConjugateGradients(1e-2, max_iterations=limit, preconditioner_rank=600),
        AlternatingProjections(1e-2, max_passes=limit),
        StochasticDualDescent(1e-2, max_passes=limit),
        StochasticGradientDescent(1e-2, max_passes=limit),
    )
    lines = (
        json.loads((out / "curves.json").read_text())
        if (out / "curves.json").exists()
        else {}
    )
    for solver in solvers:
        label = solver.name
        if isinstance(solver, ConjugateGradients):
            label += f", rank {solver.preconditioner_rank}"
        found: list[tuple[float, float, float]] = []

        def record(progress: Progress, found: list = found) -> None:
            mean = cross_products(
                problem.kernel,
                problem.test_X,
                problem.X,
                progress.value[:, :1],
                torch.float32,
            )
            error = float((mean - problem.test_Y).square().mean().sqrt())
            worst = float(progress.residual_norms.max())
            found.append((progress.passes, worst, error))

        solver = type(solver)(**{**vars(solver), "callback": record})
        start = clock(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            solution = solver(H, rhs)
        facts = solution.passes, solution.residual_norm, found[-1][2]
        row(name, label, *facts, clock(device) - start)
        lines.setdefault(name, {})[label] = found
        (out / "curves.json").write_text(json.dumps(lines))
    draw_curves(lines, out)


def draw_curves(lines: dict[str, dict[str, list]], out: Path) -> None:
    """Both rows of pictures: residuals above, test errors below."""
    figure, axes = plt.subplots(
        2, len(lines), figsize=(5.5 * len(lines), 7), squeeze=False, sharex=True
    )
    for column, (name, solvers) in zip(axes.T, lines.items(), strict=True):
        for label, points in solvers.items():
            passes, residuals, errors = zip(*points, strict=True)
            column[0].semilogy(passes, residuals, label=label)
            column[1].semilogy(passes, errors, label=label)
        column[0].set(title=name, ylabel="largest relative residual (estimate)")
        column[0].set_ylim(top=3.0)
        column[1].set(xlabel="passes over the matrix", ylabel="test RMSE of the mean")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "learning_curves.png", dpi=120)
    plt.close(figure)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--out", type=Path, required=True, help="for what is kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=tuple(SETS))
    names = ("fit", "ours", "cg", "svgp", "curves")
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data PATH with uci/ is needed")
    timing.one_thread()
    heads = {
        "fit": (
            "Hyperparameters",
            ("set", "n", "passes", "CPU seconds", "wall", "noise", "outputscale")
            + ("lengthscales",),
        ),
        "ours": (
            "Test scores",
            ("set", "n", "model", "RMSE", "NLL", "passes", "residual", "CPU seconds"),
        ),
        "curves": (
            f"Solvers, mean and {CURVE_SAMPLES} samples",
            ("set", "solver", "passes", "exact residual", "test RMSE", "CPU seconds"),
        ),
    }
    heads["cg"] = heads["svgp"] = heads["ours"]
    works = {"fit": fit, "ours": ours, "cg": peer_cg, "svgp": svgp, "curves": curves}
    for name in arguments.sets:
        for kind in arguments.rows:
            table(*heads[kind])
            options = arguments.data, name, arguments.device, arguments.smoke
            peak = timing.peak_memory(works[kind], *options, arguments.out)
            print(f"\nPeak memory: {timing.show_memory(peak)}", flush=True)


if __name__ == "__main__":
    main()
