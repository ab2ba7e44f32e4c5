"""A network and the law of its augmentation, as the evidence left them.

In: the state of a run. Out: :class:`InvarianceFit`. Next: its ``model`` is a Gaussian
process; its ``augmentation`` can be learnt on.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor

from gpbridge.augmentation.base import Augmentation, natural_name
from gpbridge.selection.invariance_training import InvarianceTraining
from gpbridge.selection.online import OnlineFit
from gpbridge.types import Evidence


@dataclass(frozen=True, repr=False)
class InvarianceFit(OnlineFit):
    """A network and the law of its augmentation, learnt together.

    Attributes:
        network: The trained copy, an :class:`~gpbridge.augmentation.AveragedNetwork` of
            rows ``n x d`` in eval mode. Predictions average over orbits.
        learnt: Parameters of the augmentation by name, in natural units, as ``bound``.
        block_size: Data of the blocks of which the evidence was made; the number of
            all data where the log determinant has no blocks. Evidences of different
            block sizes are not comparable.
    """

    learnt: dict[str, Tensor]
    block_size: int

    @property
    def augmentation(self) -> Augmentation:
        """A copy of the law, which can be learnt on from here."""
        law = copy.deepcopy(self.network.augmentation)
        for name, parameter in law.named_parameters():
            parameter.requires_grad_(natural_name(name) in self.learnt)
        return law

    def __repr__(self) -> str:
        """What was learnt, and the evidence with its block size."""
        found = {
            name: [round(x, 4) for x in value.flatten().tolist()]
            for name, value in self.learnt.items()
        }
        value = "unknown"
        if self.evidence is not None:
            bound = "at least " if self.evidence.lower_bound else ""
            value = f"{bound}{float(self.evidence.value):.5g} nats"
        shown = ", ".join(f"{name} {numbers}" for name, numbers in found.items())
        return (
            f"{type(self).__name__}({type(self.network.network).__name__}, "
            f"{type(self.augmentation).__name__}, {shown or 'nothing learnt'}; "
            f"{len(self.losses)} epochs, {len(self.steps)} updates; evidence {value}, "
            f"block size {self.block_size})"
        )


def invariance_fit(
    training: InvarianceTraining, evidence: Evidence | None
) -> InvarianceFit:
    """The result of a run, with the evidence of its end if that is known."""
    return InvarianceFit(
        training.network,
        training.trained_likelihood(),
        training.groups,
        training.prior_variance,
        training.noise_variance,
        evidence,
        training.losses,
        training.steps,
        None,
        training.natural_values(),
        training.block_size,
    )
