"""Are two independently trained networks connected by a path of low loss?

The straight line between their weights climbs a barrier, as if they lay in two separate
valleys. A curve with the same ends and one free control point, trained on the loss at
uniform times, goes around: the valleys are connected, and every network on the way
fits the data. The plane through the ends and the control point holds the whole Bezier
curve. A training run, seen in the plane of its own largest variance, turns into one of
the valleys.
"""

# %% Set up: handwritten digits, and two networks that differ only in their seeds
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from gpbridge.dnn import (
    BezierCurve,
    PolyChain,
    curve_losses,
    fit_curve,
    fit_map,
    loss_plane,
    plane_through,
    principal_plane,
)
from gpbridge.functional import FunctionalNet
from gpbridge.plots import COLORS, INK, plot_loss_along, plot_loss_plane

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
n, epochs, curve_epochs, size = (1000, 40, 80, 31)
if options.smoke:
    n, epochs, curve_epochs, size = (200, 3, 2, 5)
torch.set_num_threads(1)

images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
X = torch.tensor(images, dtype=torch.float32)[order] / 16
y = torch.tensor(labels)[order]
X, y, test_X, test_y = X[:n], y[:n], X[n:], y[n:]
decay = 1e-4


def train(seed, callback=None):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    return fit_map(
        network,
        X,
        y,
        epochs=epochs,
        weight_decay=decay,
        early_stopping=False,
        schedule="cosine",
        generator=torch.Generator().manual_seed(seed),
        progress=False,
        callback=callback,
    ).network


# %% Train both; the first one is watched after every epoch
iterates = []


def watch(epoch, network, entry):
    weights = [p.detach().flatten() for p in network.parameters()]
    iterates.append(torch.cat(weights))


start, end = train(0, watch), train(1)

# %% Three paths between them
line = PolyChain(start, end, num_bends=2)
curves = {"Bezier curve": BezierCurve(start, end), "chain": PolyChain(start, end)}
for curve in curves.values():
    fit_curve(
        curve,
        X,
        y,
        epochs=curve_epochs,
        learning_rate=0.1,
        weight_decay=decay,
        generator=torch.Generator().manual_seed(2),
        progress=False,
    )
paths = {"straight line": line, **curves}
t = torch.linspace(0, 1, 5 if options.smoke else 61)
along = {name: curve_losses(path, X, y, t=t) for name, path in paths.items()}
unseen = {
    name: curve_losses(path, test_X[: 2 * n], test_y[: 2 * n], t=t)
    for name, path in paths.items()
}
for name, losses in along.items():
    print(
        f"{name}: barrier {losses.barrier():.3f} on training digits and "
        f"{unseen[name].barrier():.3f} on others; largest test error "
        f"{100 * unseen[name].error.max():.1f}%, length {losses.length:.1f}"
    )

# %% Two planes: through the curve, and of the run that led to its start
bezier = curves["Bezier curve"]
plane = plane_through(bezier.net, bezier.control_points[[0, 2, 1]])
surface = loss_plane(plane, X, y, size=size, progress=False)
net = FunctionalNet(start)
run = principal_plane(net, torch.stack(iterates))
print(f"the plane of the run holds {100 * run.explained.sum():.0f}% of its variance")
around = loss_plane(run, X, y, size=size, progress=False)

# %% Draw
highest = 2 * float(along["straight line"].loss.max())
pyplot.rcParams.update(
    {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.titlesize": 11}
)
figure, (left, middle, right) = pyplot.subplots(
    1, 3, figsize=(14.5, 4.4), layout="constrained", width_ratios=(1, 1.3, 1.3)
)
plot_loss_along(left, along)
for color, losses in zip(COLORS, unseen.values(), strict=False):
    left.plot(losses.t, losses.loss, color=color, linestyle=":", linewidth=1.5)
left.plot([], [], color=INK, linestyle=":", label="the same on unseen digits")
left.legend(frameon=False, fontsize=8.5, loc="upper left")
left.set(xlabel="t, from one network to the other", ylabel="mean loss (nats)")
left.set(ylim=(0, 1.45 * float(unseen["straight line"].loss.max())))
left.set_title("Loss between two networks", loc="left", fontweight="bold")
plot_loss_plane(
    middle,
    surface,
    trajectory=plane.coordinates(bezier.weights(t)),
    labels=("network 1", "network 2", "control point"),
    highest=highest,
)
ends = plane.points[:2]
middle.plot(*ends.mT, color=COLORS[0], linewidth=1.5, linestyle="--")
middle.set(xlabel="distance along the line", ylabel="distance from the line")
middle.set_title("The plane of the curve", loc="left", fontweight="bold")
names = [""] * len(iterates)
names[0], names[-1] = "epoch 1", f"epoch {len(iterates)}"
plot_loss_plane(right, around, trajectory=run.points, labels=names, highest=highest)
right.plot(*run.points.mT, ".", color=COLORS[1], markersize=5)
right.set(xlabel="first principal direction", ylabel="second direction")
right.set_title("Training of network 1", loc="left", fontweight="bold")

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_mode_connectivity.png"
figure.savefig(path, dpi=110)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
print(f"figure: {path}")
