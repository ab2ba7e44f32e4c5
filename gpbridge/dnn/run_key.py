"""What a run has in common with the one that it continues, in plain values.

In: a module, a function or a tensor. Out: strings that compare equal for equal content.
Next: states of long runs keep them, and compare them before they go on.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Set
from functools import partial
from types import FunctionType, MethodType, NoneType

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, NoneType, torch.dtype)
_OF_ALL_MODULES = frozenset(vars(nn.Module()))


def checksum(value: Tensor) -> str:
    """Shape and checksum of the values."""
    if value.dim() and value.stride(0) == 0:  # expanded: one row says it all
        return f"{len(value)} times {checksum(value[0])}"
    content = value.detach().cpu().contiguous().numpy().tobytes()
    return f"{tuple(value.shape)}, checksum {zlib.crc32(content):x}"


def structure(
    network: nn.Module,
    learnt: Set[str] | None = None,
    values: bool = True,
    private: bool = True,
) -> list[str]:
    """Modules with their plain options, then weights with the values that stay.

    Args:
        network: The module.
        learnt: Names of the weights that training changes; default those that require
            gradients.
        values: Whether to add the values of the other weights.
        private: Whether to add options whose names begin with an underscore: of
            upstream's modules they are what a call leaves behind.

    Returns:
        One line for each module and each weight.
    """
    found = []
    for name, module in network.named_modules():
        options = {
            key: described(value)
            for key, value in vars(module).items()
            if key not in _OF_ALL_MODULES and _is_plain(value)
            if private or not key.startswith("_")
        }
        found.append(f"{name or 'network'}: {type(module).__name__} {options}")
    for name, p in network.named_parameters():
        moves = p.requires_grad if learnt is None else name in learnt
        stays = checksum(p) if values and not moves else tuple(p.shape)
        found.append(f"{name}: {'learnt' if moves else 'fixed'} {stays} {p.dtype}")
    return found


def described(value: object) -> str:
    """A plain value, a tensor, or a function with what it refers to.

    Of other objects the type alone: their contents may change as a run goes on.
    """
    if isinstance(value, Tensor):
        return checksum(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, Mapping):
        return str({str(key): described(value[key]) for key in value})
    if isinstance(value, partial):
        parts = value.func, value.args, value.keywords
        return f"partial{described(parts)}"
    if isinstance(value, MethodType):
        return f"{type(value.__self__).__name__}.{described(value.__func__)}"
    if isinstance(value, FunctionType):
        return _function(value)
    if isinstance(value, nn.Module):
        return str(structure(value, values=False))
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, type):
        return value.__qualname__
    return type(value).__qualname__


def _function(function: FunctionType) -> str:
    code = function.__code__
    constants = [c for c in code.co_consts if isinstance(c, _PLAIN)]
    around = []
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            content = cell.cell_contents
        except ValueError:  # not set yet
            continue
        # A function may refer to itself.
        around.append((name, "itself" if content is function else content))
    parts = constants, code.co_names, function.__defaults__, around
    return f"{function.__module__}.{function.__qualname__}{described(parts)}"


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, (*_PLAIN, FunctionType, type))


def difference(name: str, before: object, now: object) -> str:
    """What differs, in a sentence; of lists only the entries of one of the two."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = (
            [entry for entry in before if entry not in now],
            [entry for entry in now if entry not in before],
        )
    return f"its {name} is {before}, and now it is {now}"


def check_same_run(
    before: Mapping[str, object], now: Mapping[str, object], remedy: str
) -> None:
    """Require that a state is of the run that goes on from it.

    Args:
        before: What the state says of its run.
        now: The same of the run that goes on.
        remedy: What to do.

    Raises:
        ValueError: If they differ.
    """
    for name, value in now.items():
        if before.get(name) != value:
            which = difference(name, before.get(name), value)
            raise ValueError(f"The state is of another run: {which}. {remedy}")
