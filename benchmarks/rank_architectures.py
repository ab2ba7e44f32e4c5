"""Which score of a training run ranks architectures as their final test accuracy does?

34 small networks (18 MLPs and 16 CNNs) train by Adam on 4,000 images of Fashion-MNIST,
12 epochs with a cosine rate, alike but for a seed of weights, images and batches. Their
accuracy on the 10,000 test images is seen once, at the end. Scores are taken after 2,
4, 8 and all epochs: sums of training losses (TSE, TSE-E of the last two epochs,
TSE-EMA), accuracy and NLL on 1,000 held-out images, the last training loss, and as a
yardstick that sees no data the number of weights. The Laplace evidence is exact, of the
trained network linearised on the first 60 of its training images, with one prior
variance learnt: that is an n m of 600, and all 4,000 would need 40,000.

Printed is Kendall's tau-b between a score (signs such that higher is better) and the
test accuracy: mean and standard deviation over seeds, for all networks, for the better
half by test accuracy (the others are easily told apart), and within each family.

Run with ``python benchmarks/rank_architectures.py --data PATH``, PATH a folder with
``images/fashion_mnist.npz``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import image_networks
import timing
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from scipy.stats import kendalltau
from torch import Tensor, nn

from gpbridge import LinearizedGP
from gpbridge.dnn import fit_map
from gpbridge.selection import TrainingSpeed, fit_evidence

CLASSES = 10
HELD_OUT = 1000
RATE = 2e-3
GAMMA = 0.9
FAMILIES = ("MLP", "CNN")


class Effort(NamedTuple):
    """Sizes of the experiment."""

    images: int = 4000
    tests: int = 10_000
    evidence_points: int = 60
    epochs: tuple[int, ...] = (2, 4, 8, 12)
    every: int = 1  # of the architectures
    seeds: int = 3


SMOKE = Effort(200, 200, 10, (2, 3), 4, 1)


def mlp(width: int, depth: int, activation: type[nn.Module]) -> nn.Sequential:
    """A multilayer perceptron with equal hidden widths."""
    sizes = [784] + [width] * depth
    layers = [nn.Flatten()]
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], CLASSES))


def cnn(
    channels: int, depth: int, activation: type[nn.Module], pooled: bool
) -> nn.Sequential:
    """Strided 3 x 3 convolutions, doubling the channels, and one linear layer."""
    layers: list[nn.Module] = []
    before, side = 1, 28
    for level in range(depth):
        after = channels * 2**level
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), activation()]
        before, side = after, (side + 1) // 2
    if pooled:
        layers, side = [*layers, nn.AdaptiveAvgPool2d(1)], 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side**2, CLASSES))


def architectures() -> dict[str, Callable[[], nn.Module]]:
    """All networks by name."""
    made: dict[str, Callable[[], nn.Module]] = {}
    for activation in (nn.ReLU, nn.Tanh):
        kind = activation.__name__
        for depth in (1, 2, 4):
            for width in (4, 16, 128):
                name = f"MLP {kind} {depth} x {width}"
                made[name] = lambda w=width, d=depth, a=activation: mlp(w, d, a)
        for depth in (2, 3):
            for channels in (2, 8):
                for pooled in (False, True):
                    name = f"CNN {kind} {depth} x {channels}{' pooled' * pooled}"
                    made[name] = lambda c=channels, d=depth, a=activation, p=pooled: (
                        cnn(c, d, a, p)
                    )
    return made


@torch.no_grad()
def accuracy(network: nn.Module, X: Tensor, y: Tensor) -> float:
    """Share of images that are classified correctly."""
    outputs = torch.cat([network(part) for part in X.split(1000)])
    return float((outputs.argmax(-1) == y).double().mean())


class Scores(NamedTuple):
    """What is known of one network: test accuracy, scores by name and epoch."""

    test_accuracy: float
    scores: dict[tuple[str, int], float]  # higher is better
    seconds: tuple[float, float]  # CPU, of training and of the evidence


def run(make: Callable[[], nn.Module], images, seed: int, effort: Effort) -> Scores:
    """Train one network and take all its scores."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
    shape = image_networks.SHAPE
    X = torch.cat([images.X, images.val_X])
    y = torch.cat([images.y, images.val_y])
    held_out = torch.arange(len(images.X), len(X))
    val_X = images.val_X.unflatten(-1, shape)
    scores: dict[tuple[str, int], float] = {}
    speed = TrainingSpeed()

    def observe(epoch: int, trained: nn.Module, entry: dict[str, float]) -> None:
        speed(epoch, trained, entry)
        done = epoch + 1
        if done in effort.epochs:
            scores["TSE", done] = -float(speed.tse())
            scores["TSE-E, last 2", done] = -float(speed.tse_e(2))
            scores[f"TSE-EMA, {GAMMA}", done] = -float(speed.tse_ema(GAMMA))
            scores["last training loss", done] = -entry["train_loss"]
            scores["held-out NLL", done] = -entry["validation_loss"]
            right = accuracy(trained, val_X, images.val_y)
            scores["held-out accuracy", done] = right

    begin, last = time.process_time(), effort.epochs[-1]
    fit = fit_map(
        network,
        X,
        y,
        epochs=last,
        learning_rate=RATE,
        schedule="cosine",
        validation_rows=held_out,
        early_stopping=False,
        input_shape=shape,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
        callback=observe,
    )
    middle = time.process_time()
    rows = slice(effort.evidence_points)
    model = LinearizedGP(
        fit.network,
        images.X[rows],
        images.y[rows],
        SoftmaxLikelihood(num_classes=CLASSES, mixing_weights=False),
        input_shape=shape,
    )
    scores["Laplace evidence", last] = float(fit_evidence(model, warn=False).value)
    scores["number of weights", last] = sum(p.numel() for p in network.parameters())
    test_X = images.test_X.unflatten(-1, shape)
    right = accuracy(fit.network, test_X, images.test_y)
    return Scores(right, scores, (middle - begin, time.process_time() - middle))


