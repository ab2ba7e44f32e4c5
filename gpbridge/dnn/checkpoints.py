"""The file of a long training run: written every few epochs, read to go on.

In: a path, or none. Out: the state of a run before, if there is one, and writes that a
crash leaves whole. Next: ``fit`` and ``replicas`` have one each.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from gpbridge.checks import check_count
from gpbridge.storage import load_state, save_state


class Checkpoint:
    """A file with the state of a run, which has the number of its ``epoch``.

    Args:
        path: The file; None for nothing.
        every: Epochs between two writes.

    Raises:
        FileNotFoundError: If its folder does not exist.
        ValueError: If ``every`` is no whole number above zero.
    """

    def __init__(self, path: str | PathLike | None, every: int) -> None:
        check_count(checkpoint_every=every)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(
                f"The folder of checkpoint={str(path)!r} does not exist."
            )
        self.path, self.every = path, every

    def resume(
        self,
        load: Callable[[dict[str, Any]], None],
        epochs: int,
        device: torch.device,
    ) -> None:
        """Go on from the file, if there is one.

        Args:
            load: Takes the state; raises a ValueError if it is of another run.
            epochs: Length of the run.
            device: Where its tensors go.

        Raises:
            ValueError: If it is of another run, or has more epochs.
        """
        if self.path is None or not Path(self.path).exists():
            return
        state = load_state(self.path, device)
        try:
            load(state)
        except ValueError as error:
            raise ValueError(
                f"checkpoint={str(self.path)!r} cannot be continued. {error} For a new "
                "run pass another file."
            ) from error
        if state["epoch"] > epochs:
            raise ValueError(
                f"checkpoint={str(self.path)!r} has {state['epoch']} epochs already, "
                f"and epochs is {epochs}. Pass epochs={state['epoch']} or more, or "
                "another file."
            )

    def keep(self, done: int, last: bool, state: Callable[[], dict[str, Any]]) -> None:
        """Write the state after so many epochs, if it is time to."""
        if self.path is not None and (last or done % self.every == 0):
            save_state(state(), self.path)
