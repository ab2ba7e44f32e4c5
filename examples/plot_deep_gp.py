"""Does depth help where a stationary kernel cannot? A step, by one GP and by two.

A stationary kernel has one lengthscale for all inputs. A step needs two: long beside
it, short at it. With a short one an exact GP follows the step and wiggles everywhere;
with a long one a sparse GP is smooth, misses the step, and calls the rest noise. A deep
GP stretches its inputs first, so that its last layer is smooth in what it sees.

Colour is the predictive density of y, the mixture over draws of the hidden layer;
lines are functions drawn from the posterior, jointly over all inputs. The mean log
density of fresh data is in the titles, and printed for other data sets.
"""

# %% Set up: a step with little noise
import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from matplotlib import pyplot
from PIL import Image
from torch.distributions import Normal

from gpbridge.dnn import build_deep_gp, fit_deep_gp
from gpbridge.pathwise import draw_posterior_paths
from gpbridge.plots import COLORS, INK, STYLE

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
n, epochs, seeds = (20, 4, 1) if options.smoke else (60, 700, 2)
torch.set_num_threads(1)
noise_std = 0.05


def data(n, seed):
    """Inputs with variance one, and a step with noise."""
    generator = torch.Generator().manual_seed(seed)
    X = math.sqrt(3) * (2 * torch.rand(n, 1, generator=generator).double() - 1)
    noise = torch.randn(n, 1, generator=generator).double()
    return X, X.sign() + noise_std * noise


# %% The models: each gives a distribution of y, and functions


def exact(X, Y):
    """A GP with a squared exponential kernel, by maximum likelihood."""
    kernel = ScaleKernel(RBFKernel())
    model = SingleTaskGP(X, Y, covar_module=kernel, outcome_transform=None)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    paths = draw_posterior_paths(model, 6, generator=torch.Generator().manual_seed(0))

    def predict(x):
        f = model.posterior(x, observation_noise=True)
        return Normal(f.mean, f.variance.sqrt())

    return predict, paths


def deep(depth, X, Y):
    """A deep GP, trained on its bound."""
    model = build_deep_gp(X, depth=depth, num_inducing=20)
    options = {"num_samples": 2, "learning_rate": 0.05}
    fit = fit_deep_gp(model, X, Y, epochs=epochs, **options)
    # A smaller rate at the end: the bound is noisy, by the draws of the hidden layer.
    options = {"num_samples": 5, "learning_rate": 0.01, "resume": fit.state}
    trained = fit_deep_gp(model, X, Y, epochs=epochs // 4, **options).model
    draws = trained.draw(6, torch.Generator().manual_seed(0))
    return trained.predict, lambda x: draws(x)[..., 0]


models = {
    "exact GP": exact,
    "one layer": lambda X, Y: deep(1, X, Y),
    "two layers": lambda X, Y: deep(2, X, Y),
}
scores = {name: [] for name in models}
shown = {}
for seed in range(seeds):
    X, Y = data(n, seed)
    test_X, test_Y = data(500, 100 + seed)
    for name, fit in models.items():
        predict, functions = fit(X, Y)
        with torch.no_grad():
            scores[name].append(predict(test_X).log_prob(test_Y).mean().item())
        shown.setdefault(name, (X, Y, predict, functions))
for name, values in scores.items():
    print(f"{name}: log density of fresh data", *(f"{value:+.2f}" for value in values))

# %% The figure: densities and functions
x = torch.linspace(-math.sqrt(3), math.sqrt(3), 240).double()[:, None]
y = torch.linspace(-1.75, 1.75, 240).double()
pyplot.rcParams.update(STYLE)
figure, axes = pyplot.subplots(
    1, 3, figsize=(12, 3.9), sharey=True, layout="constrained"
)
best = Normal(0.0, noise_std).log_prob(torch.tensor(0.0)).exp()
for ax, (name, (X, Y, predict, functions)) in zip(axes, shown.items(), strict=True):
    with torch.no_grad():
        p = predict(x)
        density = torch.stack([p.log_prob(value.expand(len(x), 1)) for value in y])
        lines = functions(x)
    image = (density[..., 0].exp() / best).clamp_max(1).sqrt()
    ax.imshow(
        image, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1.3,
        extent=(x.min(), x.max(), y.min(), y.max()), interpolation="bilinear",
    )  # fmt: skip
    for line in lines:
        ax.plot(x, line, color=COLORS[1], linewidth=0.9, alpha=0.9)
    ax.plot(X, Y, ".", color=INK, markersize=4)
    ax.set(xlabel="x", ylim=(y.min(), y.max()), xlim=(x.min(), x.max()))
    ax.set_title(
        f"{name}: {scores[name][0]:+.2f} nats per point",
        loc="left", fontweight="bold", fontsize=11,
    )  # fmt: skip
axes[0].set_ylabel("y")
axes[0].plot([], [], color=COLORS[1], label="functions of the posterior")
axes[0].plot([], [], ".", color=INK, label="data")
axes[0].legend(frameon=False, loc="upper left", fontsize=8)
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_deep_gp.png"
figure.savefig(path, dpi=110)
Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
print(f"figure: {path}")
