"""A convolutional sparse GP against a squared exponential one, on MNIST.

Ten latent functions under a softmax, shared kernel, the same number of inducing
variables (patches of 5 x 5 pixels against whole images), the same steps and batches.
The first images of random order train; all 10,000 test images are seen once, at the
end. One rule for both kernels: lengthscales start at a factor of the median distance of
two initial inducing inputs; that factor and the rate of Adam are the best of ``GRID``
by the NLL of held-out training images, after some epochs on others, with seed 0.

Cost of a step of b images with m = 500 patches, P = 576 places, per image: 500 * 576
exponentials and 7.2 M multiplications for the cross covariance, 576^2 exponentials for
the prior variance, which is exact and not sampled, then m^2 = 250,000 multiplications
per class. The backward pass makes the first once more.

Run with ``python benchmarks/quality_convolutional.py --data PATH``, PATH a folder with
``images/mnist.npz``. With ``--results FOLDER`` each run keeps its state after every
epoch and its scores at the end; ``--minutes 8`` starts no epoch later than that, and
the same command goes on, bit for bit, until it prints the table. ``--kernel`` and
``--seeds`` take a part.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import product
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
from gpbridge.storage import load_state, save_state

SIDE, PATCH, CLASSES = 28, 5, 10
NAMES = {"rbf": "squared exponential", "conv": "convolutional"}
GRID = tuple(product((0.02, 0.05), (0.4, 1.0)))  # rate of Adam, factor of lengthscales
DECAY = 0.1  # of the rate, for the last third of the epochs
START = 0.1  # standard deviation of whitened inducing variables
DRAWS = 100  # of f, in predictions


class Score(NamedTuple):
    """Of images that did not train, in percent and nats, and what it took."""

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


class Setting(NamedTuple):
    """How one model starts and trains."""

    kernel: str
    rate: float
    factor: float
    epochs: int
    seed: int


def load(options: argparse.Namespace, seed: int) -> Images:
    """Random training images and the first test images."""
    path = Path(options.data) / "images"
    X, y, test_X, test_y = load_images(path, "mnist", num_test=options.test)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(X), generator=generator)[: options.images]
    parts = X[rows].flatten(1), y[rows], test_X.flatten(1), test_y
    return Images(*(part.to(options.device) for part in parts))


def held_out(images: Images, options: argparse.Namespace) -> Images:
    """The last fifth of the training images in place of the test images."""
    cut = 4 * len(images.X) // 5
    X, y = images.X[: min(cut, options.select_images)], images.y[:cut]
    return Images(X, y[: len(X)], images.X[cut:], images.y[cut:])


def make_kernel(name: str, location: float | None) -> Kernel:
    """The prior, its lengthscale still to be set."""
    if name == "rbf":
        return ScaleKernel(RBFKernel())
    place = None
    if location is not None:
        place = RBFKernel()
        place.lengthscale = location
    shapes = (SIDE, SIDE), (PATCH, PATCH)
    return ScaleKernel(ConvolutionalKernel(RBFKernel(), *shapes, location_kernel=place))


def build(setting: Setting, X: Tensor, options: argparse.Namespace) -> SparseGP:
    """A classifier at its starting point."""
    generator = torch.Generator(X.device).manual_seed(setting.seed)
    kernel = make_kernel(setting.kernel, options.location).to(X.device)
    Z = initial_inducing_points(kernel, X, options.inducing, generator)
    base, width = kernel.base_kernel, Z.shape[-1]
    if isinstance(base, ConvolutionalKernel):
        width = base.augmentation.patch_width
        base = base.base_kernel
        base = getattr(base, "base_kernel", base)
    base.lengthscale = setting.factor * torch.pdist(Z[:, :width]).median()
    with torch.no_grad():  # functions vary by a few logits over the images
        K = kernel.base_kernel(X[:20]).to_dense()
        spread = K.diagonal().mean() - K.mean()
    kernel.outputscale = 4.0 / spread
    softmax = SoftmaxLikelihood(num_classes=CLASSES, mixing_weights=False)
    # The prior would be a poor start: logits of a hundred, at random.
    model = SparseGP(kernel, Z, softmax, num_outputs=CLASSES, initial_std=START)
    return model.to(X.device)


@torch.no_grad()
def predict(model: SparseGP, X: Tensor, seed: int) -> Tensor:
    """Class probabilities, averaged over draws of f."""
    parts = []
    devices = [X.device] if X.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for x in X.split(200):
            with settings.num_likelihood_samples(DRAWS):
                parts.append(model.likelihood(model.marginals(x)).probs.mean(0))
    return torch.cat(parts)


class Runs:
    """Trainings whose states and scores are kept in a folder, if there is one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.results
        self.deadline = time.perf_counter() + 60 * options.minutes
        self.has_trained = False
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def score(self, name: str, setting: Setting, images: Images) -> Score:
        """Scores from the folder, or from training to the end."""
        key = self._key(setting, images)
        if self.folder is not None and (self.folder / f"{name}.json").exists():
            kept = json.loads((self.folder / f"{name}.json").read_text())
            if kept["key"] != key:
                raise SystemExit(f"{name}.json is of other options: {kept['key']}")
            return Score(**kept["score"])
        model, bound, spent = self._train(name, setting, images, key)
        probabilities = predict(model, images.test_X, setting.seed)
        wrong = probabilities.argmax(-1) != images.test_y
        nll = metrics.categorical_nll(probabilities, images.test_y)
        score = Score(100 * float(wrong.double().mean()), float(nll), bound, *spent)
        print(f"{name}: error {score.error:.2f} %, NLL {score.nll:.4f}", flush=True)
        if self.folder is not None:
            text = json.dumps({"key": key, "score": score._asdict()}, indent=1)
            (self.folder / f"{name}.json").write_text(text + "\n")
            (self.folder / f"{name}.state").unlink(missing_ok=True)
        return score

    def _key(self, setting: Setting, images: Images) -> dict:
        options = self.options
        own = {"batch": options.batch, "inducing": options.inducing}
        sizes = {"images": len(images.X), "scored": len(images.test_X)}
        return setting._asdict() | own | sizes | {"location": options.location}

    def _train(
        self, name: str, setting: Setting, images: Images, key: dict
    ) -> tuple[SparseGP, float, tuple[float, float]]:
        model = build(setting, images.X, self.options)
        elbo = VariationalELBO(model.likelihood, model, num_data=len(images.X))
        path = self.folder and self.folder / f"{name}.state"
        state, before, bound = None, (0.0, 0.0), 0.0
        if path is not None and path.exists():
            kept = load_state(path)
            if kept["key"] != key:
                raise SystemExit(f"{path} is of other options: {kept['key']}")
            state, before = kept["fit"], kept["seconds"]
            bound = state["history"]["elbo"][-1]
        start = time.process_time(), time.perf_counter()

        def seconds() -> tuple[float, float]:
            now = time.process_time(), time.perf_counter()
            return tuple(b + n - s for b, n, s in zip(before, now, start, strict=True))

        last, done = setting.epochs // 3, 0
        for part, rate in (
            (setting.epochs - last, setting.rate),
            (last, DECAY * setting.rate),
        ):
            done += part
            while (trained := 0 if state is None else _epochs(state)) < done:
                if self.has_trained and time.perf_counter() > self.deadline:
                    raise SystemExit("stopped in time: run the same command again")
                fit = fit_sparse_gp(
                    elbo,
                    images.X,
                    images.y,
                    epochs=1,
                    batch_size=self.options.batch,
                    learning_rate=rate,
                    generator=_generator(images.X, setting.seed, state),
                    resume=state,
                    progress=False,
                )
                self.has_trained = True  # each call gets somewhere
                state, bound = fit.state, fit.history["elbo"][-1]
                took = seconds()
                print(
                    f"  {name}, epoch {trained}: {bound:.4f} ({took[0]:.0f} CPU s, "
                    f"{took[1]:.0f} s)",
                    flush=True,
                )
                if path is not None:
                    save_state({"key": key, "fit": state, "seconds": took}, path)
        return model, bound, seconds()


