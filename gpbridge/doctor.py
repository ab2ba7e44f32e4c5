"""What a bug report needs: run ``python -m gpbridge.doctor``.

In: this machine. Out: versions beside the ranges that gpbridge asks for, the numerical
settings that importing botorch changes for the whole process, threads, devices, free
memory, and problems with their remedy. The exit status is 1 if there is a problem.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import botorch  # noqa: F401  changes the settings that are reported below
import gpytorch
import linear_operator
import torch

from gpbridge._version import __version__

CORE = ("torch", "gpytorch", "linear-operator", "botorch", "numpy", "tqdm")
OPTIONAL = ("scipy", "scikit-learn", "matplotlib", "curvlinops-for-pytorch")


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def required_ranges() -> dict[str, str]:
    """Version ranges by distribution; empty in a checkout that was not installed."""
    try:
        lines = metadata.requires("gpbridge") or []
    except metadata.PackageNotFoundError:
        return {}
    parts = (re.match(r"([\w.-]+)\s*([^;]*)", line).groups() for line in lines)
    return {name.lower(): found.strip() for name, found in parts}


def import_failure(module: str) -> str | None:
    """Last line of the error when a module that is installed cannot be imported.

    The import runs in a process of its own: a broken compiled extension must not take
    this one down.

    Args:
        module: Top-level name of a module.

    Returns:
        The error, or None if the module is absent or imports.
    """
    if importlib.util.find_spec(module) is None:
        return None
    attempt = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if attempt.returncode == 0:
        return None
    lines = attempt.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {attempt.returncode}"


def numerical_settings() -> dict[str, object]:
    """Settings of linear_operator and gpytorch that decide between exact and not."""
    settings = linear_operator.settings
    fast = settings.fast_computations
    return {
        "max_cholesky_size": settings.max_cholesky_size.value(),
        "cholesky_max_tries": settings.cholesky_max_tries.value(),
        "cholesky_jitter (float64)": settings.cholesky_jitter.value(torch.float64),
        "max_eager_kernel_size": gpytorch.settings.max_eager_kernel_size.value(),
        "fast covar_root_decomposition": fast.covar_root_decomposition.on(),
        "fast log_prob": fast.log_prob.on(),
        "fast solves": fast.solves.on(),
    }


def available_memory() -> int | None:
    """Bytes free without swap, a container's limit included; None if unknown."""
    limits = []
    table = _read("/proc/meminfo")
    if match := re.search(r"MemAvailable:\s+(\d+) kB", table):
        limits.append(1024 * int(match[1]))
    # The root group of a container: version 2 of control groups, then version 1.
    for folder, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        values = _read(f"{folder}/{limit}"), _read(f"{folder}/{usage}")
        if all(value.isdigit() for value in values):
            limits.append(max(0, int(values[0]) - int(values[1])))
    return min(limits, default=None)


def devices() -> list[str]:
    """Devices that torch can use, with free memory where it is known."""
    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            f"cuda:{index} {torch.cuda.get_device_name(index)}, "
            f"{_gibibytes(free)} of {_gibibytes(total)} free"
        )
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def problems() -> list[str]:
    """Sentences on what is wrong and what to do about it."""
    found = [
        f"{name} is missing. Try pip install {name}."
        for name in CORE
        if installed_version(name) is None
    ]
    if error := import_failure("torchvision"):
        found.append(
            f"torchvision {installed_version('torchvision')} is installed but does not "
            f"import beside torch {torch.__version__} ({error}). gpbridge does not use "
            "it, but other packages fail with it. Try pip uninstall torchvision, or "
            "install the build that matches this torch."
        )
    return found


def report() -> tuple[str, bool]:
    """All findings as text, and whether everything is well."""
    ranges = required_ranges()
    packages = {
        name: f"{installed_version(name) or 'not installed':<16}"
        + (f" asked for {ranges[name]}" if ranges.get(name) else "")
        for name in CORE + OPTIONAL
    }
    memory = available_memory()
    wrong = problems()
    sections = {
        f"gpbridge {__version__}, Python {platform.python_version()}": packages,
        "numerical settings (importing botorch changes them)": numerical_settings(),
        "threads": {
            "torch": torch.get_num_threads(),
            "cores": _cores(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        },
        "devices": dict(enumerate(devices())),
        "memory": {"available": "unknown" if memory is None else _gibibytes(memory)},
        "problems": dict(enumerate(wrong, 1)) or {"none": "found"},
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {name!s:<31} {value}".rstrip() for name, value in rows.items()]
    return "\n".join(lines), not wrong


def main() -> int:
    """Print the report; 0 if no problem was found."""
    text, well = report()
    print(text)
    return 0 if well else 1


def _cores() -> int | None:
    # The cores this process may use, where the system can tell: containers pin them.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
