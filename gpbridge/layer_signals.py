"""Recording what goes into the layers of a network and what comes back to them.

In: a network and inputs. Out: a :class:`LayerSignal` for each linear or convolution
layer, its inputs and the back-propagated derivatives of the outputs, from one forward
pass and one backward pass per output. Together they determine the layer's Jacobian.
Next: ``layer_features`` contracts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpbridge.frozen import FrozenNet


class Uncontractible(RuntimeError):
    """A layer's input and signal do not determine its Jacobian."""


class LayerSignal(NamedTuple):
    """One layer at T positions: scaled inputs and back-propagated signals."""

    inputs: Tensor  # batch x n x T x i, prior standard deviations folded in
    signal: Tensor  # batch x n x m x T x o

    def jacobian(self) -> Tensor:
        """The layer's columns of the features, ``batch x n x m x (o i)``."""
        return outer_products(self.signal, self.inputs).flatten(-2)


def outer_products(signal: Tensor, inputs: Tensor) -> Tensor:
    r"""Derivatives by a layer's weights, :math:`\sum_t \delta_t a_t^\top`.

    One matrix product for each point: a broadcast one would copy the inputs m times.

    Args:
        signal: Signals ``... n x m x T x o``.
        inputs: Inputs ``... n x T x i``.

    Returns:
        The derivatives, ``... n x m x o x i``.
    """
    m, _, o = signal.shape[-3:]
    return (signal.mT.flatten(-3, -2) @ inputs).unflatten(-2, (m, o))


def is_contractible(module: nn.Module) -> bool:
    """Whether a module is a linear or convolution layer of a kind known here."""
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


def record_signals(
    net: FrozenNet,
    rows: Tensor,
    layer_names: tuple[str, ...],
    directions: Callable[[Tensor], Tensor] | None = None,
    keep_graph: bool | None = None,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Run forward once and backward once per output; read inputs and signals.

    Args:
        net: The network.
        rows: Inputs ``n x d``.
        layer_names: Of the layers to read.
        directions: Maps the outputs ``n x m`` to roots ``n x m x r``; the signals are
            then those of r combinations of the outputs.
        keep_graph: Whether signals are to be differentiated; default if the rows are.

    Returns:
        The outputs, and by layer its inputs and signals ``n x m`` (or r) ``x T x o``.

    Raises:
        Uncontractible: If a layer is not called once, with all points.
    """
    taken: dict[str, tuple[Tensor, Tensor, int]] = {}

    def tap(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name in taken or not args or len(output) != len(rows):
                raise Uncontractible(f"{name} is not called once, with all points")
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            taken[name] = (args[0], output, args[0]._version)
            return output.clone()  # an in-place activation may follow

        return hook

    modules = dict(net.network.named_modules())
    handles = [modules[n].register_forward_hook(tap(n)) for n in layer_names]
    if keep_graph is None:
        keep_graph = torch.is_grad_enabled() and rows.requires_grad
    try:
        # Signals need autograd, which torch.inference_mode switches off.
        with torch.inference_mode(False), torch.enable_grad():
            rows = rows.clone() if rows.is_inference() else rows
            value = net(rows if keep_graph else rows.detach())  # n x m
            taps = [output for _, output, _ in taken.values()]
            signals = []
            root = sent = None
            if directions is not None:
                root = directions(value if keep_graph else value.detach())
                root = sent = root if keep_graph else root.detach()
                if root.shape[-1] > root.shape[-2]:
                    sent = None  # fewer passes by one for each output
            count = value.shape[1] if sent is None else sent.shape[-1]
            for j in range(count):
                last = j == count - 1
                signals.append(
                    torch.autograd.grad(
                        value[:, j].sum() if sent is None else value,
                        taps,
                        None if sent is None else sent[..., j],
                        retain_graph=keep_graph or not last,
                        create_graph=keep_graph,
                        materialize_grads=True,
                    )
                )
    finally:
        for handle in handles:
            handle.remove()
    if len(taken) < len(layer_names):
        raise Uncontractible("a layer is not called")
    result = {}
    for position, (name, (inputs, _, version)) in enumerate(taken.items()):
        if inputs._version != version:
            raise Uncontractible(f"the input of {name} is overwritten in place")
        signal = torch.stack([s[position] for s in signals], dim=1)  # n x m x ...
        if root is not None and sent is None:
            flat = root.mT @ signal.flatten(2)
            signal = flat.unflatten(-1, signal.shape[2:])
        inputs = inputs if keep_graph else inputs.detach()
        result[name] = _positions(modules[name], inputs, signal)
    return (value if keep_graph else value.detach()), result


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
