import os

import pytest
import torch

from gpbridge.storage import DamagedFileError, load_state, save_state

STATE = {
    "weights": torch.arange(6.0).reshape(2, 3),
    "steps": 3,
    "history": [1.5, float("inf")],
    "nested": {"flag": True, "nothing": None, "name": "a"},
}


def test_a_state_comes_back(tmp_path):
    save_state(STATE, tmp_path / "run.state")
    found = load_state(tmp_path / "run.state")
    assert found.keys() == STATE.keys()
    assert torch.equal(found["weights"], STATE["weights"])
    assert found["history"] == STATE["history"] and found["nested"] == STATE["nested"]
    assert [p.name for p in tmp_path.iterdir()] == ["run.state"]


@pytest.mark.parametrize("damage", ["cut", "flip", "other", "empty"])
def test_damage_is_found(tmp_path, damage):
    path = tmp_path / "run.state"
    save_state(STATE, path)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-100] ^= 1
    path.write_bytes(
        {"cut": content[:-10], "flip": content, "other": b"PK", "empty": b""}[damage]
    )
    with pytest.raises(DamagedFileError, match=r"run\.state"):
        load_state(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.state"
    save_state({"steps": 1}, path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_state({"steps": 2}, path)
    assert load_state(path) == {"steps": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.state"]


def test_no_code_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "run.state"
    save_state({"evil": Evil()}, path)
    with pytest.raises(Exception, match="weights_only|Weights only"):
        load_state(path)
    assert not (tmp_path / "ran").exists()
