r"""The evidence of an averaged network, and its gradient through the curvature.

.. math::
    E(\eta) = \log p(y \mid \bar f(w)) - \tfrac12 w^\top S^{-1} w
              - \tfrac12 \log\det(I + S^{1/2} M(\eta) S^{1/2})

with the augmentation's parameters :math:`\eta` in :math:`\bar f` and in the curvature
:math:`M = \sum_n \bar J_n^\top R_n R_n^\top \bar J_n`. Sums over data (the whole of M,
Kronecker factors, a diagonal) take two passes, one without a graph and one that
differentiates a minibatch at a time; blocks of the tangent kernel take one pass. The
weights are held fixed, as in all published versions.

In: an :class:`~gpbridge.selection.orbit_jacobians.OrbitNet`, data, hyperparameters.
Out: an :class:`~gpbridge.selection.online_evidence.OnlineEvidence` for the steps of
prior and noise, and the gradient in :math:`\eta`. Next: ``invariance_training``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor

from gpbridge.checks import check_memory
from gpbridge.likelihoods import hessian_root, is_gaussian, log_prob
from gpbridge.linearized.curvature_sums import kronecker_sums, squares_in_basis
from gpbridge.linearized.data_curvature import check_structure_size, unit_roots
from gpbridge.linearized.factored import Basis, FactoredCurvature
from gpbridge.linearized.inference import Exact
from gpbridge.linearized.structures import Diagonal, Kronecker
from gpbridge.linearized.weight_blocks import BlockJacobian
from gpbridge.selection.online_evidence import FullCurvature, OnlineEvidence
from gpbridge.selection.orbit_jacobians import OrbitNet
from gpbridge.selection.tangent_blocks import (
    BlockCurvature,
    GramBlock,
    TangentBlocks,
    gram_block,
    partition,
)
from gpbridge.types import Params

OrbitStructure = Exact | TangentBlocks | Kronecker | Diagonal
CHUNK_BYTES = 256 * 2**20  # of signals and derivatives, graph included


class Measured(NamedTuple):
    """The evidence as a function of prior and noise, and a gradient at their values."""

    evidence: OnlineEvidence
    gradients: Params  # of the evidence in total nats, by parameter of the augmentation


class OrbitData(NamedTuple):
    """Rows and targets, with base noise of each row or that of the augmentation."""

    X: Tensor
    Y: Tensor
    noise: Tensor | None = None  # n x s x k

    def take(self, rows: Tensor | slice) -> OrbitData:
        """Some of the rows."""
        noise = None if self.noise is None else self.noise[rows]
        return OrbitData(self.X[rows], self.Y[rows], noise)


class OrbitCurvature:
    """Measures the evidence of an averaged network at its weights.

    Args:
        net: The network on orbits.
        likelihood: Of the targets.
        structure: ``Exact()``, ``TangentBlocks()``, ``Kronecker()`` or ``Diagonal()``.
        num_rows: The number n of data.

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
    ) -> None:
        self.net, self.likelihood, self.num_rows = net, likelihood, num_rows
        self.is_gaussian = is_gaussian(likelihood)
        self.num_groups = 1 + max(block.group for block in net.blocks)
        index = [torch.full((block.o * block.i,), block.group) for block in net.blocks]
        self.group_of_entry = torch.cat(index).to(next(net.net.parameters()).device)
        self.structure = _resolved(structure, net, num_rows)
        self._check_memory()

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
        if isinstance(self.structure, TangentBlocks):
            curvature, misfit, gradients = self._by_blocks(data, *state, generator)
        else:
            curvature, misfit, gradients = self._by_sums(data, *state)
        evidence = OnlineEvidence(curvature, self._squares(), misfit, self.num_rows)
        return Measured(evidence, gradients)

    # -- blocks of the tangent kernel --------------------------------------------------

    def _by_blocks(self, data, prior_variance, noise_variance, leaves, generator):
        options, m = self.structure, self.net.net.num_outputs
        blocks = partition(self.num_rows, options.block_size, generator)
        total = len(blocks)
        if options.num_blocks is not None and options.num_blocks < total:
            device = generator.device
            order = torch.randperm(total, generator=generator, device=device)
            blocks = [blocks[i] for i in order[: options.num_blocks].tolist()]
        share = total / len(blocks)
        scale = share * (m if options.outputs == "sampled" else 1)
        weights = self._weights(prior_variance, noise_variance)
        kept: list[GramBlock] = []
        misfit, gradients = self._no_misfit(), _zeros(leaves)
        for rows in blocks:
            part = data.take(rows.to(data.X.device))
            chosen = torch.arange(m)
            if options.outputs == "sampled":
                device = generator.device
                chosen = torch.randint(m, (1,), generator=generator, device=device)
            chosen = chosen.to(data.X.device)
            with torch.set_grad_enabled(bool(leaves)):
                value, J = self._jacobian(
                    part, lambda f, c=chosen: self._roots(f)[..., c], leaves
                )
                channels = chosen if self.is_gaussian else 0 * chosen
                joint = options.outputs == "joint"
                gram = gram_block(J, self.net.blocks, self.num_groups, channels, joint)
                if leaves:
                    own = BlockCurvature([gram], scale, False)
                    complexity = 0.5 * own.logdet(prior_variance, weights)
                    fit = share * self._log_likelihood(value, part.Y, noise_variance)
                    _add(gradients, fit - complexity, leaves)
            misfit = misfit + share * self._misfit(value.detach(), part.Y)
            kept.append(gram.detach())
        exact = total == 1 and options.outputs == "joint"
        estimate = options.outputs == "sampled" or share > 1
        bound = not exact and not estimate
        return BlockCurvature(kept, scale, bound), misfit, gradients

    # -- sums over data ----------------------------------------------------------------

    def _by_sums(self, data, prior_variance, noise_variance, leaves):
        channels = self.net.net.num_outputs if self.is_gaussian else 1
        chunks = self._chunks(data)
        if leaves and len(chunks) == 1 and isinstance(self.structure, Exact):
            return self._in_one_pass(data, prior_variance, noise_variance, leaves)
        totals: list[Tensor] = []
        noisy: list[bool] = []
        misfit, gradients = self._no_misfit(), _zeros(leaves)
        with torch.no_grad():
            for part in chunks:
                value, J = self._jacobian(part, self._roots, {})
                noisy = self._channelled(J)
                sums = self._sums(J, channels)
                pairs = zip(totals, sums, strict=True)
                totals = [a + b for a, b in pairs] if totals else sums
                misfit = misfit + self._misfit(value, part.Y)
        curvature = self._curvature(totals, channels)
        if not leaves:
            return curvature, misfit, gradients
        weights = self._weights(prior_variance, noise_variance)
        # At this noise the channels are one sum, that of roots over the noise.
        fixed = [
            torch.tensordot(weights, total, dims=1)[None] if mix else total.clone()
            for total, mix in zip(totals, noisy, strict=True)
        ]
        fixed = [total.requires_grad_() for total in fixed]
        complexity = 0.5 * self._logdet(fixed, prior_variance)
        slopes = torch.autograd.grad(complexity, fixed, materialize_grads=True)

        def roots(f: Tensor) -> Tensor:
            R = self._roots(f)
            return R * weights.sqrt().to(R) if self.is_gaussian else R

        for part in chunks:
            with torch.enable_grad():
                value, J = self._jacobian(part, roots, leaves)
                sums = self._sums(J, 1)
                inner = sum(
                    (slope * part_sum).sum()
                    for slope, part_sum in zip(slopes, sums, strict=True)
                )
                fit = self._log_likelihood(value, part.Y, noise_variance)
                _add(gradients, fit - inner, leaves)
        return curvature, misfit, gradients

    def _in_one_pass(self, data, prior_variance, noise_variance, leaves):
        """Few data: the whole graph is held, and nothing is computed twice."""
        channels = self.net.net.num_outputs if self.is_gaussian else 1
        weights, gradients = (
            self._weights(prior_variance, noise_variance),
            _zeros(leaves),
        )
        with torch.enable_grad():
            value, J = self._jacobian(data, self._roots, leaves)
            (scatter,) = self._sums(J, channels)
            curvature = FullCurvature(scatter, self.group_of_entry)
            complexity = 0.5 * curvature.logdet(prior_variance, weights)
            fit = self._log_likelihood(value, data.Y, noise_variance)
            _add(gradients, fit - complexity, leaves)
        curvature = FullCurvature(scatter.detach(), self.group_of_entry)
        return curvature, self._misfit(value.detach(), data.Y), gradients

    def _sums(self, J: list[BlockJacobian], channels: int) -> list[Tensor]:
        """What the log determinant is a function of, linear in the data."""
        if isinstance(self.structure, Exact):
            rows = torch.cat([part.dense().flatten(2) for part in J], -1).double()
            rows = rows.movedim(1, 0) if channels > 1 else rows.flatten(0, 1)[None]
            return [rows.mT @ rows]
        if isinstance(self.structure, Diagonal):
            return [squares_in_basis(part, channels) for part in J]
        sharing = self.structure.sharing
        return [t for part in J for t in kronecker_sums(part, channels, sharing)]

    def _channelled(self, J: list[BlockJacobian]) -> list[bool]:
        """Which of the sums have a channel per output."""
        if not isinstance(self.structure, Kronecker):
            return [True] * (1 if isinstance(self.structure, Exact) else len(J))
        return [
            part.columns is not None or is_signal
            for part in J
            for is_signal in (False, True, False)
        ]

    def _logdet(self, totals: list[Tensor], prior_variance: Tensor) -> Tensor:
        one = prior_variance.new_ones(1)
        if not isinstance(self.structure, Kronecker):
            return self._curvature(totals, 1).logdet(prior_variance, one)
        logs = []
        for k, block in enumerate(self.net.blocks):
            A, G, count = totals[3 * k : 3 * k + 3]
            a, g = torch.linalg.eigvalsh(A[0]), torch.linalg.eigvalsh(G[0])
            products = g.clamp_min(0.0)[:, None] * a.clamp_min(0.0)
            tiny = torch.finfo(products.dtype).tiny
            scaled = prior_variance[block.group] * products / count.clamp_min(tiny)
            logs.append(scaled.log1p().sum())
        return torch.stack(logs).sum()

    def _curvature(
        self, totals: list[Tensor], channels: int
    ) -> FullCurvature | FactoredCurvature:
        if isinstance(self.structure, Exact):
            return FullCurvature(totals[0], self.group_of_entry)
        blocks, sizes = self.net.blocks, self.net.sizes
        if isinstance(self.structure, Diagonal):
            bases = [Basis(None, None)] * len(blocks)
            return FactoredCurvature(sizes, blocks, bases, totals, True)
        bases, values = [], []
        for k in range(len(blocks)):
            A, G, count = totals[3 * k : 3 * k + 3]
            left = torch.linalg.eigh(G.sum(0)).eigenvectors
            right = torch.linalg.eigh(A.sum(0)).eigenvectors
            bases.append(Basis(left, right))
            g = (left * (G @ left)).sum(-2).clamp_min(0.0)
            a = (right * (A @ right)).sum(-2).clamp_min(0.0)
            count = count.clamp_min(torch.finfo(g.dtype).tiny)
            values.append(g[..., :, None] * a[..., None, :] / count[:, None, None])
        return FactoredCurvature(sizes, blocks, bases, values, False)

    # -- what both have in common ------------------------------------------------------

    def _jacobian(self, part: OrbitData, roots, leaves: Params):
        reduce = isinstance(self.structure, Kronecker)
        return self.net.jacobian(part.X, roots, leaves, part.noise, reduce)

    def _roots(self, f: Tensor) -> Tensor:
        return unit_roots(f) if self.is_gaussian else hessian_root(self.likelihood, f)

    def _weights(self, like: Tensor, noise_variance: Tensor | None) -> Tensor:
        if noise_variance is None:
            return like.new_ones(1)
        return noise_variance.detach().reciprocal()

    def _no_misfit(self) -> Tensor:
        shape = (self.net.net.num_outputs,) if self.is_gaussian else ()
        device = self.group_of_entry.device
        return torch.zeros(shape, dtype=torch.float64, device=device)

    def _misfit(self, value: Tensor, Y: Tensor) -> Tensor:
        if self.is_gaussian:
            return (Y - value).double().square().sum(0)
        return log_prob(self.likelihood, value.double(), Y).sum()

    def _log_likelihood(
        self, value: Tensor, Y: Tensor, noise_variance: Tensor | None
    ) -> Tensor:
        """Up to a constant."""
        misfit = self._misfit(value, Y)
        if noise_variance is None:
            return misfit
        return -0.5 * (misfit / noise_variance.detach()).sum()

    def _squares(self) -> Tensor:
        params = self.net.net.params
        found = [torch.zeros((), dtype=torch.float64)] * self.num_groups
        for block in self.net.blocks:
            for name in block.names:
                square = params[name].detach().double().square().sum()
                found[block.group] = found[block.group].to(square) + square
        return torch.stack(found)

    def _chunks(self, data: OrbitData) -> list[OrbitData]:
        step = max(1, CHUNK_BYTES // self._bytes_per_row(data.X))
        starts = range(0, self.num_rows, step)
        return [data.take(slice(start, start + step)) for start in starts]

    def _bytes_per_row(self, X: Tensor) -> int:
        with torch.no_grad():
            _, J = self._jacobian(OrbitData(X[:1], X[:1]), self._roots, {})
        numbers = 0
        for part in J:
            held = [part.columns] if part.signal is None else [part.inputs, part.signal]
            numbers += sum(t.numel() for t in held)
            if not isinstance(self.structure, Kronecker):
                n, r = held[-1].shape[:2]
                numbers += r * part.dense()[0, 0].numel()
        return 4 * numbers * X.element_size()  # with a graph

    def _check_memory(self) -> None:
        net, options = self.net, self.structure
        p, m = net.num_params, net.net.num_outputs
        if isinstance(options, Exact):
            channels = m if self.is_gaussian else 1
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
            gram = 8.0 * self.num_groups * b**2 * r * joint
            gram *= min(options.num_blocks or self.num_rows, -(-self.num_rows // b))
            rows = 4.0 * net.net.dtype.itemsize * b * r * p
            check_memory(
                f"A block of {b} data with {r} outputs and {p} weights",
                gram + rows,
                options.memory_budget,
                "Choose a smaller block_size, outputs='sampled', or Kronecker().",
            )
        else:
            check_structure_size(net.blocks, options, m if self.is_gaussian else 1)


def _resolved(
    structure: OrbitStructure, net: OrbitNet, num_rows: int
) -> OrbitStructure:
    """The structure, Exact in the smaller of its two spaces."""
    if not isinstance(structure, OrbitStructure):
        raise TypeError(
            "structure must be Exact(...), Kronecker(...) or Diagonal(...) of "
            "gpbridge.linearized, or TangentBlocks(...) of gpbridge.selection, but is "
            f"{type(structure).__name__}."
        )
    special = getattr(structure, "curvature", "ggn") != "ggn"
    if special or getattr(structure, "eigenvalue_correction", False):
        raise ValueError(
            "learn_invariance differentiates the Gauss-Newton curvature: pass a "
            "structure with curvature='ggn', without eigenvalue_correction, whose "
            "basis has no gradient."
        )
    if not isinstance(structure, Exact):
        return structure
    if structure.space == "matrix_free":
        raise ValueError(
            "structure must not be Exact(space='matrix_free'), which has no log "
            "determinant. Choose space='auto', or TangentBlocks()."
        )
    rows = num_rows * net.net.num_outputs
    wide = structure.space == "auto" and net.num_params > rows
    if structure.space == "function" or wide:
        budget = structure.memory_budget
        return TangentBlocks(block_size=num_rows, memory_budget=budget)
    return structure


def _zeros(leaves: Params) -> Params:
    return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}


def _add(gradients: Params, objective: Tensor, leaves: Params) -> None:
    found = torch.autograd.grad(
        objective, list(leaves.values()), materialize_grads=True
    )
    for name, gradient in zip(leaves, found, strict=True):
        gradients[name] += gradient
