"""Does a network's evidence find the augmentation that its images have?

Subsets of 312 and 1250 of MNIST and Fashion-MNIST, each image turned by an angle
uniform on [-90, 90] degrees (training and test alike), means of 2 x 2 pixels, a small
CNN, and laws of rotations: none; the true one, held; learnt by the evidence together
with the network; Augerino's, learnt by its penalty. All predict by the averaged
function. The published runs have 31 samples and 1000 epochs; here it is 8, and 200 or
fewer.

"none", "true" and "learnt" differ in the law alone: their prior variance is learnt by a
Kronecker evidence. "Augerino" is as published, with the fixed unit prior of a weight
decay; "Augerino, retrained" holds its law and trains the network anew as "true" is, so
that it differs from that in the law alone, too; so does "learnt, retrained". "learnt"
starts at 11 degrees; "learnt, best of both" is the one of two starts that has the
larger evidence.

Steps of the law follow one block of 78 images and one output, which is a good enough
direction but no basis for the prior: by such blocks it falls until a network does worse
than a constant. The law starts to move after a twentieth of the epochs, so that the
network is not first trained with a narrow law, near whose optimum it would stay; the
prior after a quarter, since with a network that fits nothing yet it falls to zero.
The weights' rate falls in the second half, or the last batches decide. These choices
were made on seed 0 of MNIST 312, which the tables leave out, but for the falling rate,
which was chosen for all models because the evidence of one seed of three lay 160 nats
below that of the true law.

The cost of an update is measured beside: an epoch with evidence against one without, at
the same number of samples.

Each run is one line of a file (``invariance_runs.py``), and a run whose line is there
is not made again::

    python benchmarks/quality_invariance_images.py --data PATH --save runs.jsonl \\
        --sets mnist fashion_mnist --sizes 312 1250 --seeds 1 2 3

PATH is a folder with ``images/<name>.npz``. ``--parts tables`` prints what is saved.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from invariance_runs import (
    MODELS,
    RETRAINED,
    TESTS,
    Key,
    print_tables,
    save_run,
    saved_runs,
)
from quality_invariance import seeded
from torch import Tensor, nn
from torch.nn import functional as F

from gpbridge import metrics
from gpbridge.augmentation import AffineAugmentation2d, AveragedNetwork
from gpbridge.data import load_images
from gpbridge.dnn.schedules import swa_factor
from gpbridge.linearized import Kronecker
from gpbridge.selection import TangentBlocks, augerino_penalty, learn_invariance

TRUE = math.pi / 2  # half-width of the angles of the images
SIDE = 14  # pixels, means of 2 x 2
STARTS = {"learnt from 60": math.pi / 3, "none": 1e-4, "true": TRUE}
START = 0.2  # half-width at which the others start


class Problem(NamedTuple):
    """Flat turned images and labels."""

    X: Tensor
    y: Tensor
    test_X: Tensor
    test_y: Tensor


def turned(images: Tensor, seed: int) -> Tensor:
    """Each image by an angle of its own, then means of 2 x 2 pixels, flat."""
    generator = torch.Generator().manual_seed(seed)
    angle = TRUE * (2 * torch.rand(len(images), generator=generator) - 1)
    zero = torch.zeros_like(angle)
    rows = [torch.stack(r, -1) for r in _rotation(angle, zero)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bicubic", align_corners=False)
    return F.avg_pool2d(moved, 2).flatten(1)


def _rotation(angle: Tensor, zero: Tensor):
    return (angle.cos(), -angle.sin(), zero), (angle.sin(), angle.cos(), zero)


def load(path: Path, name: str, n: int, tests: int, seed: int) -> Problem:
    """Random training images; the first test images."""
    X, y, test_X, test_y = load_images(path / "images", name, num_test=tests)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(X), generator=generator)[:n]
    X, test_X = turned(X[rows], seed + 1000), turned(test_X, seed + 2000)
    # Not centred: what is turned into the image must be background, which is 0.
    return Problem(X / X.std(), y[rows], test_X / X.std(), test_y)


def cnn() -> nn.Sequential:
    """Two strided convolutions with softplus, p = 9,802 on 14 x 14 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.Softplus(),
        nn.Linear(32, 10),
    )


