"""Which kernel for a monthly series? The evidence, leave-one-out, and a forecast.

The evidence of eight kernels on the first two thirds of a series, beside two held-out
scores: each month given all others, and the last third given the first two. The three
do not ask the same. Evidence and leave-one-out are about months among the others, where
any smooth kernel with a season does well; only the forecast asks whether the trend goes
on, and on the passengers it prefers another kernel than the evidence does.

Before that one quantity is scanned, the period: its evidence has a maximum at every
multiple of the truth and many small ones, where an ascent from one start would end.

Run with ``--data PATH`` for the airline passengers of Box and Jenkins, PATH a folder
with series/airline_passengers.npz, as for the figure here. Without, a synthetic series
like it.
"""

# %% Set up: the log of the series, time in units of its length
import argparse
import math
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy
import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import (
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from matplotlib import pyplot
from PIL import Image

from gpbridge.checks import NotConvergedWarning
from gpbridge.plots import COLORS, INK, plot_posterior_band, plot_scan
from gpbridge.selection import compare, conditional_log_evidence, multi_start, scan

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
parser.add_argument("--data", type=Path, help="folder with series/")
options = parser.parse_args()
torch.set_num_threads(1)


def series():
    """Years, and passengers in thousands a month."""
    if options.data is not None:
        with numpy.load(options.data / "series" / "airline_passengers.npz") as file:
            return tuple(torch.tensor(file[k].reshape(-1)).double() for k in ("X", "y"))
    generator = torch.Generator().manual_seed(0)
    years = 1949 + torch.arange(144, dtype=torch.float64) / 12
    phase = 2 * math.pi * (years - 1949)
    season = 0.12 * torch.sin(phase - 1.6) + 0.06 * torch.sin(2 * phase + 0.5)
    trend = 4.8 + 0.125 * (years - 1949) - 0.001 * (years - 1949) ** 2
    noise = 0.03 * torch.randn(144, generator=generator, dtype=torch.float64)
    return years, (trend + season + noise).exp()


years, passengers = series()
length = float(years[-1] - years[0])
X, Y = ((years - years[0]) / length)[:, None], passengers.log()[:, None]
train = torch.arange(96)
test = torch.arange(96, len(X))


def model(kernel):
    """A GP on the first eight years, targets standardised, with no hyperpriors."""
    likelihood = GaussianLikelihood().double()
    made = SingleTaskGP(
        X[train], Y[train], covar_module=kernel.double(), likelihood=likelihood
    )
    made.likelihood.noise = 0.05
    return made


# %% The period, by a scan of the simplest kernel that has one
def season(period=1.0, smooth=1.0):
    kernel = PeriodicKernel()
    kernel.period_length, kernel.lengthscale = period / length, smooth
    return ScaleKernel(kernel)


def trend(power):
    return ScaleKernel(PolynomialKernel(power))


simple = model(trend(1) + season())
grid = torch.linspace(0.3, 3.4, 12 if options.smoke else 94) / length
name = "covar_module.kernels.1.base_kernel.period_length"
found = scan(
    simple,
    name,
    grid,
    warm_start=False,
    polish=1 if options.smoke else 3,
    refit_steps=2 if options.smoke else 10,
)
period = float(found.best_value) * length
print(f"{len(found.maxima)} local maxima; period {period:.3f} years: {found}")

# %% Kernels, each fitted from several starts
kernels = {
    "RBF": lambda: ScaleKernel(RBFKernel()),
    "Matérn-5/2": lambda: ScaleKernel(MaternKernel(2.5)),
    "linear": lambda: trend(1),
    "linear + season": lambda: trend(1) + season(period),
    "quadratic + season": lambda: trend(2) + season(period),
    "cubic + season": lambda: trend(3) + season(period),
    "linear + Matérn + season": lambda: (
        trend(1) + ScaleKernel(MaternKernel(2.5)) + season(period)
    ),
    "linear + season x RBF": lambda: (
        trend(1) + ScaleKernel(PeriodicKernel() * RBFKernel())
    ),
}
if options.smoke:
    kernels = {name: kernels[name] for name in ("RBF", "linear + season")}
models = {}
for name, build in kernels.items():
    one = models[name] = model(build())
    if name.endswith("x RBF"):
        one.covar_module.kernels[1].base_kernel.kernels[0].period_length = (
            period / length
        )
    with warnings.catch_warnings():  # one of the starts may fail
        warnings.simplefilter("ignore", NotConvergedWarning)
        multi_start(
            ExactMarginalLogLikelihood(one.likelihood, one),
            [{}, {"likelihood.noise": 0.5}][: 1 if options.smoke else 2],
        )

# %% The table: evidence beside the log density of a month that was held out
inside = compare(models)
ahead = compare(models, held_out=(X[test], Y[test]))
print(inside)
scores = {row.name: [row.evidence / len(train), row.held_out] for row in inside.rows}
for row in ahead.rows:
    half = conditional_log_evidence(models[row.name]).value.detach() / 48
    scale = models[row.name].outcome_transform.stdvs.log().item()
    scores[row.name] += [row.held_out, float(half) - scale]
print(f"\n{'nats per month':26s} evidence leave-one-out  forecast  half given half")
for name, (evidence, left_out, forecast, half) in scores.items():
    print(f"{name:26s} {evidence:8.3f} {left_out:13.3f} {forecast:9.3f} {half:16.3f}")

# %% Draw
pyplot.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK})
figure, (left, middle, right) = pyplot.subplots(
    1, 3, figsize=(13.5, 4.2), layout="constrained", width_ratios=(1, 1.25, 1.25)
)
plot_scan(left, found)
ticks = torch.arange(0.5, 3.5, 0.5)
left.set_xticks(ticks / length, [f"{t:g}" for t in ticks])
left.set_xlabel("period of the season, years")
names = list(scores)[::-1]
kinds = ("evidence", "leave-one-out", "forecast of four years")
for place, (kind, color) in enumerate(zip(kinds, COLORS, strict=False)):
    values = [scores[name][place] for name in names]
    middle.plot(values, range(len(names)), "o", color=color, markersize=7, label=kind)
