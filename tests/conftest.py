"""What every test shares: threads, seeds, the data folder, and skipping without a GPU.

One thread, because the matrices are tiny (more threads are slower) and because sums
then have one order. The global random state is set before each test, because the
initial weights of ``torch.nn`` layers are drawn from it: a test must not depend on
those that ran before it. The library itself must not touch that state.
"""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible_initial_weights():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_path() -> Path:
    """Folder with the larger data sets, or skip: they do not ship with the package."""
    given = os.environ.get("GPBRIDGE_DATA")
    path = Path(given) if given else ROOT.parent / "shared" / "data"
    if given and not path.is_dir():
        pytest.fail(f"GPBRIDGE_DATA must name a folder, but is {given!r}.")
    if not path.is_dir():
        pytest.skip("set GPBRIDGE_DATA to the folder with the data sets")
    return path


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
