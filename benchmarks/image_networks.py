"""Fashion-MNIST for the weight-space table: data, a small CNN, its training, scores.

In: a folder of images, a seed. Out: parts of the data, trained networks, logits of
draws, one row of scores per method. Next: ``quality_weight_space_images``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import quality_classification
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from gpbridge import metrics
from gpbridge.data import load_images
from gpbridge.predictive_mixture import decompose

SHAPE = (1, 28, 28)
ROWS = 250  # of images in one vectorised pass
BATCH = 100


class Images(NamedTuple):
    """Flat standardised images ``n x 784`` and their labels; ``other`` are digits."""

    X: Tensor
    y: Tensor
    val_X: Tensor
    val_y: Tensor
    test_X: Tensor
    test_y: Tensor
    other_X: Tensor


class Row(NamedTuple):
    """What one method reached; areas for three scores of doubt."""

    accuracy: float
    nll: float
    ece: float
    auroc: float
    auroc_entropy: float
    auroc_information: float


def load(path: Path, seed: int, sizes: tuple[int, int, int]) -> Images:
    """Random training and held-out images, the first test images of both sets."""
    n, held_out, tests = sizes
    X, y, test_X, test_y = load_images(path, "fashion_mnist", num_test=tests)
    _, _, other_X, _ = load_images(path, "mnist", num_train=1, num_test=tests)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(X), generator=generator)[: n + held_out]
    fit, held = rows[:n], rows[n:]
    center, scale = X[fit].mean(), X[fit].std()

    def flat(images: Tensor) -> Tensor:
        return ((images - center) / scale).flatten(1)

    parts = flat(X[fit]), y[fit], flat(X[held]), y[held], flat(test_X), test_y
    return Images(*parts, flat(other_X))


def cnn(seed: int, rate: float = 0.0) -> nn.Sequential:
    """Two strided convolutions and two linear layers, p = 20,522."""
    drop = [nn.Dropout(rate)] if rate else []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 5, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            *drop,
            nn.Linear(256, 64),
            nn.ReLU(),
            *drop,
            nn.Linear(64, 10),
        )


def train(
    network: nn.Module,
    images: Images,
    optimizer: torch.optim.Optimizer,
    factor: Callable[[int], float],
    epochs: int,
    seed: int,
    after: Callable[[int, nn.Module], object] | None = None,
) -> nn.Module:
    """A plain loop; ``factor`` of the rate and ``after`` are called with the step."""
    generator = torch.Generator().manual_seed(seed)
    schedule = LambdaLR(optimizer, factor)
    X, step = images.X.unflatten(-1, SHAPE), 0
    network.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for _ in range(epochs):
            for rows in torch.randperm(len(X), generator=generator).split(BATCH):
                loss = F.cross_entropy(network(X[rows]), images.y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                if after is not None:
                    after(step, network)
    return network.eval()


@torch.no_grad()
def logits(functions: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
    """Of draws, ``s x n x 10``, in passes of few rows."""
    return torch.cat([functions(rows) for rows in X.split(ROWS)], 1)


def held_out_nll(values: Tensor, y: Tensor) -> float:
    """Of the averaged probabilities."""
    return float(metrics.categorical_nll(values.softmax(-1).mean(0), y))


def score(inside: Tensor, outside: Tensor, likelihood: object, images: Images) -> Row:
    """All scores, from logits ``s x n x 10`` of test images and of digits."""
    probabilities = [part.softmax(-1).mean(0) for part in (inside, outside)]
    found = quality_classification.scores(*probabilities, images.test_y)
    both = decompose(likelihood, torch.cat([inside, outside], 1))
    is_other = torch.arange(inside.shape[1] + outside.shape[1]) >= inside.shape[1]
    areas = [
        float(metrics.auroc(doubt, is_other))
        for doubt in (both.total, both.mutual_information)
    ]
    if len(inside) == 1:
        areas[1] = float("nan")  # one function has nobody to disagree with
    return Row(*found, *areas)


def print_table(results: Sequence[dict[str, tuple[Row, float, float]]]) -> None:
    """Mean and standard deviation over seeds."""
    print(
        "\n| method | accuracy | NLL | ECE | AUROC, max probability | entropy "
        "| mutual information | CPU s, training and tuning | prediction |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in results[0]:
        runs = [result[name] for result in results if name in result]
        table = torch.tensor([[*row, *spent] for row, *spent in runs]).double()
        std = table.std(0) if len(runs) > 1 else torch.full_like(table[0], torch.nan)
        moments = zip(table.mean(0)[:6].tolist(), std[:6].tolist(), strict=True)
        cells = [
            "" if mean != mean else f"{mean:.3f}" + ("" if s != s else f" ± {s:.3f}")
            for mean, s in moments
        ]
        times = [f"{t:.0f}" for t in table.mean(0)[6:].tolist()]
        print(f"| {name} | {' | '.join(cells + times)} |", flush=True)
