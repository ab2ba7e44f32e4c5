"""Figures and the table of the study, from its file of results.

Regret is the optimum minus the best value, or hypervolume, so far. The table has its
decimal logarithm at the end, averaged over seeds, because regrets of several orders of
magnitude have no useful mean. Differences to ``SingleTaskGP`` are between runs of the
same seed, with 95% intervals of Student's t; below zero is better. Ranks are of final
regrets among the baselines and the shortlist, over the seeds that all of them have; any
other method is ranked as if it alone had joined them. Where a method has fewer seeds
than others its number is printed.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bayesopt.methods import DESIGNS, GP, OTHERS, SHORTLIST
from bayesopt.problems import PROBLEMS, Problem, problem
from bayesopt.study import Run

FLOOR = 1e-6  # of regrets, relative to the scale of the problem: rounding of optima
ORDER = (*DESIGNS, GP, *SHORTLIST, *OTHERS)
MAIN = [name.removesuffix("Surrogate") for name in (*DESIGNS, GP, *SHORTLIST)]
T_975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Curve(NamedTuple):
    """The regret of one run after each iteration, and what it cost."""

    regret: Tensor
    seconds: float | None
    failures: int


class Estimate(NamedTuple):
    """A mean over seeds with its standard error, not known of one seed."""

    mean: float
    error: float | None
    count: int

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {self.error:.2f}"


def label(run: Run) -> str:
    """The name of a method in figures and tables."""
    name = run.method.removesuffix("Surrogate").replace("Surrogate ", " ")
    return f"{name}, Thompson" if run.acquisition == "thompson" else name


def curve(target: Problem, line: dict) -> Curve:
    """The regret of one line of the file."""
    Y = torch.tensor(line["values"], dtype=torch.float64)
    score = target.score(Y)[line["num_initial"] - 1 :: line["batch_size"]]
    regret = (target.optimum - score).clamp_min(FLOOR * max(1.0, abs(target.optimum)))
    cpu = line["cpu_seconds"]
    replaced = sum("random_instead" in failure for failure in line["failures"])
    return Curve(regret, statistics.mean(cpu) if cpu else None, replaced)


Curves = dict[str, dict[str, dict[int, Curve]]]


def curves(lines: Iterable[dict]) -> Curves:
    """Runs by problem, label and seed; of several versions of one the last."""
    found: Curves = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        run = Run(*(line[name] for name in Run._fields))
        found[run.problem][label(run)][run.seed] = curve(problem(run.problem), line)
    return {
        name: {key: found[name][key] for key in sorted(found[name], key=_place)}
        for name in PROBLEMS
        if name in found
    }


def _place(name: str) -> tuple[bool, int, str]:
    method = name.removesuffix(", Thompson").removesuffix(" (dense)")
    order = [each.removesuffix("Surrogate") for each in ORDER]
    return ", Thompson" in name, order.index(method), name


def estimate(values: list[float]) -> Estimate:
    """Mean and standard error."""
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(statistics.mean(values), error, n)


def interval(values: list[float]) -> tuple[float, float] | None:
    """95% of Student's t for the mean; none of fewer than two values."""
    if len(values) < 2:
        return None
    centre = estimate(values)
    degrees = len(values) - 1
    quantile = T_975[degrees - 1] if degrees <= len(T_975) else 1.96 + 2.4 / degrees
    return centre.mean - quantile * centre.error, centre.mean + quantile * centre.error


def final(runs: dict[int, Curve]) -> dict[int, float]:
    """Decimal logarithm of the last regret by seed."""
    return {seed: math.log10(float(run.regret[-1])) for seed, run in runs.items()}


