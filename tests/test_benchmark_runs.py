"""Saved runs of a benchmark: what makes a run another, rows of before."""

import importlib.util
import json

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def runs():
    path = ROOT / "benchmarks" / "invariance_runs.py"
    spec = importlib.util.spec_from_file_location("invariance_runs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_number_of_tests_is_another_run(runs, tmp_path):
    file = tmp_path / "runs.jsonl"
    few = runs.Key("mnist", 312, 1, "true", 8, 200, tests=500)
    assert runs.saved_runs(file) == {}
    runs.save_run(file, few, {"accuracy": 0.5})
    found = runs.saved_runs(file)
    assert found[few]["accuracy"] == 0.5
    assert few._replace(tests=2000) not in found


def test_a_row_that_does_not_say_its_tests_has_the_default(runs, tmp_path):
    file = tmp_path / "runs.jsonl"
    row = {"set": "mnist", "images": 312, "seed": 1, "model": "true"}
    row |= {"samples": 8, "epochs": 200, "accuracy": 0.7}
    file.write_text(json.dumps(row) + "\n")
    (key,) = runs.saved_runs(file)
    assert key == runs.Key("mnist", 312, 1, "true", 8, 200, tests=2000)


def test_tables_do_not_mix_numbers_of_tests(runs, tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    scores = dict.fromkeys(runs.COLUMNS, 0.25)
    for tests in (500, 2000):
        key = runs.Key("mnist", 312, 1, "true", 8, 200, tests)
        runs.save_run(file, key, scores | {"accuracy": tests / 4000})
    runs.print_tables(file)
    shown = capsys.readouterr().out
    assert "500 test images" in shown and "| true | 1 | 0.125 | 0.250" in shown
    assert "2000 test images" in shown and "| true | 1 | 0.500 | 0.250" in shown
