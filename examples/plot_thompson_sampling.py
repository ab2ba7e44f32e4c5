"""Where does the next batch of experiments go if each maximises a function of its own?

A posterior says which functions are still possible. Thompson sampling draws one of them
for each experiment of a batch and goes where that function is best: a place is chosen
as often as it is the best one, given the data. Nothing has to keep the experiments of a
batch apart, since the functions differ; they agree only where the data leave no doubt.

A draw here is a function, not values at candidates, so that its maximum is found by
gradients, and the draws of a batch are maximised side by side.
"""

# %% Set up: a function with two maxima, which the data leave open
import argparse
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
from botorch.test_functions import Branin
from botorch.utils.sampling import draw_sobol_samples
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from matplotlib import pyplot
from PIL import Image

from gpbridge.acquisition import thompson_sample
from gpbridge.plots import COLORS, INK, STYLE, plot_posterior_band

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
many, seeds, rounds, q = (20, 1, 1, 2) if options.smoke else (400, 4, 5, 5)
raw = 16 if options.smoke else 128

torch.set_num_threads(1)
warnings.simplefilter("ignore")  # of botorch, about units
generator = torch.Generator().manual_seed(0)
unit = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

X = torch.tensor([0.0, 0.05, 0.22, 0.3, 0.42, 0.52, 0.78, 0.9, 1.0]).double()[:, None]
Y = torch.sin(12.5 * X) + 0.8 * X
model = SingleTaskGP(X, Y, covar_module=ScaleKernel(MaternKernel(2.5)))
model.covar_module.base_kernel.lengthscale = 0.15
model.likelihood.noise = 1e-3

# %% Left: the posterior, five functions of it, and where the maxima of many lie
sample = thompson_sample(model, unit, many, generator=generator)
x = torch.linspace(0, 1, 501, dtype=X.dtype)[:, None]
with torch.no_grad():
    posterior = model.posterior(x)
    mean, std = posterior.mean[:, 0], posterior.variance.sqrt()[:, 0]
    functions = sample.draws(x)[..., 0]
print(
    f"{many} maxima; a dense evaluation of the same functions exceeds them by at most "
    f"{float((functions.amax(-1) - sample.values).max()):.1e}"
)

pyplot.rcParams.update(STYLE)
figure = pyplot.figure(figsize=(12.6, 4.4), layout="constrained")
grid = figure.add_gridspec(2, 3, height_ratios=(3, 1), width_ratios=(1.15, 1, 1))
top = figure.add_subplot(grid[0, 0])
below = figure.add_subplot(grid[1, 0], sharex=top)
plot_posterior_band(top, x, mean, std, color="#8a93a1", label="posterior mean")
top.plot(X, Y, "o", color=INK, markersize=4, zorder=4, label="data")
for i in range(5):
    color = COLORS[i % 4] if i < 4 else "#b0476a"
    top.plot(x, functions[i], color=color, linewidth=1.1)
    best = sample.candidates[i], sample.values[i]
    top.plot(*best, "*", color=color, markersize=13, markeredgecolor="white", zorder=5)
below.hist(sample.candidates[:, 0], bins=50, range=(0, 1), color=COLORS[0])

# %% Middle: a batch in two dimensions beside a greedy one
problem = Branin(negate=True)
box = problem.bounds.double()


def first_data(seed, size=8):
    X = draw_sobol_samples(box, size, 1, seed=seed).squeeze(1)
    return X, problem(X)[:, None]


def fitted(X, Y):
    surrogate = SingleTaskGP(X, Y, input_transform=Normalize(2, bounds=box))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(surrogate.likelihood, surrogate))
    return surrogate


def thompson(surrogate, X, Y, seed):
    seeded = torch.Generator().manual_seed(seed)
    return thompson_sample(surrogate, box, q, generator=seeded).candidates


def greedy(surrogate, X, Y, seed):
    """Expected improvement, one candidate after the other."""
    torch.manual_seed(seed)
    improvement = qLogExpectedImprovement(surrogate, best_f=Y.max())
    return optimize_acqf(improvement, box, q, 4, raw, sequential=True)[0]


def largest_means(surrogate, X, Y, seed):
    """The q best of many random points by their means."""
    choices = draw_sobol_samples(box, 2048, 1, seed=seed).squeeze(1)
    with torch.no_grad():
        means = surrogate.posterior(choices).mean[:, 0]
    return choices[means.topk(q).indices]


X2, Y2 = first_data(3)
surrogate = fitted(X2, Y2)
side = torch.linspace(0, 1, 61).double()
plane = box[0] + (box[1] - box[0]) * torch.cartesian_prod(side, side)
with torch.no_grad():
    height = surrogate.posterior(plane).mean.reshape(61, 61)
batches = {
    "Thompson sampling": (thompson, COLORS[1], "*", 15),
    "greedy, expected improvement": (greedy, COLORS[0], "o", 7),
    "largest means": (largest_means, COLORS[2], "s", 6),
}
middle = figure.add_subplot(grid[:, 1])
axes = [plane[:, i].reshape(61, 61) for i in (0, 1)]
middle.contourf(*axes, height, 14, cmap="Greys", alpha=0.55)
middle.plot(*X2.T, "x", color=INK, markersize=5, label="data")
for name, (choose, color, marker, size) in batches.items():
    batch = choose(surrogate, X2, Y2, 0)
    style = {"color": color, "markersize": size, "markeredgecolor": "white"}
    style["clip_on"] = False
    middle.plot(*batch.T, marker, linestyle="", label=name, zorder=4, **style)
middle.plot(
    *torch.tensor(problem._optimizers).T,
    *("o",),
    color="none",
    markeredgecolor=INK,
    markersize=15,
    label="true maxima",
)

# %% Right: what the batches find, round after round
right = figure.add_subplot(grid[:, 2])
for name, (choose, color, _, _) in batches.items():
    regrets, spent = [], 0.0
    for seed in range(seeds):
        X2, Y2 = first_data(10 + seed)
        trace = [Y2.max()]
        for turn in range(rounds):
            surrogate = fitted(X2, Y2)
            start = time.process_time()
            batch = choose(surrogate, X2, Y2, 100 * seed + turn)
            spent += time.process_time() - start
            X2 = torch.cat([X2, batch])
            Y2 = torch.cat([Y2, problem(batch)[:, None]])
            trace.append(Y2.max())
        regrets.append(problem.optimal_value - torch.stack(trace))
    regrets = torch.stack(regrets).clamp_min(1e-6)
    count = 8 + q * torch.arange(rounds + 1)
    cost = spent / (seeds * rounds)
    right.plot(count, regrets.mT, color=color, linewidth=0.7, alpha=0.35)
    middle_one = regrets.quantile(0.5, dim=0)
    label = f"{name}, {1e3 * cost:.0f} ms a batch"
    right.plot(count, middle_one, color=color, linewidth=2.2, label=label)
    print(f"{name}: median regret {middle_one[-1]:.2g}, {cost:.2f} s a batch")

# %% Save
title = {"loc": "left", "fontweight": "bold", "fontsize": 11}
top.set(ylabel="f", xlim=(0, 1), ylim=(-1.5, 2.0))
top.set_title("Five functions of a posterior, and their maxima", **title)
top.tick_params(labelbottom=False)
top.legend(frameon=False, fontsize=8, loc="lower left", ncols=3)
below.set(xlabel="x", ylabel=f"maxima of {many}")
middle.set(xlabel="x1", ylabel="x2", xlim=box[:, 0], ylim=box[:, 1])
middle.set_title(f"A batch of {q}: Branin after 8 values", **title)
middle.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=8)
right.set(yscale="log", xlabel="evaluations", ylabel="regret of the best so far")
right.set_title(f"Median of {seeds} runs", **title)
right.grid(True)
right.legend(frameon=False, fontsize=8, loc="lower left")
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_thompson_sampling.png"
figure.savefig(path, dpi=120)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
print(f"figure: {path}")
