"""How many labels does a classifier need, if it may choose what is labelled?

MNIST and Fashion-MNIST: a small CNN starts with 20 random labels and asks for batches
of 10 or 100 more, out of 1000 images that are drawn anew in each round. In each round
it is trained from scratch, 300 steps of Adam without held-out data, and scored on test
images. The posterior is that of the last layer, linearised, with a prior variance of
one over its width. Methods differ in what they ask for:

random      any images
entropy     the largest entropies of the network's own softmax
variance    the largest variances of the probabilities over 100 draws of the posterior
BALD        the largest mutual information of label and function, by the same draws
BAIT        the batch that makes the average posterior variance of the pool smallest,
            by Fisher embeddings of the last layer under the same posterior

Within a seed all methods see the same first labels, the same candidates of a round and
the same first weights of a round's network. Choices were made on scikit-learn's digits,
which the tables do not have. The evidence finds larger prior variances (.15 for 20
images): draws of the logits then contradict the labels, and BALD does worse.

The table has the numbers of labels that a method needs for the mean accuracies that
random labels reach half way and at best.

Each run is one line of a file, and a run whose line is there is not made again::

    python benchmarks/quality_active_learning.py --data PATH --save runs.jsonl

PATH is a folder with ``images/<name>.npz``. ``--table`` prints the table of what is
saved, ``--figure PATH`` draws the curves.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from run_records import Records, Run, shown
from torch import Tensor, nn

from gpbridge import LinearizedGP, metrics
from gpbridge.acquisition import (
    bald,
    fisher_embeddings,
    predictive_variance,
    select_bait,
    select_top,
)
from gpbridge.data import load_images
from gpbridge.dnn import fit_map

METHODS = ("random", "entropy", "variance", "BALD", "BAIT")
KEY = ("set", "batch", "method", "seed", "smoke")
START = 20
WIDTH = 64  # of the last layer
ROWS = 32  # of a training batch
NAMES = {"digits": "digits", "mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}


class Size(NamedTuple):
    """Effort: labels in the end for each batch size, candidates, steps, test images."""

    labels: dict[int, int]
    candidates: int
    steps: int
    tests: int
    draws: int


FULL = Size({10: 160, 100: 820}, 1000, 300, 5000, 100)
SMOKE = Size({10: 40, 100: 120}, 150, 5, 100, 8)


class Pool(NamedTuple):
    """Standardised flat images with their labels, and the shape of one."""

    X: Tensor
    y: Tensor
    test_X: Tensor
    test_y: Tensor
    shape: tuple[int, int, int]


def load(path: Path | None, name: str, tests: int, seed: int) -> Pool:
    """10,000 random training images; the first test images."""
    generator = torch.Generator().manual_seed(seed)
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        X = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        y = torch.tensor(labels)
        rows = torch.randperm(len(X), generator=generator)
        fit, held = rows[:1297], rows[1297:]
        X, y, test_X, test_y = X[fit], y[fit], X[held], y[held]
    else:
        X, y, test_X, test_y = load_images(path / "images", name, num_test=tests)
        rows = torch.randperm(len(X), generator=generator)[:10_000]
        X, y = X[rows], y[rows]
    center, scale = X.mean(), X.std()
    flat = [((part - center) / scale).flatten(1) for part in (X, test_X)]
    return Pool(flat[0], y, flat[1], test_y, tuple(X.shape[1:]))


def cnn(shape: tuple[int, int, int], seed: int) -> nn.Sequential:
    """Two convolutions and two linear layers, p = 20,522 on 28 x 28 pixels."""
    size, stride = (5, 2) if shape[-1] == 28 else (3, 1)
    width = ((shape[-1] - size) // stride + 1 - size) // stride + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, size, stride=stride),
            nn.ReLU(),
            nn.Conv2d(8, 16, size, stride=stride),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * width**2, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 10),
        )


def trained(pool: Pool, labelled: Tensor, steps: int, seed: int) -> nn.Module:
    """A network of the labelled images, about so many steps from random weights."""
    per_epoch = -(-len(labelled) // ROWS)
    return fit_map(
        cnn(pool.shape, seed),
        pool.X[labelled],
        pool.y[labelled],
        epochs=max(1, round(steps / per_epoch)),
        learning_rate=2e-3,
        batch_size=ROWS,
        validation_fraction=0.0,
        input_shape=pool.shape,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    ).network


def last_layer(network: nn.Module, pool: Pool, labelled: Tensor) -> LinearizedGP:
    """The posterior of the last layer, whose logits have prior variances near one."""
    model = LinearizedGP(
        network,
        pool.X[labelled],
        pool.y[labelled],
        parameters="last_layer",
        input_shape=pool.shape,
    )
    model.prior_variance = 1 / WIDTH
    return model


@torch.no_grad()
def outputs(network: nn.Module, X: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Logits of flat images."""
    return torch.cat([network(part.unflatten(-1, shape)) for part in X.split(500)])


