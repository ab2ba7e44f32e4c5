r"""Tangent features contracted layer by layer, where that is right and cheaper.

Linear and convolution layers whose contraction reproduces the per-sample Jacobian are
held as signals. Other layers, tied weights, layers that are called more than once, and
layers whose Jacobian costs less than the contraction, get columns of a matrix.

In: a network, inputs, prior standard deviations. Out:
:class:`~gpbridge.layer_features.LayerFeatures`, or dense ones.
Next: ``prediction`` and ``kernels/tangent`` consume them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from gpbridge.checks import ShapeError, check_choice
from gpbridge.features import (
    DenseFeatures,
    PriorStd,
    TangentFeatures,
    dense_features,
    flat_std,
)
from gpbridge.functional import FunctionalNet
from gpbridge.jacobians import jacobian
from gpbridge.layer_features import Columns, LayerFeatures
from gpbridge.layer_signals import (
    LayerSignal,
    Uncontractible,
    is_contractible,
    record_signals,
)

Directions = Callable[[Tensor], Tensor]

METHODS = ("auto", "layers", "dense")
_VERIFY_BYTES = 64 * 2**20  # Jacobians of all layers compared at once
_PASS = 50  # columns of a product that cost as much as one pass over an n x n matrix


def tangent_features(
    net: FunctionalNet,
    X: Tensor,
    std: PriorStd,
    method: str = "auto",
    directions: Directions | None = None,
) -> TangentFeatures:
    r"""Features of the tangent kernel :math:`k(x, x') = J(x) S J(x')^\top`.

    Args:
        net: The network, probed.
        X: Inputs ``batch x n x d`` of the network's dtype.
        std: Prior standard deviations of the weights that contribute.
        method: ``"layers"`` contracts every linear and convolution layer, ``"dense"``
            forms the Jacobian, ``"auto"`` contracts the layers where an estimate of the
            operations says that it is cheaper.
        directions: Maps outputs ``n x m`` to roots R, ``n x m x r``: the features are
            those of the combinations :math:`R^\top f`, by min(m, r) backward passes.
            It may be asked twice, where the layers turn out not to be contractible.

    Returns:
        The features of ``batch x n`` points, with directions of n points.

    Raises:
        ShapeError: If there are directions for a batch of sets.
    """
    check_choice("method", method, METHODS)
    if directions is not None and X.dim() != 2:
        raise ShapeError(
            f"With directions X must be ``n x d``, but has shape {tuple(X.shape)}."
        )
    scalar = all(s.dim() == 0 for s in std.values())
    trainable = any(p.requires_grad for p in net.params.values())
    if method == "dense" or not scalar or trainable or X.shape[:-1].numel() == 0:
        return _dense(net, X, std, directions)
    if net.layer_names is None:
        net.layer_names = _verified_layers(net, X)
    if not any(_weights_of(name, std) for name in net.layer_names):
        return _dense(net, X, std, directions)
    try:
        return _layer_features(net, X, std, net.layer_names, method, directions)
    except Uncontractible:  # control flow that depends on these data
        return _dense(net, X, std, directions)


def _dense(
    net: FunctionalNet, X: Tensor, std: PriorStd, directions: Directions | None
) -> DenseFeatures:
    features = dense_features(net, X, std)
    if directions is None:
        return features
    value = features.value
    root = directions(value)
    rows = root.mT @ features.matrix.unflatten(-2, value.shape)
    return DenseFeatures(_combined(value, root), rows.flatten(0, 1))


def _combined(value: Tensor, root: Tensor) -> Tensor:
    return (root.mT @ value[..., None])[..., 0]


def _layer_features(
    net: FunctionalNet,
    X: Tensor,
    std: PriorStd,
    layer_names: tuple[str, ...],
    method: str,
    directions: Directions | None = None,
) -> LayerFeatures:
    root: Tensor | None = None

    def kept(outputs: Tensor) -> Tensor:
        nonlocal root
        root = directions(outputs)
        return root

    value, raw = record_signals(
        net,
        X.reshape(-1, X.shape[-1]),
        layer_names,
        None if directions is None else kept,
    )
    value = value if root is None else _combined(value, root)
    batch = X.shape[:-1]  # batch x n
    value = value.reshape(*batch, -1)
    layers: dict[str, LayerSignal] = {}
    sources: dict[str, Columns] = {}
    dense: list[Tensor] = []
    width = 0
    for layer_name, (inputs, signal) in raw.items():
        own = _weights_of(layer_name, std)
        for kind in [kind for kind in own if _full(layer_name, kind) in net.entries]:
            name = _full(layer_name, kind)
            part = _entry_columns(inputs, signal, kind, net.entries[name])
            dense.append((part * own.pop(kind)).reshape(*batch, *part.shape[1:]))
            size = part.shape[-1]
            sources[name] = Columns(None, width, 1, size, 0, size)
            width += size
        if not own:
            continue
        layer = _scaled(inputs, signal, own)
        layer = LayerSignal(*(t.reshape(*batch, *t.shape[1:]) for t in layer))
        o, i = layer.signal.shape[-1], layer.inputs.shape[-1]
        start = 0
        key: str | None = layer_name
        if method == "auto" and _prefers_jacobian(layer):
            dense.append(layer.jacobian())
            key, start, width = None, width, width + o * i
        else:
            layers[layer_name] = layer
        if "weight" in own:
            stop = i - 1 if "bias" in own else i
            name = _full(layer_name, "weight")
            sources[name] = Columns(key, start, o, i, 0, stop)
        if "bias" in own:
            name = _full(layer_name, "bias")
            sources[name] = Columns(key, start, o, i, i - 1, i)
    rest = {name: s for name, s in std.items() if name not in sources}
    if rest:
        params = net.params
        J = jacobian(net, X, {name: params[name] for name in rest})
        J = J if root is None else root.mT @ J
        dense.append(J * flat_std(net, rest))
        for name in rest:
            size = params[name].numel()
            sources[name] = Columns(None, width, 1, size, 0, size)
            width += size
    m = value.shape[-1]
    matrix = torch.cat(dense, -1) if dense else value.new_zeros(*batch, m, 0)
    columns = [sources[name] for name in std]
    return LayerFeatures(value, layers, matrix.flatten(-3, -2), columns)


def _weights_of(layer_name: str, std: PriorStd) -> dict[str, Tensor]:
    own = {}
    for kind in ("weight", "bias"):
        name = _full(layer_name, kind)
        if name in std:
            own[kind] = std[name]
    return own


def _full(layer_name: str, kind: str) -> str:
    return f"{layer_name}.{kind}".lstrip(".")


def _entry_columns(inputs: Tensor, signal: Tensor, kind: str, places: Tensor) -> Tensor:
    """Derivatives by single entries of a layer's weight or bias, ``n x m x k``."""
    if kind == "bias":
        return signal[..., places].sum(-2)
    width = inputs.shape[-1]
    seen = inputs[:, None, :, places % width]  # n x 1 x T x k
    return (signal[..., places // width] * seen).sum(-2)


def _scaled(inputs: Tensor, signal: Tensor, own: dict[str, Tensor]) -> LayerSignal:
    parts = []
    if "weight" in own:
        parts.append(inputs * own["weight"])
    if "bias" in own:
        parts.append(own["bias"].expand(*inputs.shape[:-1], 1))
    if inputs.stride(-1) == 1:
        return LayerSignal(torch.cat(parts, -1), signal)
    # Patches of a convolution: positions are contiguous, and stay so.
    return LayerSignal(torch.cat([part.mT for part in parts], -2).mT, signal)


def _prefers_jacobian(layer: LayerSignal) -> bool:
    """Whether a product of Jacobians is cheaper than the contraction."""
    m, T, o = layer.signal.shape[-3:]
    i = layer.inputs.shape[-1]
    return m * m * o * i <= T * T * (i + m * m * (o + _PASS))


def _verified_layers(net: FunctionalNet, X: Tensor) -> tuple[str, ...]:
    """The layers whose contraction reproduces the per-sample Jacobian on this input.

    A module may use a weight outside of the layer that owns it; no inspection can see
    that, so the two derivatives are compared on two points, and on two moved ones in
    case the first are special (all zero, or where units are dead).
    """
    rows = _probe_points(net, X.detach().reshape(-1, X.shape[-1])[:2])
    owners: dict[int, int] = {}
    for module in net.network.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    calls: dict[str, int] = {}

    def count(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            # A hook sees positional arguments only: no layers called by keyword.
            calls[name] = calls.get(name, 0) + (1 if args else 2)

        return hook

    candidates = [
        name
        for name, module in net.network.named_modules()
        if is_contractible(module)
        and all(owners[id(p)] == 1 for p in module.parameters())
    ]
    modules = dict(net.network.named_modules())
    handles = [modules[n].register_forward_hook(count(n)) for n in candidates]
    try:
        with torch.no_grad():
            outputs = net(rows)
    finally:
        for handle in handles:
            handle.remove()
    candidates = [name for name in candidates if calls.get(name) == 1]
    # Keep the order in which the layers are called: it is the order of capture.
    size = sum(net.params[n].numel() for c in candidates for n in _own_names(net, c))
    # An error may also come from a shape that is not n x ...: the per-sample Jacobian
    # handles it. All layers at once; where that fails, each says whether it is the one.
    if rows.element_size() * outputs.numel() * size <= _VERIFY_BYTES:
        with suppress(RuntimeError, ValueError):
            return _reproduced(net, rows, candidates)
    verified: list[str] = []
    for name in candidates:
        with suppress(RuntimeError, ValueError):
            verified += _reproduced(net, rows, [name])
    return tuple(verified)


def _own_names(net: FunctionalNet, layer_name: str) -> list[str]:
    """Random weight and bias of a layer."""
    names = (_full(layer_name, kind) for kind in ("weight", "bias"))
    return [name for name in names if name in net.params]


def _reproduced(
    net: FunctionalNet, rows: Tensor, layer_names: list[str]
) -> tuple[str, ...]:
    """Those of the layers whose contraction equals the per-sample Jacobian.

    Raises:
        Uncontractible: If the shapes differ.
    """
    layer_names = [name for name in layer_names if _own_names(net, name)]
    std = {n: rows.new_ones(()) for c in layer_names for n in _own_names(net, c)}
    if not std:
        return ()
    got = _layer_features(net, rows, std, tuple(layer_names), "layers").rows()
    exact = dense_features(net, rows, std).matrix
    if got.shape != exact.shape:
        raise Uncontractible("columns are missing")
    tolerance = 1e-3 if exact.dtype == torch.float32 else 1e-8
    found, start = [], 0
    for name in layer_names:
        width = sum(net.params[n].numel() for n in _own_names(net, name))
        own, theirs = (J[:, start : start + width] for J in (got, exact))
        scale = theirs.abs().max().clamp_min(torch.finfo(exact.dtype).tiny)
        if (own - theirs).abs().max() <= tolerance * scale:
            found.append(name)
        start += width
    return tuple(found)


def _probe_points(net: FunctionalNet, rows: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    moved = rows + noise * (rows.abs().mean() + 0.1)
    try:
        with torch.no_grad():
            usable = bool(net(moved).isfinite().all())
    except (RuntimeError, ValueError, IndexError):
        usable = False  # inputs that stand for numbers of another kind, as indices
    return torch.cat([rows, moved]) if usable else rows
