"""What does linearising a trained network buy?

A network trained on two stretches of data is equally sure of itself everywhere. Its
tangent model is a Gaussian process that knows where there were no data, as an exact GP
does, and keeps the network's idea of the function. How well depends on the prior of the
weights: the lower row shows three other choices for the same trained network.
"""

# %% Set up: data on both sides of a gap, and one network, trained once
import argparse
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize
from gpytorch.mlls import ExactMarginalLogLikelihood
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.data import sine_gap
from gpbridge.dnn import fit_map
from gpbridge.metrics import gaussian_nll, interval_coverage
from gpbridge.plots import COLORS, INK, plot_posterior_band
from gpbridge.selection import fit_evidence

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(0)  # initial weights are torch's, which have no generator
generator = torch.Generator().manual_seed(0)
X, Y = sine_gap(80, generator)
x = torch.linspace(-4, 4, 401, dtype=X.dtype)[:, None]

# Scored where there are data and between them, on new noisy values.
test_X = torch.linspace(-3, 3, 301, dtype=X.dtype)[:, None]
test_Y = torch.sin(2 * test_X)
test_Y = test_Y + 0.1 * torch.randn(test_X.shape, generator=generator, dtype=X.dtype)

network = nn.Sequential(
    nn.Linear(1, 50), nn.SiLU(), nn.Linear(50, 50), nn.SiLU(), nn.Linear(50, 1)
).double()
trained = fit_map(network, X, Y, epochs=20 if options.smoke else 300)


# %% A panel: the posterior of f, and the score of the predictive distribution of y
pyplot.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK})
figure, axes = pyplot.subplots(
    2, 3, figsize=(11, 6.4), sharex=True, sharey=True, layout="constrained"
)
panels = iter(axes.flat)


def panel(title, predict, color, draws=None):
    """Draw and score; ``predict`` maps X to the mean and the variances of f and y."""
    with torch.no_grad():
        mean, variance, _ = predict(x)
        test_mean, _, test_variance = predict(test_X)
    nll = gaussian_nll(test_mean, test_variance, test_Y)
    covered = interval_coverage(test_mean, test_variance, test_Y)
    print(f"{title}: NLL {nll:.2f}, 95% intervals cover {covered:.0%}")

    ax = next(panels)
    ax.plot(x, torch.sin(2 * x), color=INK, linewidth=1, linestyle=":", label="truth")
    if draws is not None:
        ax.plot(x, draws(x)[..., 0].mT, color=color, linewidth=0.7, alpha=0.55)
    plot_posterior_band(ax, x, mean, variance.sqrt(), color=color)
    ax.get_legend().remove()
    ax.scatter(X, Y, s=9, color=INK, linewidth=0, zorder=3, label="data")
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11, pad=20)
    score = f"NLL {nll:.2f}, 95% intervals cover {covered:.0%}"
    ax.text(0, 1.03, score, transform=ax.transAxes)
    ax.set(xlim=(-4, 4), ylim=(-3.2, 3.2), xticks=range(-3, 4))


def of_model(model):
    """What a panel wants, from a BoTorch model with Gaussian noise."""

    def predict(X):
        f = model.posterior(X)
        return f.mean, f.variance, model.posterior(X, observation_noise=True).variance

    return predict


# %% The network alone: its output, with the residuals of its validation rows as noise
def network_alone(X):
    mean = trained.network(X)
    variance = trained.validation_variance.expand_as(mean)
    return mean, variance, variance


panel("network, validation noise", network_alone, INK)

# %% Linearised: one prior variance and the noise learnt by evidence
model = LinearizedGP.from_fit(trained, X, Y)
evidence = fit_evidence(model)
print(f"one prior variance: {evidence.value:.1f} nats")
panel(
    "linearised, one prior variance",
    of_model(model),
    COLORS[0],
    model.draw(8, torch.Generator().manual_seed(0)),
)

# %% Reference: an exact GP
exact = SingleTaskGP(X, Y, input_transform=Normalize(1))
fit_gpytorch_mll(ExactMarginalLogLikelihood(exact.likelihood, exact))
panel("exact GP (SingleTaskGP)", of_model(exact), COLORS[2])

# %% One prior variance per layer: more evidence, and a layer that is switched off. The
# hidden layers were fitted to these targets, so evidence trusts them too much; here the
# price is paid outside the data, on most real data it is test NLL.
layers = LinearizedGP.from_fit(trained, X, Y, groups="layer", select=None)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of layers pruned
    evidence = fit_evidence(layers)
ratio = layers.diagnostics.group_ratio
print(f"per layer: {evidence.value:.1f} nats, smallest / largest variance {ratio:.0e}")
panel("one prior variance per layer", of_model(layers), COLORS[1])

# %% Last layer only: cheap; its noise has to come from validation data
last = LinearizedGP.from_fit(trained, X, Y, parameters="last_layer")
fit_evidence(last)
panel("last layer, validation noise", of_model(last), COLORS[1])

# %% g-prior: every weight scaled by the size of its feature on the data
scaled = LinearizedGP.from_fit(trained, X, Y, g_prior=True, select=None)
fit_evidence(scaled)
panel("g-prior, mean zero", of_model(scaled), COLORS[1])

# %% Save
for ax in axes[1]:
    ax.set_xlabel("x")
handles, labels = axes[0, 0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_linearized_laplace.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
