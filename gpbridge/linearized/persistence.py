"""How a linearised GP is copied, pickled, moved and loaded.

In: a model of network, data, hyperparameters and caches. Out: :class:`Persistence`,
which keeps what cannot be recomputed and forgets the rest. Next: ``gp``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, Self

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from torch import Tensor, nn

from gpbridge.linearized.calibration import Calibration
from gpbridge.linearized.state import CACHES
from gpbridge.linearized.training_run import restricted


class Persistence:
    """Copies and states of a linearised GP, beside :class:`torch.nn.Module`'s own."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode; network and transforms stay in eval mode."""
        super().train(mode)
        for name in ("input_transform", "outcome_transform"):
            if hasattr(self, name):
                getattr(self, name).eval()
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any
    ):
        """Load network, data and hyperparameters; transforms are part of the state."""
        return nn.Module.load_state_dict(self, state_dict, strict=strict)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def get_extra_state(self) -> Tensor:
        """What a state_dict carries beside hyperparameters and data: plain values.

        As a tensor, since botorch's optimisers detach and clone whatever is in there.
        """
        calibration = None if self.calibration is None else tuple(self.calibration)
        state = {"mean": self.mean, "fitted": self.fitted, "calibration": calibration}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore them."""
        state = json.loads(bytes(state.tolist()))
        self.mean, self.fitted = state["mean"], state["fitted"]
        kept = state["calibration"]
        self.calibration = None if kept is None else Calibration(*kept)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Self:
        super()._apply(fn, *args, **kwargs)
        self._forget()
        return self

    def __getstate__(self) -> dict:
        """Copies and pickles carry the state, not what can be computed from it."""
        return {**self.__dict__, **dict.fromkeys(CACHES)}

    def _share(self) -> Self:
        """A shallow copy: modules and caches are shared, further data are not."""
        # Not copy.copy, whose __getstate__ leaves the caches behind.
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[name] = self.__dict__[name].copy()
        return twin

    def subset_rows(self, rows: Tensor) -> Self:
        """An independent model with the same options on some of the training rows.

        Args:
            rows: Row numbers.

        Returns:
            The model, with a likelihood of its own and nothing to select.
        """
        if isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            raise NotImplementedError(
                "Rows of a model with fixed noise per point cannot be taken out. Build "
                "a model with the noise of those rows."
            )
        twin = copy.deepcopy(self)
        for name in ("_train_X", "_targets"):
            setattr(twin, name, getattr(self, name)[rows])
        twin.select = None
        if self.fit_result is not None:
            twin.fit_result = restricted(self.fit_result, rows, len(self._train_X))
        return twin

    def _set_transformed_inputs(self) -> None:
        """Nothing to swap: inputs are kept as given and transformed where used."""

    def _revert_to_original_inputs(self) -> None:
        """Nothing to swap."""
