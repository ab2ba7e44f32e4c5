"""A frozen copy of a network as a function of (weights, inputs).

In: a trained ``nn.Module``, the names of its random weights, and for tensors of which
only some entries are random their places. Out: a :class:`FrozenNet` that evaluates the
copy at any values of these weights, and turns them into one vector and back. The
caller's module is never changed.
Next: ``jacobians`` differentiates it, ``functional`` chooses the names.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gpbridge.tracing import traceable
from gpbridge.types import Params


class FrozenNet(nn.Module):
    r"""A copy of a network in eval mode, :math:`f(x, w)` of some of its weights.

    Args:
        network: The module, copied without its owner's hooks.
        names: The random weights, in the order of ``named_parameters``.
        input_shape: Shape of one input, to unflatten the ``d`` columns.
        freeze: Whether the weights of the copy are constants.
        entries: Of the tensors that are random in part, the places of the random
            entries in the flattened tensor. Such a tensor stands in ``params`` as the
            vector of these entries.
    """

    def __init__(
        self,
        network: nn.Module,
        names: list[str],
        input_shape: Sequence[int] | None = None,
        freeze: bool = True,
        entries: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.names = names
        self._entries = {n: f"entries_{n.replace('.', '__')}" for n in entries or {}}
        for name, held in self._entries.items():
            self.register_buffer(held, entries[name].clone())
        self.network = _frozen_copy(network, freeze, names)
        self.freeze = freeze
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.vectorized = True  # what torch.func can do with it: the probe finds out
        self.forward_mode = True
        self.num_activations = 0  # numbers that one point's backward pass keeps
        self.layer_names: tuple[str, ...] | None = None  # filled by layer_gram
        self._num_outputs: int | None = None
        self.register_buffer("weight_scale", None)

    @property
    def entries(self) -> dict[str, Tensor]:
        """Places of the random entries of the tensors that are random in part."""
        return {name: getattr(self, held) for name, held in self._entries.items()}

    @property
    def params(self) -> Params:
        """The random weights by name, of a tensor that is random in part a vector."""
        return self.read(dict(self.network.named_parameters()))

    def read(self, tensors: Mapping[str, Tensor]) -> Params:
        """Take the random weights out of whole tensors by name."""
        entries = self.entries
        return {
            name: tensors[name].reshape(-1)[entries[name]]
            if name in entries
            else tensors[name]
            for name in self.names
        }

    @torch.no_grad()
    def write(self, params: Params) -> None:
        """Put other values of the random weights into the copy, in place."""
        own = dict(self.network.named_parameters())
        for name, value in self.whole(params).items():
            own[name].copy_(value)

    def whole(self, params: Params) -> Params:
        """Weights with the constant entries in their places, tensors of full shape.

        Args:
            params: Weights by name, in the form of :attr:`params`.

        Returns:
            The same names; tensors that are random as a whole are passed through.
        """
        if not self._entries:
            return params
        own, entries = dict(self.network.named_parameters()), self.entries
        return {
            name: _scattered(own[name], entries[name], value)
            if name in entries
            else value
            for name, value in params.items()
        }

    def whole_size(self, names: Iterable[str]) -> int:
        """Entries of the tensors of these names, whether random or not."""
        own = dict(self.network.named_parameters())
        return sum(own[name].numel() for name in names)

    @property
    def num_params(self) -> int:
        """The number p of random weights."""
        return sum(p.numel() for p in self.params.values())

    @property
    def num_outputs(self) -> int:
        """The number m of outputs.

        Raises:
            RuntimeError: If no point was probed yet.
        """
        if self._num_outputs is None:
            raise RuntimeError(
                "The number of outputs is not known before the network has seen a "
                "point. Call probe(X) first."
            )
        return self._num_outputs

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.network.parameters()).dtype

    def apply_network(self, params: Params, X: Tensor) -> Tensor:
        """Evaluate ``... x n x d`` inputs at given weights, ``... x n x m``.

        Weights and buffers that are not given follow the dtype of ``X``, so that a
        float32 network can be evaluated in float64.

        Args:
            params: Weights by name; those that are not given keep their own values.
            X: Inputs.

        Returns:
            The outputs.
        """
        rows = X.reshape(-1, *(self.input_shape or X.shape[-1:]))
        params = self.whole(params)
        if X.dtype != self.dtype:
            params = {**self._state_in(X.dtype), **params}
        with traceable():
            outputs = functional_call(self.network, params, (rows,))
        return outputs.reshape(*X.shape[:-1], -1 if rows.numel() else self.num_outputs)

    def _state_in(self, dtype: torch.dtype) -> Params:
        state = [*self.network.named_parameters(), *self.network.named_buffers()]
        return {k: v.to(dtype) for k, v in state if v.is_floating_point()}

    def forward(self, X: Tensor) -> Tensor:
        """The network at its own weights, ``... x n x m``."""
        if self.freeze or not self._entries:
            return self.apply_network({}, X)
        return self.apply_network(self.params, X)  # the other entries are constants

    def train(self, mode: bool = True) -> FrozenNet:
        """Set the mode of everything but the network, which stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def flatten(self, params: Params) -> Tensor:
        """Concatenate weights, each ``... x shape``, to ``... x p``."""
        parts = []
        for name, own in self.params.items():
            value = params[name]
            batch = value.shape[: value.dim() - own.dim()]
            parts.append(value.reshape(*batch, own.numel()))
        return torch.cat(parts, dim=-1)

    def unflatten(self, vector: Tensor) -> Params:
        """Split ``... x p`` into weights by name, each ``... x shape``."""
        shapes = {name: p.shape for name, p in self.params.items()}
        parts = vector.split([math.prod(s) for s in shapes.values()], dim=-1)
        return {
            name: part.reshape((*vector.shape[:-1], *shape))
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def set_weight_scale(self, scale: Tensor | None) -> None:
        """Keep a standard deviation per weight, ``p``, beside the prior variance.

        Part of the state: it was measured on data and a loaded model needs it.
        """
        self.register_buffer("weight_scale", scale)

    def extra_repr(self) -> str:
        """How many of the weights are random."""
        total = sum(p.numel() for p in self.network.parameters())
        return f"random weights: {self.num_params} of {total}"


def _scattered(tensor: Tensor, places: Tensor, values: Tensor) -> Tensor:
    base = tensor.detach().to(values.dtype).reshape(-1)
    return torch.scatter(base, 0, places, values).reshape(tensor.shape)


def copy_without_hooks(network: nn.Module) -> nn.Module:
    """Copy a module in eval mode without its owner's hooks; the module is not touched.

    A hook can hold or write anything of the caller's, also what no copy can be made of,
    so it stays behind. Those that torch itself installs to compute a weight
    (weight_norm, spectral_norm) are part of the function and come along.

    Args:
        network: The module.

    Returns:
        The copy.

    Raises:
        ValueError: If the module keeps tensors of a forward pass.
    """
    kept = {
        id(hooks): type(hooks)(
            (key, copy.deepcopy(hook))
            for key, hook in hooks.items()
            if type(hook).__module__.startswith("torch.nn.utils")
        )
        for module in network.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    }
    try:
        return copy.deepcopy(network, memo=kept).eval()
    except RuntimeError as error:
        raise ValueError(
            f"The network cannot be copied: {first_line(error)} It keeps a tensor "
            "that a graph computed, in an attribute or by the old "
            "torch.nn.utils.weight_norm. Detach them, or use "
            "torch.nn.utils.parametrizations."
        ) from error


def _frozen_copy(network: nn.Module, freeze: bool, names: list[str]) -> nn.Module:
    with torch.inference_mode(False):
        own, random = copy_without_hooks(network), set(names)
    for name, p in own.named_parameters():
        p.requires_grad_(not freeze and name in random)
    return own


def first_line(error: Exception) -> str:
    """What an error says, short enough to be quoted in another."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
