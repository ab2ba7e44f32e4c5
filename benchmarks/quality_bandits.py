"""Does Thompson sampling from a posterior over networks earn more than being greedy?

The wheel bandit (Riquelme, Tucker, Snoek 2018), where one context in four, in five or
in ten pays fifty times as much for an arm that is worse elsewhere; and classification
as a bandit: an arm for each class of digits or Fashion-MNIST, which pays 1 if it is
right.

uniform              any arm
linear Thompson      Bayesian linear regression for each arm, exact, updated at every
                     step; prior and its parameters as published (a = b = 6, precision
                     of the weights .25)
greedy               the best arm by the network
epsilon-greedy       the same, with probability .05 any arm
linearised           Thompson sampling: each step the best arm by a function drawn from
                     the tangent model of all weights, hyperparameters by evidence
last layer           the same with the last layer alone
ensemble             by one of five networks, each step another
dropout              by one of 64 sets of masks
SGHMC                by one of 32 samples of four chains

All networks are the same, two layers of 64 ReLU and an output for each arm, trained by
the surrogate recipes: from scratch after the first steps, in which the arms take turns
(20 with classes; 100 on the wheel, since recipes scale rewards by those seen, and no
method that has not seen a large one looks for it), then warm-started every 20 steps up
to step 200 and every 50 after, 100 epochs at first and 30 each time. Contexts and what
each arm would pay are the same for all methods of a seed. Choices were made on the
wheel of delta .7, which the table does not have.

Each run is one line of a file, and a run whose line is there is not made again::

    python benchmarks/quality_bandits.py --data PATH --save runs.jsonl

PATH is a folder with ``images/fashion_mnist.npz``; without it that problem is left out.
``--table`` prints the table of what is saved, ``--figure PATH`` draws the curves.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from bandit_problems import ArmNetwork, Bandit, load
from botorch.models.deterministic import GenericDeterministicModel
from botorch.models.model import Model
from run_records import Records, Run, shown
from torch import Generator, Tensor

from gpbridge.surrogates import (
    DropoutSurrogate,
    EnsembleSurrogate,
    LastLayerSurrogate,
    LinearizedSurrogate,
    Recipe,
    SGHMCSurrogate,
)
from gpbridge.surrogates.recipe import Experiments, State
from gpbridge.surrogates.training import train

PROBLEMS = ("wheel .5", "wheel .9", "wheel .95", "digits", "fashion_mnist")
NAMES = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}
KEY = ("problem", "method", "seed", "smoke")
EPSILON = 0.05


@dataclass(frozen=True, kw_only=True)
class PointSurrogate(Recipe):
    """The network itself."""

    def _fit(self, experiments: Experiments) -> tuple[Model, list[State]]:
        network, encode = train(self, experiments).network, experiments.input_transform
        model = GenericDeterministicModel(lambda X: network(encode(X)))
        return model, [network.state_dict()]


SGHMC = partial(SGHMCSurrogate, num_cycles=1, steps_per_cycle=150)
RECIPES: dict[str, Callable[..., Recipe]] = {
    "greedy": PointSurrogate,
    "epsilon-greedy": PointSurrogate,
    "linearised": LinearizedSurrogate,
    "last layer": LastLayerSurrogate,
    "ensemble": EnsembleSurrogate,
    "dropout": DropoutSurrogate,
    "SGHMC": SGHMC,
}
METHODS = ("uniform", "linear Thompson", *RECIPES)


class Size(NamedTuple):
    """Steps, epochs at first and at each update."""

    horizon: int = 800
    epochs: int = 100
    update_epochs: int = 30


FULL, SMOKE = Size(), Size(60, 3, 2)


def retrained_at(horizon: int, first: int = 20) -> list[int]:
    """Steps before which a network is trained, and the end."""
    often = range(first, min(200, horizon), 20)
    return [*often, *range(200, horizon, 50), horizon]


def with_arms(contexts: Tensor, arms: int) -> Tensor:
    """Every context with every arm's number behind it, ``(b K) x (d + 1)``."""
    numbers = torch.arange(arms).to(contexts).repeat(len(contexts))
    return torch.cat([contexts.repeat_interleave(arms, 0), numbers[:, None]], -1)


@torch.no_grad()
def chosen(
    method: str, model: Model, contexts: Tensor, arms: int, generator: Generator
) -> Tensor:
    """One arm for each context, each by a function of its own."""
    b, X = len(contexts), with_arms(contexts, arms)
    steps = torch.arange(b)
    if method in ("linearised", "last layer"):
        values = model.draw(b, generator)(X)[..., 0].unflatten(-1, (b, arms))
        return values[steps, steps].argmax(-1)
    if method in ("greedy", "epsilon-greedy"):
        best = model(X)[..., 0].unflatten(-1, (b, arms)).argmax(-1)
        if method == "greedy":
            return best
        anyhow = torch.randint(arms, (b,), generator=generator)
        explores = torch.rand(b, generator=generator) < EPSILON
        return torch.where(explores, anyhow, best)
    values = model.posterior(X).values[..., 0].unflatten(-1, (b, arms))
    members = torch.randint(len(values), (b,), generator=generator)
    return values[members, steps].argmax(-1)