def law(samples: int, width: float) -> AffineAugmentation2d:
    """Rotations."""
    return AffineAugmentation2d(
        (SIDE, SIDE),
        ["rotation"],
        num_samples=samples,
        init=width,
        interpolation="bilinear",
    )


def options(epochs: int, seed: int) -> dict[str, Any]:
    """Of all models alike, but Augerino itself."""
    return {
        "structure": TangentBlocks(block_size=78, outputs="sampled", num_blocks=1),
        "prior_structure": Kronecker(),
        "prior_every": max(1, epochs // 10),
        "orbit": "resampled",
        "epochs": epochs,
        "burn_in": epochs // 20,
        "every": 2,
        "hyper_steps": 40,
        "augmentation_learning_rate": 0.2,
        "learning_rate": 1e-2,
        "schedule": swa_factor(epochs, 0.05),
        "batch_size": 104,
        "input_shape": (1, SIDE, SIDE),
        "generator": torch.Generator().manual_seed(seed),
        "progress": False,
    }


def augerino(
    network: nn.Module,
    data: tuple[Tensor, Tensor],
    own: AffineAugmentation2d,
    epochs: int,
    seed: int,
) -> AveragedNetwork:
    """The baseline: cross-entropy with the penalty, weight decay of a unit prior."""
    X, y = data
    averaged = AveragedNetwork(network, own, (1, SIDE, SIDE))
    optimizer = torch.optim.Adam(
        [
            {"params": network.parameters(), "weight_decay": 1 / len(X)},
            {"params": own.parameters(), "lr": 0.05},
        ],
        lr=1e-2,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [swa_factor(epochs, 0.05), lambda epoch: 1.0]
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        averaged.train()
        own.resample(generator)
        for rows in torch.randperm(len(X), generator=generator).split(104):
            loss = F.cross_entropy(averaged(X[rows]), y[rows])
            optimizer.zero_grad()
            (loss + augerino_penalty(own, 0.01)).backward()
            optimizer.step()
        schedule.step()
    return averaged.eval()


@torch.no_grad()
def scores(network: AveragedNetwork, problem: Problem) -> dict[str, float]:
    """Accuracy and NLL of the averaged function on the test images."""
    parts = [network(rows) for rows in problem.test_X.split(250)]
    probabilities = torch.cat(parts).softmax(-1)
    return {
        "accuracy": float(metrics.accuracy(probabilities, problem.test_y)),
        "nll": float(metrics.categorical_nll(probabilities, problem.test_y)),
        "width": math.degrees(float(network.augmentation.bound[0])),
    }


def evaluate(
    problem: Problem,
    model: str,
    samples: int,
    epochs: int,
    seed: int,
    width: float,
) -> dict[str, Any]:
    """Train one model and score it.

    Args:
        problem: Images.
        model: One of ``MODELS``.
        samples: Of an orbit.
        epochs: Of training.
        seed: Of first weights, orbits and batches.
        width: Half-width to start from, or to hold.
    """
    start = time.process_time()
    network, data = seeded(seed, cnn), (problem.X, problem.y)
    own = law(1 if model == "none" else samples, width)
    if model == "Augerino":
        averaged = augerino(network, data, own, epochs, seed)
        found = {"prior": 1.0, "evidence": None}
    else:
        own.requires_grad_(model.startswith("learnt") and model != RETRAINED)
        fit = learn_invariance(network, data, own, **options(epochs, seed))
        averaged, prior = fit.network, float(fit.prior_variance[0])
        found = {"prior": prior, "evidence": float(fit.evidence.value)}
    seconds = time.process_time() - start
    return {**scores(averaged, problem), **found, "seconds": seconds}


def run_models(arguments: argparse.Namespace, name: str, n: int, seed: int) -> None:
    """Train the models of one problem that are not saved yet."""
    epochs = arguments.epochs or (200 if n < 1000 else 100)
    problem = None
    for model in arguments.models:
        runs = saved_runs(arguments.save)
        key = Key(name, n, seed, model, arguments.samples, epochs, arguments.tests)
        if key in runs:
            continue
        width = STARTS.get(model, START)
        first, comma, _ = model.partition(",")
        if comma:
            before = runs.get(key._replace(model=first))
            if before is None:
                raise SystemExit(f"{model!r} needs the run of {first!r} before it.")
            width = min(math.radians(before["width"]), math.pi - 1e-3)
        if problem is None:
            problem = load(arguments.data, name, n, arguments.tests, seed)
        found = evaluate(problem, model, arguments.samples, epochs, seed, width)
        print(f"<!-- {save_run(arguments.save, key, found)} -->", flush=True)


# -- cost ------------------------------------------------------------------------------


def cost_table(path: Path, n: int, samples: int) -> None:
    """Epochs with a step of the law, with one of the prior, and plain, in one run."""
    problem = load(path, "mnist", n, 10, 0)
    spent: dict[str, list[float]] = {"plain": [], "law": [], "both": []}
    last = [time.process_time()]

    def note(training: Any) -> None:
        now, steps = time.process_time(), training.steps
        kind = "plain"
        if steps and steps[-1].epoch == training.epoch:
            kind = "both" if steps[-1].moves_prior else "law"
        spent[kind].append(now - last[0])
        last[0] = time.process_time()

    given = options(40, 0) | {"burn_in": 1, "callback": note}
    learn_invariance(seeded(0, cnn), problem[:2], law(samples, 0.5), **given)
    plain = spent["plain"][1:]
    typical = {kind: statistics.median(values) for kind, values in spent.items()}
    low, high = min(plain), max(plain)
    whole = options(200, 0)  # where steps of the prior are rarer than in this run
    updates = (200 - whole["burn_in"]) // whole["every"]
    both = updates // whole["prior_every"]
    mean = (200 - updates) * typical["plain"] + (updates - both) * typical["law"]
    mean = (mean + both * typical["both"]) / 200
    print(
        f"\nCost, {n} images, {samples} samples, in units of a plain epoch "
        f"({1e3 * typical['plain']:.0f} ms, {1e3 * low:.0f} to {1e3 * high:.0f}): an "
        f"epoch with a step of the law {typical['law'] / typical['plain']:.2f} (one "
        f"block of 78, one output), with one of the prior, too, "
        f"{typical['both'] / typical['plain']:.2f} (Kronecker, all images); the mean "
        f"of 200 epochs, {updates} with a step of the law and {both} with one of the "
        f"prior, {mean / typical['plain']:.2f}. Target: at most 3.",
        flush=True,
    )


def main() -> None:
    """Parse arguments, train what is missing, print tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with images/<name>.npz")
    parser.add_argument("--save", type=Path, help="default invariance_images.jsonl")
    parser.add_argument("--sets", nargs="*", default=["mnist", "fashion_mnist"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[312, 1250])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--epochs", type=int, help="default 200, 100 for 1250 images")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tests", type=int, default=TESTS)
    parser.add_argument("--parts", nargs="*", default=["cost", "runs", "tables"])
    parser.add_argument("--smoke", action="store_true", help="tiny, means nothing")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.sizes, arguments.seeds, arguments.epochs = [100], [1], 4
        arguments.samples, arguments.tests = 2, 50
    if arguments.save is None:
        folder = tempfile.mkdtemp() if arguments.smoke else "."
        arguments.save = Path(folder, "invariance_images.jsonl")
    timing.one_thread()
    if arguments.data is None and {"cost", "runs"} & set(arguments.parts):
        raise SystemExit("--data names the folder of images.")
    if "cost" in arguments.parts:
        cost_table(arguments.data, 312, arguments.samples)
    if "runs" in arguments.parts:
        for name in arguments.sets:
            for n in arguments.sizes:
                for seed in arguments.seeds:
                    run_models(arguments, name, n, seed)
    if "tables" in arguments.parts:
        print_tables(arguments.save)


if __name__ == "__main__":
    main()
