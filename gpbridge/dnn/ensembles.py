"""Independently trained networks, seen as a distribution over functions.

In: trained modules, or an ``EnsembleFit``. Out: frozen functions, each member once, all
members of one architecture in one vectorised pass. Next: the same views as of every
other posterior.

References:
    Lakshminarayanan, Pritzel, Blundell, Simple and scalable predictive uncertainty
    estimation using deep ensembles, NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType, NoneType

import torch
from torch import Generator, Tensor, nn

from gpbridge.checks import ShapeError
from gpbridge.dnn.ensemble_fit import EnsembleFit
from gpbridge.dnn.replica_input import check_several
from gpbridge.draws import JoinedDraws, WeightDraws
from gpbridge.frozen import copy_without_hooks
from gpbridge.functional import FunctionalNet
from gpbridge.types import FitResult
from gpbridge.weights import Drawable, EmpiricalWeights, even_choice

_PLAIN = (bool, int, float, str, NoneType, torch.dtype, FunctionType, type)
_OF_ALL_MODULES = frozenset(vars(nn.Module()))


class DeepEnsemble(Drawable):
    """Trained networks, equally likely, each with batch-norm statistics of its own.

    Members of one architecture (the same layers with the same settings) are stacked:
    memory k p, and a pass through all of them is vectorised. Others take one pass each.

    Args:
        members: Modules, results of ``fit_map``, or one of ``fit_ensemble``. Copied in
            eval mode, never changed.
        input_shape: Shape of one input, to unflatten the ``d`` columns. Default none,
            or that of the ``fit_ensemble``.

    Raises:
        TypeError: If members are no list, or a member is no network or of another dtype
            than the others.
        ValueError: If there is none.

    Example:
        >>> ensemble = DeepEnsemble([nn.Linear(2, 1) for _ in range(5)])
        >>> ensemble.draw()(torch.zeros(4, 2)).shape
        torch.Size([5, 4, 1])
    """

    def __init__(
        self,
        members: EnsembleFit | Sequence[nn.Module | FitResult],
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(members, EnsembleFit):
            input_shape = members.input_shape if input_shape is None else input_shape
            members = members.networks
        check_several(members, "members")
        networks = [m.network if isinstance(m, FitResult) else m for m in members]
        if not networks:
            raise ValueError("members must hold at least one network, but is empty.")
        for network in networks:
            if not isinstance(network, nn.Module):
                raise TypeError(
                    "members must be torch.nn.Modules or results of fit_map, but one "
                    f"is {type(network).__name__}."
                )
            if hasattr(network, "draw") or hasattr(network, "posterior"):
                raise TypeError(
                    "members must be networks, but one is "
                    f"{type(network).__name__}. Posteriors are joined by "
                    "gpbridge.weights.MixtureWeights; of a tracker pass its posterior()"
                    " there."
                )
        _check_one_dtype(networks)
        networks = [copy_without_hooks(n).requires_grad_(True) for n in networks]
        groups: list[list[int]] = []
        for i, network in enumerate(networks):
            for group in groups:
                if _same_architecture(networks[group[0]], network):
                    group.append(i)
                    break
            else:
                groups.append([i])
        self.num_members = len(networks)
        self.groups = nn.ModuleList(
            _stack([networks[i] for i in group], input_shape) for group in groups
        )
        # Of each member: its group and its row there.
        self._places = {
            i: (g, row) for g, group in enumerate(groups) for row, i in enumerate(group)
        }

    def extra_repr(self) -> str:
        """How many members, of how many architectures."""
        return f"num_members={self.num_members}, architectures={len(self.groups)}"

    def draw(
        self, num_samples: int | None = None, generator: Generator | None = None
    ) -> WeightDraws | EnsembleDraws:
        """Freeze members as functions.

        Args:
            num_samples: How many; default every member once, in order. Up to k they are
                distinct, beyond that every member comes as often as any other, up to
                one.
            generator: Source of the choice.

        Returns:
            The functions.
        """
        if num_samples is None:
            chosen = list(range(self.num_members))
        else:
            chosen = even_choice(num_samples, self.num_members, generator).tolist()
        if len(self.groups) == 1:
            return self.groups[0].members(torch.tensor(chosen))
        parts, order = [], []
        for g, group in enumerate(self.groups):
            places = [s for s, i in enumerate(chosen) if self._places[i][0] == g]
            if places:
                rows = [self._places[chosen[s]][1] for s in places]
                parts.append(group.members(torch.tensor(rows)))
                order += places
        return EnsembleDraws(parts, torch.tensor(order).argsort())


class EnsembleDraws(JoinedDraws):
    """Members of several architectures, in the order of the ensemble.

    Args:
        parts: The members of each architecture.
        order: Where each member is found among them.
    """

    def __init__(self, parts: Sequence[WeightDraws], order: Tensor) -> None:
        super().__init__(parts)
        self.register_buffer("order", order)

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate all members, ``... x n x d`` to ``s x ... x n x m``.

        Raises:
            ShapeError: If members have different numbers of outputs.
        """
        return self._joined([part(X) for part in self.parts])

    def each(self, X: Tensor) -> Tensor:
        """Evaluate each member at inputs of its own, ``s x ... x n x d`` likewise."""
        counts = [part.num_samples for part in self.parts]
        own = X[self.order.argsort()].split(counts)
        pairs = zip(self.parts, own, strict=True)
        return self._joined([part.each(rows) for part, rows in pairs])

    def _joined(self, values: list[Tensor]) -> Tensor:
        widths = [value.shape[-1] for value in values]
        if len(set(widths)) > 1:
            raise ShapeError(
                "The members of an ensemble must have one number of outputs, but these "
                f"architectures have {widths}."
            )
        return torch.cat(values)[self.order]


