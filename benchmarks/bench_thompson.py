"""Thompson sampling: a batch of 100 by frozen draws, against doing it without them.

n = 1000, d = 6, Hartmann's function with noise, hyperparameters fixed, one model for
all sides: a ``SingleTaskGP``, and a linearised network of 64 x 64 units. Ours draws and
maximises 100 functions by gradients. The peers: botorch's ``MaxPosteriorSampling``, a
joint covariance over Sobol candidates; upstream's ``optimize_posterior_samples`` of its
own pathwise draws, with as many starts; and 100 updates of the model, one candidate
each, as a greedy batch does. Run with
``python benchmarks/bench_thompson.py [--smoke] [--repeats 3]``.
"""

from __future__ import annotations

import argparse

import problems
import timing
import torch
from botorch.acquisition import qLogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.generation.sampling import MaxPosteriorSampling
from botorch.models import SingleTaskGP
from botorch.models.model import Model
from botorch.optim import optimize_acqf
from botorch.sampling.pathwise import draw_matheron_paths
from botorch.test_functions import Hartmann
from botorch.utils.sampling import draw_sobol_samples, optimize_posterior_samples
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor, nn

from gpbridge import LinearizedGP
from gpbridge.acquisition import ThompsonSample, thompson_sample

NOISE_VARIANCE = 1e-2
RAW, RESTARTS = 1024, 4  # ours by default, and so for the peers


def data(n: int) -> tuple[Tensor, Tensor]:
    """Inputs in the unit cube and standardised noisy values."""
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(n, 6, generator=generator, dtype=torch.float64)
    f = Hartmann(dim=6, negate=True)(X)[:, None]
    noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return X, (f - f.mean()) / f.std() + NOISE_VARIANCE**0.5 * noise


def gaussian_process(X: Tensor, Y: Tensor) -> SingleTaskGP:
    """Botorch's default model, with hyperparameters near their fitted values."""
    model = SingleTaskGP(X, Y, outcome_transform=None)
    model.covar_module.lengthscale = 0.5
    model.likelihood.noise = NOISE_VARIANCE
    return model.eval()


def linearized(X: Tensor, Y: Tensor) -> LinearizedGP:
    """A trained network, linearised."""
    network = problems.train(problems.mlp((6, 64, 64, 1)).to(X), X, Y, nn.MSELoss())
    return LinearizedGP(network, X, Y)


def ours(model: Model, box: Tensor, q: int) -> ThompsonSample:
    """Draw and maximise."""
    return thompson_sample(model, box, q, generator=torch.Generator().manual_seed(0))


def joint_covariance(model: Model, box: Tensor, q: int, candidates: int) -> Tensor:
    """Botorch's sampling from the joint posterior of candidates."""
    X = draw_sobol_samples(box, candidates, 1, seed=0).squeeze(1)
    with torch.no_grad():
        return MaxPosteriorSampling(model, replacement=True)(X, num_samples=q)


def upstream_paths(model: Model, box: Tensor, q: int) -> Tensor:
    """Botorch's pathwise draws, maximised by its own optimiser."""
    torch.manual_seed(0)
    paths = draw_matheron_paths(model, torch.Size([q]))
    return optimize_posterior_samples(paths, box, RAW, RESTARTS)[1]


def fits(X: Tensor, Y: Tensor, count: int) -> None:
    """Posteriors fitted anew, hyperparameters included, a row more each."""
    for i in range(count):
        model = SingleTaskGP(X[: len(X) - i], Y[: len(X) - i], outcome_transform=None)
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 20}})


def updates(model: Model, box: Tensor, count: int) -> None:
    """A greedy batch: each candidate maximises an acquisition given those before it."""
    pending = None
    for _ in range(count):
        acquisition = qLogExpectedImprovement(model, best_f=1.0, X_pending=pending)
        X, _ = optimize_acqf(acquisition, box, 1, RESTARTS, RAW)
        pending = X if pending is None else torch.cat([pending, X])


def shortfall(sample: ThompsonSample, box: Tensor, points: int) -> float:
    """The largest excess of a dense evaluation of the same draws over their maxima."""
    worst = -torch.inf
    for seed in range(points // 2**14 or 1):
        size = min(points, 2**14)
        X = draw_sobol_samples(box, size, 1, seed=100 + seed).squeeze(1)
        with torch.no_grad():
            for part in X.split(1024):
                best = sample.draws(part)[..., 0].amax(-1)
                worst = max(worst, float((best - sample.values).max()))
    return worst


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    timing.one_thread()
    n, q, candidates, few, dense = 1000, 100, 10_000, 2, 2**16
    repeats = arguments.repeats
    if arguments.smoke:
        n, q, candidates, few, dense, repeats = 50, 4, 100, 1, 2**10, 1
    X, Y = data(n)
    box = torch.tensor([[0.0] * 6, [1.0] * 6], dtype=torch.float64)
    models = {"GP": gaussian_process(X, Y), "network": linearized(X, Y)}
    tasks = {
        f"ours, {name}": (lambda m=m: ours(m, box, q)) for name, m in models.items()
    }
    tasks |= {
        f"joint, {name}": (lambda m=m: joint_covariance(m, box, q, candidates))
        for name, m in models.items()
    }
    tasks["paths"] = lambda: upstream_paths(models["GP"], box, q)
    tasks["fits"] = lambda: fits(X, Y, few)
    tasks["updates"] = lambda: updates(models["GP"], box, few)
    times = timing.interleave(tasks, repeats)
    own = f"{q} Thompson samples, n={n}, "
    rows = [
        timing.compare(
            own + name,
            f"joint covariance of {candidates} candidates",
            times[f"ours, {name}"],
            times[f"joint, {name}"],
            10,
        )
        for name in models
    ]
    for name, peer in (
        ("fits", f"{q} fits of the GP, {few} timed"),
        ("updates", f"a greedy batch of {q} by qLogEI, the first {few} timed"),
    ):
        mine = times["ours, GP"]
        rows.append(timing.compare(own + "GP", peer, mine, times[name], 10, q / few))
    peer = "botorch's paths and optimiser"
    rows.append(timing.compare(own + "GP", peer, times["ours, GP"], times["paths"]))
    notes = []
    for name, model in models.items():
        sample = ours(model, box, q)
        best = ours_best(sample, model, box, q, candidates)
        notes.append(
            f"{name}: dense evaluation of the same {q} draws at {dense} Sobol points "
            f"exceeds their maxima by at most {shortfall(sample, box, dense):.2g}; "
            f"mean maximum {float(sample.values.mean()):.3f}, and {best:.3f} at the "
            f"peer's {candidates} candidates."
        )
    timing.print_rows("Thompson sampling", rows, notes)


def ours_best(
    sample: ThompsonSample, model: Model, box: Tensor, q: int, candidates: int
) -> float:
    """Mean of what the draws attain at the discrete candidates of the peer."""
    X = draw_sobol_samples(box, candidates, 1, seed=0).squeeze(1)
    with torch.no_grad():
        parts = [sample.draws(part)[..., 0].amax(-1) for part in X.split(1024)]
    return float(torch.stack(parts).amax(0).mean())


if __name__ == "__main__":
    main()
