"""A GP and the law of its transformations, as the best of several ascents left them.

In: a fitted model, values by name, one record for each ascent. Out:
:class:`KernelInvarianceFit`. Next: its ``model`` predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gpytorch.mlls import MarginalLogLikelihood
from gpytorch.models import GP
from torch import Tensor

from gpbridge.selection.scan import ScanResult


class InvarianceStart(NamedTuple):
    """Where one ascent began and ended, by name; objective in total nats.

    The objective is the evidence, or its lower bound, plus the log density of the
    hyperpriors; minus infinity after a failure, with an empty ``end``.
    """

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    objective: float


@dataclass(frozen=True, repr=False)
class KernelInvarianceFit:
    """A GP and the law of its transformations at the best optimum found.

    Attributes:
        model: The fitted copy, in eval mode.
        objective: The trained copy of the bound, of a sparse GP; else None.
        learnt: Free parameters of the law by name, in natural units, as ``bound``.
            With several laws in one kernel the names have the paths of the model.
        evidence: Total nats without hyperpriors; of a sparse GP its lower bound, with
            the draws of the law and not those of a minibatch.
        starts: One record for each ascent of everything together: the best maxima of
            the curve, the highest first, or all starts in their order.
        curve: The evidence along the starts, everything else refitted, where a number
            was scanned; else None.
    """

    model: GP
    objective: MarginalLogLikelihood | None
    learnt: dict[str, Tensor]
    evidence: float
    starts: tuple[InvarianceStart, ...]
    curve: ScanResult | None

    def __repr__(self) -> str:
        """What was learnt, and from how many starts."""
        return (
            f"{type(self).__name__}({type(self.model).__name__}, "
            f"{_shown(self.learnt)}; {len(self.starts)} ascents, "
            f"evidence {self.evidence:.5g} nats)"
        )


def _shown(values: Mapping[str, Tensor]) -> str:
    return ", ".join(
        f"{name} {[round(x, 4) for x in value.flatten().tolist()]}"
        for name, value in values.items()
    )
