"""Which posteriors over weights know where they have no data?

One network of two hidden layers, one data set with a gap, one noise variance, eight
ways to be uncertain about the weights. Where there are data all should agree; in the
gap and beyond the ends the bands should widen. Here they do for the linearised GP most,
for the ensemble and the chain less; the moments of a training run and dropout are
about as wide everywhere, and mean-field inference does not fit all of the data. Every
method is a distribution over functions, so that the same lines draw them all.
"""

# %% Set up: a noisy sine that is not seen in the middle
import argparse
import copy
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from gpytorch.likelihoods import GaussianLikelihood
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.data import sine_gap
from gpbridge.dnn import (
    SGHMC,
    SWAG,
    EllipticalSliceSampling,
    MCDropout,
    Subspace,
    fit_ensemble,
    fit_map,
    fit_mean_field,
    sample_subspace,
)
from gpbridge.functional import FunctionalNet
from gpbridge.likelihoods import log_prob
from gpbridge.plots import COLORS, INK, plot_posterior_band
from gpbridge.surrogates import WeightSpaceModel
from gpbridge.weights import EmpiricalWeights

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
share = 0.01 if options.smoke else 1.0  # of every run

torch.set_num_threads(1)
noise_std = 0.1
X, Y = sine_gap(80, noise_std=noise_std)
x = torch.linspace(-4.5, 4.5, 61 if options.smoke else 181, dtype=X.dtype)[:, None]
likelihood = GaussianLikelihood().double()
likelihood.noise = noise_std**2
likelihood.requires_grad_(False)
prior_variance = 0.5  # of every weight, where a method has a prior


def steps(number):
    return max(4, int(share * number))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(dropout=0.0, width=30):
    layers = []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for inputs in (1, width):
            layers += [nn.Linear(inputs, width), nn.Tanh()]
            layers += [nn.Dropout(dropout)] if dropout else []
        layers.append(nn.Linear(width, 1))
    return nn.Sequential(*layers).double()


training = {
    "epochs": steps(1000),
    "early_stopping": False,
    "weight_decay": noise_std**2 / (prior_variance * len(X)),
    "schedule": "cosine",
    "progress": False,
}
trained = fit_map(network(), X, Y, **training).network


def model(posterior, mode="ensemble"):
    """Any posterior over weights, seen as functions."""
    return WeightSpaceModel(
        posterior, num_outputs=1, mode=mode, likelihood=likelihood, generator=seeded()
    )


# %% The methods, each as a model with a predict
def tangent_model():
    gp = LinearizedGP(trained, X, Y, likelihood=copy.deepcopy(likelihood))
    gp.prior_variance = prior_variance
    return gp


def minus_log_likelihood(own):
    return -log_prob(likelihood, own(X), Y).mean()


def run(optimizer, own, number, keep, every):
    """Descend on the likelihood per datum, and let ``keep`` look now and then."""
    for step in range(steps(number)):
        optimizer.zero_grad()
        minus_log_likelihood(own).backward()
        optimizer.step()
        if step % every == 0:
            keep(own)


