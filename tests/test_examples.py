"""Every example runs in its smallest size and saves its figures."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FIGURES = {"demo": {"demo_posterior", "demo_reliability", "demo_optimisation"}}


def run(script, folder):
    command = [sys.executable, script, "--smoke", "--figures", folder]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """The examples that were asked for, two at a time, each in its own folder."""
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    asked = [
        call.params["script"] for call in asked if call and "script" in call.params
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {
            script: (folder, pool.submit(run, script, folder))
            for script in asked
            for folder in [tmp_path_factory.mktemp(script.stem)]
        }


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs_and_saves_its_figures(script, runs):
    folder, running = runs[script]
    result = running.result()
    assert result.returncode == 0, result.stderr
    assert "nan" not in result.stdout
    saved = {figure.stem for figure in folder.glob("*.png")}
    assert saved == FIGURES.get(script.stem, {script.stem})


def test_the_committed_figures_are_those_that_the_examples_save():
    expected = {
        name for stem in EXAMPLES for name in FIGURES.get(stem.stem, {stem.stem})
    }
    figures = list((ROOT / "examples" / "figures").iterdir())
    assert {figure.stem for figure in figures} == expected
    assert max(figure.stat().st_size for figure in figures) < 150_000
