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
from gpbridge.linearized.conditioning import NewData
from gpbridge.linearized.construction import check_previous, working_dtype
from gpbridge.linearized.state import CACHES, MOVED, SAVED
from gpbridge.linearized.structured_weights import StructuredWeights
from gpbridge.linearized.training_run import restricted, row_numbers
from gpbridge.linearized.variational import Refinement


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
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        keep_transforms: bool = True,
        assign: bool = False,
    ):
        """Load network, data and hyperparameters, and a curvature that was saved.

        The structure of the inference stays that of this model; a previous posterior
        is loaded, and must fit it.

        Args:
            state_dict: The state of a model with data and network of these shapes.
            strict: Whether all keys must be there, and no others.
            keep_transforms: As in botorch's models, where it says what becomes of the
                data. Without effect: here data and transforms are both loaded.
            assign: Whether to take over the tensors instead of their values.

        Returns:
            Missing and unexpected keys.
        """
        return nn.Module.load_state_dict(self, state_dict, strict, assign)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in (self._results() or {}).items():
            destination[f"{prefix}_saved.{name}"] = value
        if self.previous is not None:
            for name, value in self.previous.state_dict().items():
                destination[f"{prefix}_previous.{name}"] = value
        for name in MOVED:
            kept = getattr(self, name)
            for field, value in () if kept is None else kept._asdict().items():
                value = value if keep_vars else value.detach()
                destination[f"{prefix}{name}.{field}"] = value

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        names = [f"{prefix}_new.{field}" for field in NewData._fields]
        unexpected_keys[:] = [k for k in unexpected_keys if k not in names]
        if all(name in state_dict for name in names):
            like = self._train_X
            new = (state_dict[name].detach().clone().to(like.device) for name in names)
            new = NewData(*new)
            self._new = new._replace(X=new.X.to(like), Y=new.Y.to(like))
        elif f"{prefix}_train_X" in state_dict:  # of a model without further data
            self._new = None
        names = [f"{prefix}refinement.{field}" for field in Refinement._fields]
        unexpected_keys[:] = [k for k in unexpected_keys if k not in names]
        if all(name in state_dict for name in names):
            device = self._train_X.device
            self.refinement = Refinement(
                *(state_dict[name].detach().clone().to(device) for name in names)
            )
        elif f"{prefix}_train_X" in state_dict:
            self.refinement = None
        saved, previous = (
            self._tensors_below(f"{prefix}{part}.", state_dict, unexpected_keys)
            for part in ("_saved", "_previous")
        )
        if saved or f"{prefix}_train_X" in state_dict:
            self._saved = saved or None
        if previous:
            self.previous = StructuredWeights.from_state_dict(previous).to(
                self._train_X.device
            )
            check_previous(self.previous, self, self.covar_module.groups)
        elif f"{prefix}_train_X" in state_dict:
            self.previous = None
        self._forget()

    @staticmethod
    def _tensors_below(
        start: str, state_dict: Mapping[str, Any], unexpected_keys: list[str]
    ) -> dict[str, Tensor]:
        """Copies of the tensors whose names begin so, which torch does not expect."""
        unexpected_keys[:] = [k for k in unexpected_keys if not k.startswith(start)]
        return {
            name.removeprefix(start): value.detach().clone()
            for name, value in state_dict.items()
            if name.startswith(start)
        }

    def get_extra_state(self) -> Tensor:
        """What a state_dict carries beside hyperparameters and data: plain values.

        As a tensor, since botorch's optimisers detach and clone whatever is in there.
        """
        state = {name: getattr(self, name) for name in SAVED}
        if not isinstance(self.noise, str | float):
            state["noise"] = torch.as_tensor(self.noise).tolist()
        named = self.likelihood.named_parameters()
        state["fixed"] = [name for name, p in named if not p.requires_grad]
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore them."""
        values = json.loads(bytes(state.tolist()))
        fixed = values.pop("fixed")
        if values["calibration"] is not None:
            values["calibration"] = Calibration(*values["calibration"])
        if isinstance(values["noise"], list):
            values["noise"] = torch.tensor(values["noise"], dtype=torch.float64)
        for name in SAVED:
            setattr(self, name, values[name])
        for name, parameter in self.likelihood.named_parameters():
            parameter.requires_grad_(name not in fixed)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Self:
        self._saved = self._results()  # a move does not change what it is made of
        super()._apply(fn, *args, **kwargs)
        for name in MOVED:
            kept = getattr(self, name)
            if kept is not None:
                setattr(self, name, type(kept)(*map(fn, kept)))
        # The precision of Jacobians is an option, not that of the data.
        if self.previous is not None:
            self.previous = self.previous.to(self._train_X.device)
        dtype = working_dtype(self.inference, self._train_X)
        if self.functional.dtype != dtype:
            self.covar_module.to(dtype)
        self._forget()
        return self

    def __getstate__(self) -> dict:
        """Copies and pickles carry the state, not what is cheap to compute from it."""
        kept = {"_saved": self._results()}
        return {**self.__dict__, **dict.fromkeys(CACHES), **kept}

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
            rows: Row numbers, or a mask of all rows.

        Returns:
            The model, with a likelihood of its own and nothing to select, at these
            hyperparameters, which were not fitted to its rows.

        Raises:
            NotImplementedError: If the noise is fixed per point, or the model was
                conditioned on further observations.
        """
        self.check_all_data_is_training_data("A row number of subset_rows")
        rows = row_numbers(rows, len(self._train_X)).to(self._train_X.device)
        if isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            raise NotImplementedError(
                "Rows of a model with fixed noise per point cannot be taken out. Build "
                "a model with the noise of those rows."
            )
        twin = copy.deepcopy(self)
        for name in ("_train_X", "_targets"):
            setattr(twin, name, getattr(self, name)[rows])
        twin.select = twin.fitted = twin.calibration = twin.refinement = None
        if self.fit_result is not None:
            twin.fit_result = restricted(self.fit_result, rows, len(self._train_X))
        return twin

    def _set_transformed_inputs(self) -> None:
        """Nothing to swap: inputs are kept as given and transformed where used."""

    def _revert_to_original_inputs(self) -> None:
        """Nothing to swap."""
