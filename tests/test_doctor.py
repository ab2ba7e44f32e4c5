import sys

import pytest

from gpbridge import doctor


def plant(folder, monkeypatch, name, body):
    """Put a module of one file in front of all others, for children too."""
    (folder / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_the_report_names_versions_settings_threads_devices_and_memory(capsys):
    assert doctor.main() in (0, 1)
    text = capsys.readouterr().out
    for word in ("torch", "botorch", "max_cholesky_size", "cores", "cpu", "available"):
        assert word in text


def test_botorch_settings_are_those_in_force():
    # botorch raises the size up to which linear_operator is exact: 800 before.
    assert doctor.numerical_settings()["max_cholesky_size"] >= 4096


def test_available_memory_is_a_plausible_number_of_bytes():
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux says")
    assert 2**20 < doctor.available_memory() < 2**50


def test_a_full_container_has_no_memory_left(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  2048 kB",
        "/sys/fs/cgroup/memory.max": "4096",
        "/sys/fs/cgroup/memory.current": "5000",
    }
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(path, ""))
    assert doctor.available_memory() == 0
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert doctor.available_memory() == 2048 * 1024
    files.clear()
    assert doctor.available_memory() is None


def test_a_broken_torchvision_is_a_problem_with_a_remedy(tmp_path, monkeypatch, capsys):
    error = "operator torchvision::nms does not exist"
    plant(tmp_path, monkeypatch, "torchvision", f"raise RuntimeError({error!r})")
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert error in text and "pip uninstall torchvision" in text


def test_a_module_that_dies_at_import_does_not_take_us_down(tmp_path, monkeypatch):
    plant(tmp_path, monkeypatch, "dies", "import os; os._exit(7)")
    plant(tmp_path, monkeypatch, "lives", "")
    assert doctor.import_failure("dies") == "exit status 7"
    assert doctor.import_failure("lives") is None
    assert doctor.import_failure("no_such_module_anywhere") is None


def test_a_missing_core_package_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "CORE", ("no-such-distribution",))
    assert "no-such-distribution is missing" in doctor.problems()[0]


def test_ranges_come_from_the_installed_metadata(monkeypatch):
    lines = ["torch>=2.4", 'matplotlib>=3.8; extra == "plots"', "tqdm"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    assert doctor.required_ranges() == {
        "torch": ">=2.4",
        "matplotlib": ">=3.8",
        "tqdm": "",
    }
    assert "asked for >=2.4" in doctor.report()[0]
