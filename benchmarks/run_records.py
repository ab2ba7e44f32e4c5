"""Runs of a study, one JSON line each: what is there is not run again.

In: a file, and what identifies a run. Out: the runs. A line is appended at once, and a
line that an interruption cut off does not count. Next: the studies that last hours.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]


class Records:
    """The file of one study.

    Args:
        path: Of the file; it and its folder are made when the first run is added.
        key: The entries that identify a run.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self.key = Path(path), tuple(key)

    def runs(self) -> dict[tuple, Run]:
        """What is there, by key."""
        if not self.path.exists():
            return {}
        found = {}
        for line in self.path.read_text().split("\n"):
            try:
                run = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off, or empty
            found[self._key(run)] = run
        return found

    def add(self, run: Run) -> None:
        """Append a run by one write, on a line of its own."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            cut_off = False
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                cut_off = file.read(1) != b"\n"
            line = ("\n" if cut_off else "") + json.dumps(run) + "\n"
            os.write(file.fileno(), line.encode())

    def complete(self, planned: Iterable[Run], make: Callable[[Run], Run]) -> list[Run]:
        """All planned runs in their order, of which the missing ones are made."""
        found = self.runs()
        result = []
        for plan in planned:
            if self._key(plan) not in found:
                run = {**plan, **make(plan)}
                self.add(run)
                found[self._key(plan)] = run
            result.append(found[self._key(plan)])
        return result

    def _key(self, run: Run) -> tuple:
        return tuple(run[name] for name in self.key)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, NaN for one value."""
    if len(values) < 2:
        return float(values[0]), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], digits: int = 1, sign: bool = False) -> str:
    """Mean ± standard error."""
    mean, error = mean_and_error(values)
    plus = "+" if sign else ""
    if math.isnan(error):
        return f"{mean:{plus}.{digits}f}"
    return f"{mean:{plus}.{digits}f} ± {error:.{digits}f}"
