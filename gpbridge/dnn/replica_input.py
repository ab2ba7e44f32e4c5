"""What the training of many copies accepts.

In: the arguments of :func:`gpbridge.dnn.train_replicas`. Out: an error that says what
to change, or stacked weights and buffers, data of each copy and generators of each.
Next: ``replicas`` asks all of it before it trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from gpbridge.batch_norm import norm_layers
from gpbridge.checks import (
    ShapeError,
    check_finite,
    check_inputs,
    check_same_dtype,
    check_tensor,
)
from gpbridge.dnn.replica_fit import ReplicaFit
from gpbridge.functional import FunctionalNet
from gpbridge.types import FitResult, Params


def check_several(networks: object, name: str) -> None:
    """Require a list of networks and not one network, whose layers would be read."""
    if isinstance(networks, ReplicaFit):
        raise TypeError(
            f"{name} must be networks, but is a ReplicaFit, which holds weights alone. "
            "Train by fit_ensemble, which gives networks."
        )
    single = isinstance(networks, nn.Module) and not isinstance(networks, nn.ModuleList)
    if single or isinstance(networks, FitResult):
        raise TypeError(
            f"{name} must be several networks, but is one {type(networks).__name__}. "
            f"Pass a list of networks: [network]."
        )


def stacked_state(net: FunctionalNet, weights: Tensor | Params) -> Params:
    """Copies of all weights and buffers by name, each ``k x shape``.

    Args:
        net: The network; buffers that are not given are its own, for every copy.
        weights: Random weights ``k x p``, or by name ``k x shape``, buffers and frozen
            weights among them if the copies differ in these.

    Returns:
        The state.

    Raises:
        ShapeError: If a tensor does not have one row for each copy.
        ValueError: If a name is missing or unknown.
    """
    if isinstance(weights, Tensor):
        check_tensor(weights=weights)
        if weights.dim() != 2 or weights.shape[1] != net.num_params or not len(weights):
            raise ShapeError(
                f"weights must be ``k x {net.num_params}``, one row for each copy, but "
                f"has shape {tuple(weights.shape)}."
            )
        weights = net.unflatten(weights)
    named = dict(net.network.named_parameters()) | dict(net.network.named_buffers())
    missing = [name for name in net.names if name not in weights]
    unknown = [name for name in weights if name not in named]
    if missing or unknown:
        raise ValueError(
            "weights must name the random weights of the network, and may name its "
            f"other tensors, but lacks {missing} and has the unknown {unknown}."
        )
    k = len(weights[net.names[0]])
    for name, value in weights.items():
        wanted = (k, *named[name].shape)
        if tuple(value.shape) != wanted or not k:
            raise ShapeError(
                f"weights[{name!r}] must be ``{' x '.join(map(str, wanted))}``, but "
                f"has shape {tuple(value.shape)}."
            )
        if value.is_floating_point():
            check_finite(**{f"weights[{name!r}]": value})
            check_same_dtype(f"weights[{name!r}]", value, named[name].dtype)
    state = {name: weights[name].detach().clone() for name in net.names}
    for name, value in weights.items():
        state.setdefault(name, value.detach().clone())
    for name, value in net.network.named_buffers():
        state.setdefault(name, value.expand(k, *value.shape).clone())
    return state


def stacked_data(
    X: Tensor, Y: Tensor, k: int, dtype: torch.dtype, kind: str = ""
) -> tuple[Tensor, Tensor]:
    """Inputs ``k x n x d`` and targets ``k x n x ...``; what is in common is expanded.

    Args:
        X: Inputs ``n x d``, in common, or ``k x n x d``.
        Y: Targets, with the same leading dimensions.
        k: Number of copies.
        dtype: That of the weights.
        kind: Word before the names in messages.

    Returns:
        Both.

    Raises:
        ShapeError: If dimensions do not fit.
        TypeError: If the inputs are not in the dtype of the weights.
    """
    check_tensor(**{f"{kind}Y": Y})
    check_inputs(X, f"{kind}X")
    check_finite(**{f"{kind}Y": Y})
    if X.dtype != dtype:
        raise TypeError(
            f"{kind}X is {X.dtype}, but the weights are {dtype}. Try "
            "network.to(X.dtype), or convert the data."
        )
    leading = X.shape[:-1]
    if X.dim() > 3 or (X.dim() == 3 and len(X) != k) or not leading.numel():
        raise ShapeError(
            f"{kind}X must be ``n x d`` for all copies, or ``{k} x n x d`` with data "
            f"for each of the {k} copies, but has shape {tuple(X.shape)}. Flatten "
            "images to rows and pass input_shape=(c, h, w)."
        )
    if Y.shape[: len(leading)] != leading:
        raise ShapeError(
            f"{kind}Y must have the leading dimensions {tuple(leading)} of {kind}X, "
            f"but has shape {tuple(Y.shape)}. For data in common and other targets "
            f"for each copy pass X.expand({k}, -1, -1)."
        )
    X, Y = X.detach(), Y.detach()
    if X.dim() == 2:
        X, Y = X.expand(k, *X.shape), Y.expand(k, *Y.shape)
    return X, Y


def check_rows(rows: Tensor, n: int, k: int) -> Tensor:
    """Require row numbers ``k x b`` in 0 .. n - 1; they may repeat."""
    check_tensor(rows=rows)
    fits = rows.dim() == 2 and len(rows) == k and rows.shape[1] > 0
    if not fits or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ShapeError(
            f"rows must be ``{k} x b`` row numbers, some for each copy, but is "
            f"{tuple(rows.shape)} of {rows.dtype}."
        )
    if int(rows.min()) < 0 or int(rows.max()) >= n:
        raise ValueError(
            f"rows must lie in 0 .. {n - 1}, but go from {int(rows.min())} to "
            f"{int(rows.max())}."
        )
    return rows.long()


def check_normalisation(network: nn.Module, num_rows: int) -> bool:
    """Whether layers mix the rows of a batch; then two are needed, and a momentum."""
    layers = norm_layers(network).values()
    if layers and num_rows == 1:
        raise ValueError(
            "The network has batch normalisation, which needs batches of two rows or "
            "more, but these have one."
        )
    if any(m.momentum is None and m.track_running_stats for m in layers):
        raise ValueError(
            "Batch normalisation with momentum=None averages by a count on the host, "
            "which stacked copies do not have. Set its momentum, as 0.1."
        )
    return bool(layers)


def one_generator_each(
    generator: Generator | Sequence[Generator] | None, k: int
) -> list[Generator]:
    """The generators of k copies; one alone seeds them all."""
    if generator is not None and not isinstance(generator, Generator):
        generators = list(generator)
        if len(generators) != k:
            raise ValueError(
                f"generator must be one, or one for each of the {k} copies, but are "
                f"{len(generators)}."
            )
        return generators
    if generator is None:
        generator = Generator().manual_seed(0)
    return [Generator().manual_seed(drawn_seed(generator)) for _ in range(k)]


def drawn_seed(generator: Generator) -> int:
    """A number that can seed another generator."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return int(seed)
