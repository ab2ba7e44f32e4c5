r"""A Gaussian over the weights of a network with a structured precision.

.. math::
    w \sim N(\mu, H^{-1}), \qquad H = S^{-1} + M

with a diagonal S, and a curvature M that is a Kronecker product for each layer, a
diagonal, or of low rank. The posterior of one data set is such a Gaussian, and the
prior of the next: curvatures add, up to the structure.

In: a mean, prior variances, a curvature. Out: :class:`StructuredWeights`, a density of
named weights; sums of curvatures. Next: ``structured_problem`` adds the curvature of
further data, ``continual`` reads the Gaussian off a fitted model.

References:
    Ritter, Botev, Barber, Online structured Laplace approximations for overcoming
    catastrophic forgetting, NeurIPS 2018, section 3 (with a sum of Kronecker products
    as one in the basis of the summed factors).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from gpbridge.checks import ShapeError
from gpbridge.linearized.curvature_tensors import (
    Curvature,
    curvature_of_tensors,
    curvature_tensors,
    read_text,
)
from gpbridge.linearized.factored import Basis, FactoredCurvature
from gpbridge.linearized.low_rank import LowRankCurvature
from gpbridge.types import Params


class StructuredWeights:
    r"""Weights :math:`w \sim N(\mu, (S^{-1} + M)^{-1})` of a network, by name.

    Callable, so that it serves as the prior of
    :class:`~gpbridge.dnn.log_posterior.LogPosterior`.

    Args:
        sizes: Shape of each weight, in the order of the flat vectors.
        mean: :math:`\mu`, ``p``.
        prior_variance: One number for each group of weights.
        groups: The group of each weight, ``p`` integers.
        curvature: M, of one channel.
        entries: Places of the single entries that are random, for the weights that are
            not random as a whole.
    """

    def __init__(
        self,
        sizes: Mapping[str, torch.Size],
        mean: Tensor,
        prior_variance: Tensor,
        groups: Tensor,
        curvature: Curvature,
        entries: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.sizes, self.mean = dict(sizes), mean.double()
        self.entries = dict(entries or {})
        self.prior_variance, self.groups = prior_variance.double(), groups
        self.curvature = curvature

    @property
    def variance(self) -> Tensor:
        """The diagonal S, ``p``."""
        return self.prior_variance[self.groups]

    def precision_product(self, columns: Tensor) -> Tensor:
        """Product of the precision with ``p x k``, O(k p) in the structure."""
        moved = curvature_product(self.curvature, columns)
        return columns / self.variance[:, None] + moved

    def log_prob(self, params: Params) -> Tensor:
        """Log density in nats, a scalar, differentiable.

        Args:
            params: Weights by name; others than these are left alone.

        Raises:
            ValueError: If a weight is missing.
            ShapeError: If one has another shape.
        """
        missing = [name for name in self.sizes if name not in params]
        if missing:
            raise ValueError(
                f"params lacks {missing}. The density is of {list(self.sizes)}."
            )
        for name, size in self.sizes.items():
            if params[name].shape != size:
                raise ShapeError(
                    f"{name} must have shape {tuple(size)}, but has "
                    f"{tuple(params[name].shape)}."
                )
        flat = torch.cat([params[name].reshape(-1) for name in self.sizes])
        change = (flat.double() - self.mean)[:, None]
        quadratic = (change * self.precision_product(change)).sum()
        one = self.mean.new_ones(1)
        logdet = self.curvature.logdet(self.prior_variance, one)
        logdet = logdet - self.variance.log().sum()
        size = len(self.mean) * math.log(2 * math.pi)
        return (-0.5 * (quadratic - logdet + size)).to(flat.dtype)

    __call__ = log_prob

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        state = self.state_dict().items()
        return self.from_state_dict({name: t.to(device) for name, t in state})

    def state_dict(self) -> dict[str, Tensor]:
        """All that it is, as tensors: ``torch.save`` it, load with ``weights_only``."""
        sizes = {name: list(size) for name, size in self.sizes.items()}
        packed = curvature_tensors(self.curvature, sizes=sizes)
        state = {f"curvature.{name}": value for name, value in packed.items()}
        state |= {f"entries.{name}": value for name, value in self.entries.items()}
        names = ("mean", "prior_variance", "groups")
        return state | {name: getattr(self, name) for name in names}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """The Gaussian that :meth:`state_dict` came from.

        Raises:
            ValueError: If the state is of something else.
        """
        packed, entries = (
            {n.removeprefix(p): v for n, v in state.items() if n.startswith(p)}
            for p in ("curvature.", "entries.")
        )
        if "meta" not in packed or "mean" not in state:
            raise ValueError(
                "state must be the state_dict() of a posterior over weights, but has "
                f"{sorted(state)[:5]}."
            )
        sizes = read_text(packed["meta"])["sizes"]
        sizes = {name: torch.Size(size) for name, size in sizes.items()}
        curvature = curvature_of_tensors(packed, sizes)
        own = (state[name] for name in ("mean", "prior_variance", "groups"))
        return cls(sizes, *own, curvature, entries)

    def __repr__(self) -> str:
        """Its size and structure."""
        kind = type(self.curvature).__name__
        return f"{type(self).__name__}(p={len(self.mean)}, {kind})"


def combine_channels(curvature: Curvature, weights: Tensor) -> Curvature:
    """The same matrix with one channel of weight one."""
    if isinstance(curvature, LowRankCurvature):
        core = torch.tensordot(weights, curvature.core, dims=1)[None]
        traces = (weights @ curvature.traces)[None]
        groups, bound = curvature.groups, curvature.rank_bound
        return LowRankCurvature(curvature.vectors, core, traces, groups, bound)
    return FactoredCurvature(
        curvature.sizes,
        curvature.blocks,
        curvature.bases,
        [torch.tensordot(weights, v, dims=1)[None] for v in curvature.eigenvalues],
        curvature.is_lower_bound,
    )


def add_curvatures(first: Curvature, second: Curvature) -> Curvature:
    r"""A curvature close to the sum of two, each of one channel.

    Exact for diagonals and low ranks, whose ranks add. Two Kronecker products get the
    common basis of their summed partial traces, and there the exact diagonal of the
    sum: exact where the factors of both sides commute, as those of the outputs do
    where there is one.

    Args:
        first: A curvature.
        second: One of the same weights and structure.

    Returns:
        The sum, of one channel.
    """
    if isinstance(first, LowRankCurvature):
        vectors = torch.cat([first.vectors, second.vectors], -1)
        U, R = torch.linalg.qr(vectors)
        core = R @ torch.block_diag(first.core[0], second.core[0]) @ R.mT
        traces = first.traces + second.traces
        bound = first.rank_bound + second.rank_bound
        return LowRankCurvature(U, core[None], traces, second.groups, bound)
    bases, sums = [], []
    for k, basis in enumerate(second.bases):
        parts = [(c.bases[k], c.eigenvalues[k][0]) for c in (first, second)]
        if all(q is None for own, _ in parts for q in own):
            bases.append(basis)
            sums.append(sum(values for _, values in parts)[None])
            continue
        # Partial traces over the other side: o x o and i x i.
        G = sum(_rotated_back(own.left, v.sum(-1)) for own, v in parts)
        A = sum(_rotated_back(own.right, v.sum(-2)) for own, v in parts)
        Q, P = torch.linalg.eigh(G).eigenvectors, torch.linalg.eigh(A).eigenvectors
        bases.append(Basis(Q, P))
        moved = [
            _overlap(Q, own.left) @ values @ _overlap(P, own.right).mT
            for own, values in parts
        ]
        sums.append(sum(moved)[None])
    bound = first.is_lower_bound and second.is_lower_bound
    return FactoredCurvature(second.sizes, second.blocks, bases, sums, bound)


def curvature_product(curvature: Curvature, columns: Tensor) -> Tensor:
    """Product of a curvature of one channel with ``p x k``."""
    if isinstance(curvature, LowRankCurvature):
        U = curvature.vectors
        return U @ (curvature.core[0] @ (U.mT @ columns))
    moved, parts = columns.mT, []
    places = []
    index = torch.arange(curvature.num_params, device=columns.device)
    for block, (left, right), values in zip(
        curvature.blocks, curvature.bases, curvature.eigenvalues, strict=True
    ):
        part = block.take(moved)  # k x o x i
        part = part if right is None else part @ right
        part = values[0] * (part if left is None else left.mT @ part)
        part = part if right is None else part @ right.mT
        parts.append((part if left is None else left @ part).flatten(-2))
        places.append(block.take(index).reshape(-1))
    order = torch.cat(places).argsort()
    return torch.cat(parts, -1)[:, order].mT


def _rotated_back(basis: Tensor | None, values: Tensor) -> Tensor:
    return values.diag() if basis is None else (basis * values) @ basis.mT


def _overlap(basis: Tensor, other: Tensor | None) -> Tensor:
    """Squared cosines between two bases."""
    return (basis.mT if other is None else basis.mT @ other).square()