lowest = min(min(scores[name][:2]) for name in names)
middle.set_xlim(left=lowest - 0.6)
for y, name in enumerate(names):  # what fell off the axis
    if scores[name][2] < lowest - 0.6:
        middle.annotate(
            f"{scores[name][2]:.1f}",
            (lowest - 0.55, y),
            color=COLORS[2],
            va="center",
            fontsize=9,
        )
middle.set_yticks(range(len(names)), names)
middle.set_xlabel("log density, nats per month")
middle.grid(axis="x", color="#e6e8ec")
middle.set_axisbelow(True)
middle.legend(frameon=False, fontsize=8, loc="lower right")
middle.spines[["top", "right"]].set_visible(False)
foreseen = max(ahead.rows, key=lambda row: row.held_out).name
for name, color in ((inside.best, COLORS[0]), (foreseen, COLORS[2])):
    with torch.no_grad():
        y = models[name].posterior(X, observation_noise=True)
    plot_posterior_band(
        right, years, y.mean, y.variance.sqrt(), color=color, label=name
    )
right.plot(years, Y, ".", color=INK, markersize=3, label="data")
right.axvline(float(years[95]), color=INK, linewidth=1, linestyle=":")
right.set(xlabel="year", ylabel="log passengers", ylim=(4, 7.2))
handles, labels = right.get_legend_handles_labels()
kept = {label: handle for handle, label in zip(handles, labels, strict=True)}
right.legend(kept.values(), kept.keys(), frameon=False, loc="upper left", fontsize=8)
for ax, title in zip(
    (left, middle, right),
    ("Evidence along the period", "Three scores of each kernel", "Four years ahead"),
    strict=True,
):
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_model_selection_airline.png"
figure.savefig(path, dpi=110)
Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third
print(f"figure: {path}")
