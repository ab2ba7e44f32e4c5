"""What does the tangent kernel of a network look like, before and after training?

Two points are alike for a network if the same change of weights moves its output at
both. Before training this is a smooth prior over functions, one that can be added to a
Matérn kernel as any other. After training it bends towards the function learnt: alike
are the points that the network treats alike, not those that are near.
"""

# %% Set up: a function that is flat on the left and wiggles on the right
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize
from gpytorch.mlls import ExactMarginalLogLikelihood
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge.dnn import fit_map
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.metrics import rmse
from gpbridge.plots import COLORS, INK, STYLE, plot_posterior_band
from gpbridge.selection import fit_matern_plus_kernel, log_evidence, multi_start

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(0)  # initial weights are torch's, which have no generator
generator = torch.Generator().manual_seed(0)


def truth(x):
    return 0.5 * x + torch.where(x > 0, torch.sin(4 * x), 0)


X = 4 * torch.rand(60, 1, generator=generator, dtype=torch.float64) - 2
Y = truth(X) + 0.1 * torch.randn(X.shape, generator=generator, dtype=X.dtype)
x = torch.linspace(-3, 3, 301, dtype=X.dtype)[:, None]

network = nn.Sequential(
    nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)
).double()
trained = fit_map(network, X, Y, epochs=20 if options.smoke else 1000).network
kernels = {
    "untrained": NeuralTangentKernel(network),
    "trained": NeuralTangentKernel(trained),
}

# %% A figure with the tangent kernel before training above, after training below
pyplot.rcParams.update(STYLE)
figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.2), layout="constrained")
for ax in axes.flat:
    ax.grid(True)
    ax.set(xlim=(-3, 3))


def title(ax, text, subtitle):
    ax.set_title(text, loc="left", fontweight="bold", fontsize=11, pad=20)
    ax.text(0, 1.03, subtitle, transform=ax.transAxes)


# %% Left: the correlation of f(x) with f at three points. Right of it: prior draws
centres = X.new_tensor([[-1.5], [0.0], [1.5]])
with torch.no_grad():
    for row, (name, kernel) in zip(axes, kernels.items(), strict=True):
        std, centre_std = kernel(x, diag=True).sqrt(), kernel(centres, diag=True).sqrt()
        correlation = kernel(x, centres).to_dense() / std[:, None] / centre_std
        for column, color, centre in zip(correlation.mT, COLORS, centres, strict=False):
            row[0].plot(x, column, color=color, linewidth=2)
            row[0].plot(centre, 1, "o", color=color, markeredgecolor="white")
        row[0].set(ylim=(-1.05, 1.1), ylabel="correlation")
        title(
            row[0],
            f"Tangent kernel, {name}",
            "correlation of f(x) with f at three points",
        )
        near = (correlation > 0.5).double().mean(0) * 6
        print(
            f"{name}: correlation above 1/2 over a width of {near[0]:.1f} around "
            f"x = -1.5 and of {near[2]:.1f} around x = 1.5"
        )

        features = kernel.features(x) / kernel(X, diag=True).mean().sqrt()
        weights = torch.randn(features.shape[-1], 5, generator=generator, dtype=X.dtype)
        row[1].plot(x, features @ weights, color=COLORS[0], linewidth=1.4, alpha=0.75)
        row[1].set(ylim=(-3.6, 3.6), ylabel="f")
        title(row[1], f"Prior draws, {name}", "scaled to variance 1 at the data")
axes[1, 1].plot(
    x, truth(x), color=INK, linewidth=1.2, linestyle=":", label="trained on"
)
axes[1, 1].legend(frameon=False, loc="lower left")


# %% Right: the untrained kernel as a part of an ordinary GP, on a trend with a wiggle.
# A stationary kernel forgets the trend outside the data; the network's part does not.
def wiggle(x):
    return x + 0.4 * torch.sin(6 * x)


Y = wiggle(X) + 0.1 * torch.randn(X.shape, generator=generator, dtype=X.dtype)
matern = SingleTaskGP(X, Y, input_transform=Normalize(1))
starts = [{}, {"covar_module.lengthscale": 0.1, "likelihood.noise": 0.01}]
multi_start(ExactMarginalLogLikelihood(matern.likelihood, matern), starts)
both = fit_matern_plus_kernel(X, Y, kernels["untrained"], input_transform=Normalize(1))
outside = x.abs() > 2
for ax, model, name, color in (
    (axes[0, 2], matern, "SingleTaskGP", COLORS[2]),
    (axes[1, 2], both, "Matérn + untrained NTK", COLORS[3]),
):
    with torch.no_grad():
        posterior, evidence = model.posterior(x), log_evidence(model)
        error = rmse(posterior.mean[outside], wiggle(x)[outside])
        std = posterior.variance.sqrt()
    plot_posterior_band(ax, x, posterior.mean, std, color=color)
    ax.plot(x, wiggle(x), color=INK, linewidth=1.2, linestyle=":", label="truth")
    ax.scatter(X, Y, s=9, color=INK, linewidth=0, zorder=3, label="data")
    ax.set(xlim=(-3, 3), ylim=(-3.8, 4.8), ylabel="f")
    ax.legend(frameon=False, loc="upper left", ncols=2)
    title(ax, name, f"error outside the data {error:.2f}")
    print(
        f"{name}: log evidence {evidence:.1f} nats, RMSE outside the data {error:.2f}"
    )

# %% Save
for ax in axes[1]:
    ax.set_xlabel("x")
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_tangent_kernel.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
