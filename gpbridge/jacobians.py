"""Products with the Jacobian of a network in its weights.

In: a :class:`~gpbridge.frozen.FrozenNet` and inputs. Out: the Jacobian of its outputs
as a tensor, within a budget of bytes, or its products with vectors: by the transforms
of torch.func where the probe found that they can trace the network, by plain autograd
in a loop where not.
Next: ``probe`` compares the two, ``operators`` offers the products as matrices and
``features`` the Gram matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from gpbridge.frozen import FrozenNet
from gpbridge.types import Params

JACOBIAN_BYTES = 256 * 2**20  # one chunk of a Jacobian, workspace included


def jacobian(
    net: FrozenNet,
    X: Tensor,
    params: Params | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Derivative of the outputs in the weights, :math:`J = \partial f / \partial w`.

    One backward pass per output and point, vectorised over points: time linear in the
    number of points. Memory is n m p numbers for the result and at most
    ``JACOBIAN_BYTES`` of workspace. Differentiable in ``X``.

    Args:
        net: The network.
        X: Inputs ``... x n x d``.
        params: Weights to differentiate in and their values; default all random ones.
        chunk_size: Points per vectorised pass; default as many as the budget allows.

    Returns:
        ``... x n x m x p``, the weights in the order of ``params``.
    """
    params = net.params if params is None else params
    rows = X.reshape(-1, X.shape[-1])
    sizes = [p.numel() for p in params.values()]
    if len(rows) == 0:
        return X.new_zeros(*X.shape[:-1], net.num_outputs, sum(sizes))
    if not net.vectorized:
        return looped_jacobian(net, rows, params).reshape(*X.shape[:-1], -1, sum(sizes))

    def one_point(values: Params, x: Tensor) -> Tensor:
        return net.apply_network(values, x[None])[0]

    if chunk_size is None:
        # Of a tensor that is random in part the whole gradient passes by.
        numbers = 3 * net.whole_size(params) + 2 * net.num_activations
        per_row = (net._num_outputs or 1) * numbers * rows.element_size()
        chunk_size = max(1, JACOBIAN_BYTES // per_row)
    blocks = vmap(
        jacrev(one_point),
        in_dims=(None, 0),
        chunk_size=chunk_size if chunk_size < len(rows) else None,
    )(params, rows)  # each rows x m x shape
    # Spelled out, because flatten(2) refuses the block of a scalar weight.
    flat = [b.reshape(*b.shape[:2], params[name].numel()) for name, b in blocks.items()]
    J = torch.cat(flat, dim=-1)
    return J.reshape(*X.shape[:-1], *J.shape[1:])


def jvp(
    net: FrozenNet, X: Tensor, tangent: Tensor, params: Params | None = None
) -> Tensor:
    r"""Product :math:`J v` of the Jacobian with a change of the weights.

    A forward pass with tangents, about the time and memory of two forward passes; two
    backward passes where a layer has no forward mode. Where torch.func cannot trace the
    network the Jacobian is formed. Differentiable in ``X``.

    Args:
        net: The network.
        X: Inputs ``... x n x d``.
        tangent: The vector v, ``p`` numbers in the order of ``params``.
        params: Weights to differentiate in and their values; default all random ones.

    Returns:
        ``... x n x m``.
    """
    params = net.params if params is None else params
    if not net.vectorized:
        return jacobian(net, X, params) @ tangent
    change = _split(tangent, params)
    if net.forward_mode:
        _, product = torch.func.jvp(
            lambda values: net.apply_network(values, X), (params,), (change,)
        )
        return product
    _, push = _transposed_pull(net, X, params)
    return push((change,))[0]


def vjp(
    net: FrozenNet, X: Tensor, cotangent: Tensor, params: Params | None = None
) -> Tensor:
    r"""Product :math:`J^\top u` of the transposed Jacobian with changes of the outputs.

    One forward and one backward pass over all points, and the memory of their graph.
    Where torch.func cannot trace the network the Jacobian is formed. Differentiable in
    ``X``.

    Args:
        net: The network.
        X: Inputs ``... x n x d``.
        cotangent: The values u, ``... x n x m``.
        params: Weights to differentiate in and their values; default all random ones.

    Returns:
        ``p`` numbers, in the order of ``params``.
    """
    params = net.params if params is None else params
    if not net.vectorized:
        J = jacobian(net, X, params)
        return J.flatten(0, -2).mT @ cotangent.reshape(-1)
    _, pull = torch.func.vjp(lambda values: net.apply_network(values, X), params)
    (slopes,) = pull(cotangent)
    return torch.cat([slopes[name].reshape(-1) for name in params])


def linearize(net: FrozenNet, X: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    r"""The tangent model :math:`f(x, w^*) + J(x)(w - w^*)` at fixed inputs.

    The forward pass is shared by all products, so that many tangents are cheap.

    Returns:
        The outputs ``... x n x m`` at the trained weights, and the map from a ``p``
        vector of weight changes to the change of the outputs.
    """
    if not net.vectorized:
        J = jacobian(net, X)
        return net(X), lambda tangent: J @ tangent
    # Reverse mode twice: torch.func.linearize traces, slowly and with warnings.
    outputs, push = _transposed_pull(net, X, net.params)
    return outputs, lambda tangent: push((net.unflatten(tangent),))[0]


def looped_jacobian(net: FrozenNet, rows: Tensor, params: Params) -> Tensor:
    """Plain autograd, one point and one output at a time, ``rows x m x p``."""
    create_graph = torch.is_grad_enabled() and (
        rows.requires_grad or any(p.requires_grad for p in params.values())
    )
    result = []
    with torch.enable_grad():
        leaves = {
            name: p if p.requires_grad else p.detach().requires_grad_()
            for name, p in params.items()
        }
        for x in rows:
            for output in net.apply_network(leaves, x[None])[0]:
                if not output.requires_grad:  # this point takes a constant branch
                    result.append(x.new_zeros(sum(p.numel() for p in leaves.values())))
                    continue
                grads = torch.autograd.grad(
                    output,
                    list(leaves.values()),
                    retain_graph=True,
                    create_graph=create_graph,
                    allow_unused=True,
                )
                result.append(
                    torch.cat(
                        [
                            (torch.zeros_like(p) if g is None else g).reshape(-1)
                            for g, p in zip(grads, leaves.values(), strict=True)
                        ]
                    )
                )
    return torch.stack(result).reshape(len(rows), -1, result[0].numel())


def _transposed_pull(
    net: FrozenNet, X: Tensor, params: Params
) -> tuple[Tensor, Callable]:
    """J v as the derivative of u -> v' J' u, which is linear in u."""
    value, pull = torch.func.vjp(lambda values: net.apply_network(values, X), params)
    _, push = torch.func.vjp(pull, torch.zeros_like(value))
    return value, push


def _split(vector: Tensor, params: Params) -> Params:
    """Cut a vector of ``p`` numbers into the shapes of these weights."""
    parts = vector.split([p.numel() for p in params.values()])
    return {
        name: part.reshape(p.shape)
        for (name, p), part in zip(params.items(), parts, strict=True)
    }
