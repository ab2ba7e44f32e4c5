"""Many copies of one network, evaluated side by side.

A chain of linear and elementwise layers becomes batched products, which take a third of
the time that ``torch.func.vmap`` takes to dispatch it; everything else is vmapped.

In: a network as a function of its weights. Out: a function of stacked weights and of
inputs for each copy. Next: ``draws`` evaluates them, ``dnn.replicas`` trains them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from gpbridge.functional import FunctionalNet
from gpbridge.types import Params

Stacked = Callable[[Params, Tensor], Tensor]

# By exact type: a subclass may do anything. Each acts on a number alone, or, as dropout
# does, draws for each number alone.
_ELEMENTWISE = {
    *(nn.Identity, nn.Tanh, nn.Sigmoid, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU),
    *(nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.LogSigmoid, nn.Tanhshrink),
    *(nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.Dropout, nn.AlphaDropout),
}


def stack_layers(net: FunctionalNet) -> Stacked:
    """The function of weights ``k x shape`` and ``k x b x d`` inputs, ``k x b x m``.

    Args:
        net: The network; its mode, train or eval, is that at the time of the call.

    Returns:
        The function.
    """
    return stack_chain(net) or vmap(net.apply_network, randomness="different")


def stack_chain(net: FunctionalNet) -> Stacked | None:
    """The same by batched products, or None if the network is no plain chain.

    Args:
        net: The network.

    Returns:
        The function.
    """
    chain = _chain(net.network)
    if chain is None or net.entries or len(net.input_shape or (0,)) != 1:
        return None
    if getattr(chain[0], "inplace", False):  # would write to inputs that copies share
        return None
    names = {id(p): name for name, p in net.network.named_parameters()}
    layers = [
        (module, names.get(id(module.weight)), names.get(id(module.bias)))
        if type(module) is nn.Linear
        else (module, None, None)
        for module in chain
    ]

    def forward(params: Params, X: Tensor) -> Tensor:
        values = X
        for module, weight, bias in layers:
            if weight is None:
                values = module(values)
            else:
                values = _linear(
                    values,
                    params.get(weight, module.weight),
                    None if bias is None else params.get(bias, module.bias),
                )
        return values

    return forward


def _linear(X: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dim() == 2:  # one for all copies
        values = F.linear(X, weight)
        if bias is None:
            return values
        return values + (bias if bias.dim() == 1 else bias[:, None])
    if bias is None:
        return torch.bmm(X, weight.mT)
    return torch.baddbmm(bias.unsqueeze(-2), X, weight.mT)


def _chain(network: nn.Module) -> list[nn.Module] | None:
    """The layers in their order, or None if the network is no plain chain."""
    hooked = (
        *(network._forward_hooks, network._forward_pre_hooks),
        *(network._backward_hooks, network._backward_pre_hooks),
    )
    if any(hooked):
        return None
    if type(network) is nn.Linear or type(network) in _ELEMENTWISE:
        return [network]
    if type(network) is not nn.Sequential:
        return None
    parts = [_chain(module) for module in network]
    if any(part is None for part in parts):
        return None
    return [module for part in parts for module in part]
