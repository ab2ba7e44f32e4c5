"""Which experiment next? Bayesian optimisation of a curve, with networks as surrogates.

The loop is the usual one of BoTorch: fit a model, maximise an acquisition function, run
the experiments that it asks for. Only the model changes: a Gaussian process of botorch,
a linearised network and an ensemble. An experiment is a slide, given by its heights at
32 places, and its outcome the time that it takes to slide down without friction. To a
Gaussian process these are 32 numbers of equal standing. The networks are convolutional:
what they learn about one part of a slide they know of the others. Where inputs have no
such structure, and are few, the Gaussian process is hard to beat: see the study in
benchmarks/bayesopt.
"""

# %% Set up: from rest at height 1 down to 0.35, one unit further along
import argparse
import math
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from botorch.acquisition import qLogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize
from botorch.optim import optimize_acqf
from botorch.utils.sampling import draw_sobol_samples
from gpytorch.mlls import ExactMarginalLogLikelihood
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge.plots import COLORS, INK, STYLE
from gpbridge.surrogates import EnsembleSurrogate, LinearizedSurrogate

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
seeds, batches, epochs, maxiter = (1, 1, 10, 3) if options.smoke else (2, 6, 200, 30)

torch.set_num_threads(1)
places, first = (8, 8) if options.smoke else (32, 20)
q, end, gravity = 4, 0.35, 9.81
bounds = torch.tensor([[0.0] * places, [0.95] * places], dtype=torch.float64)
x = torch.linspace(0, 1, places + 2, dtype=torch.float64)


def whole(X):
    """Slides with both of their ends."""
    ends = torch.ones_like(X[..., :1])
    return torch.cat([ends, X, end * ends], -1)


def seconds(X):
    """The time to slide down straight pieces, as a column."""
    Y = whole(X)
    speed = (2 * gravity * (1 - Y)).sqrt()
    length = (Y.diff(dim=-1).square() + x[1].square()).sqrt()
    mean_speed = (speed[..., 1:] + speed[..., :-1]) / 2
    return (length / mean_speed).sum(-1, keepdim=True)


def cycloid():
    """The quickest slide of all: its places, heights and time."""
    low, high = 1e-3, 2 * math.pi - 1e-3
    for _ in range(100):
        angle = (low + high) / 2
        steep = (1 - math.cos(angle)) / (angle - math.sin(angle))
        low, high = (angle, high) if steep > 1 - end else (low, angle)
    radius = 1 / (angle - math.sin(angle))
    t = torch.linspace(0, angle, 200)
    total = angle * math.sqrt(radius / gravity)
    return radius * (t - t.sin()), 1 - radius * (1 - t.cos()), total


