"""Does the evidence of a trained network say which architecture predicts best?

Depth, width, activation and skip connections of small networks on a regression, on two
half circles and, with convolutions, on digits. Each network is trained, linearised, and
its one prior variance (and its noise) learnt by evidence, at the linear model's own
optimum. Its evidence on the training data is set against its log density on test data
by Kendall's rank correlation within each data set. Beside it stands what the few
validation rows that stopped the training say, which costs nothing more either.

What is seen: the evidence ranks well on the half circles (tau 0.66, mean of three data
sets), badly on the regression (0.36), where it puts one hidden layer first, which
predicts worse than most, and worse on digits (0.19, below zero in one), where it likes
neither skip connections nor many channels. Validation rows give 0.35, 0.54 and 0.26. As
a choice the evidence does no harm in any: its first is as good as that of the
validation rows or better, and better than the average.

Last: two parallel paths from images to images, a dense map and a convolution, each with
its own prior variance. Where a filter makes the targets, the evidence switches the
dense path off, although that could imitate the filter and would fit better. Where
pixels change places it lowers the variance of the convolution, by a factor of six or
more. Several groups prune, and this is where that is wanted. The network is linear, so
that its tangent model is the network itself and the evidence is exact.
"""

# %% Set up
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from matplotlib import pyplot
from PIL import Image
from torch import nn
from torch.nn import functional as F

from gpbridge import LinearizedGP
from gpbridge.data import two_moons
from gpbridge.dnn import fit_map
from gpbridge.plots import COLORS, INK, STYLE
from gpbridge.selection import fit_evidence, group_dimensions

try:
    from sklearn.datasets import load_digits
except ImportError:  # an extra; the example does without
    load_digits = None

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
epochs, num_seeds, num_architectures = (3, 1, 3) if options.smoke else (250, 3, None)
num_images = (5, 10) if options.smoke else (5, 10, 20)

torch.set_num_threads(1)


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class ParallelPath(nn.ModuleDict):
    """The sum of what several branches make of the same input."""

    def forward(self, x):
        return sum(branch(x) for branch in self.values())


# %% Architectures
def mlp(inputs, outputs, depth=2, width=16, activation=nn.Tanh, skip=False):
    layers = [nn.Linear(inputs, width), activation()]
    for _ in range(depth - 1):
        block = nn.Linear(width, width), activation()
        layers += [Residual(*block)] if skip else block
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def cnn(inputs, outputs, depth=1, channels=8, activation=nn.Tanh, skip=False):
    layers = [nn.Conv2d(1, channels, 3, padding=1), activation()]
    for _ in range(depth - 1):
        block = nn.Conv2d(channels, channels, 3, padding=1), activation()
        layers += [Residual(*block)] if skip else block
    layers += [nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), *layers, nn.Linear(channels * 16, outputs)
    )


MLPS = {
    "width 16, depth 2": (mlp, {}),
    "width 2": (mlp, {"width": 2}),
    "width 4": (mlp, {"width": 4}),
    "width 48": (mlp, {"width": 48}),
    "depth 1": (mlp, {"depth": 1}),
    "depth 3": (mlp, {"depth": 3}),
    "depth 4": (mlp, {"depth": 4}),
    "relu": (mlp, {"activation": nn.ReLU}),
    "gelu": (mlp, {"activation": nn.GELU}),
    "sine": (mlp, {"activation": Sine}),
    "depth 3, skip": (mlp, {"depth": 3, "skip": True}),
    "depth 4, skip": (mlp, {"depth": 4, "skip": True}),
}
CNNS = {
    "dense 16": (mlp, {"depth": 1}),
    "dense 16, depth 2": (mlp, {}),
    "dense 64": (mlp, {"depth": 1, "width": 64}),
    "conv, 8 channels": (cnn, {}),
    "conv, 2 channels": (cnn, {"channels": 2}),
    "conv, 12 channels": (cnn, {"channels": 12}),
    "conv, relu": (cnn, {"activation": nn.ReLU}),
    "conv, depth 2": (cnn, {"depth": 2}),
    "conv, depth 2, skip": (cnn, {"depth": 2, "skip": True}),
}
KINDS = {"skip": ("D", 3), "depth": ("^", 1), "width": ("o", 0), "dense": ("s", 1)}
KINDS |= {"conv": ("o", 0), "activation": ("s", 2)}  # marker and colour


def kind_of(name):
    """What a network varies: the first kind that its name has."""
    return next((kind for kind in KINDS if kind in name), "activation")


