"""How far should a network's predictions be invariant? The evidence of training data.

Two classes lie on circles of which only an arc is seen. A network averaged over
rotations of its inputs, by angles up to a half-width, is trained together with that
half-width: weights by the likelihood and a prior, the half-width by the evidence with
gradients through the curvature, without validation data.

The gradient holds the weights, so that learning ends where no small change of the law
helps this network. The right panel asks for more: one training with the half-width held
at each value of a grid. Its maximum can lie elsewhere, and several starts
(``learn_invariance_from``) are safer than one. That a short arc ends near nothing, the
circle at everything and 120 degrees between them is what to expect; that the half-width
is half the arc is not.
"""

# %% Set up: two rings and a blob, seen under an arc
import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge.augmentation import Rotation2d
from gpbridge.plots import COLORS, INK, STYLE
from gpbridge.selection import learn_invariance

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
n, epochs, width = (30, 4, 8) if options.smoke else (150, 250, 30)
samples = 3 if options.smoke else 10
arcs = (20, 120) if options.smoke else (20, 60, 120, 200, 280, 360)
grid = (10, 90) if options.smoke else (5, 20, 40, 60, 75, 95, 130, 170)

torch.set_num_threads(1)


def rings(arc):
    generator = torch.Generator().manual_seed(0)
    half = n // 2
    radius, label = torch.full((n,), 0.5), torch.zeros(n, dtype=torch.long)
    label[half:], radius[half:] = 1, 1.0
    radius[half + (n - half) * 2 // 3 :] = 0.0  # a blob at the origin
    angle = torch.rand(n, generator=generator) * math.radians(arc)
    X = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    return X + 0.06 * torch.randn(n, 2, generator=generator), label


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))


def fit(arc, rotation):
    return learn_invariance(
        network(),
        rings(arc),
        rotation,
        orbit="fixed",  # one grid of angles: evidences of different runs compare
        epochs=epochs,
        learning_rate=0.05,
        batch_size=n,
    )


# %% Learn the half-width from several arcs
fits = {arc: fit(arc, Rotation2d(samples)) for arc in arcs}
learnt = {
    arc: math.degrees(found.learnt["bound"].item()) for arc, found in fits.items()
}
for arc, found in fits.items():
    print(f"arc {arc}: half-width {learnt[arc]:.1f} degrees; {found}")

# %% Hold it at the values of a grid instead, for one arc
held = []
for degrees in grid:
    rotation = Rotation2d(samples, init=math.radians(degrees)).requires_grad_(False)
    held.append(float(fit(120, rotation).evidence.value))
    print(f"half-width held at {degrees}: evidence {held[-1]:.1f} nats")

# %% Draw
pyplot.rcParams.update(STYLE)
figure, (left, middle, right) = pyplot.subplots(
    1, 3, figsize=(13, 4.0), layout="constrained"
)
X, label = rings(120)
extent = torch.linspace(-1.4, 1.4, 121)
places = torch.cartesian_prod(extent, extent)
with torch.no_grad():
    p = fits[120].network(places).softmax(-1)[:, 1].reshape(121, 121).mT
left.contourf(extent, extent, p, levels=11, cmap="RdBu_r", vmin=0, vmax=1, alpha=0.5)
for k, marker in enumerate("o^"):
    left.plot(
        *X[label == k].T,
        marker,
        color=COLORS[k],
        markersize=4,
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=f"class {k}",
    )
left.set(xlabel="first input", ylabel="second input", aspect="equal")
left.legend(frameon=True, loc="lower left", fontsize=8)
left.set_title("Averaged network, arc 120°", loc="left", fontweight="bold", fontsize=11)

middle.plot(
    arcs, [arc / 2 for arc in arcs], color=INK, linestyle=":", label="half the arc"
)
middle.plot(arcs, list(learnt.values()), "o-", color=COLORS[0], label="learnt")
middle.set(xlabel="arc of the data, degrees", ylabel="half-width, degrees")
middle.set(ylim=(0, 190), yticks=range(0, 181, 45))
middle.legend(frameon=False, loc="upper left", fontsize=8)
middle.set_title("Half-width by evidence", loc="left", fontweight="bold", fontsize=11)

right.plot(grid, held, "o-", color=COLORS[1], label="half-width held")
right.plot(
    learnt[120],
    float(fits[120].evidence.value),
    "*",
    color=COLORS[0],
    markersize=14,
    label="learnt with the weights",
)
right.set(xlabel="half-width, degrees", ylabel="log evidence, nats")
right.legend(frameon=False, loc="lower right", fontsize=8)
right.set_title("Scan, arc 120°", loc="left", fontweight="bold", fontsize=11)

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_learn_invariance.png"
figure.savefig(path, dpi=110)
Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
print(f"figure: {path}")
