"""Assertions on modules: nothing of a user's network may change.

In: a module, before and after. Out: nothing, or an error that names what differs.
Next: ``case`` watches the networks of the models under test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def assert_module_unchanged(module: nn.Module) -> Iterator[None]:
    """Require that a block leaves a module bit for bit as it was, also if it raises.

    Compared are the submodules and their types, attributes, modes and hooks, and for
    every parameter and buffer its identity, bits, dtype, device, ``requires_grad`` and
    gradient.

    Args:
        module: The module to watch.

    Yields:
        Nothing.

    Raises:
        AssertionError: If anything differs; the message says what and where.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> with assert_module_unchanged(network):
        ...     _ = network(torch.ones(3, 2))
    """
    before = snapshot(module)
    try:
        yield
    finally:
        check_unchanged(before, snapshot(module))


def snapshot(module: nn.Module) -> dict[str, object]:
    """Everything about a module that a user could notice, by readable names."""
    found: dict[str, object] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        place = path or "the module"
        found[f"type of {place}"] = type(part)
        found[f"training mode of {place}"] = part.training
        found[f"attributes of {place}"] = sorted(vars(part))
        for name, value in vars(part).items():
            if "hook" in name and isinstance(value, dict):
                found[f"{name} of {place}"] = list(value.items())
    for kind, tensors in (
        ("parameter", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
    ):
        for name, value in tensors:
            found[f"identity of {kind} {name}"] = id(value)
            found[f"{kind} {name}"] = value.detach().clone()
            found[f"requires_grad of {kind} {name}"] = value.requires_grad
            grad = value.grad if value.is_leaf else None
            found[f"gradient of {kind} {name}"] = None if grad is None else grad.clone()
    return found


def check_unchanged(before: dict[str, object], after: dict[str, object]) -> None:
    """Compare two snapshots of a module."""
    different = [
        name
        for name in {**before, **after}
        if not (name in before and name in after)
        or not identical(before[name], after[name])
    ]
    if different:
        shown = ", ".join(different[:6])
        raise AssertionError(
            f"The user's module was changed in {len(different)} places: {shown}. Work "
            "on a copy of it."
        )


def identical(value: object, other: object) -> bool:
    """Whether two values are equal, tensors bit for bit."""
    if not (isinstance(value, Tensor) and isinstance(other, Tensor)):
        return not isinstance(value, Tensor) and value == other
    if (value.shape, value.dtype, value.device) != (
        other.shape,
        other.dtype,
        other.device,
    ):
        return False
    # As bytes: NaN equals itself, and -0.0 does not equal 0.0.
    bits = (tensor.reshape(-1).view(torch.uint8) for tensor in (value, other))
    return torch.equal(*bits)
