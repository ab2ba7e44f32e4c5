"""A convolutional sparse GP against a squared exponential one, on MNIST.

Ten latent functions under a softmax, shared kernel, the same number of inducing
variables (patches of 5 x 5 pixels against whole images), the same steps, batches and
rates of Adam, both from random training patches or images. The first images of random
order train; all 10,000 test images are seen once, at the end. Lengthscales start at the
median distance of two images, and at 0.4 of that of two patches.

Cost of a step of b images with m = 500 patches, P = 576 places, per image: 500 * 576
exponentials and 7.2 M multiplications for the cross covariance, 576^2 exponentials for
the prior variance, which is exact and not sampled, then m^2 = 250,000 multiplications
per class. The backward pass makes the first once more.

Run with ``python benchmarks/quality_convolutional.py --data PATH``, PATH a folder with
``images/mnist.npz``.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from gpytorch import settings
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import SoftmaxLikelihood
from gpytorch.mlls import VariationalELBO
from torch import Tensor

from gpbridge import metrics
from gpbridge.data import load_images
from gpbridge.inducing_gp import SparseGP
from gpbridge.inducing_points import initial_inducing_points
from gpbridge.kernels import ConvolutionalKernel
from gpbridge.selection import fit_sparse_gp

SIDE, PATCH, CLASSES = 28, 5, 10
RATES = (0.05, 0.005)  # of Adam: the second for the last third of the epochs
START = 0.1  # standard deviation of whitened inducing variables
DRAWS = 100  # of f, in predictions


class Score(NamedTuple):
    """Of the test images, in percent and nats, and what it took."""

    error: float
    nll: float
    elbo: float
    cpu_seconds: float
    seconds: float


class Images(NamedTuple):
    """Flat images with pixels in [0, 1], and their labels."""

    X: Tensor
    y: Tensor
    test_X: Tensor
    test_y: Tensor


def load(path: Path, num_train: int, num_test: int, seed: int) -> Images:
    """Random training images and the first test images."""
    X, y, test_X, test_y = load_images(path, "mnist", num_test=num_test)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(X), generator=generator)[:num_train]
    return Images(X[rows].flatten(1), y[rows], test_X.flatten(1), test_y)


def kernels(location: float | None) -> dict[str, Kernel]:
    """Both priors, lengthscales still to be set."""
    place = None
    if location is not None:
        place = RBFKernel()
        place.lengthscale = location
    shapes = (SIDE, SIDE), (PATCH, PATCH)
    convolutional = ConvolutionalKernel(RBFKernel(), *shapes, location_kernel=place)
    return {
        "squared exponential": ScaleKernel(RBFKernel()),
        "convolutional": ScaleKernel(convolutional),
    }


def build(kernel: Kernel, X: Tensor, num_inducing: int, seed: int) -> SparseGP:
    """A classifier at its starting point."""
    generator = torch.Generator().manual_seed(seed)
    Z = initial_inducing_points(kernel, X, num_inducing, generator)
    base, width = kernel.base_kernel, Z.shape[-1]
    is_convolutional = isinstance(base, ConvolutionalKernel)
    if is_convolutional:
        width = base.augmentation.patch_width
        base = base.base_kernel
        base = getattr(base, "base_kernel", base)
    median = torch.pdist(Z[:, :width]).median()
    base.lengthscale = (0.4 if is_convolutional else 1.0) * median
    with torch.no_grad():  # functions vary by a few logits over the images
        K = kernel.base_kernel(X[:20]).to_dense()
        spread = K.diagonal().mean() - K.mean()
    kernel.outputscale = 4.0 / spread
    softmax = SoftmaxLikelihood(num_classes=CLASSES, mixing_weights=False)
    # The prior would be a poor start: logits of a hundred, at random.
    return SparseGP(kernel, Z, softmax, num_outputs=CLASSES, initial_std=START)


@torch.no_grad()
def predict(model: SparseGP, X: Tensor, seed: int) -> Tensor:
    """Class probabilities, averaged over draws of f."""
    parts = []
    with torch.random.fork_rng(devices=[]), settings.num_likelihood_samples(DRAWS):
        torch.manual_seed(seed)
        for x in X.split(200):
            parts.append(model.likelihood(model.marginals(x)).probs.mean(0))
    return torch.cat(parts)


def run(
    name: str, kernel: Kernel, images: Images, options: argparse.Namespace, seed: int
) -> Score:
    """Train one model and score it."""
    model = build(kernel, images.X, options.inducing, seed)
    elbo = VariationalELBO(model.likelihood, model, num_data=len(images.X))
    wall, cpu = time.perf_counter(), time.process_time()

    def report(epoch: int, elbo: VariationalELBO, entry: dict[str, float]) -> None:
        took = time.process_time() - cpu
        print(
            f"  {name}, epoch {epoch}: {entry['elbo']:.4f} ({took:.0f} s)", flush=True
        )

    last = options.epochs // 3
    state = None
    for epochs, rate in zip((options.epochs - last, last), RATES, strict=True):
        if epochs:
            fit = fit_sparse_gp(
                elbo,
                images.X,
                images.y,
                epochs=epochs,
                batch_size=options.batch,
                learning_rate=rate,
                resume=state,
                progress=False,
                callback=report,
            )
            state = fit.state
    spent = time.process_time() - cpu, time.perf_counter() - wall
    probabilities = predict(model, images.test_X, seed)
    wrong = probabilities.argmax(-1) != images.test_y
    return Score(
        100 * float(wrong.double().mean()),
        float(metrics.categorical_nll(probabilities, images.test_y)),
        fit.history["elbo"][-1],
        *spent,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--train", type=int, default=10_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--inducing", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--location", type=float, help="lengthscale of places, pixels")
    parser.add_argument("--smoke", action="store_true", help="tiny")
    options = parser.parse_args()
    if options.data is None:
        parser.error("pass --data, a folder with images/mnist.npz")
    if options.smoke:
        options.train, options.test, options.inducing = 100, 100, 20
        options.epochs = 2
    torch.set_num_threads(options.threads)
    print(
        f"{options.train} images, {options.inducing} inducing, {options.epochs} epochs"
    )
    scores: dict[str, list[Score]] = {}
    for seed in range(options.seeds):
        images = load(Path(options.data) / "images", options.train, options.test, seed)
        for name, kernel in kernels(options.location).items():
            scores.setdefault(name, []).append(run(name, kernel, images, options, seed))
    print("\n| kernel | error, % | NLL | bound per datum | CPU s | s |")
    print("|---|---|---|---|---|---|")
    for name, rows in scores.items():
        table = torch.tensor(rows)
        mean = table.mean(0).tolist()
        spread = table.std(0, correction=int(len(rows) > 1))[:2]
        error, nll = ("-" if len(rows) == 1 else f"{s:.3f}" for s in spread)
        print(
            f"| {name} | {mean[0]:.2f} ± {error} | {mean[1]:.4f} ± {nll} | "
            f"{mean[2]:.3f} | {mean[3]:.0f} | {mean[4]:.0f} |"
        )


if __name__ == "__main__":
    main()