def part_of(result: dict[str, Scores], part: str) -> list[Scores]:
    """All networks, the better half, or one family."""
    if part in FAMILIES:
        return [each for name, each in result.items() if name.startswith(part)]
    ranked = sorted(result.values(), key=lambda each: -each.test_accuracy)
    return ranked if part == "all" else ranked[: (len(ranked) + 1) // 2]


def print_table(results: list[dict[str, Scores]], effort: Effort) -> None:
    """Kendall's tau of every score, family and epoch; mean and spread over seeds."""
    first = next(iter(results[0].values()))
    names = list(dict.fromkeys(name for name, _ in first.scores))
    columns = [(part, t) for part in ("all", "better half") for t in effort.epochs]
    columns += [(family, effort.epochs[-1]) for family in FAMILIES]
    heads = [f"{part}, epoch {epoch}" for part, epoch in columns]
    print(f"\n| score | {' | '.join(heads)} |")
    print("|---|" + "---|" * len(heads))
    for name in names:
        cells = []
        for part, epoch in columns:
            taus = []
            for result in results:
                chosen = [
                    each
                    for each in part_of(result, part)
                    if (name, epoch) in each.scores
                ]
                if len(chosen) > 1:
                    values = [each.scores[name, epoch] for each in chosen]
                    truth = [each.test_accuracy for each in chosen]
                    taus.append(kendalltau(values, truth).statistic)
            taus = torch.tensor(taus).double()
            if not len(taus):
                cells.append("")
            else:
                spread = f" ± {taus.std():.2f}" if len(taus) > 1 else ""
                cells.append(f"{taus.mean():.2f}{spread}")
        print(f"| {name} | {' | '.join(cells)} |")
    accuracies = torch.tensor([[s.test_accuracy for s in r.values()] for r in results])
    spent = torch.tensor([[s.seconds for s in r.values()] for r in results]).sum(1)
    between = [
        kendalltau(accuracies[i], accuracies[j]).statistic
        for i in range(len(results))
        for j in range(i)
    ]
    if between:
        mean = sum(between) / len(between)
        print(f"\ntest accuracy against that of another seed: tau {mean:.2f}")
    print(
        f"test accuracies {accuracies.min():.3f} to {accuracies.max():.3f}, "
        f"{accuracies.shape[1]} networks; CPU seconds per seed: training "
        f"{spent.mean(0)[0]:.0f}, evidence {spent.mean(0)[1]:.0f}",
        flush=True,
    )


def main() -> None:
    """Train all networks for each seed; a table after every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one seed")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("it needs --data PATH with images/fashion_mnist.npz")
    timing.one_thread()
    effort = SMOKE if arguments.smoke else Effort()
    held_out = min(HELD_OUT, effort.images)
    sizes = (effort.images, held_out, effort.tests)
    every = list(architectures().items())[:: effort.every]
    results = []
    for seed in range(effort.seeds):
        images = image_networks.load(Path(arguments.data) / "images", seed, sizes)
        results.append({})
        for name, make in every:
            results[-1][name] = found = run(make, images, seed, effort)
            print(
                f"  {seed} {name}: {found.test_accuracy:.4f} "
                f"({found.seconds[0]:.1f} and {found.seconds[1]:.1f} s)",
                flush=True,
            )
        print_table(results, effort)


if __name__ == "__main__":
    main()
