"""How many episodes does a learner need to swing up a pendulum, and a cart-pole?

A learner sees one second of random actions, fits the dynamics, and from then on plans:
at each step the actions of the largest return over a horizon are found by the
cross-entropy method, and the first is applied. After each episode it fits again. (From
five seconds of random actions, tried for one seed of the pendulum with the GP, one to
two episodes were enough for every planner, the fewest with the mean.) States
are seen with noise of standard deviation 0.01. An episode is solved if the reward is at
least 0.85 of its maximum in the mean over the last second, for which the pole has to
stand, though it may sway; the run ends there.

Planners differ in what they take for the dynamics, with the same candidates otherwise:

* ``draws``: functions of the posterior, frozen for the episode; a particle follows one
* ``one draw``: one such function, another in each episode (Thompson sampling)
* ``mean``: the mean of the posterior, without uncertainty

Beside them stand random actions and the true dynamics. Each run is one line of JSON in
the results file; those that are there are not run again. Run with ``python
benchmarks/quality_control.py --results FILE``; the same with ``--report`` prints tables
and saves the figure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import timing
import torch
from control_models import MODELS
from control_systems import SYSTEMS, System, TrueDynamics, advance
from torch import Generator, Tensor

from gpbridge.acquisition import plan_actions
from gpbridge.types import FunctionDraws

NOISE = 0.01  # standard deviation of seen states
LAST, ENOUGH = 10, 0.85  # steps at the end, and their mean reward, if solved
PLANNERS = ("draws", "one draw", "mean")
KEY = ("system", "model", "planner", "seed")


class Sizes(NamedTuple):
    """What ``--smoke`` makes small."""

    episodes: int = 8
    particles: int = 10
    candidates: int = 48
    elites: int = 8
    rounds: int = 2
    first_steps: int = 10
    steps: int | None = None  # of an episode; default the system's
    horizon: int | None = None


SMOKE = Sizes(1, 2, 4, 2, 1, 10, 10, 2)


class Run(NamedTuple):
    """What tells a run from others."""

    system: str
    model: str
    planner: str
    seed: int


class Episode(NamedTuple):
    """What happened: states ``(T + 1) x d`` as they were and as they were seen."""

    states: Tensor
    seen: Tensor
    actions: Tensor


def seeded(*parts: int) -> Generator:
    """A generator of its own for each purpose, so that runs of a seed are paired."""
    seed = 0
    for part in parts:
        seed = 1000 * seed + part
    return torch.Generator().manual_seed(seed)


def play(
    system: System,
    draws: FunctionDraws | None,
    sizes: Sizes,
    steps: int,
    generator: Generator,
) -> Episode:
    """One episode, by random actions without draws."""
    bounds = system.limit * torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    is_true = isinstance(draws, TrueDynamics)

    def value(states: Tensor, actions: Tensor) -> Tensor:
        return system.reward(states[..., 1:, :]).sum(-1)

    def look(state: Tensor) -> Tensor:
        noise = torch.randn(state.shape, generator=generator, dtype=state.dtype)
        return state + NOISE * noise

    state, start = system.start, None
    states, seen, actions = [state], [look(state)], []
    for _ in range(steps):
        if draws is None:
            share = torch.rand(1, generator=generator, dtype=torch.float64)
            action = bounds[0] + share * (bounds[1] - bounds[0])
        else:
            plan = plan_actions(
                draws,
                value,
                seen[-1],
                sizes.horizon or system.horizon,
                bounds,
                encode=None if is_true else system.encode,
                start=start,
                candidates=sizes.candidates,
                elites=sizes.elites,
                rounds=sizes.rounds,
                smoothness=0.3,
                generator=generator,
            )
            action = plan.actions[0]
            start = torch.cat([plan.actions[1:], 0 * plan.actions[-1:]])
        state = advance(system, state, action)
        states.append(state)
        seen.append(look(state))
        actions.append(action)
    return Episode(*(torch.stack(part) for part in (states, seen, actions)))


def do(run: Run, sizes: Sizes) -> dict[str, Any]:
    """Learn until an episode is solved, or all are over."""
    begin = time.process_time()
    system, number = SYSTEMS[run.system], list(SYSTEMS).index(run.system)
    generator, steps = seeded(1, number, run.seed), sizes.steps or system.episode
    played = [play(system, None, sizes, sizes.first_steps, generator)]
    returns, solved, fitting = [], None, 0.0
    for episode in range(1, sizes.episodes + 1):
        generator = seeded(2, number, run.seed, episode)
        draws = None
        if run.model == "true dynamics":
            draws = TrueDynamics(system)
        elif run.model != "none":
            before = time.process_time()
            draws = learnt(run, system, played, sizes, generator)
            fitting += time.process_time() - before
        latest = play(system, draws, sizes, steps, generator)
        played.append(latest)
        rewards = system.reward(latest.states[1:])
        returns.append(rewards.sum().item())
        if rewards[-LAST:].mean() >= ENOUGH:
            solved = episode
            break
    return {
        **run._asdict(),
        "solved": solved,
        "episodes": sizes.episodes,
        "returns": returns,
        "cpu_seconds": time.process_time() - begin,
        "fitting_seconds": fitting,
    }


def learnt(
    run: Run,
    system: System,
    played: list[Episode],
    sizes: Sizes,
    generator: Generator,
) -> FunctionDraws:
    """The dynamics as the planner takes them, from all that was seen."""
    X = torch.cat(
        [torch.cat([system.encode(e.seen[:-1]), e.actions], -1) for e in played]
    )
    Y = torch.cat([e.seen[1:] - e.seen[:-1] for e in played])
    kind = MODELS[run.model]
    model = kind.fit(X, Y, run.seed)
    if run.planner == "mean":
        return kind.mean(model)
    return kind.draw(model, sizes.particles if run.planner == "draws" else 1, generator)


def all_runs(seeds: int) -> Iterator[Run]:
    """Seeds outermost: what is there at any time is balanced."""
    for seed in range(seeds):
        for system in SYSTEMS:
            yield Run(system, "none", "random", seed)
            yield Run(system, "true dynamics", "mean", seed)
            for model in MODELS:
                for planner in PLANNERS:
                    yield Run(system, model, planner, seed)


def read(path: Path) -> list[dict[str, Any]]:
    """Finished runs; a line that was cut off by an interruption does not count."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def study(path: Path, seeds: int, sizes: Sizes) -> None:
    """Run what is not in the results file yet."""
    done = {Run(*(record[key] for key in KEY)) for record in read(path)}
    path.parent.mkdir(parents=True, exist_ok=True)
    for run in all_runs(seeds):
        if run in done:
            continue
        record = do(run, sizes)
        cut_off = path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
        with path.open("a") as file:
            file.write("\n" * cut_off + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(*run, f"solved {record['solved']}, {record['cpu_seconds']:.0f} s")


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0
    return statistics.mean(values), error


def counted(record: dict[str, Any]) -> int:
    """Episodes until solved; one more than there were, if never."""
    return record["solved"] or record["episodes"] + 1


def grouped(records: list[dict[str, Any]]) -> dict[tuple, dict[int, dict]]:
    """Records by (system, model, planner), then by seed."""
    groups: dict[tuple, dict[int, dict]] = {}
    for record in records:
        key = tuple(record[name] for name in KEY[:3])
        groups.setdefault(key, {})[record["seed"]] = record
    return groups


def print_tables(records: list[dict[str, Any]]) -> None:
    """Episodes to solve, and paired differences to planning on the mean."""
    groups = grouped(records)
    print("| system | model | planner | solved | episodes | first return | CPU s |")
    print("|" + "---|" * 7)
    for key, runs in groups.items():
        rows = list(runs.values())
        mean, error = mean_and_error([counted(row) for row in rows])
        first, spread = mean_and_error([row["returns"][0] for row in rows])
        seconds = statistics.mean(row["cpu_seconds"] for row in rows)
        share = f"{sum(row['solved'] is not None for row in rows)} of {len(rows)}"
        print(
            f"| {' | '.join(key)} | {share} | {mean:.1f} ± {error:.1f} "
            f"| {first:.1f} ± {spread:.1f} | {seconds:.0f} |"
        )
    print("\n| system | model | planner | episodes more than with the mean, paired |")
    print("|" + "---|" * 4)
    for (system, model, planner), runs in groups.items():
        base = groups.get((system, model, "mean"), {})
        pairs = sorted(runs.keys() & base.keys())
        if planner not in PLANNERS[:2] or not pairs:
            continue
        mean, error = mean_and_error(
            [counted(runs[seed]) - counted(base[seed]) for seed in pairs]
        )
        print(f"| {system} | {model} | {planner} | {mean:+.1f} ± {error:.1f} |")


def save_figure(records: list[dict[str, Any]], path: Path) -> None:
    """The share of seeds that are solved after each number of episodes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from gpbridge.plots import COLORS, INK, STYLE

    pyplot.rcParams.update(STYLE)
    groups, width = grouped(records), len(MODELS)
    figure, axes = pyplot.subplots(
        len(SYSTEMS),
        width,
        figsize=(9.5, 6),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    looks = {"draws": (COLORS[0], "-"), "one draw": (COLORS[2], "-")}
    looks |= {"mean": (COLORS[1], "--")}
    for row, system in zip(axes, SYSTEMS, strict=True):
        for axis, model in zip(row, MODELS, strict=True):
            lines = [(model, name, name, *looks[name]) for name in PLANNERS]
            lines += [("true dynamics", "mean", "true dynamics", INK, ":")]
            lines += [("none", "random", "random", "#b8bdc6", "-")]
            for offset, (key, planner, label, color, dashes) in enumerate(lines):
                runs = groups.get((system, key, planner), {})
                if not runs:
                    continue
                last = max(run["episodes"] for run in runs.values())
                shares = [
                    100
                    * statistics.mean(counted(run) <= after for run in runs.values())
                    for after in range(last + 1)
                ]
                axis.step(
                    range(last + 1),
                    [share - 0.7 * offset for share in shares],
                    where="post",
                    color=color,
                    linestyle=dashes,
                    linewidth=1.8,
                    label=label,
                )
            title = f"{system}, {model}"
            axis.set_title(title, loc="left", fontweight="bold", fontsize=10)
            axis.set_ylim(-6, 104)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(True)
        row[0].set_ylabel("% of seeds solved")
    for axis in axes[-1]:
        axis.set_xlabel("episodes after a second of random actions")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"figure: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("control.jsonl"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--report", action="store_true", help="tables and the figure")
    folder = Path(__file__).parent / "figures"
    parser.add_argument("--figures", type=Path, default=folder)
    given = parser.parse_args()
    timing.one_thread()
    if given.report:
        records = read(given.results)
        print_tables(records)
        save_figure(records, given.figures / "quality_control.png")
    else:
        study(given.results, given.seeds, SMOKE if given.smoke else Sizes())


if __name__ == "__main__":
    main()