def differences(runs: dict[int, Curve], others: dict[int, Curve]) -> list[float]:
    """Of final log regrets, over the seeds that both have."""
    ours, theirs = final(runs), final(others)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def ranks(methods: dict[str, dict[int, Curve]]) -> dict[str, list[float]]:
    """Of the final regret among all methods, for each seed that all of them have."""
    seeds = set.intersection(*(set(runs) for runs in methods.values()))
    found: dict[str, list[float]] = {name: [] for name in methods}
    for seed in sorted(seeds):
        ends = {name: final(runs)[seed] for name, runs in methods.items()}
        for name, end in ends.items():
            below = sum(other < end for other in ends.values())
            ties = sum(other == end for other in ends.values())
            found[name].append(below + (ties + 1) / 2)
    return found


def ranks_of_all(methods: dict[str, dict[int, Curve]]) -> dict[str, list[float]]:
    """Ranks among baselines and shortlist; others as if each alone had joined them."""
    main = {name: runs for name, runs in methods.items() if name in MAIN}
    found = ranks(main) if main else {}
    for name, runs in methods.items():
        if name not in main:
            found[name] = ranks(main | {name: runs})[name]
    return found


def table(found: Curves) -> str:
    """All problems, a block of rows each, in Markdown."""
    rows = [
        "| problem | method | log10 regret | minus SingleTaskGP [95%] | rank | "
        "CPU s per iteration | seeds | random instead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, methods in found.items():
        target, gaussian = problem(name), methods.get(GP, {})
        placed = ranks_of_all(methods)
        for i, (method, runs) in enumerate(methods.items()):
            off = differences(runs, gaussian)
            versus = ""
            if method != GP and off:
                versus = f"{statistics.mean(off):+.2f}"
                bounds = interval(off)
                if bounds is not None:
                    versus += f" [{bounds[0]:+.2f}, {bounds[1]:+.2f}]"
                    if bounds[0] > 0 or bounds[1] < 0:
                        versus = f"**{versus}**"
            rank = f"{statistics.mean(placed[method]):.1f}" if placed[method] else ""
            costs = [run.seconds for run in runs.values() if run.seconds is not None]
            cost = f"{statistics.mean(costs):.2f}" if costs else ""
            title = target.title if i == 0 else ""
            failures = sum(run.failures for run in runs.values())
            rows.append(
                f"| {title} | {method} | {estimate(list(final(runs).values()))} | "
                f"{versus} | {rank} | {cost} | {len(runs)} | {failures or ''} |"
            )
    return "\n".join(rows)


def verdicts(found: Curves) -> str:
    """For each problem who wins, and who is not told apart from the winner."""
    rows = ["| problem | smooth | best mean | not told apart from it | not better than "
            "random |", "|---|---|---|---|---|"]  # fmt: skip
    for name, methods in found.items():
        means = {m: statistics.mean(final(r).values()) for m, r in methods.items()}
        best = min(means, key=means.get)
        close, poor = [], []
        for method, runs in methods.items():
            bounds = interval(differences(runs, methods[best]))
            if method != best and (bounds is None or bounds[0] <= 0):
                close.append(method)
            against = interval(differences(runs, methods.get("random", {})))
            if method not in DESIGNS and (against is None or against[1] >= 0):
                poor.append(method)
        smooth = "yes" if problem(name).smooth else "no"
        rows.append(
            f"| {problem(name).title} | {smooth} | {best} | "
            f"{', '.join(close) or 'none'} | {', '.join(poor) or 'none'} |"
        )
    return "\n".join(rows)


def aggregate(found: Curves) -> str:
    """Mean rank over problems of the methods that ran on all, and wins against the GP.

    Ranks are of each seed, among those methods only.
    """
    everywhere = set.intersection(*(set(methods) for methods in found.values()))
    named = sorted(everywhere, key=_place)
    chosen = {
        name: ranks({m: methods[m] for m in named}) for name, methods in found.items()
    }
    rows = ["| method | mean rank | better than SingleTaskGP | worse | problems |",
            "|---|---|---|---|---|"]  # fmt: skip
    for method in named:
        means = [statistics.mean(r[method]) for r in chosen.values() if r[method]]
        better = worse = 0
        for methods in found.values():
            bounds = interval(differences(methods[method], methods.get(GP, {})))
            better += bounds is not None and bounds[1] < 0
            worse += bounds is not None and bounds[0] > 0
        rank = str(estimate(means)) if means else ""
        rows.append(f"| {method} | {rank} | {better} | {worse} | {len(means)} |")
    return "\n".join(rows)


def draw(name: str, methods: dict[str, dict[int, Curve]], folder: Path) -> Path:
    """One figure: regrets, ranks and time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    from gpbridge.plots import COLORS, INK, STYLE

    target = problem(name)
    shown = [m for m in methods if m.split(",")[0].removesuffix(" (dense)") in MAIN]
    pyplot.rcParams.update(STYLE)
    figure, (left, middle, right) = pyplot.subplots(
        *(1, 3),
        figsize=(11.5, 4.0),
        width_ratios=(3, 1.2, 1.2),
        layout="constrained",
    )
    colors = {"random": "#9aa1ad", "Sobol": "#c2c7d0", GP: INK}
    palette = iter(COLORS)
    styles = {}
    for method in methods:
        base = method.split(",")[0].removesuffix(" (dense)")
        if base not in colors:
            colors[base] = next(palette, "#777777")
        styles[method] = (colors[base], "-" if method == base else "--")
    least = min(len(methods[m]) for m in shown)
    for method in shown:
        runs = methods[method].values()
        length = min(len(run.regret) for run in runs)
        logs = torch.stack([run.regret[:length].log10() for run in runs])
        x = target.num_initial + target.batch_size * torch.arange(length)
        color, style = styles[method]
        few = f" ({len(runs)} seeds)" if len(runs) != least else ""
        mean = logs.mean(0)
        left.plot(x, mean, style, color=color, linewidth=1.8, label=method + few)
        if len(runs) > 1:
            error = logs.std(0) / len(runs) ** 0.5
            left.fill_between(x, mean - error, mean + error, color=color, alpha=0.12,
                              linewidth=0)  # fmt: skip
    volume = target.ref_point is not None
    what = "hypervolume difference" if volume else "regret"
    left.set(xlabel="experiments", ylabel=f"log10 {what}, mean ± standard error")
    title = f"{target.title}, {least} seed{'s' * (least > 1)}"
    left.set_title(title, loc="left", fontweight="bold", fontsize=11)
    left.legend(frameon=False, fontsize=7.5, ncols=2)
    left.grid(True)
    placed, order = ranks_of_all(methods), list(methods)[::-1]
    for i, method in enumerate(order):
        color = styles[method][0]
        alpha = 0.5 if styles[method][1] == "--" else 1.0
        if placed[method]:
            width = statistics.mean(placed[method])
            middle.barh(i, width, color=color, alpha=alpha)
        costs = [r.seconds for r in methods[method].values() if r.seconds is not None]
        if costs:
            right.barh(i, statistics.mean(costs), color=color, alpha=alpha)
    middle.set_yticks(range(len(order)), order, fontsize=7.5)
    middle.set_xlabel("mean rank of the final regret")
    right.set_yticks(range(len(order)), [""] * len(order))
    right.set(xlabel="CPU seconds per iteration")
    for ax in (middle, right):
        ax.set_ylim(-0.6, len(order) - 0.4)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bayesopt_{name}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    return path


def write(lines: list[dict], folder: Path) -> None:
    """Print the tables, save a figure for each problem."""
    lines = one_setting(lines)
    found = curves(lines)
    if not found:
        print("No finished run in the file: call `run` first.")
        return
    print(table(found), aggregate(found), verdicts(found), sep="\n\n")
    for name, methods in found.items():
        print(f"figure: {draw(name, methods, folder)}")


def one_setting(lines: list[dict]) -> list[dict]:
    """The lines whose settings are those of the last line of their problem."""
    last = {line["problem"]: line["key"] for line in lines}
    kept = [line for line in lines if line["key"] == last[line["problem"]]]
    if len(kept) < len(lines):
        print(f"{len(lines) - len(kept)} runs of other settings are left out.\n")
    return kept
