"""The optimiser of weights whose prior is learnt: Adam, or what the user builds.

In: a function of parameters, or None. Out: an optimiser that moves all of them and adds
no decay of its own. Next: ``online_training``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gpbridge.checks import check_positive

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def weight_optimizer(
    factory: OptimizerFactory | None, weights: list[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """Build the optimiser and check it.

    Args:
        factory: Of the user, or None for Adam.
        weights: What it moves.
        learning_rate: Of Adam.

    Returns:
        The optimiser.

    Raises:
        TypeError: If it is none.
        ValueError: If it moves other weights, or decays them.
    """
    if factory is None:
        # One fused kernel per step.
        fused = all(p.device.type in ("cpu", "cuda") for p in weights)
        return torch.optim.Adam(weights, lr=learning_rate, fused=fused)
    optimizer = factory(weights)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a function of a list of parameters that returns a "
            "torch.optim.Optimizer, such as lambda params: torch.optim.SGD(params, "
            f"lr=0.1), but returned {type(optimizer).__name__}."
        )
    groups = optimizer.param_groups
    moved = {id(p) for group in groups for p in group["params"]}
    if moved != {id(p) for p in weights}:
        raise ValueError(
            f"The optimizer moves {len(moved)} tensors, but the network has "
            f"{len(weights)} to train. Pass it all of the parameters that it is given."
        )
    decay = max(group.get("weight_decay", 0.0) for group in groups)
    if decay:
        raise ValueError(
            f"The optimizer has weight_decay={decay}, which would be a second "
            "prior beside the one that is learnt. Leave it at 0."
        )
    check_positive(learning_rate=min(group["lr"] for group in groups))
    return optimizer
