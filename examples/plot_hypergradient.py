"""Can held-out data tune more than one hyperparameter by gradient, and does it pay?

A grid serves one weight decay. The implicit function theorem gives the derivative of
the held-out loss in any number of hyperparameters at the price of one linear solve:
here a weight decay per weight tensor, and the width of random shifts of the training
images. Handwritten digits, few of them, so that regularisation matters. All methods see
the same training and held-out images; the test images are seen by none.
"""

# %% Set up: small images, a network of two layers, three disjoint sets of rows
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from gpbridge.plots import COLORS, INK, STYLE, plot_trace
from gpbridge.selection import HeldOutProblem, LBFGSTraining, RowAugmentation

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
num_seeds, num_steps, num_decays, n = (4, 12, 9, 100)
if options.smoke:
    num_seeds, num_steps, num_decays, n = (2, 2, 2, 12)

torch.set_num_threads(1)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16).double(), torch.tensor(labels)


middles = (torch.arange(8).double() - 3.5) / 4  # of pixels, half a width is one
places = torch.stack(torch.meshgrid(middles, middles, indexing="xy"), -1)


def shift(X, noise, hparams):
    """Move each image by its own normal number of pixels, across and down."""
    pixels = hparams["log_shift"].exp() * noise
    grid = places + pixels[:, None, None] / 4
    moved = F.grid_sample(X.reshape(-1, 1, 8, 8), grid, align_corners=False)
    return moved.reshape(len(X), 64)


SHIFTS = RowAugmentation(shift, {"log_shift": -1.0}, noise_shape=(2,))
METHODS = {
    "one decay, grid": {"groups": "all"},
    "decay per tensor": {"groups": "tensor"},
    "one decay and shifts": {"groups": "all", "augmentation": SHIFTS},
    "decay per tensor and shifts": {"groups": "tensor", "augmentation": SHIFTS},
}
train = LBFGSTraining(tolerance=1e-2, max_iterations=20 if options.smoke else 200)


def by_grid(problem):
    """The best of some decays, each trained from the same start."""
    found = []
    for log_decay in torch.linspace(-9.0, -1.0, num_decays).double():
        hparams = {"log_weight_decay": log_decay[None]}
        params = train(problem.train_loss, problem.params, hparams)
        found.append((float(problem.val_loss(params, hparams)), params))
    return min(found, key=lambda pair: pair[0])


# %% Every method on every seed: other rows, other initial weights
test_losses = {name: [] for name in METHODS}
descents = {name: [] for name in METHODS}
for seed in range(num_seeds):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(images), generator=generator)
    fit, held_out, test = rows[:n], rows[n : 2 * n], rows[2 * n :]
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    for name, choice in METHODS.items():
        problem = HeldOutProblem(
            network,
            images[fit],
            labels[fit],
            images[held_out],
            labels[held_out],
            weight_decay=1e-3,
            num_copies=3,
            generator=generator,
            **choice,
        )
        if name.endswith("grid"):
            val_loss, params = by_grid(problem)
        else:
            descent = problem.descent(
                train=train,
                learning_rate=0.4,
                # Of loosely trained weights the Hessian is indefinite; the Gauss-Newton
                # matrix never is, and gives a biased gradient.
                curvature="ggn",
                inner_tolerance=1.0 if options.smoke else 0.1,
            )
            descent.run(num_steps, tolerance=1e-9, progress=False)
            val_loss, params = descent.best.step.val_loss, descent.best.params
            descents[name].append(descent)
        with torch.no_grad():
            outputs = problem.network_at(params)(images[test])
        test_losses[name].append(float(F.cross_entropy(outputs, labels[test])))
        print(
            f"seed {seed}, {name}: held out {val_loss:.3f}, test "
            f"{test_losses[name][-1]:.3f} nats, "
            f"{(outputs.argmax(-1) == labels[test]).double().mean():.3f} right"
        )

print("\nmean test loss, and how often it is below that of the grid:")
grid = torch.tensor(test_losses["one decay, grid"])
for name, values in test_losses.items():
    values = torch.tensor(values)
    below = int((values < grid).sum())
    print(f"{name}: {values.mean():.3f} nats, {below} of {num_seeds}")

# %% Left: how the loop goes; middle: what it learns; right: what that is worth
pyplot.rcParams.update(STYLE)
figure, (left, middle, right) = pyplot.subplots(
    1, 3, figsize=(13, 4.2), layout="constrained"
)
colors = dict(zip(METHODS, (INK, *COLORS), strict=False))
for name, runs in descents.items():
    if runs:
        values = torch.stack([run.trace("val_loss") for run in runs])
        plot_trace(left, values, color=colors[name], label=name, xlabel="outer step")
left.set(ylabel="held-out loss (nats)")
left.set_title("Median of the seeds, and quartiles", loc="left", fontweight="bold")

last = descents["decay per tensor and shifts"][0]
tensors = ["first weights", "first biases", "last weights", "last biases"]
for column, label, color in zip(
    last.trace("log_weight_decay").exp().mT, tensors, COLORS, strict=False
):
    middle.plot(column, color=color, linewidth=1.8, label=f"decay, {label}")
pixels = last.trace("log_shift").exp()
middle.plot(pixels, "--", color=INK, linewidth=1.8, label="shifts, std in pixels")
middle.set(yscale="log", xlabel="outer step", ylabel="hyperparameter")
middle.set_title("Learnt together, first seed", loc="left", fontweight="bold")
middle.set_ylim(top=8.0)  # room for the legend
middle.legend(frameon=False, fontsize=8)

places = range(len(METHODS))
for values in zip(*test_losses.values(), strict=True):
    right.plot(places, values, "-", color="#b8bdc6", linewidth=1)
for place, (name, values) in zip(places, test_losses.items(), strict=True):
    right.plot([place] * num_seeds, values, "o", color=colors[name])
right.set_xticks(
    places, [name.replace(", ", ",\n").replace(" and ", "\nand ") for name in METHODS]
)
right.tick_params(axis="x", labelsize=8)
right.set(ylabel="test loss (nats)", xlim=(-0.4, len(METHODS) - 0.6))
right.set_title("Test images, a line per seed", loc="left", fontweight="bold")
for axes in (left, middle, right):
    axes.grid(True)
left.legend(frameon=False, fontsize=8)

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_hypergradient.png"
figure.savefig(path, dpi=110)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