# %% Data: few to train on, many to test on
def regression(generator):
    X = 4 * torch.rand(1060, 2, generator=generator, dtype=torch.float64) - 2
    f = torch.sin(2 * X[:, :1]) * torch.cos(X[:, 1:]) + 0.3 * X[:, 1:]
    Y = f + 0.1 * torch.randn(f.shape, generator=generator, dtype=torch.float64)
    return X, Y, 60, 1


def half_circles(generator):
    X, labels = two_moons(1080, generator, noise_std=0.25)
    return X.double(), labels, 80, 2


def digits(generator):
    """Digits 0 to 4 with noise, so that there is something to be unsure of."""
    pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    rows = torch.nonzero(labels < 5)[:, 0]
    order = rows[torch.randperm(len(rows), generator=generator)]
    images = pixels[order].double() / 8 - 1
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    return images + 0.6 * noise, labels[order], 80, 5


problems = {"regression": (regression, MLPS), "half circles": (half_circles, MLPS)}
if load_digits is not None:
    problems["digits"] = (digits, CNNS)


# %% Train, linearise, learn the hyperparameters, and score
def scores(make, choices, seed, X, Y, n, outputs):
    """Evidence, validation and test log density, each per datum."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        network = make(X.shape[1], outputs, **choices).double()
    likelihood = None
    if not Y.is_floating_point():
        likelihood = SoftmaxLikelihood(num_classes=outputs, mixing_weights=False)
    train_X, train_Y = X[:n], Y[:n]
    fit = fit_map(network, train_X, train_Y, likelihood, epochs=epochs, progress=False)
    model = LinearizedGP.from_fit(fit, train_X, train_Y, likelihood, select=None)
    evidence = fit_evidence(model, warn=False).value / n
    test = model.predict(X[n:]).log_prob(Y[n:]).mean()
    return evidence.item(), -min(fit.history["validation_loss"]), test.item()


def kendall(a, b):
    """Share of pairs in the same order minus that in the opposite one."""
    pairs = torch.triu_indices(len(a), len(a), 1)
    signs = [(v[pairs[0]] - v[pairs[1]]).sign() for v in (a, b)]
    return (signs[0] * signs[1]).mean().item()


results = {}
for problem, (make_data, architectures) in problems.items():
    chosen = list(architectures.items())[:num_architectures]
    table = torch.zeros(num_seeds, len(chosen), 3)
    for seed in range(num_seeds):
        X, Y, n, outputs = make_data(torch.Generator().manual_seed(seed))
        for k, (_, (make, choices)) in enumerate(chosen):
            table[seed, k] = torch.tensor(scores(make, choices, seed, X, Y, n, outputs))
    taus = [[kendall(t[:, j], t[:, 2]) for t in table] for j in (0, 1)]
    results[problem] = [name for name, _ in chosen], table, taus
    print(f"\n{problem}, {n} training points: evidence and test log density per datum")
    for k, (name, _) in enumerate(chosen):
        means, spread = table[:, k].mean(0), table[:, k].std(0, correction=0)
        print(
            f"  {name:24} {means[0]:+.3f} ± {spread[0]:.3f}   "
            f"{means[2]:+.3f} ± {spread[2]:.3f}"
        )
    best = table[:, :, 2].max(1).values
    for j, what in enumerate(("evidence", "validation rows")):
        picked = table[torch.arange(num_seeds), table[:, :, j].argmax(1), 2]
        print(
            f"Kendall's tau of {what} with test: "
            f"{', '.join(f'{tau:+.2f}' for tau in taus[j])}; the pick is "
            f"{(best - picked).mean():.3f} nats below the best, the average "
            f"{(best - table[:, :, 2].mean(1)).mean():.3f}"
        )

# %% Parallel paths: a dense one and a convolution, each with its prior variance
side, path_noise = 4, 0.01


class TwoPaths(nn.Module):
    """Images to images, by a dense map plus a filter of 3 x 3."""

    def __init__(self):
        super().__init__()
        dense = nn.Linear(side**2, side**2, bias=False)
        conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        image = nn.Unflatten(1, (1, side, side))
        self.paths = ParallelPath(
            {"dense": dense, "conv": nn.Sequential(image, conv, nn.Flatten())}
        )

    def forward(self, x):
        return self.paths(x)


def images(target, n, generator):
    """Outputs are filtered inputs, or inputs with their pixels in another order."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    order, taps = torch.randperm(side**2, generator=generator), normal(1, 1, 3, 3) / 3
    noise, X = path_noise**0.5 * normal(n, side**2), normal(n, side**2)
    if target == "local":
        filtered = F.conv2d(X.unflatten(1, (1, side, side)), taps, padding=1)
        return X, filtered.flatten(1) + noise
    return X, X[:, order] + noise


