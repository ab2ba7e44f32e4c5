r"""Targets in the units that the likelihood sees, and back.

A density is one of the original targets after the change of variables,

.. math:: \log p(y) = \log p(\tilde y) + \log |d\tilde y / dy|,

for every transform of single numbers, affine or not.

In: a model and targets. Out: the targets of its likelihood and that logarithm. Next:
``held_out`` scores them, ``comparable`` puts evidences side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def original_units(
    model: nn.Module, targets: Tensor, X: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Targets before the outcome transform, and :math:`\log |d\tilde y / d y|`.

    Args:
        model: Perhaps with an ``outcome_transform``.
        targets: As its likelihood sees them, ``n x m``; labels have no transform.
        X: Their inputs, for transforms that depend on them.

    Returns:
        Both ``n x m``, the logarithm in float64.
    """
    if not hasattr(model, "outcome_transform") or not targets.is_floating_point():
        none = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        return targets.detach(), none
    with torch.enable_grad():
        seen = targets.detach().requires_grad_()
        original, _ = model.outcome_transform.untransform(seen, X=X)
        (slope,) = torch.autograd.grad(original.sum(), seen)
    return original.detach(), -slope.abs().double().log()


def likelihood_units(
    model: nn.Module, targets: Tensor, X: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Targets after the outcome transform, and :math:`\log |d\tilde y / d y|`.

    Args:
        model: In eval mode, so that its transform learns nothing.
        targets: In their own units, ``n x m``.
        X: Their transformed inputs, for transforms that depend on them.

    Returns:
        Both ``n x m``, the logarithm in float64.

    Raises:
        ValueError: If the transform does not take such targets.
    """
    if not hasattr(model, "outcome_transform") or not targets.is_floating_point():
        return original_units(model, targets, X)
    transform = model.outcome_transform
    seen = transform(targets.detach(), X=X)[0].detach()
    bad = ~torch.isfinite(seen)
    if bool(bad.any()):
        raise ValueError(
            f"The model's {type(transform).__name__} makes {int(bad.sum())} of "
            f"{seen.numel()} targets infinite or NaN, the first of them "
            f"{float(targets[bad][0]):.4g}. The model gives targets outside of the "
            "transform's range no density: leave them out, or build it with another "
            "outcome_transform."
        )
    return seen, original_units(model, seen, X)[1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, and in the mode of before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def without_outcome_transform(model: nn.Module) -> Iterator[None]:
    """Predictions in the units of the likelihood; the transform is back afterwards."""
    modules = model._modules
    if "outcome_transform" not in modules:
        yield
        return
    before = dict(modules)
    del modules["outcome_transform"]
    try:
        yield
    finally:
        modules.clear()  # the order of modules is that of before, too
        modules.update(before)
