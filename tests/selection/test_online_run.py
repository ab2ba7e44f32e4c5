"""The loop of runs that learn hyperparameters: where it ends, and what it keeps."""

from types import SimpleNamespace

import pytest
import torch

from gpbridge.selection.online_run import check_folder, diverged_message, run_epochs
from gpbridge.storage import save_state


class Counting:
    """A run whose state is the number of its epochs."""

    def __init__(self, interrupted_at=None):
        self.epoch, self.losses, self.states = 0, [], []
        self.batches = SimpleNamespace(device=torch.device("cpu"))
        self.interrupted_at = interrupted_at

    def advance(self):
        if self.epoch == self.interrupted_at:
            raise KeyboardInterrupt
        self.epoch += 1
        self.losses.append(1.0 / self.epoch)

    def state_dict(self):
        self.states.append(self.epoch)
        return {"epoch": self.epoch, "losses": list(self.losses)}

    def load_state_dict(self, state):
        if "losses" not in state:
            raise ValueError("It has no losses.")
        self.epoch, self.losses = state["epoch"], list(state["losses"])


def run(training, epochs=5, checkpoint=None, every=2, callback=None):
    run_epochs(training, epochs, "test", checkpoint, every, callback, False)
    return training


def test_a_run_has_as_many_epochs_as_it_is_told():
    seen = []
    training = run(Counting(), callback=lambda state: seen.append(state.epoch))
    assert training.epoch == 5 and seen == [1, 2, 3, 4, 5]
    assert training.states == []  # nothing to write


def test_a_callback_ends_a_run_by_true_alone():
    assert run(Counting(), callback=lambda state: state.epoch == 3).epoch == 3
    assert run(Counting(), callback=lambda state: "yes").epoch == 5


def test_the_file_is_written_every_few_epochs_and_at_the_end(tmp_path):
    training = run(Counting(), checkpoint=tmp_path / "run")
    assert training.states == [2, 4, 5]
    ended = run(Counting(), 9, tmp_path / "other", callback=lambda s: s.epoch == 3)
    assert ended.states == [2, 3]


def test_a_run_goes_on_from_its_file(tmp_path):
    first = run(Counting(), 3, tmp_path / "run")
    second = run(Counting(), 5, tmp_path / "run")
    assert second.losses[:3] == first.losses and second.epoch == 5
    again = run(Counting(interrupted_at=5), 5, tmp_path / "run")  # nothing is left
    assert again.losses == second.losses
    with pytest.raises(ValueError, match="has 5 epochs already, and epochs is 4"):
        run(Counting(), 4, tmp_path / "run")


def test_a_file_of_another_run_is_refused(tmp_path):
    save_state({"epoch": 1}, tmp_path / "run")
    with pytest.raises(ValueError, match="cannot be continued. It has no losses"):
        run(Counting(), checkpoint=tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_folder(tmp_path / "nowhere" / "run")
    assert check_folder(None) is None


def test_an_interruption_keeps_what_is_there():
    with pytest.warns(RuntimeWarning, match="interrupted after 2 of 5 epochs"):
        training = run(Counting(interrupted_at=2))
    assert training.epoch == 2
    with pytest.raises(KeyboardInterrupt):
        run(Counting(interrupted_at=0))


def test_a_divergence_says_where_and_what_to_try():
    message = diverged_message(Counting(), ArithmeticError("a loss of nan"), 0.5, 1e-2)
    assert "a loss of nan in epoch 0" in message
    assert "learning_rate=0.01 (it is 0.5)" in message
