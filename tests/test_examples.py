"""Every example runs in its smallest size and saves its figures."""

import multiprocessing
import runpy
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

import pytest

from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FIGURES = {"demo": {"demo_posterior", "demo_reliability", "demo_optimisation"}}

# Processes of their own, forked from one that has imported everything: half of the
# seconds of a small example are imports. An optimiser of torch imports torch._dynamo.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        *("gpbridge.acquisition", "gpbridge.dnn", "gpbridge.plots"),
        *("gpbridge.selection", "gpbridge.surrogates"),
        *("botorch.fit", "botorch.optim", "sklearn.datasets", "torch._dynamo"),
        *("matplotlib.backends.backend_agg", "matplotlib.pyplot"),
    ]
)


def run(script, folder, log):
    """Run a script as a program with what it prints in a file."""
    sys.argv = [str(script), "--smoke", "--figures", str(folder)]
    with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except BaseException:
            traceback.print_exc()
            raise SystemExit(1) from None


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs_and_saves_its_figures(script, tmp_path):
    log = tmp_path / "printed.txt"
    process = PROCESSES.Process(target=run, args=(script, tmp_path, log))
    process.start()
    process.join()
    printed = log.read_text()
    assert process.exitcode == 0, printed
    assert "nan" not in printed
    saved = {figure.stem for figure in tmp_path.glob("*.png")}
    assert saved == FIGURES.get(script.stem, {script.stem})


def test_the_committed_figures_are_those_that_the_examples_save():
    expected = {
        name for stem in EXAMPLES for name in FIGURES.get(stem.stem, {stem.stem})
    }
    figures = list((ROOT / "examples" / "figures").iterdir())
    assert {figure.stem for figure in figures} == expected
    assert max(figure.stat().st_size for figure in figures) < 150_000
