"""Does cooling a posterior, p(D | w)^(1/T) p(w) with T < 1, improve predictions?

Left: linear regression, where the posterior is Gaussian and everything is exact. Data
come from the model itself, so that on average over data sets T = 1 has the best
predictive density, by theory. A chain of stochastic gradients must find the curve.

Middle and right: a small network on two half circles, by Hamiltonian dynamics, where
nothing says that the prior over weights or the likelihood are right: the circles
overlap or are clean. All data sets and temperatures run at once, and a temperature is
an option of a group of parameters of an ordinary optimizer. Bands: two standard errors
over data sets.

What is seen: where classes overlap, temperatures between 0.3 and 1 are about equal and
cold ones are worse by far. Where they are clean, the colder the better: a softmax with
weights of prior variance one expects noise in labels that have none.
"""

# %% Set up
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from PIL import Image
from torch import nn
from torch.func import vmap
from torch.nn import functional as F

from gpbridge.data import two_moons
from gpbridge.dnn import SGHMC
from gpbridge.functional import FunctionalNet
from gpbridge.metrics import accuracy, categorical_nll
from gpbridge.plots import COLORS, INK, STYLE

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
num_sets, burn_in, num_steps = (2, 20, 50) if options.smoke else (6, 1000, 4000)
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def sample(groups, mean_nll, num_data, precision, rate, burn_in, num_steps, thin):
    """Samples of weights, one group ``data sets x p`` for each temperature.

    The prior of precision T / N on the loss per datum, at temperature T, is the prior
    of precision 1 whatever T is: only the likelihood is tempered.
    """
    weights = [start.clone().requires_grad_() for start in groups.values()]
    sampler = SGHMC(
        [
            {"params": [w], "temperature": T, "prior_precision": T * precision}
            for w, T in zip(weights, groups, strict=True)
        ],
        lr=rate,
        num_data=num_data,
        generator=generator,
    )
    kept = []
    for step in range(burn_in + num_steps):
        sampler.zero_grad()
        mean_nll(torch.stack(weights)).sum().backward()
        sampler.step()
        if step >= burn_in and (step + 1) % thin == 0:
            kept.append(torch.stack(weights).detach().clone())
    return torch.stack(kept)  # samples x temperatures x data sets x p


# %% Left: linear regression with weights and data from the model, in closed form
temperatures = torch.logspace(-2, 1, 13, dtype=torch.float64)
many, n, d, noise = 20 if options.smoke else 1000, 20, 10, 0.5
X, x = normal(many, n, d), normal(many, 200, d)
truth = normal(many, d, 1)
y = X @ truth + noise**0.5 * normal(many, n, 1)
y_test = x @ truth + noise**0.5 * normal(many, 200, 1)


def gaussian_nll(mean, variance, y):
    return 0.5 * ((y - mean).square() / variance + (2 * torch.pi * variance).log())


exact = []
for T in temperatures:
    precision = X.mT @ X / (noise * T) + torch.eye(d, dtype=X.dtype)
    covariance = torch.linalg.inv(precision)
    mean = x @ (covariance @ X.mT @ y / (noise * T))
    variance = ((x @ covariance) * x).sum(-1, keepdim=True) + noise
    exact.append(gaussian_nll(mean, variance, y_test).mean((1, 2)))
exact = torch.stack(exact)  # temperatures x data sets

shown = temperatures[::2].tolist()
few = min(many, 20)
start = {T: torch.zeros(few, d, dtype=X.dtype) for T in shown}
w = sample(
    start,
    lambda w: 0.5 * (X[:few] @ w[..., None] - y[:few]).square().mean((-2, -1)) / noise,
    n,
    1.0,
    rate=0.01,
    burn_in=burn_in,
    num_steps=num_steps,
    thin=10,
)
f = x[:few] @ w[..., None]  # samples x temperatures x data sets x points x 1
sampled = gaussian_nll(f.mean(0), f.var(0) + noise, y_test[:few]).mean((-2, -1))
same = exact[::2, :few]
print(
    "linear regression: best temperature",
    f"{temperatures[exact.mean(1).argmin()]:.2g}; the chains' test NLL is off by at "
    f"most {(sampled - same).abs().max():.3f} nats on {few} data sets",
)

