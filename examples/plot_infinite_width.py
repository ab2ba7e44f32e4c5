"""Does an infinitely wide network need its variances learned as it grows deeper?

A wide random network is a Gaussian process (NNGP), and so is its training by gradient
descent (NTK). Its hyperparameters are the variances of weights and biases of each
layer. At the usual initialisation (weights 2, biases 0.01) the evidence of 40 points
depends on depth by tens of nats, upwards for one kernel and downwards for the other.
With learned variances the random network explains the data at any depth as well as at
the best one, and a single layer is enough.

The data are straight lines with kinks. Between them a stationary kernel has the higher
evidence still; beyond them it returns to zero, and networks of ReLUs go on straight.
"""

# %% Set up: few noisy data on straight lines
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from matplotlib import pyplot
from matplotlib.patches import Patch
from PIL import Image

from gpbridge.kernels import InfiniteWidthKernel
from gpbridge.kernels.wide_layers import Dense, ReLU
from gpbridge.plots import COLORS, INK, plot_posterior_band
from gpbridge.selection import log_evidence

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
depths, steps = ((1,), 3) if options.smoke else ((1, 2, 3, 4, 6, 8), 100)

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)


def truth(x):
    return (x + 1).clamp_min(0) - 2.2 * (x - 0.4).clamp_min(0) - 0.5


X = (3 * torch.rand(40, 1, generator=generator, dtype=torch.float64) - 1.5).sort(0)[0]
Y = truth(X) + 0.05 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
x = torch.linspace(-3, 3, 241, dtype=torch.float64)[:, None]


def fitted(kernel, learn=True):
    """A GP of mean zero, its noise learned, its kernel too if asked for."""
    likelihood = GaussianLikelihood().double()
    likelihood.noise = 0.01
    model = SingleTaskGP(
        X, Y, likelihood=likelihood, covar_module=kernel, outcome_transform=None
    )
    model.mean_module.initialize(constant=0.0).requires_grad_(False)
    model.covar_module.requires_grad_(learn)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": steps}})
    return model.eval()


def network(depth, kind):
    layers = [layer for _ in range(depth) for layer in (Dense(), ReLU())]
    return InfiniteWidthKernel([*layers, Dense()], kind).double()


# %% Evidence of networks of growing depth, their variances fixed or learned
lines = {
    "NNGP, fixed": ("nngp", False),
    "NNGP, learned": ("nngp", True),
    "NTK, fixed": ("ntk", False),
    "NTK, learned": ("ntk", True),
}
models = {
    (kind, learn, depth): fitted(network(depth, kind), learn)
    for kind, learn in lines.values()
    for depth in depths
}
with torch.no_grad():
    evidence = {key: float(log_evidence(model)) for key, model in models.items()}
smooth = fitted(ScaleKernel(RBFKernel()).double())
with torch.no_grad():
    reference = float(log_evidence(smooth))
print(f"log evidence of the squared exponential kernel: {reference:.1f} nats")
for label, (kind, learn) in lines.items():
    values = [f"{evidence[kind, learn, depth]:.1f}" for depth in depths]
    print(f"{label}, depths {depths}:", *values)
deepest = models["nngp", True, depths[-1]].covar_module
for name in ("weight_variance", "bias_variance"):
    values = [f"{value:.2g}" for value in getattr(deepest, name).tolist()]
    print(f"learned {name} of the deepest NNGP:", *values)

# %% Left: posteriors, beyond the data too
pyplot.rcParams.update(
    {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#b8bdc6",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#e6e8ec",
    }
)
figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
shown = {
    "squared exponential": (smooth, COLORS[1]),
    "NNGP, one hidden layer, learned": (models["nngp", True, depths[0]], COLORS[0]),
}
for label, (model, color) in shown.items():
    with torch.no_grad():
        f = model.posterior(x)
        std = f.variance.sqrt()
        error = (f.mean - truth(x)).abs()
    plot_posterior_band(left, x, f.mean, std, color=color, label=label)
    print(f"{label}: mean error beyond the data {error[x.abs() > 1.5].mean():.2f}")
left.plot(x, truth(x), color=INK, linewidth=1.2, linestyle="--", label="truth")
left.plot(X, Y, ".", color=INK, markersize=4, label="data")
left.set(xlim=(-3, 3), ylim=(-3, 2.6), xlabel="x", ylabel="f")
left.set_title(
    "Posteriors, beyond the data too", loc="left", fontweight="bold", fontsize=11
)
handles, labels = left.get_legend_handles_labels()
entries = dict(zip(labels, handles, strict=True))  # each band brings "95% interval"
entries["95% interval"] = Patch(color=INK, alpha=0.2, linewidth=0)  # of either color
left.legend(
    entries.values(), entries.keys(), frameon=False, loc="upper left", fontsize=8
)

# %% Right: evidence over depth
for label, (kind, learn) in lines.items():
    values = [evidence[kind, learn, depth] for depth in depths]
    style = {"color": COLORS[0 if kind == "nngp" else 2], "label": label}
    style["linestyle"] = "-" if learn else ":"
    right.plot(depths, values, marker="o", markersize=4, linewidth=1.8, **style)
right.axhline(
    reference, color=COLORS[1], linewidth=1.4, label="squared exponential, learned"
)
right.set(xlabel="hidden layers", ylabel="log evidence, nats", xticks=depths)
right.set_title(
    "Depth, with variances fixed or learned",
    loc="left",
    fontweight="bold",
    fontsize=11,
)
right.grid(True)
right.legend(frameon=False, fontsize=8)

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_infinite_width.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
