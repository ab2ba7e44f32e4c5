"""Fair ratios: interleaved CPU times of two sides, and peak memory of a fresh process.

In: pairs of callables that do the same work. Out: rows of a table with medians, the
ratio peer / ours and its spread over rounds. Every script here prints such a table.
"""

from __future__ import annotations

import gc
import math
import re
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

Task = Callable[[], object]


class Row(NamedTuple):
    """One comparison. ``ratio`` is peer / ours: above 1, ours is faster or smaller."""

    work: str
    peer: str
    ours: str
    theirs: str
    ratio: float
    spread: tuple[float, float]
    target: float | None


class Memory(NamedTuple):
    """Peak resident bytes of a fresh process and their growth during the work."""

    peak: int
    growth: int
    seconds: float
    failure: str | None


def one_thread() -> None:
    """Restrict torch to one thread and silence the peers' import warnings."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def seconds(task: Task) -> float:
    """CPU seconds of this process for one call, free of other processes' load."""
    gc.collect()
    start = time.process_time()
    task()
    return time.process_time() - start


def interleave(tasks: dict[str, Task], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of every task, round robin, after one warm-up call of each.

    A slow minute of the machine then falls on all tasks alike. Tasks whose warm-up
    call took more than 20 s are repeated twice at most.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    limit = {
        name: min(repeats, 2) if seconds(task) > 20 else repeats
        for name, task in tasks.items()
    }
    for count in range(repeats):
        for name, task in tasks.items():
            if count < limit[name]:
                times[name].append(seconds(task))
    return times


def compare(
    work: str,
    peer: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    target: float | None = None,
    scale: float = 1.0,
) -> Row:
    """A row from the times of two sides; ratios are paired by round.

    ``scale`` multiplies the peer's times, where it was run for fewer steps.
    """
    theirs = [scale * time for time in theirs]
    ratios = [b / a for a, b in zip(ours, theirs, strict=False)]
    ratio = statistics.median(theirs) / statistics.median(ours)
    shown = (show_seconds(statistics.median(side)) for side in (ours, theirs))
    return Row(work, peer, *shown, ratio, (min(ratios), max(ratios)), target)


def compare_memory(
    work: str, peer: str, ours: Memory, theirs: Memory, target: float | None = None
) -> Row:
    """A row from two peaks; a peer that ran out of memory is shown as such."""
    failed = ours.failure is not None or theirs.failure is not None
    ratio = float("nan") if failed else theirs.peak / ours.peak
    return Row(
        work,
        peer,
        show_memory(ours),
        show_memory(theirs),
        ratio,
        (ratio, ratio),
        target,
    )


def show_seconds(value: float) -> str:
    """Seconds with three digits, in a unit that suits them."""
    if value >= 1:
        return f"{value:.3g} s"
    return f"{1e3 * value:.3g} ms"


def show_memory(memory: Memory) -> str:
    """The peak of a process, or why it died."""
    if memory.failure is not None:
        return memory.failure
    return f"{memory.peak / 2**30:.2f} GiB (+{memory.growth / 2**20:.0f} MiB)"


def print_rows(title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
    """Print rows as a Markdown table, with the ratio that the project aims at."""
    print(f"\n### {title}\n")
    print("| work | against | ours | peer | ratio | spread | target | reached |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        target = "" if row.target is None else f"{row.target:g}x"
        shown = (f"{row.ratio:.3g}x", f"{row.spread[0]:.3g} to {row.spread[1]:.3g}")
        if math.isnan(row.ratio):  # a side without an answer
            shown = ("", "")
        reached = (
            "" if row.target is None else "yes" if row.ratio >= row.target else "no"
        )
        print(
            f"| {row.work} | {row.peer} | {row.ours} | {row.theirs} | {shown[0]} "
            f"| {shown[1]} | {target} | {reached} |"
        )
    for note in notes:
        print(f"\n{note}")


def peak_memory(
    function: Callable[..., object], *arguments: object, limit: int | None = None
) -> Memory:
    """Run a module-level function in a fresh process and measure its resident peak.

    ``limit`` bounds the address space in bytes: a greedy peer then fails by itself
    instead of driving the machine into swap. Needs Linux.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        future = pool.submit(_measured, function, arguments, limit)
        try:
            return future.result()
        except BrokenProcessPool:
            return Memory(0, 0, float("nan"), "killed")


def _measured(
    function: Callable[..., object], arguments: Sequence[object], limit: int | None
) -> Memory:
    one_thread()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, start = _resident("VmRSS"), time.process_time()
    failure = None
    try:
        function(*arguments)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        failure = f"out of memory at {(limit or 0) / 2**30:.0f} GiB"
    peak = _resident("VmHWM")
    return Memory(peak, peak - before, time.process_time() - start, failure)


def _resident(field: str) -> int:
    """Bytes from the kernel's table; ru_maxrss would include the parent's peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}; run this on Linux.")
    return int(found.group(1)) * 1024
