r"""Tangent Gram matrices contracted layer by layer, without forming the Jacobian.

A linear layer :math:`z = W a + b` has :math:`\partial f / \partial W = \delta a^\top`
with the back-propagated signal :math:`\delta = \partial f / \partial z`, so its part of
the kernel is the product of two small Gram matrices,

.. math::
    K_l = (\Delta \Delta^\top) \circ (s_W A A^\top + s_b),

at a cost of n^2 (width) instead of n^2 (width)^2. A convolution is such a layer at
every position, summed over pairs of positions. Other layers, tied weights and layers
that are called more than once fall back to per-sample Jacobians of their own weights.

In: a network, inputs, prior standard deviations. Out: :class:`LayerFeatures`.
Next: ``prediction`` and ``kernels/tangent`` consume them.

References:
    Novak, Sohl-Dickstein, Schoenholz, Fast Finite Width Neural Tangent Kernel, ICML
    2022, section 3.2 (the contraction is their NTK-vector / structured form).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpbridge.checks import check_choice
from gpbridge.features import (
    DenseFeatures,
    PriorStd,
    TangentFeatures,
    dense_features,
    flat_std,
)
from gpbridge.functional import FunctionalNet
from gpbridge.jacobians import jacobian

METHODS = ("auto", "layers", "dense")
_PASS = (
    50  # one pass over an n x n matrix costs about as much as 50 columns of a product
)
_CACHE_ROWS = 64  # rows of the Gram matrix per block, so that temporaries stay in cache


class LayerSignal(NamedTuple):
    """One layer at T positions: scaled inputs and back-propagated signals."""

    inputs: Tensor  # batch x n x T x i, prior standard deviations folded in
    signal: Tensor  # batch x n x m x T x o

    def jacobian(self) -> Tensor:
        """The layer's columns of the features, ``batch x n x m x (o i)``."""
        J = self.signal.mT @ self.inputs[..., None, :, :]  # batch x n x m x o x i
        return J.flatten(-2)

    def prefers_jacobian(self) -> bool:
        """Whether a product of Jacobians is cheaper than the contraction."""
        m, T, o = self.signal.shape[-3:]
        i = self.inputs.shape[-1]
        return m * m * o * i <= T * T * (i + m * m * (o + _PASS))


class Columns(NamedTuple):
    """Where the columns of one weight are: ``o`` rows of ``i`` columns of a source.

    ``source`` is the name of a layer, or None for the matrix.
    """

    source: str | None
    start: int
    o: int
    i: int
    first: int  # of the i columns, the weight's own are first .. last - 1
    last: int

    def view(self, source: Tensor) -> Tensor:
        """The weight's columns, ``... x o x (last - first)``."""
        part = source[..., self.start : self.start + self.o * self.i]
        return part.unflatten(-1, (self.o, self.i))[..., self.first : self.last]


