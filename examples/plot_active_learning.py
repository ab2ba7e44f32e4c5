"""Which points are worth a label, alone and together?

Left, two classes with ten labels. The mutual information of a label and the function
(BALD) is large where functions of the posterior disagree; its eight best points lie
side by side and tell the same. BAIT chooses the batch that makes the average posterior
variance smallest. Right, handwritten digits: accuracy against the number of labels.
"""

# %% Set up: two moons, a small network, its tangent model as a posterior
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.acquisition import (
    bald,
    fisher_embeddings,
    predictive_entropy,
    select_bait,
    select_top,
)
from gpbridge.dnn import fit_map
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.plots import COLORS, INK, STYLE
from gpbridge.selection import fit_evidence

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
seeds, most, steps = (1, 30, 10) if options.smoke else (3, 120, 200)
side, q = 40, 8

torch.set_num_threads(1)


def moons(n, generator):
    """Two half circles with noise, ``n x 2``, and which of them."""
    y = torch.arange(n) % 2
    angle = torch.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin()], -1)
    x = torch.where(y[:, None] == 0, x, torch.tensor([1.0, 0.5]).double() - x)
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x + 0.12 * noise, y


def network(widths, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()


def trained(net, X, y, likelihood=None):
    per_epoch = -(-len(X) // 32)
    return fit_map(
        *(net, X, y, likelihood),
        epochs=max(1, steps // per_epoch),
        learning_rate=1e-2,
        batch_size=32,
        validation_fraction=0.0,
        progress=False,
    ).network


# %% Left: scores over the plane, and the batches that they lead to
generator = torch.Generator().manual_seed(1)
pool, labels = moons(300, generator)
first = torch.arange(10)
X, y = pool[first], labels[first].double()
likelihood = LogisticLikelihood()
net = trained(network([2, 32, 32, 1], 0), X, y, likelihood)
model = LinearizedGP(net, X, y, likelihood)
fit_evidence(model, warn=False)
functions = model.draw(200, generator)


def information(points):
    with torch.no_grad():
        p = functions(points).sigmoid()
    return bald(torch.cat([1 - p, p], -1))


batches = {
    "BALD, one by one": select_top(information(pool[10:]), q) + 10,
    "BAIT, together": select_bait(fisher_embeddings(model, pool[10:]), q) + 10,
}
for name, batch in batches.items():
    nearest = torch.cdist(pool[batch], pool[batch]).fill_diagonal_(9).amin(1)
    print(f"{name}: mean distance to the nearest of the batch {nearest.mean():.2f}")
across = torch.linspace(-1.5, 2.5, side).double()
up = torch.linspace(-1.0, 1.5, side).double()
grid = torch.cartesian_prod(across, up)

pyplot.rcParams.update(STYLE)
figure, axes = pyplot.subplots(1, 3, figsize=(12.5, 3.7), layout="constrained")
field = information(grid).reshape(side, side).T
for ax, (name, batch) in zip(axes, batches.items(), strict=False):
    ax.contourf(across, up, field, levels=10, cmap="Blues", vmax=1.0, alpha=0.8)
    ax.plot(*pool[10:].T, ".", color="#8d95a1", markersize=3, label="pool")
    for c in (0, 1):
        own = X[y == c]
        label = f"labelled {c}"
        ax.plot(*own.T, "os"[c], color=COLORS[c], markersize=7, label=label)
    star = {"color": COLORS[2], "markeredgecolor": "white", "markersize": 14}
    ax.plot(*pool[batch].T, "*", label="to be labelled", **star)
    ax.set(xticks=[], yticks=[], xlim=(-1.5, 2.5), ylim=(-1.0, 1.5))
    ax.set_title(name, loc="left", fontweight="bold", fontsize=11)
axes[0].legend(frameon=True, framealpha=0.8, loc="lower left", fontsize=7)

# %% Right: digits, twenty labels at first, ten more at a time
images, classes = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = (images / 16 - 0.3) / 0.38


def choose(method, net, labelled, rest, generator):
    if method == "random":
        return rest[:10]
    if method == "entropy":
        with torch.no_grad():
            scores = predictive_entropy(net(images[rest]).softmax(-1))
        return rest[select_top(scores, 10)]
    data = images[labelled], classes[labelled]
    model = LinearizedGP(net, *data, parameters="last_layer")
    fit_evidence(model, warn=False)
    if method == "BAIT":
        return rest[select_bait(fisher_embeddings(model, images[rest]), 10)]
    with torch.no_grad():
        values = model.draw(50, generator)(images[rest])
    return rest[select_top(bald(values.softmax(-1)), 10)]


def accuracies(method, seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    test, labelled, rest = order[:600], order[600:620], order[620:]
    found = []
    while True:
        start = network([64, 32, 10], 1000 * seed + len(labelled))
        net = trained(start, images[labelled], classes[labelled])
        with torch.no_grad():
            right = net(images[test]).argmax(-1) == classes[test]
        found.append(float(right.double().mean()))
        if len(labelled) + 10 > most:
            return found
        shuffled = rest[torch.randperm(len(rest), generator=generator)]
        new = choose(method, net, labelled, shuffled[:300], generator)
        labelled = torch.cat([labelled, new])
        rest = rest[~torch.isin(rest, new)]


numbers = list(range(20, most + 1, 10))
for method, color in zip(
    ("random", "entropy", "BALD", "BAIT"), (INK, *COLORS), strict=False
):
    curves = torch.tensor([accuracies(method, seed) for seed in range(seeds)])
    mean = 100 * curves.mean(0)
    print(f"{method}: {mean[-1]:.1f}% right with {most} labels")
    line = "--" if method == "random" else "-"
    axes[2].plot(numbers, mean, line, color=color, linewidth=1.8, label=method)
    if seeds > 1:
        error = 100 * curves.std(0) / seeds**0.5
        band = mean - error, mean + error
        axes[2].fill_between(numbers, *band, color=color, alpha=0.15, linewidth=0)
axes[2].set(xlabel="labels", ylabel="test accuracy, %")
axes[2].set_title(f"Digits, seeds: {seeds}", loc="left", fontweight="bold", fontsize=11)
axes[2].grid(True)
axes[2].legend(frameon=False, loc="lower right", fontsize=8)

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_active_learning.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