# %% Middle and right: a small network on small data sets, all of them at once
cold = [0.01, 1.0] if options.smoke else [0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
n = 60
noises = {"overlapping classes": 0.35, "clean classes": 0.1}
train = [
    two_moons(n, generator, noise_std=std)
    for std in noises.values()
    for _ in range(num_sets)
]
X = torch.stack([X for X, _ in train]).float()  # data sets x n x 2
labels = torch.stack([labels for _, labels in train])
test = [two_moons(1000, generator, noise_std=std) for std in noises.values()]
with torch.random.fork_rng():
    torch.default_generator.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 2))
net = FunctionalNet(network)


def apply(w, X):
    return net.apply_network(net.unflatten(w), X)


def mean_nll(w):
    """One number for each temperature and data set."""
    logits = vmap(vmap(apply), in_dims=(0, None))(w, X)  # T x data sets x n x 2
    wanted = labels.expand(len(w), *labels.shape)
    losses = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none")
    return losses.reshape(wanted.shape).mean(-1)


first = net.flatten(net.params).detach()
start = {T: first + 0.1 * normal(len(train), len(first)).float() for T in cold}
w = sample(start, mean_nll, n, 1.0, 0.05, burn_in, num_steps, thin=25)
nll, correct, single = torch.zeros(3, len(noises), len(cold), num_sets)
for k, (x, test_labels) in enumerate(test):
    for i in range(len(cold)):
        for j in range(num_sets):
            draws = w[:, i, k * num_sets + j]
            with torch.no_grad():
                p = vmap(apply, in_dims=(0, None))(draws, x.float()).softmax(-1)
            nll[k, i, j] = categorical_nll(p.mean(0), test_labels)
            correct[k, i, j] = accuracy(p.mean(0), test_labels)
            single[k, i, j] = categorical_nll(p[-1], test_labels)
difference = nll - nll[:, cold.index(1.0), None]
error = difference.std(-1) / num_sets**0.5
for k, name in enumerate(noises):
    for i, T in enumerate(cold):
        print(
            f"{name}, T = {T:<5}: test NLL {nll[k, i].mean():.3f}, minus that of T = 1 "
            f"{difference[k, i].mean():+.3f} ± {error[k, i]:.3f}, one sample "
            f"{single[k, i].mean():.3f}, accuracy {correct[k, i].mean():.3f}"
        )

# %% Save
pyplot.rcParams.update(STYLE)
figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.9), layout="constrained")


def band(ax, T, values, color, label):
    """Mean over data sets, and two standard errors of it."""
    mean, error = values.mean(1), 2 * values.std(1) / values.shape[1] ** 0.5
    ax.fill_between(T, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    ax.plot(T, mean, color=color, linewidth=1.8, marker="o", markersize=4, label=label)


base = exact[temperatures.log().abs().argmin()]
band(axes[0], temperatures, exact - base, COLORS[0], "exact")
# The error of the chains, on their own data sets, added to the exact curve.
axes[0].plot(
    shown,
    (sampled - same).mean(1) + (exact - base).mean(1)[::2],
    "x",
    color=COLORS[1],
    markersize=8,
    label="SGHMC",
)
axes[0].set(ylabel="test NLL minus that of T = 1, nats", ylim=(-0.01, None))
title = "Linear model, data from it"
axes[0].set_title(title, loc="left", fontweight="bold", fontsize=11)
for k, (ax, name) in enumerate(zip(axes[1:], noises, strict=True)):
    band(ax, cold, nll[k], COLORS[0], "average over samples")
    band(ax, cold, single[k], COLORS[3], "one sample")
    ax.set(ylabel="test NLL, nats", ylim=(0, None))
    ax.set_title(f"Network, {name}", loc="left", fontweight="bold", fontsize=11)
for ax in axes:
    ax.axvline(1.0, color=INK, linewidth=1.2, linestyle=":")
    ax.set(xscale="log", xlabel="temperature of the likelihood T")
    ax.grid(True)
    ax.legend(frameon=False, fontsize=8)
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_cold_posterior.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
