"""How a sampled GP is copied, pickled, moved and loaded.

In: a model of data, hyperparameters, seed and solution. Out: its copies: a state_dict
carries what the solution depends on, a pickle the solution as well. Next: ``gp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from torch import Tensor, nn

from gpbridge.sampled.observations import NewData

_NEW = [f"_new.{field}" for field in NewData._fields]
_FIXED = "_fixed_noise"


class SampledPersistence:
    """Copies and states of a sampled GP, beside :class:`torch.nn.Module`'s own."""

    def _share(self) -> Self:
        """A shallow copy: modules and the solution are shared."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[name] = self.__dict__[name].copy()
        return twin

    def train(self, mode: bool = True) -> Self:
        """Set the mode; transforms stay in eval mode."""
        super().train(mode)
        for name in ("input_transform", "outcome_transform"):
            if hasattr(self, name):
                getattr(self, name).eval()
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any
    ):
        """Load data, hyperparameters and seed; transforms are part of the state."""
        return nn.Module.load_state_dict(self, state_dict, strict=strict)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in zip(_NEW, self._new or (), strict=False):
            destination[prefix + name] = value if keep_vars else value.detach()
        if isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            # Upstream holds it as a plain tensor, which no state_dict has.
            destination[prefix + _FIXED] = self.likelihood.noise_covar.noise.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected = args[3]
        names = [prefix + name for name in _NEW]
        known = [*names, prefix + _FIXED]
        unexpected[:] = [key for key in unexpected if key not in known]
        if all(name in state_dict for name in names):
            new = (state_dict[name].detach().clone() for name in names)
            self._new = NewData(*(t.to(self._train_X) for t in new))
        elif f"{prefix}_train_X" in state_dict:  # of a model without further data
            self._new = None
        fixed = isinstance(self.likelihood, FixedNoiseGaussianLikelihood)
        if fixed and prefix + _FIXED in state_dict:
            noise = state_dict[prefix + _FIXED].detach().clone()
            self.likelihood.noise_covar.noise = noise.to(self._train_X)
        self._forget()

    def get_extra_state(self) -> Tensor:
        """The outputs that are kept, none for all of them."""
        return torch.tensor(self.output_indices or [], dtype=torch.long)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore them."""
        self.output_indices = state.tolist() or None

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Self:
        super()._apply(fn, *args, **kwargs)
        if self._new is not None:
            self._new, self._correction = NewData(*map(fn, self._new)), None
        return self

    def __getstate__(self) -> dict:
        """Copies and pickles carry the solution, and no graph of a gradient."""
        new = self._new
        if new is not None:
            new = NewData(*(tensor.detach() for tensor in new))
        return {**self.__dict__, "_new": new, "_correction": None}

    def _set_transformed_inputs(self) -> None:
        """Nothing to swap: inputs are kept as given and transformed where used."""

    def _revert_to_original_inputs(self) -> None:
        """Nothing to swap."""