def _epochs(state: dict) -> int:
    return len(state["history"]["elbo"])


def _generator(X: Tensor, seed: int, state: dict | None) -> torch.Generator | None:
    return torch.Generator(X.device).manual_seed(seed) if state is None else None


def choose(runs: Runs, kernel: str, images: Images) -> tuple[float, float]:
    """The best rate and factor by held-out training images."""
    images = held_out(images, runs.options)
    nll = {}
    for rate, factor in GRID:
        setting = Setting(kernel, rate, factor, runs.options.select_epochs, 0)
        name = f"{kernel}_rate{rate}_factor{factor}"
        nll[rate, factor] = runs.score(name, setting, images).nll
    best = min(nll, key=nll.get)
    shown = ", ".join(f"{key}: {value:.4f}" for key, value in nll.items())
    print(f"{NAMES[kernel]}, rate and factor {best}, of NLL {shown}", flush=True)
    return best


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--images", type=int, default=10_000, help="that train")
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--inducing", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--select-images", type=int, default=2000)
    parser.add_argument("--select-epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kernel", choices=tuple(NAMES), nargs="+", default=NAMES)
    parser.add_argument("--results", type=Path, help="folder of states and scores")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--location", type=float, help="lengthscale of places, pixels")
    parser.add_argument("--smoke", action="store_true", help="tiny")
    options = parser.parse_args()
    if options.data is None:
        parser.error("pass --data, a folder with images/mnist.npz")
    if options.smoke:
        options.images, options.test, options.inducing = 100, 100, 20
        options.epochs, options.select_images, options.select_epochs = 3, 50, 2
    torch.set_num_threads(options.threads)
    print(
        f"{options.images} images, {options.inducing} inducing, {options.epochs} epochs"
    )
    runs, first = Runs(options), load(options, 0)
    scores: dict[str, list[Score]] = {}
    for kernel in options.kernel:
        rate, factor = choose(runs, kernel, first)
        for seed in options.seeds:
            setting = Setting(kernel, rate, factor, options.epochs, seed)
            images = load(options, seed)
            score = runs.score(f"{kernel}_seed{seed}", setting, images)
            scores.setdefault(NAMES[kernel], []).append(score)
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
