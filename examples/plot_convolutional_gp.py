"""Taller than wide? A Gaussian process that sees patches learns it from less data.

The task of the paper on convolutional GPs: outlines of rectangles at random places, the
class is which side is longer. A squared exponential kernel compares whole images and
has to see all places; a convolutional kernel adds one function of patches over the
image. That function only has to tell horizontal from vertical edges, and its inducing
variables are patches of 3 x 3 pixels. Both kernels train by one rule: 150 steps of Adam
at rate 0.02, lengthscales from half the median distance of inducing inputs. Of rates
0.02 and 0.05, and factors 0.5 and 1, these are the best of both kernels.

After van der Wilk, Rasmussen and Hensman, Convolutional Gaussian processes, NeurIPS
2017, section 4.2.
"""

# %% Set up: rectangles, drawn on the fly
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.mlls import VariationalELBO
from linear_operator.utils.cholesky import psd_safe_cholesky
from matplotlib import pyplot
from PIL import Image

from gpbridge.inducing_covariances import inducing_covariance
from gpbridge.inducing_gp import SparseGP
from gpbridge.inducing_points import initial_inducing_points
from gpbridge.kernels import ConvolutionalKernel
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.plots import COLORS, STYLE
from gpbridge.selection import fit_sparse_gp

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
sizes, seeds, num_steps, num_test = (50, 100, 200, 400), 2, 150, 500
if options.smoke:
    sizes, seeds, num_steps, num_test = (20,), 1, 4, 50
side, patch, batch, rate = 14, 3, 50, 0.02
torch.set_num_threads(1)


def rectangles(n, generator):
    """Outlines of rectangles, and whether each is taller than wide."""
    images, labels = torch.zeros(n, side, side), torch.zeros(n)
    for image, label in zip(images, labels, strict=True):
        height = width = 0
        while height == width:
            height, width = torch.randint(3, side - 1, (2,), generator=generator)
        top = torch.randint(side - height + 1, (), generator=generator)
        left = torch.randint(side - width + 1, (), generator=generator)
        image[top : top + height, [left, left + width - 1]] = 1
        image[[top, top + height - 1], left : left + width] = 1
        label.fill_(height > width)
    return images.flatten(1), labels


# %% Two priors: of whole images, and of patches
def build(name, X, generator):
    if name == "convolutional":
        part = RBFKernel()
        base = ConvolutionalKernel(part, (side, side), (patch, patch))
        number = 16
    else:
        part = base = RBFKernel()
        number = 150
    kernel = ScaleKernel(base)
    Z = initial_inducing_points(kernel, X, number, generator)
    part.lengthscale = 0.5 * torch.pdist(Z).median()
    with torch.no_grad():  # functions vary by a few logits from image to image
        K = base(X).to_dense()
    kernel.outputscale = 4 / (K.diagonal().mean() - K.mean())
    return SparseGP(kernel, Z, LogisticLikelihood(), initial_std=0.1)


# %% Train both on more and more images
generator = torch.Generator().manual_seed(0)
test_X, test_y = rectangles(num_test, generator)
names = ("squared exponential", "convolutional")
errors = torch.zeros(2, len(sizes), seeds)
nlls = torch.zeros(2, len(sizes), seeds)
for seed in range(seeds):
    train_X, train_y = rectangles(max(sizes), generator)
    for column, n in enumerate(sizes):
        X, y = train_X[:n], train_y[:n]
        for row, name in enumerate(names):
            model = build(name, X, torch.Generator().manual_seed(seed))
            elbo = VariationalELBO(model.likelihood, model, num_data=n)
            epochs = max(1, num_steps * batch // n)
            steps = {"epochs": epochs, "batch_size": batch, "learning_rate": rate}
            fit_sparse_gp(elbo, X, y, progress=False, **steps)
            with torch.no_grad():
                f = model(test_X)
                score = model.likelihood.log_marginal(test_y, f)
                wrong = (f.mean > 0) != (test_y > 0)
            errors[row, column, seed] = 100 * wrong.float().mean()
            nlls[row, column, seed] = -score.mean()
print("error in percent, and NLL, means over", seeds, "draws of the data")
for row, name in enumerate(names):
    for column, n in enumerate(sizes):
        error, nll = errors[row, column].mean(), nlls[row, column].mean()
        print(f"  {name}, n = {n}: {error:.1f}, {nll:.3f}")

# %% What the last convolutional model keeps: patches, by the value of g there
with torch.no_grad():
    strategy, kernel = model.variational_strategy, model.covar_module
    Z, q = strategy.inducing_points.detach(), strategy.variational_distribution
    root = psd_safe_cholesky(inducing_covariance(kernel, Z).double())  # q is whitened
    g = root @ q.mean.double()
order = g.argsort(descending=True)


def mosaic(tiles, columns):
    """Images side by side, a white frame around each."""
    rows = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=torch.nan)
    rows = rows.unflatten(0, (-1, columns)).movedim(2, 1)
    return rows.flatten(0, 1).flatten(-2)


# %% Show
pyplot.rcParams.update(STYLE)
figure = pyplot.figure(figsize=(11.5, 3.6), layout="constrained")
parts = figure.subplots(1, 4, width_ratios=(1.5, 2.6, 3.3, 3.3))
data, kept, first, second = parts
bold = {"loc": "left", "fontweight": "bold", "fontsize": 11}
rows = [torch.where(test_y == label)[0][:4] for label in (1, 0)]
pixels = test_X[torch.stack(rows, -1).flatten()].reshape(-1, side, side)
data.imshow(mosaic(pixels, 2), cmap="gray_r")
data.set_title("Taller, wider", **bold)
kept.imshow(
    mosaic(Z[order].reshape(-1, patch, patch), 4), cmap="gray_r", vmin=0, vmax=1
)
for place, value in enumerate(g[order].tolist()):
    row, column = divmod(place, 4)
    at = (patch + 2) * column + (patch + 1) / 2, (patch + 2) * (row + 1) - 0.55
    kept.text(*at, f"{value:+.0f}", fontsize=7.5, ha="center", va="center")
kept.set_title("Inducing patches, and g", **bold)
for axes in (data, kept):
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
for axes, values, title in (
    (first, errors, "Test error, %"),
    (second, nlls, "Test NLL, nats"),
):
    for row, name in enumerate(names):
        middle = values[row].mean(-1)
        axes.fill_between(
            sizes,
            values[row].amin(-1),
            values[row].amax(-1),
            color=COLORS[row],
            alpha=0.18,
            linewidth=0,
        )
        axes.plot(sizes, middle, "o-", color=COLORS[row], label=name, markersize=4)
    axes.set(xscale="log", xlabel="training images")
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(title, **bold)
    axes.grid(True)
    if axes is first:
        axes.legend(frameon=False, fontsize=9)
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_convolutional_gp.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
print(f"figure: {path}")
