"""The optimiser of weights whose prior is learnt: Adam, or what the user builds.

In: a function of parameters, or None. Out: an optimiser that moves all of them and adds
no decay of its own. Next: ``online_training``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from gpbridge.checks import check_positive
from gpbridge.dnn.training import adam

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
        TypeError: If it is none, or one that evaluates the loss by itself.
        ValueError: If it moves other weights, or decays them.
    """
    if factory is None:
        return adam([(weights, learning_rate)])
    optimizer = factory(weights)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a function of a list of parameters that returns a "
            "torch.optim.Optimizer, such as lambda params: torch.optim.SGD(params, "
            f"lr=0.1), but returned {type(optimizer).__name__}."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} asks for a closure that evaluates the loss "
            "again, but training takes one step per batch. Pass an optimizer that "
            "steps along a gradient, such as SGD or Adam."
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
