r"""A fitted curvature as tensors, and whether it belongs to a model that loads it.

A curvature costs passes over the data, so that it travels with the state of a model. It
is taken over only where data, network, groups and options are bit for bit those that it
was made of, and the output curvature is the same up to rounding; else it is made anew.

In: a :class:`~gpbridge.linearized.problem.TangentProblem` with a structure. Out: its
curvature as tensors by name, and back. Next: ``persistence`` saves and loads them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gpbridge.linearized.curvature_tensors import (
    Curvature,
    curvature_of_tensors,
    curvature_tensors,
    read_text,
    text_tensor,
)
from gpbridge.linearized.posterior import TangentPosterior
from gpbridge.linearized.problem import TangentProblem
from gpbridge.linearized.structures import Structure

_NO_MATTER = ("solver", "memory_budget")  # options that do not change a curvature
_ROUNDING = 1e-4  # relative, of the output curvature on another device


def pack_curvature(problem: TangentProblem) -> dict[str, Tensor] | None:
    """The curvature that a problem has made, as tensors by name; None if there is none.

    Costs a checksum of the data, no copy.
    """
    if problem._curvature is None:
        return None
    root, curvature = problem._curvature
    packed = curvature_tensors(curvature, key=curvature_key(problem))
    return packed | {"root": _fingerprint(root)}


def pack_results(
    problem: TangentProblem, posterior: tuple[tuple, TangentPosterior] | None
) -> dict[str, Tensor]:
    """The curvature of a problem, and the mean of its posterior where there is one.

    Args:
        problem: The problem, with a curvature.
        posterior: The posterior beside the hyperparameters that it depends on.

    Returns:
        Tensors by name.
    """
    packed = pack_curvature(problem)
    if posterior is not None and posterior[1].weights is not None:
        packed["mean"] = posterior[1].weights
        packed["mean_at"] = text_tensor([*posterior[0], *_beside_curvature(problem)])
    return packed


def saved_weights(
    problem: TangentProblem, packed: Mapping[str, Tensor] | None, at: tuple
) -> Tensor | None:
    """The posterior mean of a state, or None if it is not that of this problem."""
    if packed is None or "mean" not in packed:
        return None
    if not isinstance(problem.inference, Structure):
        return None
    if read_text(packed["meta"])["key"] != curvature_key(problem):
        return None
    wanted = text_tensor([*at, *_beside_curvature(problem)])
    if not torch.equal(wanted, packed["mean_at"].cpu()):
        return None
    return packed["mean"].to(problem.X.device)


def unpack_curvature(
    problem: TangentProblem, packed: Mapping[str, Tensor], root: Tensor
) -> Curvature | None:
    """The curvature of a state, or None if it is not that of this problem.

    Args:
        problem: The problem that needs one.
        packed: What :func:`pack_curvature` gave.
        root: The problem's roots of the output curvature.

    Returns:
        The curvature; its tensors are those of the state.
    """
    meta = read_text(packed["meta"])
    if meta["key"] != curvature_key(problem):
        return None
    own, saved = _fingerprint(root), packed["root"].to(root.device)
    if not bool(((own - saved).abs() <= _ROUNDING * own[0]).all()):
        return None
    packed = {name: value.to(root.device) for name, value in packed.items()}
    params = problem.net.params
    sizes = {name: params[name].shape for name in problem.unit_std}
    return curvature_of_tensors(packed, sizes)


def curvature_key(problem: TangentProblem) -> str:
    """Checksum of all that a curvature depends on, but for the output curvature."""
    if problem._curvature_key is None:
        options = problem.inference
        named = {
            field.name: str(getattr(options, field.name))
            for field in dataclasses.fields(options)
            if field.name not in _NO_MATTER
        }
        plain = [type(options).__name__, named, problem.groups, problem.has_channels]
        digest = hashlib.sha256(json.dumps(plain).encode())
        tensors = [problem.X, *problem.unit_std.values()]
        state = problem.net.state_dict().values()
        tensors += [value for value in state if isinstance(value, Tensor)]
        if options.curvature == "empirical":
            tensors.append(problem.Y)
        for value in tensors:
            _add(digest, value)
        problem._curvature_key = digest.hexdigest()
    return problem._curvature_key


def _beside_curvature(problem: TangentProblem) -> list:
    """What a posterior mean depends on beyond curvature and hyperparameters."""
    digest = hashlib.sha256()
    _add(digest, problem.Y)
    before = problem.previous
    if before is not None:
        for value in before.state_dict().values():
            _add(digest, value)
    return [problem.offset, digest.hexdigest()]


def _add(digest: Any, value: Tensor) -> None:
    value = value.detach().cpu().contiguous()
    digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy())


def _fingerprint(root: Tensor) -> Tensor:
    """The size of a tensor and some projections of it, float64."""
    flat = root.detach().double().reshape(-1)
    places = torch.arange(1, len(flat) + 1, device=flat.device, dtype=torch.float64)
    waves = [torch.cos(frequency * places) for frequency in (0.0, 0.7, 1.9, 2.6)]
    return torch.stack([flat.norm(), *(flat @ wave for wave in waves)])
