"""A curvature as tensors by name, and back: what is saved without a pickle.

In: a curvature. Out: tensors, among them a short text as bytes. Next:
``structured_weights`` and ``curvature_state`` add what they belong to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gpbridge.linearized.factored import Basis, FactoredCurvature
from gpbridge.linearized.low_rank import LowRankCurvature
from gpbridge.linearized.weight_blocks import WeightBlock

Curvature = FactoredCurvature | LowRankCurvature

_LOW_RANK = ("vectors", "core", "traces", "groups")


def curvature_tensors(curvature: Curvature, **more: Any) -> dict[str, Tensor]:
    """The tensors of a curvature; no copies.

    Args:
        curvature: The curvature.
        **more: Plain values to keep beside it, see :func:`read_text`.
    """
    if isinstance(curvature, LowRankCurvature):
        packed = {name: getattr(curvature, name) for name in _LOW_RANK}
        more = dict(more) | {"rank_bound": curvature.rank_bound}
        return packed | {"meta": text_tensor(more)}
    packed, more = {}, dict(more)
    more["lower_bound"] = curvature.is_lower_bound
    more["blocks"] = [block._asdict() for block in curvature.blocks]
    zipped = zip(curvature.bases, curvature.eigenvalues, strict=True)
    for k, (basis, values) in enumerate(zipped):
        named = {"values": values, "left": basis.left, "right": basis.right}
        packed |= {f"{n}.{k}": t for n, t in named.items() if t is not None}
    return packed | {"meta": text_tensor(more)}


def curvature_of_tensors(
    packed: Mapping[str, Tensor], sizes: Mapping[str, torch.Size]
) -> Curvature:
    """The curvature whose tensors these are.

    Args:
        packed: What :func:`curvature_tensors` gave.
        sizes: Shape of each random weight, in the order of the flat vectors.
    """
    meta = read_text(packed["meta"])
    if "blocks" not in meta:
        tensors = (packed[name] for name in _LOW_RANK)
        return LowRankCurvature(*tensors, meta["rank_bound"])
    blocks = [
        WeightBlock(**{k: tuple(v) if isinstance(v, list) else v for k, v in b.items()})
        for b in meta["blocks"]
    ]
    places = range(len(blocks))
    bases = [Basis(packed.get(f"left.{k}"), packed.get(f"right.{k}")) for k in places]
    values = [packed[f"values.{k}"] for k in places]
    return FactoredCurvature(sizes, blocks, bases, values, meta["lower_bound"])


def text_tensor(values: object) -> Tensor:
    """Plain values as the bytes of a text."""
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def read_text(tensor: Tensor) -> Any:
    """The values of :func:`text_tensor`."""
    return json.loads(bytes(tensor.tolist()))