def learn_paths(target, n, seed):
    """Share of the weights of each path that the data determine, prior variances."""
    X, Y = images(target, n, torch.Generator().manual_seed(seed))
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        network = TwoPaths().double()
    groups = [[name] for name, _ in network.named_parameters()]
    model = LinearizedGP(network, X, Y, groups=groups, noise=path_noise)
    fit_evidence(model, warn=False)
    sizes = torch.tensor([p.numel() for p in network.parameters()])
    return torch.cat([group_dimensions(model) / sizes, model.prior_variance.detach()])


print("\nparallel paths: share of the weights in use, and prior variance")
paths = {}
for target in ("local", "dense"):
    found = [
        torch.stack([learn_paths(target, n, seed) for n in num_images])
        for seed in range(num_seeds)
    ]
    paths[target] = torch.stack(found)  # seeds x sizes x 4
    for k, n in enumerate(num_images):
        for path, name in enumerate(("dense", "convolution")):
            values = paths[target][:, k, path::2].tolist()
            shown = ", ".join(f"{share:.2f} ({s:.0e})" for share, s in values)
            print(f"  {target} target, {n:2} images, {name:11}: {shown}")

# %% Save
pyplot.rcParams.update(STYLE)
figure, axes = pyplot.subplots(2, 3, figsize=(12.5, 7.2), layout="constrained")
for ax, (problem, (names, table, taus)) in zip(axes[0], results.items(), strict=False):
    labelled = set()
    for k, name in enumerate(names):
        kind = kind_of(name)
        marker, color = KINDS[kind]
        means = table[:, k].mean(0)
        style = {"color": COLORS[color], "marker": marker, "linestyle": ""}
        ax.plot(*table[:, k, [0, 2]].mT, markersize=3, alpha=0.4, **style)
        label = None if kind in labelled else kind
        labelled.add(kind)
        ax.plot(
            *means[[0, 2]],
            markersize=7,
            label=label,
            marker=marker,
            color=COLORS[color],
        )
    ax.set(xlabel="log evidence / datum, nats", ylabel="test log density, nats")
    ax.set_title(
        f"{problem.capitalize()}: tau {sum(taus[0]) / num_seeds:.2f}",
        loc="left",
        fontweight="bold",
        fontsize=11,
    )
    ax.legend(frameon=False, fontsize=8, loc="lower right")
for ax in axes[0, len(results) :]:
    ax.set_axis_off()
for ax, (target, found) in zip(axes[1], paths.items(), strict=False):
    for path, (name, color) in enumerate({"dense": 1, "convolution": 0}.items()):
        for seed, variances in enumerate(found[..., 2 + path]):
            ax.plot(
                num_images,
                variances,
                color=COLORS[color],
                linewidth=1.4,
                marker="o",
                markersize=4,
                label=f"{name} path" if seed == 0 else None,
            )
    ax.set(xlabel="training images", ylabel="prior variance")
    ax.set(ylim=(1e-11, 1e2), xscale="log", yscale="log")
    ax.set_xticks(num_images, num_images)
    ax.minorticks_off()
    title = f"Parallel paths, {target} target"
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
    ax.legend(frameon=False, fontsize=8, loc="upper right")
ax = axes[1, 2]
for j, (what, marker) in enumerate({"evidence": "o", "validation rows": "s"}.items()):
    for k, (_, _, taus) in enumerate(results.values()):
        at = [k + 0.2 * (j - 0.5)] * num_seeds
        label = what if k == 0 else None
        ax.plot(at, taus[j], marker, color=COLORS[3 * j], markersize=6, label=label)
ax.axhline(0, color=INK, linewidth=1.2, linestyle=":")
ax.set(ylim=(-1.05, 1.05), ylabel="Kendall's tau with the test score")
ax.set_xticks(range(len(results)), results)
title = "Rank correlation, by data set"
ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
ax.legend(frameon=False, fontsize=8, loc="lower right")
for ax in axes.flat:
    ax.grid(True)
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_architecture_selection.png"
figure.savefig(path, dpi=110)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