def by_network(method: str, bandit: Bandit, size: Size, seed: int) -> Tensor:
    """Arms of all steps by a recipe that is fitted now and then."""
    horizon, arms = bandit.rewards.shape
    d = bandit.contexts.shape[1]
    generator = Generator().manual_seed(seed)
    rate = 0.1 if method == "dropout" else 0.0
    recipe = RECIPES[method](
        network=lambda width, outputs: ArmNetwork(width, arms, rate),
        bounds=torch.cat([bandit.bounds, torch.tensor([[0.0], [arms - 1.0]])], 1),
        categories={d: arms},
        epochs=size.epochs,
        update_epochs=size.update_epochs,
        seed=seed,
    )
    taken = torch.arange(bandit.first) % arms
    times = retrained_at(horizon, bandit.first)
    model = None
    for start, stop in zip(times[:-1], times[1:], strict=True):
        X = torch.cat([bandit.contexts[:start], taken[:, None].double()], 1)
        Y = bandit.rewards[:start].gather(1, taken[:, None])
        model = recipe.fit(X, Y) if model is None else recipe.update(model, X, Y)
        new = chosen(method, model, bandit.contexts[start:stop], arms, generator)
        taken = torch.cat([taken, new])
    return taken


class LinearArms:
    """Bayesian linear regression of each arm's reward, with unknown noise.

    Normal-inverse-gamma, exact. The factors of the posterior precision are kept.
    """

    def __init__(
        self, d: int, arms: int, precision: float = 0.25, a: float = 6.0, b: float = 6.0
    ) -> None:
        self.a0, self.b0 = a, b
        self.precision = precision * torch.eye(d).double().repeat(arms, 1, 1)
        self.cross = torch.zeros(arms, d, dtype=torch.float64)
        self.count = torch.zeros(arms, dtype=torch.float64)
        self.squares = torch.zeros(arms, dtype=torch.float64)
        self.factor = torch.linalg.cholesky(self.precision)
        self.mean = torch.zeros(arms, d, dtype=torch.float64)

    def observe(self, x: Tensor, arm: int, reward: Tensor) -> None:
        """One more reward."""
        self.precision[arm] += x[:, None] * x
        self.cross[arm] += reward * x
        self.count[arm] += 1
        self.squares[arm] += reward**2
        self.factor[arm] = torch.linalg.cholesky(self.precision[arm])
        solved = torch.cholesky_solve(self.cross[arm][:, None], self.factor[arm])
        self.mean[arm] = solved[:, 0]

    def scale(self) -> Tensor:
        """b of the inverse gamma distribution of each arm's noise."""
        fit = (self.mean * self.cross).sum(-1)
        return self.b0 + 0.5 * (self.squares - fit).clamp_min(0)

    def draw(self, x: Tensor, generator: Generator) -> Tensor:
        """A drawn mean reward of each arm."""
        shape = self.a0 + self.count / 2
        # torch's gamma draws take no generator; half a sum of 2a squares is one.
        squares = [
            torch.randn(int(2 * a), generator=generator, dtype=x.dtype).square().sum()
            for a in shape.tolist()
        ]
        variance = 2 * self.scale() / torch.stack(squares)
        normal = torch.randn(self.mean.shape, generator=generator, dtype=x.dtype)
        moved = torch.linalg.solve_triangular(
            self.factor.mT, normal[..., None], upper=True
        )[..., 0]
        return (self.mean + variance.sqrt()[:, None] * moved) @ x


def by_linear_regression(bandit: Bandit, seed: int) -> Tensor:
    """Arms of all steps by linear Thompson sampling."""
    horizon, arms = bandit.rewards.shape
    ones = torch.ones(horizon, 1, dtype=torch.float64)
    low, high = bandit.bounds
    scaled = 12**0.5 * (bandit.contexts - (low + high) / 2) / (high - low)
    features = torch.cat([scaled, ones], 1)
    generator = Generator().manual_seed(seed)
    model, taken = LinearArms(features.shape[1], arms), []
    for t in range(horizon):
        if t < bandit.first:
            arm = t % arms
        else:
            arm = int(model.draw(features[t], generator).argmax())
        model.observe(features[t], arm, bandit.rewards[t, arm])
        taken.append(arm)
    return torch.tensor(taken)


def arms_of(method: str, bandit: Bandit, size: Size, seed: int) -> Tensor:
    """The arms that a method takes, T."""
    if method == "uniform":
        horizon, arms = bandit.rewards.shape
        generator = Generator().manual_seed(seed)
        rest = torch.randint(arms, (horizon - bandit.first,), generator=generator)
        return torch.cat([torch.arange(bandit.first) % arms, rest])
    if method == "linear Thompson":
        return by_linear_regression(bandit, seed)
    return by_network(method, bandit, size, seed)


