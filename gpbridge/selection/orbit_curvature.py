r"""The evidence of an averaged network, and its gradient through the curvature.

.. math::
    E(\eta) = \log p(y \mid \bar f(w)) - \tfrac12 w^\top S^{-1} w
              - \tfrac12 \log\det(I + S^{1/2} M(\eta) S^{1/2})

with the augmentation's parameters :math:`\eta` in :math:`\bar f` and in the curvature
:math:`M = \sum_n \bar J_n^\top R_n R_n^\top \bar J_n`, summed over data
(``orbit_sums``) or by blocks of the tangent kernel (``orbit_blocks``). The weights are
held fixed, as in all published versions.

In: an :class:`~gpbridge.selection.orbit_jacobians.OrbitNet`, data, hyperparameters.
Out: an :class:`~gpbridge.selection.online_evidence.OnlineEvidence` for the steps of
prior and noise, and the gradient in :math:`\eta`. Next: ``invariance_training``.
"""

from __future__ import annotations

from typing import NamedTuple

from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor

from gpbridge.checks import check_memory
from gpbridge.linearized.data_curvature import check_structure_size
from gpbridge.linearized.inference import Exact
from gpbridge.linearized.structures import Diagonal, Kronecker
from gpbridge.selection.online_evidence import OnlineEvidence
from gpbridge.selection.orbit_blocks import measure_blocks
from gpbridge.selection.orbit_jacobians import OrbitNet
from gpbridge.selection.orbit_likelihood import OrbitData, OrbitLikelihood
from gpbridge.selection.orbit_sums import OrbitSums
from gpbridge.selection.tangent_blocks import TangentBlocks
from gpbridge.types import Params

OrbitStructure = Exact | TangentBlocks | Kronecker | Diagonal


class Measured(NamedTuple):
    """The evidence as a function of prior and noise, and a gradient at their values."""

    evidence: OnlineEvidence
    gradients: Params  # of the evidence in total nats, by parameter of the augmentation


class OrbitCurvature:
    """Measures the evidence of an averaged network at its weights.

    Args:
        net: The network on orbits.
        likelihood: Of the targets.
        structure: ``Exact()``, ``TangentBlocks()``, ``Kronecker()`` or ``Diagonal()``.
        num_rows: The number n of data.
        name: What messages call the structure.

    Raises:
        TypeError: If the structure is another.
        ValueError: If it has an option that has no gradient.
        MemoryError: If it does not fit into its budget.
    """

    def __init__(
        self,
        net: OrbitNet,
        likelihood: Likelihood,
        structure: OrbitStructure,
        num_rows: int,
        name: str = "structure",
    ) -> None:
        self.net, self.num_rows = net, num_rows
        self.model = OrbitLikelihood(net, likelihood)
        self.structure = _resolved(structure, net, num_rows, name)
        self._check_memory()
        self._sums = None
        if not isinstance(self.structure, TangentBlocks):
            self._sums = OrbitSums(self.model, self.structure)

    def measure(
        self,
        data: OrbitData,
        prior_variance: Tensor,
        noise_variance: Tensor | None,
        values: Params,
        generator: Generator,
    ) -> Measured:
        """Pass over the data.

        Args:
            data: All rows, with the orbits of this evaluation.
            prior_variance: One per group, float64; the gradient is taken there.
            noise_variance: One per output, or None.
            values: Parameters of the augmentation to differentiate in; may be empty.
            generator: Of partitions and of drawn blocks and outputs.

        Returns:
            The evidence and its gradient.
        """
        leaves = {k: v.detach().clone().requires_grad_() for k, v in values.items()}
        state = prior_variance.detach(), noise_variance, leaves
        if self._sums is None:
            found = measure_blocks(self.model, self.structure, data, *state, generator)
        else:
            found = self._sums.measure(data, *state)
        curvature, misfit, gradients = found
        squares = self.model.squares()
        evidence = OnlineEvidence(curvature, squares, misfit, self.num_rows)
        return Measured(evidence, gradients)

    def _check_memory(self) -> None:
        net, options = self.net, self.structure
        p, m = net.num_params, net.net.num_outputs
        if isinstance(options, Exact):
            channels = self.model.channels
            check_memory(
                f"The full curvature of {p} weights",
                8.0 * p**2 * (channels + 4),
                options.memory_budget,
                "Choose TangentBlocks(), Kronecker() or Diagonal().",
            )
        elif isinstance(options, TangentBlocks):
            b = min(options.block_size, self.num_rows)
            r = 1 if options.outputs == "sampled" else m
            joint = r if options.outputs == "joint" else 1
            gram = 8.0 * self.model.num_groups * b**2 * r * joint
            gram *= min(options.num_blocks or self.num_rows, -(-self.num_rows // b))
            rows = b * float(self.model.bytes_per_row(net.example, r))
            check_memory(
                f"A block of {b} data with {r} outputs and {p} weights",
                gram + rows,
                options.memory_budget,
                "Choose a smaller block_size, outputs='sampled', or Kronecker().",
            )
        else:
            check_structure_size(net.blocks, options, self.model.channels)


def _resolved(
    structure: OrbitStructure, net: OrbitNet, num_rows: int, name: str
) -> OrbitStructure:
    """The structure, Exact in the smaller of its two spaces."""
    if not isinstance(structure, OrbitStructure):
        raise TypeError(
            f"{name} must be Exact(...), Kronecker(...) or Diagonal(...) of "
            "gpbridge.linearized, or TangentBlocks(...) of gpbridge.selection, but is "
            f"{type(structure).__name__}."
        )
    special = getattr(structure, "curvature", "ggn") != "ggn"
    if special or getattr(structure, "eigenvalue_correction", False):
        raise ValueError(
            f"{name} must have curvature='ggn' and no eigenvalue_correction: "
            "learn_invariance differentiates the Gauss-Newton curvature, and the basis "
            "of the correction has no gradient."
        )
    if not isinstance(structure, Exact):
        return structure
    if structure.space == "matrix_free":
        raise ValueError(
            f"{name} must not be Exact(space='matrix_free'), which has no log "
            "determinant. Choose space='auto', or TangentBlocks()."
        )
    rows = num_rows * net.net.num_outputs
    wide = structure.space == "auto" and net.num_params > rows
    if structure.space == "function" or wide:
        budget = structure.memory_budget
        return TangentBlocks(block_size=num_rows, memory_budget=budget)
    return structure
