"""Runs of the study, one line of a file each, in an order that completes seeds.

A line holds a run's names, its settings, the outcomes of every experiment and the
seconds of every iteration. A run is decided by its names and settings alone, so that a
study which was interrupted goes on as if it had not been. A fit or a proposal that
fails is noted, and a random experiment takes its place; nothing is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from bayesopt.methods import (
    DESIGNS,
    GP,
    OTHERS,
    SHORTLIST,
    Settings,
    propose,
    surrogate,
)
from bayesopt.problems import PROBLEMS, Problem, problem

WITH_ALL_METHODS = ("branin", "hartmann6", "network10")
WITH_DENSE = "curve64"  # where the shortlist is also run without convolutions
VERSION = 2  # of what a run does; raise it when that changes


class Run(NamedTuple):
    """What decides a run, beside the settings."""

    problem: str
    method: str
    acquisition: str  # "improvement", "thompson", or "none" of a design
    seed: int


def plan(
    parts: Iterable[str], seeds: Iterable[int], problems: Iterable[str] | None = None
) -> Iterator[Run]:
    """All runs of the parts named, seed by seed.

    Args:
        parts: ``"shortlist"``, with the baselines; ``"others"``; ``"thompson"``;
            ``"dense"``.
        seeds: In this order.
        problems: Default all.
    """
    chosen = tuple(PROBLEMS) if problems is None else tuple(problems)
    parts = tuple(parts)
    for seed in seeds:
        for name in chosen:
            if "shortlist" in parts:
                for method in DESIGNS:
                    yield Run(name, method, "none", seed)
                for method in (GP, *SHORTLIST):
                    yield Run(name, method, "improvement", seed)
            if "dense" in parts and name == WITH_DENSE:
                for method in SHORTLIST:
                    yield Run(name, f"{method} (dense)", "improvement", seed)
            if "thompson" in parts and problem(name).ref_point is None:
                for method in (GP, *SHORTLIST):
                    yield Run(name, method, "thompson", seed)
            if "others" in parts and name in WITH_ALL_METHODS:
                for method in OTHERS:
                    yield Run(name, method, "improvement", seed)


def initial_design(target: Problem, seed: int, more: int = 0) -> Tensor:
    """The design that every method of a seed starts from, and how it would go on."""
    engine = SobolEngine(target.dim, scramble=True, seed=seed)
    U = engine.draw(target.num_initial + more, dtype=torch.float64)
    return target.to_inputs(U)


def settings_key(run: Run, settings: Settings) -> str:
    """Of all that decides the outcomes of a run and is not in its names."""
    target = problem(run.problem)
    decides = [VERSION, asdict(settings), target.num_iterations, target.batch_size]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]


def execute(run: Run, settings: Settings) -> dict:
    """One run, from the initial design to the last experiment."""
    target = problem(run.problem)
    iterations = settings.iterations or target.num_iterations
    budget = iterations * target.batch_size
    first = initial_design(target, run.seed, budget)
    X, rest = first[: target.num_initial], first[target.num_initial :]
    generator = torch.Generator().manual_seed(run.seed)
    spare = target.to_inputs(torch.rand(rest.shape, generator=generator).to(rest))
    Y = target.evaluate(X)
    wall, cpu, failures = [], [], []
    if run.method in DESIGNS:
        X = torch.cat([X, rest if run.method == "Sobol" else spare])
        Y = target.evaluate(X)
        iterations = 0
    fitter = surrogate(run.method, settings, run.seed) if iterations else None
    model = None
    for i in range(iterations):
        started, cpu_started = time.perf_counter(), time.thread_time()
        seed = 1_000 * run.seed + i
        try:
            chosen, model, notes = propose(
                *(target, fitter, run.acquisition, X, Y, model, settings, seed)
            )
            failures += [{"iteration": i, "note": note} for note in notes]
            if not bool(chosen.isfinite().all()):
                raise ValueError("the experiment proposed is not finite")
        except (RuntimeError, ValueError, ArithmeticError) as error:
            text = f"{type(error).__name__}: {error}"[:500]
            failures.append({"iteration": i, "random_instead": text})
            q = target.batch_size
            chosen = spare[i * q : (i + 1) * q]
        wall.append(time.perf_counter() - started)
        cpu.append(time.thread_time() - cpu_started)
        X = torch.cat([X, chosen.detach()])
        Y = torch.cat([Y, target.evaluate(chosen.detach())])
    return {
        **run._asdict(),
        "key": settings_key(run, settings),
        "num_initial": target.num_initial,
        "batch_size": target.batch_size,
        "values": Y.tolist(),
        "failures": failures,
        "seconds": wall,
        "cpu_seconds": cpu,
    }


def read(path: Path) -> list[dict]:
    """The finished runs of a file; a last line that was cut off is none."""
    if not path.exists():
        return []
    text = path.read_text()
    lines = text.split("\n")[: text.count("\n")]
    return [json.loads(line) for line in lines]


def append(path: Path, result: dict) -> None:
    """One line, at once, after whatever an interruption left of the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(result) + "\n"
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(max(0, end - 2**20))
            tail = file.read()
            file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def identity(line: dict) -> tuple:
    """What two lines of the same run have in common."""
    return (*(line[name] for name in Run._fields), line["key"])


def study(
    path: Path, runs: Iterable[Run], settings: Settings, at_most: int | None = None
) -> int:
    """Do the runs that a file does not hold yet.

    Args:
        path: Of the results.
        runs: In this order.
        settings: Of all.
        at_most: Stop after so many.

    Returns:
        How many were done.
    """
    done = {identity(line) for line in read(path)}
    count = 0
    for run in runs:
        if (*run, settings_key(run, settings)) in done:
            continue
        if count == at_most:
            break
        started = time.perf_counter()
        result = execute(run, settings)
        append(path, result)
        count += 1
        best = float(
            problem(run.problem).score(torch.tensor(result["values"]).double())[-1]
        )
        print(
            f"{run.problem} {run.method} {run.acquisition} seed {run.seed}: "
            f"{best:.5g} of {problem(run.problem).optimum:.5g}, "
            f"{len(result['failures'])} notes, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
    return count
