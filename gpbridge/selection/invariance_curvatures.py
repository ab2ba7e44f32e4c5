"""The curvatures that a run of invariance learning measures its evidence by.

In: an averaged network, structures for the steps of the law and of the prior. Out:
:class:`InvarianceCurvatures`, each of them on frozen copies of the weights.
Next: ``invariance_training`` measures by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor

from gpbridge.augmentation.averaged import AveragedNetwork
from gpbridge.selection.orbit_curvature import Measured, OrbitCurvature, OrbitStructure
from gpbridge.selection.orbit_jacobians import OrbitNet
from gpbridge.selection.orbit_likelihood import OrbitData
from gpbridge.selection.tangent_blocks import TangentBlocks
from gpbridge.types import Params


class InvarianceCurvatures:
    """Curvatures for the steps of the law, for those of the prior, and for the end.

    All are built at once, so that what does not fit into memory is refused before
    training: blocks of the end may be larger than those of training.

    Args:
        network: The averaged network.
        groups: Names of its weights that share a prior variance.
        likelihood: Of the targets.
        first: Some inputs, to look at the network.
        num_rows: The number n of data.
        structure: Of the law's.
        prior_structure: Of the prior's; None is that of the law.

    Attributes:
        law: Measures the gradient of the law.
        prior: Measures the evidence that prior and noise ascend.
        whole: As ``prior``, by all blocks and outputs.
    """

    def __init__(
        self,
        network: AveragedNetwork,
        groups: Sequence[Sequence[str]],
        likelihood: Likelihood,
        first: Tensor,
        num_rows: int,
        structure: OrbitStructure,
        prior_structure: OrbitStructure | None,
    ) -> None:
        self.network = network
        names = [[n.removeprefix("network.") for n in group] for group in groups]

        def build(structure: OrbitStructure, called: str) -> OrbitCurvature:
            inner, law = network.network, network.augmentation
            net = OrbitNet(inner, law, names, network.input_shape, first)
            dtype = getattr(structure, "jacobian_dtype", None)
            if dtype is not None:
                net.net.to(dtype)
            return OrbitCurvature(net, likelihood, structure, num_rows, called)

        called = "structure"
        self.law = self.prior = build(structure, called)
        if prior_structure is not None:
            structure, called = prior_structure, "prior_structure"
            self.prior = build(structure, called)
        self.whole = self.prior
        if isinstance(structure, TangentBlocks):
            sampled = structure.outputs == "sampled"
            outputs = "independent" if sampled else structure.outputs
            whole = replace(structure, outputs=outputs, num_blocks=None)
            self.whole = build(whole, called)

    def measure(
        self,
        curvature: OrbitCurvature,
        data: OrbitData,
        prior_variance: Tensor,
        noise_variance: Tensor | None,
        values: Params,
        generator: Generator,
    ) -> Measured:
        """One of the three, at the weights and the law of the moment.

        Args:
            curvature: Which.
            data: All rows, with the orbits of this evaluation.
            prior_variance: One per group.
            noise_variance: One per output, or None.
            values: Parameters of the augmentation to differentiate in; may be empty.
            generator: Of partitions and of drawn blocks and outputs.

        Returns:
            The evidence and its gradient.
        """
        curvature.net.augmentation = self.network.augmentation
        frozen = curvature.net.net.network.state_dict()
        with torch.no_grad():
            for name, value in self.network.network.state_dict().items():
                frozen[name].copy_(value)
        state = prior_variance, noise_variance, values
        return curvature.measure(data, *state, generator)

    def block_size(self, curvature: OrbitCurvature) -> int:
        """Data of a block of the tangent kernel; of all where there are no blocks."""
        structure, n = curvature.structure, curvature.num_rows
        is_blocks = isinstance(structure, TangentBlocks)
        return min(n, structure.block_size) if is_blocks else n
