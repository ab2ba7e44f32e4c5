"""When does a high evidence mean a good model, and when has it seen the answers?

The evidence is the probability of the targets under a prior that does not know them. A
prior whose features or mean were fitted to the same targets does know them, and its
evidence is then highest where its predictions are worst. So is its leave-one-out score:
leaving a point out of the Gaussian process does not take it out of the network. In
the one data set of 800 points here the harm is small, and the order by evidence still
wrong.

One network for each data set, 500 full-batch steps of Adam on the Hartmann function in
six dimensions; every model below is a Gaussian process made from it or beside it, with
hyperparameters by maximal evidence. The score is on 2000 new points.
"""

# %% Set up
import argparse
import copy
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from botorch.models import SingleTaskGP
from botorch.optim.fit import fit_gpytorch_mll_scipy
from botorch.test_functions import Hartmann
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.kernels import DeepKernel
from gpbridge.kernels.deep import network_body
from gpbridge.plots import COLORS, INK
from gpbridge.selection import (
    evidence_parts,
    fit_evidence,
    held_out_log_density,
    leave_one_out,
)

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
parser.add_argument("--sizes", type=int, nargs="+", default=[50, 200, 800])
parser.add_argument("--seeds", type=int, default=3, help="of the two smaller sizes")
options = parser.parse_args()
if options.smoke:
    options.sizes, options.seeds = [20, 40], 1
torch.set_num_threads(1)


# %% Data with standardised targets, and one network trained on them
def problem(n, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.rand(n + 2000, 6, generator=generator, dtype=torch.float64)
    Y = -Hartmann(6)(X)[:, None]
    return X, (Y - Y[:n].mean()) / Y[:n].std()


def trained(X, Y, seed):
    """The network before and after training."""
    torch.manual_seed(seed)  # initial weights are torch's, which have no generator
    net = nn.Sequential(
        *(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
    ).double()
    untrained = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, weight_decay=1e-4)
    for _ in range(20 if options.smoke else 500):
        optimizer.zero_grad()
        (net(X) - Y).square().mean().backward()
        optimizer.step()
    return untrained, net


# %% The models: what their prior knows of the targets is in the name
def tangent(net, X, Y, n, **prior):
    model = LinearizedGP(net, X[:n], Y[:n], **prior)
    fit_evidence(model, warn=False)
    return model, Y


def plain(X, Y, n, kernel=None):
    model = SingleTaskGP(X[:n], Y[:n], covar_module=kernel, outcome_transform=None)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll_scipy(mll, options={"maxiter": 200})
    return model.eval(), Y


SAFE = {
    "SingleTaskGP": lambda X, Y, n, untrained, net: plain(X, Y, n),
    "tangents before training": lambda X, Y, n, untrained, net: tangent(
        untrained, X, Y, n, offset=False
    ),
    "linearised network, one variance": lambda X, Y, n, untrained, net: tangent(
        net, X, Y, n
    ),
}
FITTED = {
    "linearised network, one per layer": lambda X, Y, n, untrained, net: tangent(
        net, X, Y, n, groups="layer"
    ),
    "deep kernel on trained features": lambda X, Y, n, untrained, net: plain(
        *(X, Y, n),
        DeepKernel(
            network_body(net), ScaleKernel(MaternKernel()), freeze=True, train_X=X[:n]
        ),
    ),
    "trained tangents, mean zero": lambda X, Y, n, untrained, net: tangent(
        net, X, Y, n, offset=False, groups="layer"
    ),
    "trained tangents, mean f": lambda X, Y, n, untrained, net: tangent(
        net, X, Y - net(X).detach(), n, offset=False
    ),
}
table = {}
for n in options.sizes:
    for seed in range(1 if n >= 800 else options.seeds):
        X, Y = problem(n, seed)
        untrained, net = trained(X[:n], Y[:n], seed)
        for name, build in {**SAFE, **FITTED}.items():
            model, targets = build(X, Y, n, untrained, net)
            with torch.no_grad():
                row = (
                    float(evidence_parts(model).value) / n,
                    float(leave_one_out(model).value) / n,
                    float(held_out_log_density(model, X[n:], targets[n:]).mean()),
                )
            table.setdefault((name, n), []).append(row)

# %% The table: nats per point, higher is better in every column
print(f"{'model':34s} {'n':>4s}  evidence  leave-one-out  new points (each seed)")
for (name, n), rows in table.items():
    evidence, left_out, new = zip(*rows, strict=True)
    print(
        f"{name:34s} {n:4d} {sum(evidence) / len(rows):9.2f} "
        f"{sum(left_out) / len(rows):14.2f}  ",
        *(f"{value:.2f}" for value in new),
    )

# %% Draw: a model promises what its evidence says and keeps what new points say
pyplot.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK})
figure, axes = pyplot.subplots(
    1, len(options.sizes), figsize=(12, 4.4), sharey=True, layout="constrained"
)
markers = dict(zip([*SAFE, *FITTED], "os^Ds^v", strict=True))
for ax, n in zip(axes, options.sizes, strict=True):
    for name, marker in markers.items():
        color = COLORS[0] if name in SAFE else COLORS[1]
        for seed, row in enumerate(table[name, n]):
            ax.plot(
                row[0],
                -row[2],
                marker,
                color=color,
                markersize=8,
                markeredgecolor="white",
                label=name if seed == 0 else None,
            )
    ax.set_yscale("symlog", linthresh=2)
    ax.set_yticks(
        [-1, 0, 1, 2, 10, 100, 1000], ["-1", "0", "1", "2", "10", "100", "1000"]
    )
    ax.set_title(f"{n} training points", loc="left", fontweight="bold", fontsize=11)
    ax.set_xlabel("log evidence per training point")
    ax.grid(color="#e6e8ec", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("loss on new points, nats (NLPD)")
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(
    handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9
)
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_safe_evidence.png"
figure.savefig(path, dpi=120)
Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third
print(f"figure: {path}")
