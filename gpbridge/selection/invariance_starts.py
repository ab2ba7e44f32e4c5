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
from gpbridge.checks import NotConvergedWarning, check_sequence, warn_user
from gpbridge.dnn.divergence import DivergedError
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
        One fit per start that did not fail, that of the largest evidence first.

    Raises:
        ValueError: If there are no starts, one of them is outside of its cap, or
            nothing of the augmentation is learnt.
        TypeError: If the augmentation has no half-width, starts are no sequence, or
            an option is of one run.
        DivergedError: If every start fails; its ``last_good`` is that of the first.

    Warns:
        NotConvergedWarning: For each start that fails; the others go on.
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
    laws = [_started(augmentation, k, start) for k, start in enumerate(starts)]
    fits: list[InvarianceFit] = []
    failures: list[DivergedError] = []
    for number, law in enumerate(laws):
        own = options | {"generator": Generator().manual_seed(seed)}
        try:
            fits.append(learn_invariance(network, data, law, likelihood, **own))
        except DivergedError as error:
            failures.append(error)
            warn_user(
                f"Start {number} of {len(laws)} failed: {error}", NotConvergedWarning
            )
    if not fits:
        first = failures[0]
        raise DivergedError(
            f"All {len(laws)} starts failed. The first said: {first}", first.last_good
        ) from first
    return sorted(fits, key=lambda fit: -float(fit.evidence.value))


def _started(
    augmentation: Augmentation, number: int, start: float | Sequence[float] | Tensor
) -> Augmentation:
    """A copy with this half-width."""
    law = copy.deepcopy(augmentation)
    try:
        law.bound = start
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"Start {number} cannot be: {error}") from error
    return law
