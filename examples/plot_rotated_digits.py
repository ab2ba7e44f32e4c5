"""Which rotations should a digit classifier ignore? A Gaussian process learns it.

Digits of 8 x 8 pixels are turned by random angles of at most 90 degrees, or of all
angles. A squared exponential kernel compares pixels, and has to see each digit at each
angle. An invariant kernel averages it over rotations of both images by angles up to a
half-width, which is a hyperparameter as the lengthscale is: the marginal likelihood of
the training images chooses both, without validation data.

The evidence has several maxima in the half-width: ``learn_kernel_invariance`` follows
the best ones of a scan. That evidence and accuracy gain much is what to look at; the
half-width itself is no estimate of the largest angle. Wide laws lose little that the
classes need, and turning small images smooths them, too.
"""

# %% Set up: digits in a frame of 12 x 12, turned
import argparse
import math
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from gpytorch.models import ExactGP
from matplotlib import pyplot
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional

from gpbridge.augmentation import AffineAugmentation2d, median_orbit_distance
from gpbridge.kernels import InvariantKernel
from gpbridge.plots import COLORS, STYLE
from gpbridge.selection import learn_kernel_invariance, log_evidence, scan

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
n, num_test, samples, polish_steps = 200, 600, 8, 20
half_widths = (5, 30, 60, 90, 120, 150, 175)
if options.smoke:
    n, num_test, samples, polish_steps, half_widths = 20, 40, 3, 2, (10, 90)
torch.set_num_threads(1)

pixels, labels = load_digits(return_X_y=True)
pixels = functional.pad(torch.tensor(pixels).reshape(-1, 8, 8) / 16, 4 * (2,))
labels = torch.tensor(labels)


def turned(images, degrees, generator):
    angle = torch.rand(len(images), generator=generator, dtype=images.dtype)
    angle = (2 * angle - 1) * math.radians(degrees)
    c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrices = torch.stack([c, -s, zero, s, c, zero], -1).reshape(-1, 2, 3)
    grid = functional.affine_grid(
        matrices, (len(images), 1, 12, 12), align_corners=False
    )
    return functional.grid_sample(
        images[:, None], grid, mode="bicubic", align_corners=False
    ).flatten(1)


# %% Ten outputs, one for each digit, that share a kernel
class DigitGP(ExactGP):
    def __init__(self, X, Y, kernel):
        likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-4))
        likelihood.noise = 0.05
        super().__init__(X, Y, likelihood)
        self.mean_module = ZeroMean(batch_shape=torch.Size([10]))
        self.covar_module = ScaleKernel(kernel)
        self.to(X)

    def forward(self, x):
        K = self.covar_module(x).evaluate_kernel()  # once for all outputs
        return MultivariateNormal(self.mean_module(x), K)


@torch.no_grad()
def predict(model, X):
    train_X, Y = model.train_inputs[0], model.train_targets
    K = model.covar_module(train_X).to_dense()
    K = K + model.likelihood.noise * torch.eye(len(K)).to(K)
    weights = torch.cholesky_solve(Y.mT, torch.linalg.cholesky(K))
    kernel = model.covar_module
    parts = [kernel(x, train_X).to_dense() @ weights for x in X.split(100)]
    return torch.cat(parts).argmax(-1)


# %% Learn both kernels by the same evidence, each from several starts
names = ("squared exponential", "invariant")
steps = {"refit_steps": 5, "polish": 1, "polish_steps": polish_steps, "progress": False}
if options.smoke:
    steps["refit_steps"] = 1