# %% The surrogates: one function each, of the experiments and the model before
def convolutions(num_inputs, num_outputs):
    return nn.Sequential(
        nn.Unflatten(-1, (1, num_inputs)),
        *(nn.Conv1d(1, 16, 5, padding=2), nn.Tanh()),
        *(nn.Conv1d(16, 16, 5, padding=2), nn.Tanh()),
        *(nn.AvgPool1d(num_inputs // 4), nn.Flatten()),
        nn.Linear(64, num_outputs),
    )


def gaussian_process(X, Y, last):
    model = SingleTaskGP(X, Y, input_transform=Normalize(places, bounds=bounds))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def fitted_by(recipe):
    def fit(X, Y, last):
        return recipe.fit(X, Y) if last is None else recipe.update(last, X, Y)

    return fit


given = {"network": convolutions, "bounds": bounds, "epochs": epochs}
surrogates = {
    "SingleTaskGP": gaussian_process,
    "linearised network": fitted_by(LinearizedSurrogate(**given)),
    "ensemble of 5": fitted_by(EnsembleSurrogate(**given)),
}


# %% The loop, once for each surrogate and each first design
def optimise(fit, X, seed):
    """All experiments in the order in which they were run, and the last model."""
    Y, model = -seconds(X), None  # the less time the better
    for batch in range(batches):
        torch.manual_seed(100 * seed + batch)  # botorch's starts
        model = fit(X, Y, model)
        chosen, _ = optimize_acqf(
            qLogExpectedImprovement(model, best_f=Y.max()),
            bounds,
            q=q,
            num_restarts=2,
            raw_samples=32,
            options={"maxiter": maxiter},
        )
        X = torch.cat([X, chosen])
        Y = torch.cat([Y, -seconds(chosen)])
    return X, Y, fit(X, Y, model)


slide_x, slide, quickest = cycloid()
budget = first + q * batches
sobol = [
    draw_sobol_samples(bounds, budget, 1, seed=seed)[:, 0] for seed in range(seeds)
]
runs = {"Sobol design": [(X, -seconds(X), None) for X in sobol]}
for name, fit in surrogates.items():
    began = time.process_time()
    with warnings.catch_warnings():  # of optimisers that stop early
        warnings.simplefilter("ignore")
        runs[name] = [optimise(fit, X[:first], seed) for seed, X in enumerate(sobol)]
    each = (time.process_time() - began) / (seeds * batches)
    best = ", ".join(f"{-float(Y.max()):.3f}" for _, Y, _ in runs[name])
    print(f"{name}: {each:.1f} s per batch; quickest slides {best} s")
print(f"cycloid: {quickest:.3f} s")

# %% Left: the best slide of the first design; middle: the surrogates on other slides
pyplot.rcParams.update(STYLE)
figure, (left, middle, right) = pyplot.subplots(
    1, 3, figsize=(12.5, 3.9), layout="constrained"
)
colors = dict(zip(runs, ("#9aa1ad", INK, COLORS[0], COLORS[1]), strict=True))
left.plot(slide_x, slide, color="#d9a400", linewidth=5, alpha=0.5, label="cycloid")
for name, tried in runs.items():
    X, Y, _ = tried[0]
    best = whole(X[Y[:, 0].argmax()])
    left.plot(x, best, color=colors[name], linewidth=1.6, label=name)

generator = torch.Generator().manual_seed(1)
rough = torch.rand(60, 1, generator=generator).double()  # how far from a smooth slide
noise = bounds[1] * torch.rand(60, places, generator=generator).double()
sag = 0.6 * torch.rand(60, 1, generator=generator).double()
smooth = 0.9 + (end - 0.9) * x[1:-1] - sag * 4 * x[1:-1] * (1 - x[1:-1]) * 0.6
others = (rough * noise + (1 - rough) * smooth.clamp(0, 0.95)).clamp(0, 0.95)
times = seconds(others)[:, 0]
for name in ("SingleTaskGP", "linearised network"):
    model = runs[name][0][2]
    with torch.no_grad():
        posterior = model.posterior(others)
    mean, std = -posterior.mean[:, 0], posterior.variance[:, 0].sqrt()
    error = float((mean - times).square().mean().sqrt())
    middle.errorbar(
        *(times, mean, 2 * std),
        fmt="o",
        color=colors[name],
        markersize=3.5,
        elinewidth=0.6,
        alpha=0.8,
        label=f"{name}: error {error:.2f} s",
    )
limits = (float(times.min()) - 0.2, float(times.max()) + 0.2)
middle.plot(limits, limits, color="#9aa1ad", linewidth=1, zorder=0)

# %% Right: how much slower than the cycloid
for name, tried in runs.items():
    best = torch.stack([-Y.cummax(0).values[first - 1 :: q, 0] for _, Y, _ in tried])
    slower = best - quickest
    steps = range(first, budget + 1, q)
    right.plot(steps, slower.mT, color=colors[name], linewidth=0.8, alpha=0.5)
    mean = slower.log().mean(0).exp()
    right.plot(steps, mean, color=colors[name], linewidth=2.2, label=name)

# %% Save
for ax, title in (
    (left, f"The quickest of {budget} slides"),
    (middle, "60 slides that were not tried"),
    (right, "Against the cycloid, each first design"),
):
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
    ax.legend(frameon=False, fontsize=8, ncols=1 + (ax is left))
left.set(xlabel="place", ylabel="height", ylim=(-0.05, 1.6))
middle.set(xlabel="seconds it takes", ylabel="predicted, ± 2 standard deviations")
right.set(yscale="log", xlabel="experiments", ylabel="seconds slower, best so far")
right.grid(True)
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_bayesian_optimization.png"
figure.savefig(path, dpi=110)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
