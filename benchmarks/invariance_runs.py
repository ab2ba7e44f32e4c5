"""Runs of ``quality_invariance_images.py`` in a file, one per line, and their tables.

In: what a run found, under the key of all that makes it another. Out: the runs of a
file, tables of them.
"""

from __future__ import annotations

import json
import statistics
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

MODELS = ("none", "true", "learnt", "learnt from 60", "Augerino", "Augerino, retrained")
RETRAINED = "learnt, retrained"  # on request
BEST = "learnt, best of both"
COLUMNS = ("accuracy", "nll", "width", "prior", "evidence", "seconds")
TESTS = 2000  # test images, unless said; rows of before do not say
HEAD = attrgetter("set", "images", "samples", "epochs", "tests")  # of a table


class Key(NamedTuple):
    """What makes a run another."""

    set: str
    images: int
    seed: int
    model: str
    samples: int
    epochs: int
    tests: int = TESTS


def saved_runs(path: Path) -> dict[Key, dict[str, Any]]:
    """All runs of a file, one per line."""
    lines = path.read_text().splitlines() if path.exists() else []
    runs = [Key._field_defaults | json.loads(line) for line in lines]
    return {Key(*(run[name] for name in Key._fields)): run for run in runs}


def save_run(path: Path, key: Key, found: dict[str, Any]) -> str:
    """Append a run, and return its line."""
    line = json.dumps(key._asdict() | found)
    with path.open("a") as file:
        file.write(line + "\n")
    return line


def print_tables(path: Path) -> None:
    """Mean and spread over seeds, and paired differences."""
    runs = saved_runs(path)
    for head in sorted({HEAD(key) for key in runs}):
        name, n, samples, epochs, tests = head
        print(
            f"\n### {name}, {n} images turned by up to 90 degrees, {samples} samples, "
            f"{epochs} epochs, {tests} test images\n\n"
            f"| augmentation | seeds | {' | '.join(COLUMNS)} |"
        )
        print("|---" * (2 + len(COLUMNS)) + "|")
        by_model = {
            model: {
                key.seed: run
                for key, run in runs.items()
                if HEAD(key) == head and key.model == model
            }
            for model in (*MODELS, RETRAINED)
        }
        pair = by_model["learnt"], by_model["learnt from 60"]
        by_model[BEST] = {
            seed: max((runs[seed] for runs in pair), key=lambda run: run["evidence"])
            for seed in sorted(pair[0].keys() & pair[1].keys())
        }
        for model, found in by_model.items():
            if found:
                cells = [_moments([r[c] for r in found.values()]) for c in COLUMNS]
                print(f"| {model} | {len(found)} | {' | '.join(cells)} |")
        print()
        for mine in ("learnt", "learnt from 60", BEST, RETRAINED):
            for other in ("none", "true", "Augerino, retrained"):
                both = sorted(by_model[mine].keys() & by_model[other].keys())
                if both:
                    _print_difference(mine, by_model[mine], other, by_model[other])


def _print_difference(mine: str, ours: dict, other: str, theirs: dict) -> None:
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    gain = _moments([100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs])
    nats = _moments([a["nll"] - b["nll"] for a, b in pairs])
    print(f"* {mine} minus {other}: accuracy {gain} points, NLL {nats}")


def _moments(values: list[float | None]) -> str:
    if any(value is None for value in values):
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