def choose(
    method: str,
    network: nn.Module,
    pool: Pool,
    labelled: Tensor,
    candidates: Tensor,
    q: int,
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """Numbers of q candidates among the candidates, whose order is random."""
    X = pool.X[candidates]
    if method == "random":
        return torch.arange(q)
    if method == "entropy":
        probabilities = outputs(network, X, pool.shape).softmax(-1)
        return select_top(metrics.predictive_entropy(probabilities), q)
    model = last_layer(network, pool, labelled)
    if method == "BAIT":
        return select_bait(fisher_embeddings(model, X), q)
    functions = model.draw(draws, generator)
    with torch.no_grad():
        values = torch.cat([functions(part) for part in X.split(250)], 1).softmax(-1)
    score = {"variance": predictive_variance, "BALD": bald}[method]
    return select_top(score(values), q)


def run(plan: Run, path: Path | None, size: Size) -> Run:
    """One seed of one method: labels and accuracies of each round."""
    began = time.process_time()
    seed, q = plan["seed"], plan["batch"]
    pool = load(path, plan["set"], size.tests, seed)
    source = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(len(pool.X), generator=source)
    labelled, rest = order[:START], order[START:]
    labels, accuracies, rounds = [], [], 0
    while True:
        own = 100_000 * (seed + 1) + rounds  # the same for all methods
        network = trained(pool, labelled, size.steps, own)
        logits = outputs(network, pool.test_X, pool.shape)
        labels.append(len(labelled))
        accuracies.append(float(metrics.accuracy(logits.softmax(-1), pool.test_y)))
        if len(labelled) + q > size.labels[q]:
            break
        generator = torch.Generator().manual_seed(own)
        # Among the rows of the whole pool, so that a candidate of one method is one of
        # the others, too, unless it is labelled.
        ranks = torch.rand(len(pool.X), generator=generator)
        places = ranks[rest].argsort()[: size.candidates]
        taken = choose(
            *(plan["method"], network, pool, labelled, rest[places]),
            *(q, size.draws, generator),
        )
        new = rest[places[taken]]
        labelled = torch.cat([labelled, new])
        rest = rest[~torch.isin(rest, new)]
        rounds += 1
    seconds = round(time.process_time() - began, 1)
    return {"labels": labels, "accuracy": accuracies, "seconds": seconds}


def labels_needed(run: Run, accuracy: float) -> float:
    """Labels at which the curve first reaches an accuracy, between rounds linearly.

    The last number of labels if it does not.
    """
    previous = None
    for at in zip(run["labels"], run["accuracy"], strict=True):
        if at[1] >= accuracy:
            if previous is None:
                return at[0]
            share = (accuracy - previous[1]) / (at[1] - previous[1])
            return previous[0] + share * (at[0] - previous[0])
        previous = at
    return run["labels"][-1]


def groups(runs: list[Run]) -> dict[tuple[str, int], dict[str, dict[int, Run]]]:
    """By set and batch, method, seed."""
    found: dict = {}
    for one in runs:
        by_method = found.setdefault((one["set"], one["batch"]), {})
        by_method.setdefault(one["method"], {})[one["seed"]] = one
    return found


def targets(by_method: dict[str, dict[int, Run]]) -> tuple[float, float]:
    """Mean accuracies of random labels, after half of the rounds and after all."""
    own = by_method.get("random") or next(iter(by_method.values()))
    curves = torch.tensor([one["accuracy"] for one in own.values()]).mean(0)
    return float(curves[len(curves) // 2]), float(curves.amax())


def print_tables(runs: list[Run]) -> None:
    """Labels needed, differences to random and entropy, mean and last accuracy.

    Needed for what random labels reach half way and at best, in the mean.
    """
    for (name, q), by_method in groups(runs).items():
        print(f"\n{NAMES[name]}, batches of {q}; mean ± standard error over seeds\n")
        low, high = targets(by_method)
        print(
            f"| method | seeds | labels to {low:.1%} | to {high:.1%} | minus random's, "
            "paired | minus entropy's, paired | mean accuracy, % | at the end, % "
            "| CPU s |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for method in METHODS:
            own = by_method.get(method, {})
            if not own:
                continue
            cells = [str(len(own))]
            for target in (low, high):
                needed = [labels_needed(one, target) for one in own.values()]
                missed = sum(max(one["accuracy"]) < target for one in own.values())
                cells.append(
                    shown(needed, 0) + (f" ({missed} never)" if missed else "")
                )
            for other in ("random", "entropy"):
                theirs = by_method.get(other, {})
                pairs = [
                    labels_needed(own[seed], high) - labels_needed(theirs[seed], high)
                    for seed in own
                    if seed in theirs
                ]
                skip = method == other or not pairs
                cells.append("" if skip else shown(pairs, 0, sign=True))
            for pick in (lambda a: 100 * sum(a) / len(a), lambda a: 100 * a[-1]):
                cells.append(shown([pick(one["accuracy"]) for one in own.values()]))
            cells.append(f"{sum(o['seconds'] for o in own.values()) / len(own):.0f}")
            print(f"| {method} | {' | '.join(cells)} |")


def draw_figure(runs: list[Run], path: Path) -> None:
    """Accuracy over labels, mean and standard error, a panel for each set and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from gpbridge.plots import COLORS, INK, STYLE

    pyplot.rcParams.update(STYLE)
    panels = groups(runs)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        *(rows, columns),
        figsize=(5.4 * columns, 3.6 * rows),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    colors = dict(zip(METHODS, [INK, *COLORS], strict=True))
    for ax, ((name, q), by_method) in zip(axes.flat, panels.items(), strict=False):
        for method in METHODS:
            own = by_method.get(method)
            if not own:
                continue
            labels = next(iter(own.values()))["labels"]
            curves = torch.tensor([one["accuracy"] for one in own.values()]) * 100
            mean = curves.mean(0)
            style = "--" if method == "random" else "-"
            color = colors[method]
            ax.plot(labels, mean, style, color=color, linewidth=1.6, label=method)
            if len(curves) > 1:
                error = curves.std(0) / len(curves) ** 0.5
                band = mean - error, mean + error
                ax.fill_between(labels, *band, color=color, alpha=0.15, linewidth=0)
        ax.set(xlabel="labels", ylabel="test accuracy, %")
        title = f"{NAMES[name]}, batches of {q}"
        ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
        ax.grid(True)
        ax.legend(frameon=False, loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--save", type=Path, default="active_learning.jsonl")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--sets", nargs="+", default=["mnist", "fashion_mnist"])
    parser.add_argument("--batches", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--table", action="store_true", help="print what is saved")
    parser.add_argument("--figure", type=Path, help="draw what is saved")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = Records(options.save, KEY)
    if options.table or options.figure:
        runs = [r for r in records.runs().values() if r["smoke"] == options.smoke]
        if options.table:
            print_tables(runs)
        if options.figure:
            draw_figure(runs, options.figure)
        return
    path = None if options.data is None else Path(options.data)
    if path is None and options.sets != ["digits"]:
        parser.error("--data must name the folder with images/")
    size = SMOKE if options.smoke else FULL
    plans = [
        dict(zip(KEY, (name, q, method, seed, options.smoke), strict=True))
        for seed in options.seeds  # so that an early table has all methods
        for name in options.sets
        for q in options.batches
        for method in options.methods
    ]

    def make(plan: Run) -> Run:
        made = run(plan, path, size)
        print(*plan.values(), made["accuracy"][-1], f"{made['seconds']} s", flush=True)
        return made

    records.complete(plans, make)


if __name__ == "__main__":
    main()
