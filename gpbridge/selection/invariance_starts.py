"""Learning an invariance from several starts, ordered by evidence.

In: half-widths, and what ``learn_invariance`` takes. Out: one fit per start.
Next: the first of them, or a table of all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor, nn

from gpbridge.augmentation.base import Augmentation
from gpbridge.checks import check_sequence
from gpbridge.selection.invariance import learn_invariance
from gpbridge.selection.invariance_fit import InvarianceFit


def learn_invariance_from(
    starts: Iterable[float | Sequence[float] | Tensor],
    network: nn.Module,
    data: tuple[Tensor, Tensor],
    augmentation: Augmentation,
    likelihood: Likelihood | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> list[InvarianceFit]:
    """Learn from several half-widths, since the evidence has several optima in them.

    All runs have the same seed, so that their evidences are of the same draws.

    Args:
        starts: Half-widths, one number or one for each parameter of the augmentation.
        network: As for :func:`learn_invariance`.
        data: As there.
        augmentation: With a ``bound``.
        likelihood: As there.
        seed: Of every run.
        **options: As there; no ``generator`` and no ``checkpoint``, which are of one
            run.

    Returns:
        One fit per start, that of the largest evidence first.

    Raises:
        ValueError: If there are no starts, or nothing of the augmentation is learnt.
        TypeError: If the augmentation has no half-width, starts are no sequence, or an
            option is of one run.
    """
    check_sequence(starts=starts)
    starts = list(starts)
    if not starts:
        raise ValueError("starts must name at least one half-width.")
    if not hasattr(augmentation, "bound"):
        raise TypeError(
            f"{type(augmentation).__name__} has no bound to start from. Call "
            "learn_invariance."
        )
    if not any(p.requires_grad for p in augmentation.parameters()):
        raise ValueError(
            f"{type(augmentation).__name__} has no parameter with requires_grad, so "
            "that there is nothing to learn from several starts. Call "
            "requires_grad_(True) on it."
        )
    alone = {"checkpoint", "generator"} & set(options)
    if alone:
        raise TypeError(
            f"{sorted(alone)} are of one run, but there are {len(starts)}. Pass seed=, "
            "or call learn_invariance for each start."
        )
    fits = []
    for start in starts:
        own = copy.deepcopy(augmentation)
        own.bound = start
        generator = Generator().manual_seed(seed)
        fits.append(
            learn_invariance(
                network, data, own, likelihood, generator=generator, **options
            )
        )
    return sorted(fits, key=lambda fit: -float(fit.evidence.value))