def _stack(
    networks: list[nn.Module], input_shape: Sequence[int] | None
) -> EmpiricalWeights:
    """Members of one architecture, with all tensors that they may have of their own."""
    net = FunctionalNet(networks[0], input_shape=input_shape)
    net.vectorized = len(networks) > 1
    weights = [dict(network.named_parameters()) for network in networks]
    flat = torch.stack([net.flatten(each) for each in weights])
    buffers = [dict(network.named_buffers()) for network in networks]
    statistics = {
        name: torch.stack([each[name] for each in buffers]) for name in buffers[0]
    }
    return EmpiricalWeights(net, flat, statistics)


def _check_one_dtype(networks: list[nn.Module]) -> None:
    dtypes = [
        p.dtype for p in (next(n.parameters(), None) for n in networks) if p is not None
    ]
    for i, dtype in enumerate(dtypes):
        if dtype != dtypes[0]:
            raise TypeError(
                f"members must have one dtype, but member 0 is {dtypes[0]} and member "
                f"{i} is {dtype}. Try member.to({dtypes[0]})."
            )


def _same_architecture(a: nn.Module, b: nn.Module) -> bool:
    """Whether the tensors of one, put into the other, give its function.

    What cannot be compared counts as different: then each has a pass of its own.
    """
    parts_a, parts_b = dict(a.named_modules()), dict(b.named_modules())
    if list(parts_a) != list(parts_b):
        return False
    for name, one in parts_a.items():
        other = parts_b[name]
        if type(one) is not type(other) or not _same_settings(one, other):
            return False
        if one._forward_hooks or one._forward_pre_hooks:  # those of torch.nn.utils
            return False
        for kind in ("_parameters", "_buffers"):
            shapes = [
                {k: v if v is None else (v.shape, v.dtype) for k, v in held.items()}
                for held in (getattr(one, kind), getattr(other, kind))
            ]
            if shapes[0] != shapes[1]:
                return False
    names = [[n for n, _ in m.named_parameters()] for m in (a, b)]
    return names[0] == names[1]  # tied weights alike


def _same_settings(one: nn.Module, other: nn.Module) -> bool:
    own = [
        {key: value for key, value in vars(m).items() if key not in _OF_ALL_MODULES}
        for m in (one, other)
    ]
    return own[0].keys() == own[1].keys() and all(
        _same(value, own[1][key]) for key, value in own[0].items()
    )


def _same(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return isinstance(one, _PLAIN) and one == other