class LayerFeatures(NamedTuple):
    """Features held as layer signals, and as a matrix where that is cheaper."""

    value: Tensor  # batch x n x m
    layers: dict[str, LayerSignal]  # contracted, by module name
    matrix: Tensor  # batch x (n m) x f, the columns of all other weights
    columns: list[Columns]  # one per weight, in the order of the features

    def gram(self, other: TangentFeatures | None = None) -> Tensor:
        """Kernel matrix with other features, default with these."""
        if isinstance(other, DenseFeatures):
            return self.rows() @ other.matrix.mT
        other = self if other is None else other
        tensors = [self.matrix, other.matrix]
        for name, mine in self.layers.items():
            tensors += [*mine, *other.layers[name]]
        if any(t.requires_grad for t in tensors) and torch.is_grad_enabled():
            return self._gram_block(other)
        if self.value.dim() > 2 or other.value.dim() > 2:
            return self._gram_block(other)
        n, m = self.value.shape
        K = self.value.new_empty(n * m, other.value.numel())
        step = max(1, _CACHE_ROWS // m)
        with torch.no_grad():
            for start in range(0, n, step):
                part = self.take(slice(start, start + step))
                rows = K[start * m : (start + step) * m]
                if other is not self:
                    part._gram_into(other, rows)
                    continue
                # The matrix of a set with itself: the lower blocks, and their mirror.
                seen = self.take(slice(0, start + step))
                part._gram_into(seen, rows[:, : seen.value.numel()])
                K[: start * m, start * m : (start + step) * m] = rows[:, : start * m].mT
        return K

    def _gram_into(self, other: LayerFeatures, out: Tensor) -> None:
        """Write the matrix in place: temporaries are as small as the block."""
        n, m = self.value.shape
        n_other, m_other = other.value.shape
        torch.mm(self.matrix, other.matrix.mT, out=out)
        for name, mine in self.layers.items():
            theirs = other.layers[name]
            if mine.inputs.shape[-2] > 1:
                out += _contract_positions(mine, theirs)
                continue
            part = mine.signal.flatten(0, 2) @ theirs.signal.flatten(0, 2).mT
            pairs = mine.inputs[:, 0] @ theirs.inputs[:, 0].mT
            if m == m_other == 1:
                out.addcmul_(part, pairs)
            else:
                by_point = part.view(n, m, n_other, m_other)
                by_point.mul_(pairs[:, None, :, None])
                out += part

    def _gram_block(self, other: LayerFeatures) -> Tensor:
        """The matrix by differentiable operations, batches included."""
        K = self.matrix @ other.matrix.mT
        n, m = self.value.shape[-2:]
        n_other, m_other = other.value.shape[-2:]
        for name, mine in self.layers.items():
            theirs = other.layers[name]
            if mine.inputs.shape[-2] == 1:
                part = mine.signal.flatten(-4, -2) @ theirs.signal.flatten(-4, -2).mT
                pairs = mine.inputs[..., 0, :] @ theirs.inputs[..., 0, :].mT
                if m == m_other == 1:
                    K = torch.addcmul(K, part, pairs)
                    continue
                part = part.unflatten(-1, (n_other, m_other)).unflatten(-3, (n, m))
                part = (part * pairs[..., :, None, :, None]).flatten(-2)
                K = K + part.flatten(-3, -2)
            else:
                K = K + _contract_positions(mine, theirs)
        return K

    def take(self, points: Tensor | slice) -> LayerFeatures:
        """The features of some of the points, unbatched sets."""
        matrix = self.matrix.unflatten(0, self.value.shape)[points]
        return LayerFeatures(
            self.value[points],
            {
                name: LayerSignal(s.inputs[points], s.signal[points])
                for name, s in self.layers.items()
            },
            matrix.flatten(0, 1),
            self.columns,
        )

    def to(self, dtype: torch.dtype) -> LayerFeatures:
        """The features in another precision."""
        return LayerFeatures(
            self.value.to(dtype),
            {
                name: LayerSignal(s.inputs.to(dtype), s.signal.to(dtype))
                for name, s in self.layers.items()
            },
            self.matrix.to(dtype),
            self.columns,
        )

    def select(self, outputs: Sequence[int]) -> LayerFeatures:
        """The features of some of the outputs."""
        chosen = list(outputs)
        matrix = self.matrix.unflatten(-2, self.value.shape[-2:])[..., chosen, :]
        return LayerFeatures(
            self.value[..., chosen],
            {
                name: LayerSignal(s.inputs, s.signal[..., chosen, :, :])
                for name, s in self.layers.items()
            },
            matrix.flatten(-3, -2),
            self.columns,
        )

    def blocks(self) -> Tensor:
        """Per-point prior covariance."""
        per_point = self.matrix.unflatten(-2, self.value.shape[-2:])
        total = per_point @ per_point.mT
        for layer in self.layers.values():
            if layer.inputs.shape[-2] == 1:
                delta = layer.signal[..., 0, :]  # batch x n x m x o
                square = layer.inputs.square().sum((-2, -1))
                total = total + (delta @ delta.mT) * square[..., None, None]
            else:
                J = layer.jacobian()
                total = total + J @ J.mT
        return total

    def rows(self) -> Tensor:
        """The dense features, built from the signals."""
        sources: dict[str | None, Tensor] = {
            name: layer.jacobian() for name, layer in self.layers.items()
        }
        sources[None] = self.matrix.unflatten(-2, self.value.shape[-2:])
        parts = [c.view(sources[c.source]) for c in self.columns]
        if any(part.requires_grad for part in parts):
            return torch.cat([p.flatten(-2) for p in parts], dim=-1).flatten(-3, -2)
        p = sum(part.shape[-2:].numel() for part in parts)
        result = self.value.new_empty(*self.value.shape, p)
        start = 0
        for part in parts:  # one copy each, where cat would need two
            size = part.shape[-2:]
            stop = start + size.numel()
            result[..., start:stop].unflatten(-1, size).copy_(part)
            start = stop
        return result.flatten(-3, -2)

    def matmul(self, omega: Tensor) -> Tensor:
        """Product with a vector of scaled weights."""
        widths: dict[str | None, int] = {
            name: layer.signal.shape[-1] * layer.inputs.shape[-1]
            for name, layer in self.layers.items()
        }
        widths[None] = self.matrix.shape[-1]
        parts = {name: omega.new_zeros(width) for name, width in widths.items()}
        start = 0
        for c in self.columns:
            view = c.view(parts[c.source])
            view.copy_(omega[start : start + view.numel()].view(view.shape))
            start += view.numel()
        total = (self.matrix @ parts[None]).reshape(self.value.shape)
        for name, layer in self.layers.items():
            weight = parts[name].reshape(layer.signal.shape[-1], -1)  # o x i
            moved = layer.inputs @ weight.mT  # batch x n x T x o
            total = total + (layer.signal * moved[..., None, :, :]).sum((-2, -1))
        return total

    def t_matmul(self, outputs: Tensor) -> Tensor:
        """Transposed product, for an unbatched set of points."""
        k = outputs.shape[-1]
        sources = {None: self.matrix.mT @ outputs.flatten(0, 1)}
        for name, layer in self.layers.items():
            pulled = torch.einsum("nmto,nmk->ntok", layer.signal, outputs)
            weight = pulled.flatten(0, 1).flatten(1).mT @ layer.inputs.flatten(0, 1)
            weight = weight.unflatten(0, (-1, k))  # o x k x i
            sources[name] = weight.transpose(1, 2).reshape(-1, k)
        parts = [c.view(sources[c.source].mT) for c in self.columns]  # k x o x i
        return torch.cat([part.flatten(1) for part in parts], dim=1).mT


def tangent_features(
    net: FunctionalNet, X: Tensor, std: PriorStd, method: str = "auto"
) -> TangentFeatures:
    r"""Features of the tangent kernel :math:`k(x, x') = J(x) S J(x')^\top`.

    Args:
        net: The network, probed.
        X: Inputs ``batch x n x d`` of the network's dtype.
        std: Prior standard deviations of the weights that contribute.
        method: ``"layers"`` contracts every linear and convolution layer, ``"dense"``
            forms the Jacobian, ``"auto"`` contracts the layers where an estimate of the
            operations says that it is cheaper.

    Returns:
        The features of ``batch x n`` points.
    """
    check_choice("method", method, METHODS)
    scalar = all(s.dim() == 0 for s in std.values())
    trainable = any(p.requires_grad for p in net.params.values())
    if method == "dense" or not scalar or trainable or X.shape[:-1].numel() == 0:
        return dense_features(net, X, std)
    if net.layer_names is None:
        net.layer_names = _verified_layers(net, X)
    if not any(_weights_of(name, std) for name in net.layer_names):
        return dense_features(net, X, std)
    try:
        return _layer_features(net, X, std, net.layer_names, method)
    except _Uncontractible:  # control flow that depends on these data
        return dense_features(net, X, std)


def _layer_features(
    net: FunctionalNet,
    X: Tensor,
    std: PriorStd,
    layer_names: tuple[str, ...],
    method: str,
) -> LayerFeatures:
    value, raw = _capture(net, X.reshape(-1, X.shape[-1]), layer_names)
    batch = X.shape[:-1]  # batch x n
    value = value.reshape(*batch, -1)
    layers: dict[str, LayerSignal] = {}
    sources: dict[str, Columns] = {}
    dense: list[Tensor] = []
    width = 0
    for layer_name, (inputs, signal) in raw.items():
        own = _weights_of(layer_name, std)
        if not own:
            continue
        layer = _scaled(inputs, signal, own)
        layer = LayerSignal(*(t.reshape(*batch, *t.shape[1:]) for t in layer))
        o, i = layer.signal.shape[-1], layer.inputs.shape[-1]
        start = 0
        key: str | None = layer_name
        if method == "auto" and layer.prefers_jacobian():
            dense.append(layer.jacobian())
            key, start, width = None, width, width + o * i
        else:
            layers[layer_name] = layer
        if "weight" in own:
            stop = i - 1 if "bias" in own else i
            name = f"{layer_name}.weight".lstrip(".")
            sources[name] = Columns(key, start, o, i, 0, stop)
        if "bias" in own:
            name = f"{layer_name}.bias".lstrip(".")
            sources[name] = Columns(key, start, o, i, i - 1, i)
    rest = {name: s for name, s in std.items() if name not in sources}
    if rest:
        params = net.params
        J = jacobian(net, X, {name: params[name] for name in rest})
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
        name = f"{layer_name}.{kind}".lstrip(".")
        if name in std:
            own[kind] = std[name]
    return own


def _scaled(inputs: Tensor, signal: Tensor, own: dict[str, Tensor]) -> LayerSignal:
    parts = []
    if "weight" in own:
        parts.append(inputs * own["weight"])
    if "bias" in own:
        parts.append(own["bias"].expand(*inputs.shape[:-1], 1))
    return LayerSignal(torch.cat(parts, -1), signal)


def _capture(
    net: FunctionalNet, rows: Tensor, layer_names: tuple[str, ...]
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Run forward once and backward once per output; read inputs and signals."""
    taken: dict[str, tuple[Tensor, Tensor, int]] = {}

    def tap(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name in taken or not args or len(output) != len(rows):
                raise _Uncontractible(f"{name} is not called once, with all points")
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            taken[name] = (args[0], output, args[0]._version)
            return output.clone()  # an in-place activation may follow

        return hook

    modules = dict(net.network.named_modules())
    handles = [modules[n].register_forward_hook(tap(n)) for n in layer_names]
    keep_graph = torch.is_grad_enabled() and rows.requires_grad
    try:
        # Signals need autograd, which torch.inference_mode switches off.
        with torch.inference_mode(False), torch.enable_grad():
            rows = rows.clone() if rows.is_inference() else rows
            value = net(rows if keep_graph else rows.detach())  # n x m
            taps = [output for _, output, _ in taken.values()]
            signals = []
            for j in range(value.shape[1]):
                last = j == value.shape[1] - 1
                signals.append(
                    torch.autograd.grad(
                        value[:, j].sum(),
                        taps,
                        retain_graph=keep_graph or not last,
                        create_graph=keep_graph,
                        materialize_grads=True,
                    )
                )
    finally:
        for handle in handles:
            handle.remove()
    if len(taken) < len(layer_names):
        raise _Uncontractible("a layer is not called")
    result = {}
    for position, (name, (inputs, _, version)) in enumerate(taken.items()):
        if inputs._version != version:
            raise _Uncontractible(f"the input of {name} is overwritten in place")
        signal = torch.stack([s[position] for s in signals], dim=1)  # n x m x ...
        inputs = inputs if keep_graph else inputs.detach()
        result[name] = _positions(modules[name], inputs, signal)
    return (value if keep_graph else value.detach()), result


class _Uncontractible(RuntimeError):
    """A layer's input and signal do not determine its Jacobian."""


def _positions(
    module: nn.Module, inputs: Tensor, signal: Tensor
) -> tuple[Tensor, Tensor]:
    """Bring a layer to the form n x T x i and n x m x T x o."""
    n, m = signal.shape[:2]
    if isinstance(module, nn.Linear):
        return (
            inputs.reshape(n, -1, module.in_features),
            signal.reshape(n, m, -1, module.out_features),
        )
    if isinstance(module, nn.Conv1d):
        inputs = inputs.unsqueeze(-2)
        kernel, dilation = (1, *module.kernel_size), (1, *module.dilation)
        padding, stride = (0, *module.padding), (1, *module.stride)
    else:
        kernel, dilation = module.kernel_size, module.dilation
        padding, stride = module.padding, module.stride
    patches = F.unfold(inputs, kernel, dilation, padding, stride)  # n x i x T
    return patches.mT, signal.flatten(3).mT


def _contract_positions(mine: LayerSignal, theirs: LayerSignal) -> Tensor:
    """Sum over pairs of positions, one position of the first set at a time."""
    m, T = mine.signal.shape[-3:-1]
    m_other = theirs.signal.shape[-3]
    n, n_other = mine.inputs.shape[-3], theirs.inputs.shape[-3]
    their_inputs = theirs.inputs.flatten(-3, -2)  # (n' T') x i
    their_signal = theirs.signal.transpose(-3, -2).flatten(-4, -2)  # (n' T' m) x o
    total = 0.0
    for t in range(T):
        pairs = mine.inputs[..., t, :] @ their_inputs.mT  # n x (n' T')
        part = mine.signal[..., t, :].flatten(-3, -2) @ their_signal.mT
        part = part.unflatten(-1, (n_other, -1, m_other)).unflatten(-4, (n, m))
        pairs = pairs.unflatten(-1, (n_other, -1))[..., :, None, :, :, None]
        total = total + (part * pairs).sum(-2)  # n x m x n' x m
    return total.flatten(-2).flatten(-3, -2)


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
        if _is_contractible(module)
        and all(owners[id(p)] == 1 for p in module.parameters())
    ]
    modules = dict(net.network.named_modules())
    handles = [modules[n].register_forward_hook(count(n)) for n in candidates]
    try:
        with torch.no_grad():
            net(rows)
    finally:
        for handle in handles:
            handle.remove()
    candidates = [name for name in candidates if calls.get(name) == 1]
    # Keep the order in which the layers are called: it is the order of capture.
    params = net.params
    one = rows.new_ones(())
    verified = []
    for name in candidates:
        std = {n: one for n in params if n in (f"{name}.weight", f"{name}.bias")}
        if name == "":
            std = {n: one for n in params if n in ("weight", "bias")}
        if not std:
            continue
        try:
            features = _layer_features(net, rows, std, (name,), "layers")
        except (RuntimeError, ValueError):
            # Also a shape that is not n x ...: the per-sample Jacobian handles it.
            continue
        exact = dense_features(net, rows, std).matrix
        got = features.rows()
        scale = exact.abs().max().clamp_min(torch.finfo(exact.dtype).tiny)
        tolerance = 1e-3 if exact.dtype == torch.float32 else 1e-8
        if got.shape == exact.shape and (got - exact).abs().max() <= tolerance * scale:
            verified.append(name)
    return tuple(verified)


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


def _is_contractible(module: nn.Module) -> bool:
    # Exact types: a subclass may compute something else. A parametrised weight is not
    # a parameter of its module and keeps the fallback through its name.
    if type(module) is nn.Linear:
        return True
    return (
        type(module) in (nn.Conv1d, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )
