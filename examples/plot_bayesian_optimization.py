"""Which experiment next? Bayesian optimisation with networks as surrogates.

The loop is the usual one of BoTorch: fit a model, maximise an acquisition function, run
the experiment that it asks for. Only the model changes: botorch's own Gaussian process,
a linearised network and an ensemble. The yield to be maximised falls off a cliff beyond
a curved line, near which the best experiments lie, and changes slowly elsewhere: no
single length scale suits both.
"""

# %% Set up: two inputs, a yield with a cliff, the same ten first experiments for all
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
from botorch.utils.sampling import draw_sobol_samples
from gpytorch.mlls import ExactMarginalLogLikelihood
from matplotlib import pyplot
from PIL import Image

from gpbridge.plots import COLORS, INK, STYLE
from gpbridge.surrogates import EnsembleSurrogate, LinearizedSurrogate

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
seeds, steps, epochs, maxiter = (1, 1, 10, 3) if options.smoke else (3, 15, 300, 50)

torch.set_num_threads(1)
bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def truth(X):
    """The yield of experiments ``n x 2``, as a column."""
    x, y = X.split(1, -1)
    edge = 0.55 + 0.25 * torch.sin(3 * x) - y  # positive on the good side
    slope = 1 - 1.2 * (x - 0.75).square() - 0.6 * (y - 0.9).square()
    return slope * torch.sigmoid(40 * edge)


side = torch.linspace(0, 1, 401, dtype=torch.float64)
grid = torch.cartesian_prod(side, side)
optimum = float(truth(grid).max())
starts = [
    draw_sobol_samples(bounds, n=10, q=1, seed=seed)[:, 0] for seed in range(seeds)
]

# %% The surrogates: one function each, of the experiments and the model before


def gaussian_process(X, Y, last):
    model = SingleTaskGP(X, Y, input_transform=Normalize(2, bounds=bounds))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def fitted_by(recipe):
    def fit(X, Y, last):
        return recipe.fit(X, Y) if last is None else recipe.update(last, X, Y)

    return fit


surrogates = {
    "SingleTaskGP": gaussian_process,
    "linearised network": fitted_by(LinearizedSurrogate(bounds=bounds, epochs=epochs)),
    "ensemble of 5": fitted_by(EnsembleSurrogate(bounds=bounds, epochs=epochs)),
}

# %% The loop, once for each surrogate and seed


def optimise(fit, X, seed):
    """All experiments, in the order in which they were run, and the last model."""
    Y, model = truth(X), None
    for step in range(steps):
        torch.manual_seed(100 * seed + step)  # botorch's starts
        model = fit(X, Y, model)
        chosen, _ = optimize_acqf(
            qLogExpectedImprovement(model, best_f=Y.max()),
            bounds,
            q=1,
            num_restarts=4,
            raw_samples=64,
            options={"maxiter": maxiter},
        )
        X = torch.cat([X, chosen])
        Y = torch.cat([Y, truth(chosen)])
    return X, Y, fit(X, Y, model)


runs, regrets = {}, {}
for name, fit in surrogates.items():
    began = time.process_time()
    with warnings.catch_warnings():  # of optimisers that stop early
        warnings.simplefilter("ignore")
        runs[name] = [optimise(fit, X, seed) for seed, X in enumerate(starts)]
    best = torch.stack([Y.cummax(0).values[9:, 0] for _, Y, _ in runs[name]])
    regrets[name] = (optimum - best).clamp_min(1e-6)
    each = (time.process_time() - began) / (seeds * steps)
    print(
        f"{name}: {each:.2f} s per experiment, regret at the end "
        + ", ".join(f"{value:.1e}" for value in regrets[name][:, -1])
    )
sobol = [draw_sobol_samples(bounds, n=10 + steps, q=1, seed=s) for s in range(seeds)]
best = torch.stack([truth(X[:, 0]).cummax(0).values[9:, 0] for X in sobol])
regrets["Sobol design"] = (optimum - best).clamp_min(1e-6)

# %% Left: what two of them believe after the last experiment of the first seed
pyplot.rcParams.update(STYLE)
figure, panels = pyplot.subplots(
    1, 4, figsize=(14, 3.7), width_ratios=(1, 1, 1, 1.5), layout="constrained"
)
coarse = torch.linspace(0, 1, 81, dtype=torch.float64)
points = torch.cartesian_prod(coarse, coarse)
levels = torch.linspace(-0.3, 1.05, 19).tolist()


def picture(ax, values, title):
    values = values.reshape(81, 81).mT.clamp(levels[0], levels[-1])
    shades = ax.contourf(coarse, coarse, values, levels, cmap="viridis")
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
    ax.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), xlabel="$x_1$")
    return shades


picture(panels[0], truth(points), "The yield")
for ax, name in zip(panels[1:3], ("SingleTaskGP", "linearised network"), strict=True):
    X, _, model = runs[name][0]
    with torch.no_grad():
        posterior = model.posterior(points)
    shades = picture(ax, posterior.mean, f"{name}: mean")
    std = posterior.variance.sqrt().reshape(81, 81).mT
    if float(std.max()) > 0.1:
        ax.contour(
            coarse, coarse, std, [0.1], colors="white", linestyles=":", linewidths=1.2
        )
    ax.plot(*X[:10].mT, "o", markersize=4, color="white", markeredgecolor=INK)
    ax.plot(*X[10:].mT, "o", markersize=4, color=COLORS[1], markeredgecolor="white")
panels[0].set_ylabel("$x_2$")
best_input = grid[truth(grid)[:, 0].argmax()]
panels[0].plot(*best_input, "*", color="white", markeredgecolor=INK, markersize=13)
figure.colorbar(shades, ax=panels[2], shrink=0.9, ticks=(0, 0.5, 1))

# %% Right: regret of all seeds; the mean is of logarithms
ax, x = panels[3], range(10, 11 + steps)
colors = (INK, COLORS[0], COLORS[1], "#9aa1ad")
for color, (name, values) in zip(colors, regrets.items(), strict=True):
    ax.plot(x, values.mT, color=color, linewidth=0.7, alpha=0.35)
    mean = values.log().mean(0).exp()
    ax.plot(x, mean, color=color, linewidth=2.2, label=name)
ax.set(yscale="log", xlabel="experiments", ylabel="optimum minus best so far")
ax.set_title(f"Regret, {seeds} first designs", loc="left", fontweight="bold",
             fontsize=11)  # fmt: skip
ax.legend(frameon=False, fontsize=8.5)
ax.grid(True)

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_bayesian_optimization.png"
figure.savefig(path, dpi=110)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
