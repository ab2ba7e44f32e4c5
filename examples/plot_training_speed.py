"""Does the model that learns faster generalise better?

The evidence is the score of predicting each datum from those before it. A learner that
draws one set of weights from the posterior of what it has seen scores less, by a bound
that is loose, since the first data are predicted by the prior; but it ranks the models
alike here, and more draws inside the logarithm close the gap.

A network trained by gradient descent draws from no posterior. The sum of its training
losses (TSE) is then no bound of anything, and whether it ranks architectures is a
question for an experiment: small MLPs on a wavy surface, each trained alike, ranked by
the sum after a quarter of the epochs, and by a held-out loss at the same time.
"""

# %% Set up: a cubic with noise, and polynomials of other orders
import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge.dnn import fit_map
from gpbridge.plots import COLORS, INK, STYLE
from gpbridge.selection import LinearModel, TrainingSpeed, training_speed_bound

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
num_orders, epochs, n = (2, 4, 60) if options.smoke else (50, 60, 300)
widths, depths = ((2, 8), (1,)) if options.smoke else ((2, 4, 8, 32), (1, 2, 3))

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# %% Left: bounds of the evidence, averaged over random orders of the data
x = torch.linspace(-1, 1, 40, dtype=torch.float64)
y = 0.5 - x - 0.5 * x**2 + 2 * x**3 + 0.1 * normal(40)
degrees = range(1, 9)
bounds = {}
for k in (math.inf, 64, 4, 1):
    found = []
    for degree in degrees:
        model = LinearModel(x[:, None] ** torch.arange(degree + 1), y, 0.01)
        seed = torch.Generator().manual_seed(1)  # the same orders for each
        found.append(training_speed_bound(model, k, orders=num_orders, generator=seed))
    bounds[k] = torch.stack([each.value for each in found])
    best = max(degrees, key=lambda degree: bounds[k][degree - 1])
    shown = ", ".join(f"{value:.1f}" for value in bounds[k].tolist())
    print(f"k = {k}: {shown} nats; best order {best}")

# %% Right: networks that are trained alike, ranked early
X = 4 * torch.rand(n + 2000, 2, generator=generator) - 2
Y = torch.sin(2 * X[:, :1]) * torch.cos(1.5 * X[:, 1:]) + 0.3 * X[:, :1]
Y = Y + 0.1 * normal(*Y.shape).float()
held_out = torch.arange(n, n + n // 3)
test = slice(n + n // 3, None)
early = epochs // 4


def network(width, depth, activation, seed):
    sizes = [2] + [width] * depth
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            layer
            for a, b in zip(sizes[:-1], sizes[1:], strict=True)
            for layer in (nn.Linear(a, b), activation())
        ]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))


def kendall(a, b):
    """Share of pairs ranked alike less the share ranked otherwise."""
    signs = torch.sign(a[:, None] - a) * torch.sign(b[:, None] - b)
    return float(signs.sum() / (len(a) * (len(a) - 1)))


kinds = {"ReLU": nn.ReLU, "Tanh": nn.Tanh, "Sigmoid": nn.Sigmoid}
scores, fits = [], []
for kind, activation in kinds.items():
    for width in widths:
        for depth in depths:
            speed = TrainingSpeed()
            fit = fit_map(
                network(width, depth, activation, len(fits)),
                X[: n + n // 3],
                Y[: n + n // 3],
                epochs=epochs,
                batch_size=30,
                learning_rate=1e-2,
                schedule="cosine",
                validation_rows=held_out,
                early_stopping=False,
                progress=False,
                callback=speed,
            )
            with torch.no_grad():
                error = (fit.network(X[test]) - Y[test]).square().mean().sqrt()
            first = TrainingSpeed.from_history(speed.epoch_losses[:early])
            validation = fit.history["validation_loss"][early - 1]
            row = [first.tse(), first.tse_e(1), validation, speed.tse(), error]
            scores.append([float(value) for value in row])
            fits.append((kind, width, depth))
scores = torch.tensor(scores).double()
names = [
    f"TSE of {early} epochs",
    f"training loss of epoch {early}",
    f"held-out loss after epoch {early}",
    f"TSE of {epochs} epochs",
]
taus = [kendall(score, scores[:, -1]) for score in scores.T[:-1]]
for name, tau in zip(names, taus, strict=True):
    print(f"{name}: Kendall's tau with the final test error {tau:.2f}")

# %% Draw and save
pyplot.rcParams.update(STYLE)
figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
colors = [INK, *COLORS]
for (k, values), color in zip(bounds.items(), colors, strict=False):
    label = "evidence" if k == math.inf else f"bound, k = {k}"
    left.plot(degrees, values, "o-", color=color, markersize=4, label=label)
    top = int(values.argmax())
    left.plot(degrees[top], values[top], "o", color=color, markersize=9)
left.set_yscale("symlog", linthresh=30, linscale=1.5)
left.set(xlabel="order of the polynomial", ylabel="nats", xticks=list(degrees))
ticks = (20, 0, -20, -50, -100, -200, -500)
left.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
left.minorticks_off()
left.set_title(
    "40 points of a cubic: evidence and its bounds",
    loc="left",
    fontweight="bold",
    fontsize=11,
)
left.grid(True, axis="y")
left.legend(frameon=False, fontsize=8, loc="upper left")

for color, kind in zip(COLORS, kinds, strict=False):
    chosen = torch.tensor([fit[0] == kind for fit in fits])
    sizes = torch.tensor([12 + 3 * fit[1] for fit in fits])[chosen]
    right.scatter(
        scores[chosen, 0], scores[chosen, -1], s=sizes, color=color, label=kind
    )
right.set(xscale="log", yscale="log", ylabel="test RMSE after the last epoch")
right.set_xlabel(f"sum of training losses over the first {early} of {epochs} epochs")
for axis, ticks in (
    (right.xaxis, (0.8, 1, 1.5, 2, 3)),
    (right.yaxis, (0.15, 0.2, 0.3, 0.4)),
):
    axis.set_ticks(ticks, [str(tick) for tick in ticks])
    axis.set_ticks([], minor=True)
lines = [f"{name}: {tau:.2f}" for name, tau in zip(names, taus, strict=True)]
right.text(
    0.02,
    0.98,
    "Kendall's tau with the test error\n" + "\n".join(lines),
    transform=right.transAxes,
    va="top",
    fontsize=8,
    bbox={"color": "white", "alpha": 0.8},
)
right.set_title(
    f"{len(fits)} MLPs: training speed and test error",
    loc="left",
    fontweight="bold",
    fontsize=11,
)
right.grid(True)
right.legend(
    frameon=False, fontsize=8, loc="lower right", title="area: width", title_fontsize=8
)
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_training_speed.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