curves, widths, predictions, images = {}, {}, {}, {}
accuracy, nats, seconds = (torch.zeros(2, 2) for _ in range(3))
for column, degrees in enumerate((90, 180)):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(pixels), generator=generator)[: n + num_test]
    X, y = turned(pixels[rows], degrees, generator), labels[rows]
    Y = (2 * functional.one_hot(y[:n], 10).double() - 0.2).mT.contiguous()
    test_X, test_y = X[n:], y[n:]

    start = time.process_time()
    plain = DigitGP(X[:n], Y, RBFKernel())
    median = float(torch.pdist(X[:n]).median())
    found = scan(
        plain,
        "covar_module.base_kernel.lengthscale",
        [median / 2, median],
        lambda model: log_evidence(model).sum(),
        **steps,
    )
    seconds[0, column] = time.process_time() - start

    start = time.process_time()
    law = AffineAugmentation2d((12, 12), ["rotation"], samples)
    base = RBFKernel()
    base.lengthscale = float(median_orbit_distance(law, X[:n]))
    fit = learn_kernel_invariance(
        DigitGP(X[:n], Y, InvariantKernel(base, law)),
        starts=[math.radians(width) for width in half_widths],
        **steps,
    )
    seconds[1, column] = time.process_time() - start
    evidences = found.best_evidence, fit.evidence
    for row, model in enumerate((plain, fit.model)):
        predictions[row, column] = predict(model, test_X)
        right = predictions[row, column] == test_y
        accuracy[row, column] = 100 * right.double().mean()
        nats[row, column] = evidences[row] / Y.numel()
        print(
            f"angles up to {degrees}, {names[row]}: accuracy "
            f"{accuracy[row, column]:.1f} %, {nats[row, column]:.3f} nats per output, "
            f"{seconds[row, column]:.1f} s"
        )
    curves[column] = fit.curve.grid.rad2deg(), fit.curve.evidence / Y.numel()
    widths[column] = math.degrees(fit.learnt["bound"].item()), fit.evidence / Y.numel()
    images[column] = test_X, test_y
    print(f"half-width learnt: {widths[column][0]:.0f} degrees")

# %% Draw
pyplot.rcParams.update(STYLE)
figure = pyplot.figure(figsize=(13, 4.2), layout="constrained")
left, middle, right = figure.subplots(1, 3, width_ratios=(1.3, 1.2, 1))
bold = {"loc": "left", "fontweight": "bold", "fontsize": 11}
test_X, test_y = images[1]
was, now = predictions[0, 1], predictions[1, 1]
mended = torch.where((was != test_y) & (now == test_y))[0][:12]
frame = torch.ones(3 * 16, 4 * 14)
for place, row in enumerate(mended.tolist()):
    i, j = divmod(place, 4)
    frame[16 * i + 3 : 16 * i + 15, 14 * j + 1 : 14 * j + 13] = 1 - test_X[row].reshape(
        12, 12
    )
    left.text(
        14 * j + 6.5,
        16 * i + 1.2,
        f"{was[row]} → {now[row]}",
        ha="center",
        va="center",
        fontsize=8.5,
    )
left.imshow(frame, cmap="gray", vmin=0, vmax=1)
left.set(xticks=[], yticks=[])
left.spines[:].set_visible(False)
left.set_title("All angles: wrong by pixels → right by orbits", **bold)

for column, degrees in enumerate((90, 180)):
    grid, curve = curves[column]
    color = COLORS[column]
    middle.plot(grid, curve, "o-", color=color, label=f"angles up to {degrees}°")
    middle.plot(*widths[column], "*", color=color, markersize=14)
    middle.axhline(nats[0, column], color=color, linestyle=":", linewidth=1.5)
    middle.text(
        178, nats[0, column] + 0.012, "squared exponential", color=color, ha="right",
        fontsize=8,
    )  # fmt: skip
middle.set(xlabel="half-width of the kernel, degrees", xticks=range(0, 181, 45))
middle.set_ylabel("log evidence, nats per output")
middle.legend(frameon=False, fontsize=8, loc="center right")
middle.set_title("Evidence of the training images", **bold)

for row, name in enumerate(names):
    places = torch.arange(2) + 0.38 * row - 0.19
    bars = right.bar(places, accuracy[row], 0.36, color=COLORS[2 + row], label=name)
    right.bar_label(bars, fmt="%.1f", fontsize=8.5, padding=2)
right.set_xticks(range(2), ("up to 90°", "all angles"))
right.set(ylim=(0, 118), ylabel="test accuracy, %", yticks=range(0, 101, 25))
right.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
right.set_title(f"{n} training images", **bold)

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_rotated_digits.png"
figure.savefig(path, dpi=110)
Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
print(f"figure: {path}")
