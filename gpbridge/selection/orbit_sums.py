r"""The curvature of an averaged network as a sum over its data.

The whole of M, Kronecker factors or a diagonal are sums over data of which the log
determinant is a function. One pass sums them up without a graph; a second one
differentiates a minibatch at a time, each contracted with the slope of the log
determinant in the sum, so that memory does not grow with the data. Few data take one
pass, whose graph is held.

In: an :class:`~gpbridge.selection.orbit_likelihood.OrbitLikelihood`, data, prior and
noise. Out: the curvature as a function of prior and noise, the misfit, and the gradient
of the evidence in the augmentation's parameters. Next: ``orbit_curvature``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpbridge.linearized.curvature_sums import kronecker_sums, squares_in_basis
from gpbridge.linearized.factored import Basis, FactoredCurvature
from gpbridge.linearized.inference import Exact
from gpbridge.linearized.structures import Diagonal, Kronecker
from gpbridge.linearized.weight_blocks import BlockJacobian
from gpbridge.selection.online_evidence import FullCurvature
from gpbridge.selection.orbit_likelihood import (
    OrbitData,
    OrbitLikelihood,
    add_gradients,
    no_gradients,
)
from gpbridge.types import Params

CHUNK_BYTES = 256 * 2**20  # of signals and derivatives, graph included

SummedStructure = Exact | Kronecker | Diagonal
SummedCurvature = FullCurvature | FactoredCurvature


class OrbitSums:
    """Measures the evidence of an averaged network by sums over data.

    Args:
        model: What data say.
        structure: ``Exact()``, ``Kronecker()`` or ``Diagonal()``.
    """

    def __init__(self, model: OrbitLikelihood, structure: SummedStructure) -> None:
        self.model, self.structure = model, structure
        blocks = model.net.blocks
        index = [torch.full((block.o * block.i,), block.group) for block in blocks]
        self.group_of_entry = torch.cat(index).to(model.device)

    def measure(
        self,
        data: OrbitData,
        prior_variance: Tensor,
        noise_variance: Tensor | None,
        leaves: Params,
    ) -> tuple[SummedCurvature, Tensor, Params]:
        """Pass over the data.

        Args:
            data: All rows, with the orbits of this evaluation.
            prior_variance: One per group, float64; the gradient is taken there.
            noise_variance: One per output, or None.
            leaves: Parameters of the augmentation, with ``requires_grad``.

        Returns:
            The curvature, the misfit, and gradients by name.
        """
        model, channels = self.model, self.model.channels
        chunks = self._chunks(data)
        if leaves and len(chunks) == 1 and isinstance(self.structure, Exact):
            return self._in_one_pass(data, prior_variance, noise_variance, leaves)
        totals: list[Tensor] = []
        noisy: list[bool] = []
        misfit, gradients = model.no_misfit(), no_gradients(leaves)
        with torch.no_grad():
            for part in chunks:
                value, J = self._jacobian(part, {})
                noisy = self._channelled(J)
                sums = self._sums(J, channels)
                pairs = zip(totals, sums, strict=True)
                totals = [a + b for a, b in pairs] if totals else sums
                misfit = misfit + model.misfit(value, part.Y)
        curvature = self._curvature(totals, channels)
        if not leaves:
            return curvature, misfit, gradients
        weights = model.weights(prior_variance, noise_variance)
        # At this noise the channels are one sum, that of roots over the noise.
        fixed = [
            torch.tensordot(weights, total, dims=1)[None] if mix else total.clone()
            for total, mix in zip(totals, noisy, strict=True)
        ]
        fixed = [total.requires_grad_() for total in fixed]
        complexity = 0.5 * self._logdet(fixed, prior_variance)
        slopes = torch.autograd.grad(complexity, fixed, materialize_grads=True)

        def roots(f: Tensor) -> Tensor:
            R = model.roots(f)
            return R * weights.sqrt().to(R) if model.is_gaussian else R

        for part in chunks:
            with torch.enable_grad():
                value, J = self._jacobian(part, leaves, roots)
                sums = self._sums(J, 1)
                inner = sum(
                    (slope * part_sum).sum()
                    for slope, part_sum in zip(slopes, sums, strict=True)
                )
                fit = model.log_likelihood(value, part.Y, noise_variance)
                add_gradients(gradients, fit - inner, leaves)
        return curvature, misfit, gradients

    def _in_one_pass(self, data, prior_variance, noise_variance, leaves):
        """Few data: the whole graph is held, and nothing is computed twice."""
        model, gradients = self.model, no_gradients(leaves)
        weights = model.weights(prior_variance, noise_variance)
        with torch.enable_grad():
            value, J = self._jacobian(data, leaves)
            (scatter,) = self._sums(J, model.channels)
            curvature = FullCurvature(scatter, self.group_of_entry)
            complexity = 0.5 * curvature.logdet(prior_variance, weights)
            fit = model.log_likelihood(value, data.Y, noise_variance)
            add_gradients(gradients, fit - complexity, leaves)
        curvature = FullCurvature(scatter.detach(), self.group_of_entry)
        return curvature, model.misfit(value.detach(), data.Y), gradients

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
        for k, block in enumerate(self.model.net.blocks):
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
        blocks, sizes = self.model.net.blocks, self.model.net.sizes
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

    def _jacobian(self, part: OrbitData, leaves: Params, roots=None):
        is_kronecker = isinstance(self.structure, Kronecker)
        return self.model.jacobian(part, leaves, roots, reduce=is_kronecker)

    def _chunks(self, data: OrbitData) -> list[OrbitData]:
        is_kronecker = isinstance(self.structure, Kronecker)
        row = self.model.bytes_per_row(data.X, reduce=is_kronecker)
        step = max(1, CHUNK_BYTES // row)
        starts = range(0, len(data.X), step)
        return [data.take(slice(start, start + step)) for start in starts]
