"""What the two ends of a curve of weights must have in common.

In: two modules. Out: nothing, or an error that names the first difference. Next:
``curves`` asks before it connects them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpbridge.batch_norm import norm_layers


def check_same_network(start: nn.Module, end: nn.Module, moving: set[str]) -> None:
    """Require one architecture, and agreement in what does not move.

    Args:
        start: A module.
        end: What should be another with the same submodules, parameters and buffers, by
            name, type, setting, shape, dtype and device.
        moving: Names of the parameters that may differ; running statistics of batch
            norm may as well.

    Raises:
        TypeError: If the second is not a module.
        ValueError: If they differ; the message names the first difference.
    """
    if not isinstance(end, nn.Module):
        raise TypeError(
            f"end_network must be a torch.nn.Module, but is {type(end).__name__}."
        )
    for kind, own, other in (
        ("module", dict(start.named_modules()), dict(end.named_modules())),
        ("parameter", dict(start.named_parameters()), dict(end.named_parameters())),
        ("buffer", dict(start.named_buffers()), dict(end.named_buffers())),
        ("module", _settings(start), _settings(end)),
    ):
        for name in [*own, *(name for name in other if name not in own)]:
            found = [_described(side.get(name)) for side in (own, other)]
            if found[0] != found[1]:
                raise ValueError(
                    "The ends of a curve must have one architecture, but differ first "
                    f"in the {kind} {name or 'at the top'!r}: start_network has "
                    f"{found[0]}, end_network has {found[1]}."
                )
    norms = norm_layers(start)
    own, other = (
        {**dict(side.named_parameters()), **dict(side.named_buffers())}
        for side in (start, end)
    )
    for name, value in own.items():
        is_statistic = name.rpartition(".")[0] in norms and "running" in name
        if name in moving or is_statistic or name.endswith("num_batches_tracked"):
            continue
        if not torch.equal(value, other[name]):
            raise ValueError(
                f"{name} does not move along the curve, but differs between its ends. "
                "Let it move (parameters=, requires_grad), or copy it from one network "
                "to the other and train again."
            )


def _settings(network: nn.Module) -> dict[str, str]:
    """What modules say of themselves, as the stride of a convolution."""
    return {name: module.extra_repr() for name, module in network.named_modules()}


def _described(value: nn.Module | Tensor | str | None) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, nn.Module):
        return type(value).__name__
    return f"{tuple(value.shape)} of {value.dtype} on {value.device}"