def averaged():
    """Weights along a run at a constant rate, from the trained ones."""
    own = copy.deepcopy(trained).requires_grad_()
    tracker = SWAG(own, rank=min(20, steps(1000) // 2))
    optimizer = torch.optim.SGD(own.parameters(), lr=3e-4, momentum=0.9)
    order = torch.Generator().manual_seed(3)
    for step in range(steps(1000)):
        rows = torch.randperm(len(X), generator=order)[:10]
        optimizer.zero_grad()
        (-log_prob(likelihood, own(X[rows]), Y[rows]).mean()).backward()
        optimizer.step()
        if step % max(1, int(share * 10)) == 0:
            tracker.update(own)
    return tracker


tracker = averaged()


def dropout():
    own = fit_map(network(dropout=0.05, width=100), X, Y, **training).network
    return MCDropout(own)


def ensemble():
    fit = fit_ensemble(
        network(), X, Y, 3 if options.smoke else 10, generator=seeded(), **training
    )
    return EmpiricalWeights(FunctionalNet(fit.networks[0]), fit.weights)


def subspace():
    draws = 4 if options.smoke else 30
    directions = Subspace.pca(tracker, dim=min(5, tracker.num_columns - 1))
    found = sample_subspace(
        *(directions, X, Y, likelihood),
        method=EllipticalSliceSampling(num_samples=draws, burn_in=draws),
        prior_std=10.0,
        generator=seeded(),
        progress=False,
    )
    return found.posterior


def variational():
    return fit_mean_field(
        trained,
        X,
        Y,
        likelihood,
        epochs=steps(2000),
        generator=seeded(),
        progress=False,
    )


def chain():
    own = copy.deepcopy(trained).requires_grad_()
    net, kept = FunctionalNet(own), []
    sampler = SGHMC(
        own.parameters(),
        lr=3e-5,
        num_data=len(X),
        prior_precision=1 / prior_variance,
        generator=seeded(),
    )

    def keep(own):
        kept.append(net.flatten(dict(own.named_parameters())).detach().clone())

    run(sampler, own, 10000, keep, every=max(1, int(share * 125)))
    return EmpiricalWeights(net, torch.stack(kept[len(kept) // 5 :]))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # few snapshots, in smoke size
    swag = tracker.posterior(0.5)
panels = [
    ("linearised GP", tangent_model),
    ("SWAG, draws", lambda: model(swag)),
    ("SWAG, tangent model", lambda: model(swag, "linearized")),
    ("MC dropout", lambda: model(dropout())),
    ("deep ensemble of 10", lambda: model(ensemble())),
    ("subspace of 5, slice sampling", lambda: model(subspace())),
    ("mean-field VI", lambda: model(variational())),
    ("SGHMC", lambda: model(chain())),
]

# %% One panel each: mean, bands with noise, and three functions
pyplot.rcParams.update({"font.size": 9, "text.color": INK, "axes.edgecolor": "#b8bdc6"})
figure, grid = pyplot.subplots(
    *(2, 4),
    figsize=(13, 5.6),
    sharex=True,
    sharey=True,
    layout=None if options.smoke else "constrained",
)
gap, seen = x[:, 0].abs() < 0.8, (x[:, 0].abs() > 1.2) & (x[:, 0].abs() < 2.8)
for axes, (name, build) in zip(grid.flat, panels, strict=True):
    view = build()
    with torch.no_grad():
        prediction = view.predict(x)
        std = prediction.variance.sqrt()
        if isinstance(view, WeightSpaceModel):
            functions = view.function_space.values(x)[:3]
        else:
            functions = view.draw(3, seeded())(x)
    plot_posterior_band(axes, x, prediction.mean, std, train_x=X, train_y=Y)
    axes.plot(x, functions[..., 0].mT, color=COLORS[1], linewidth=0.8)
    axes.plot(x, torch.sin(2 * x), color=INK, linewidth=0.9, linestyle=":")
    axes.set_title(name, loc="left", fontweight="bold", fontsize=10)
    axes.get_legend().remove()
    print(
        f"{name}: standard deviation {std[seen].mean():.2f} where there are data, "
        f"{std[gap].mean():.2f} in the gap, {std[[0, -1]].mean():.2f} at the ends"
    )
grid[0, 0].set(xlim=(-4.5, 4.5), ylim=(-3.2, 3.2))
handles = [
    pyplot.Line2D([], [], color=COLORS[0], linewidth=2, label="mean, 68% and 95%"),
    pyplot.Line2D([], [], color=COLORS[1], linewidth=0.8, label="three functions"),
    pyplot.Line2D([], [], color=INK, linestyle=":", label="truth"),
]
grid[0, 0].legend(handles=handles, frameon=False, fontsize=8, loc="upper center")

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_regression_uncertainty.png"
figure.savefig(path, dpi=100)
Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
print(f"figure: {path}")