def run(plan: Run, path: Path | None, size: Size) -> Run:
    """One seed of one method: cumulative regret after each tenth step."""
    began = time.process_time()
    bandit = load(plan["problem"], size.horizon, plan["seed"], path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all rewards the same, at first
        taken = arms_of(plan["method"], bandit, size, 10_000 + plan["seed"])
    regret = bandit.regrets.gather(1, taken[:, None])[:, 0].cumsum(0)
    values = [round(v, 4) for v in regret[9::10].tolist()]
    return {"regret": values, "seconds": round(time.process_time() - began, 1)}


def groups(runs: list[Run]) -> dict[str, dict[str, dict[int, Run]]]:
    """By problem, method, seed."""
    found: dict = {}
    for one in runs:
        by_method = found.setdefault(one["problem"], {})
        by_method.setdefault(one["method"], {})[one["seed"]] = one
    return found


def relative(own: dict[int, Run], uniform: dict[int, Run]) -> dict[int, float]:
    """Regret in percent of that of uniform choices, by seed."""
    return {
        seed: 100 * own[seed]["regret"][-1] / uniform[seed]["regret"][-1]
        for seed in own
        if seed in uniform
    }


def print_tables(runs: list[Run]) -> None:
    """Cumulative regret, the same relative to uniform choices, against greedy."""
    for name, by_method in groups(runs).items():
        print(f"\n{NAMES.get(name, name)}; mean ± standard error over seeds\n")
        print(
            "| method | seeds | cumulative regret | % of uniform "
            "| minus greedy's, paired | CPU s |"
        )
        print("|---|---|---|---|---|---|")
        for method in METHODS:
            own = by_method.get(method, {})
            if not own:
                continue
            scaled = relative(own, by_method.get("uniform", {}))
            greedy = relative(by_method.get("greedy", {}), by_method.get("uniform", {}))
            pairs = [scaled[seed] - greedy[seed] for seed in scaled if seed in greedy]
            regrets = [one["regret"][-1] for one in own.values()]
            cells = (
                *(method, str(len(own)), shown(regrets)),
                shown(list(scaled.values())) if scaled else "",
                shown(pairs, sign=True) if pairs and method != "greedy" else "",
                f"{sum(one['seconds'] for one in own.values()) / len(own):.0f}",
            )
            print(f"| {' | '.join(cells)} |")


def draw_figure(runs: list[Run], path: Path) -> None:
    """Cumulative regret over steps, mean and standard error, one panel per problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from gpbridge.plots import COLORS, INK, STYLE

    pyplot.rcParams.update(STYLE)
    looks = {
        "uniform": ("#b8bdc6", ":"),
        "linear Thompson": ("#b8bdc6", "--"),
        "greedy": (INK, "-"),
        "epsilon-greedy": (INK, "--"),
        "linearised": (COLORS[0], "-"),
        "last layer": (COLORS[0], "--"),
        "ensemble": (COLORS[1], "-"),
        "dropout": (COLORS[2], "-"),
        "SGHMC": (COLORS[3], "-"),
    }
    panels = groups(runs)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        *(rows, columns),
        figsize=(4.3 * columns, 3.6 * rows),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (name, by_method) in zip(axes.flat, panels.items(), strict=False):
        for method, (color, line) in looks.items():
            own = by_method.get(method)
            if not own:
                continue
            curves = torch.tensor([one["regret"] for one in own.values()])
            steps = 10 * torch.arange(1, curves.shape[1] + 1)
            mean = curves.mean(0)
            ax.plot(steps, mean, line, color=color, linewidth=1.6, label=method)
            if len(curves) > 1:
                error = curves.std(0) / len(curves) ** 0.5
                band = mean - error, mean + error
                ax.fill_between(steps, *band, color=color, alpha=0.12, linewidth=0)
        ax.set(
            xlabel="step", ylabel="cumulative regret", xlim=(0, None), ylim=(0, None)
        )
        title = NAMES.get(name, name)
        ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
        ax.grid(True)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--save", type=Path, default="bandits.jsonl")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--problems", nargs="+", default=PROBLEMS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(10))
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
    needs_images = {"fashion_mnist", "mnist"}
    plans = [
        dict(zip(KEY, (name, method, seed, options.smoke), strict=True))
        for seed in options.seeds  # so that an early table has all methods
        for name in options.problems
        for method in options.methods
        if path is not None or name not in needs_images
    ]
    size = SMOKE if options.smoke else FULL

    def make(plan: Run) -> Run:
        made = run(plan, path, size)
        print(*plan.values(), made["regret"][-1], f"{made['seconds']} s", flush=True)
        return made

    records.complete(plans, make)


if __name__ == "__main__":
    main()
