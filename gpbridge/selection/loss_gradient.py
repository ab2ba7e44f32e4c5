"""A training loss over batches: its value, checked, and its gradient.

In: a loss as a function of (params, hparams), or of (params, hparams, batch) with
re-iterable batches. Out: means over the rows of all batches, one batch in memory at a
time. Next: ``loss_curvature`` has the second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpbridge.checks import ShapeError
from gpbridge.types import Params

Loss = Callable[..., Tensor]
"""``loss(params, hparams)`` or ``loss(params, hparams, batch)``, a scalar."""


def value_and_gradient(
    loss: Loss,
    params: Params,
    hparams: Params,
    batches: Iterable[Any] | None = None,
    name: str = "train_loss",
    wrt_hparams: bool = False,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Value and gradients; None where the loss does not read a tensor.

    Args:
        loss: The loss.
        params: Where to evaluate it.
        hparams: The hyperparameters.
        batches: Re-iterable batches, or None.
        name: Of the loss, for messages.
        wrt_hparams: Whether to differentiate in the hyperparameters too.

    Returns:
        The loss, its gradients in the parameters, and those in the hyperparameters.
    """
    w = {k: p.detach().requires_grad_() for k, p in params.items()}
    h = {k: p.detach().requires_grad_(wrt_hparams) for k, p in hparams.items()}
    wanted = [*w.values(), *(h.values() if wrt_hparams else ())]

    def one(*batch: Any) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            value = evaluated(loss, w, h, batch, name)
            if not value.requires_grad:
                return (value, *[None] * len(wanted))
            found = torch.autograd.grad(value, wanted, allow_unused=True)
        return (value.detach(), *found)

    value, *found = mean_over(batches, one, name)
    return value, found[: len(w)], found[len(w) :]


def evaluated(
    loss: Loss, params: Params, hparams: Params, batch: Sequence[Any], name: str
) -> Tensor:
    """The loss, checked to be a scalar; a wrong name is explained."""
    try:
        value = loss(params, hparams, *batch)
    except KeyError as error:
        raise ValueError(
            f"{name} looked up {error}, which is neither in params "
            f"({', '.join(params)}) nor in hparams ({', '.join(hparams)}). Names must "
            "be the same in the losses and in the dictionaries."
        ) from error
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must return a tensor, but returned {type(value).__name__}."
        )
    if value.numel() != 1:
        raise ShapeError(
            f"{name} must return one number, but returned shape {tuple(value.shape)}. "
            "Take the mean over data."
        )
    return value.reshape(())


def mean_over(
    batches: Iterable[Any] | None,
    function: Callable[..., Sequence[Tensor | None]],
    name: str = "train_loss",
) -> Sequence[Tensor | None]:
    """Mean over batches, weighted by their rows, of a tuple of tensors or None."""
    if batches is None:
        return function()
    total: list[Tensor | None] | None = None
    count = 0
    for batch in batches:
        rows = _rows(batch)
        parts = function(batch)
        if total is None:
            total = [None] * len(parts)
        for i, part in enumerate(parts):
            if part is not None:
                total[i] = rows * part if total[i] is None else total[i] + rows * part
        count += rows
    if not count:
        raise ValueError(
            f"The batches of {name} have no rows. A generator that was used up has "
            "none left: pass a list or a loader, which every product passes over anew."
        )
    return [None if part is None else part / count for part in total]


def _rows(batch: Any) -> int:
    first = batch
    while not isinstance(first, Tensor):
        if isinstance(first, dict) and first:
            first = next(iter(first.values()))
        elif isinstance(first, list | tuple) and first:
            first = first[0]
        else:
            raise TypeError(
                "A batch must be a tensor, or a tuple or dict that begins with one, "
                f"but holds {type(first).__name__}."
            )
    return len(first)
