"""Every example runs in its smallest size and saves its figures."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FIGURES = {"demo": {"demo_posterior", "demo_reliability", "demo_optimisation"}}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs_and_saves_its_figures(script, tmp_path):
    command = [sys.executable, script, "--smoke", "--figures", tmp_path]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "nan" not in result.stdout
    saved = {figure.stem for figure in tmp_path.glob("*.png")}
    assert saved == FIGURES.get(script.stem, {script.stem})


def test_the_committed_figures_are_those_that_the_examples_save():
    expected = {
        name for stem in EXAMPLES for name in FIGURES.get(stem.stem, {stem.stem})
    }
    figures = list((ROOT / "examples" / "figures").iterdir())
    assert {figure.stem for figure in figures} == expected
    assert max(figure.stat().st_size for figure in figures) < 150_000
