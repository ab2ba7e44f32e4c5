"""Operations whose derivatives torch.func lacks or gets wrong, spelled out.

In: nothing. Out: a context in which a network is evaluated, and one in which what is
kept for later gradients is computed. Fused attention has no
batching rule and no double backward. Under vmap and in forward mode the statistics that
normalisation keeps for its backward pass are taken for constants, so that a Jacobian is
right and its derivative in the inputs is not (pytorch/functorch issue 534, pytorch
issue 196700). Next: ``functional`` evaluates networks in this context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def traceable():
    """Compute attention and normalisation by operations that torch.func knows."""
    # The switch of the transformer layers is global upstream, so it is put back.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _Elementary():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Compute outside of inference mode, whose tensors no later gradient may meet.

    What is computed here is kept: a prediction must not spoil the next acquisition.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


class _Elementary(TorchFunctionMode):
    """Replace functions by those of ``_ELEMENTARY`` for the current thread."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        rule = _ELEMENTARY.get(func, func)
        return rule(*args, **(kwargs or {}))


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(-len(normalized_shape), 0))
    return _normalise(input, axes, weight, bias, eps)


def _instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    if not use_input_stats:
        return F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    per_channel = (-1, *[1] * (input.dim() - 2))
    return _normalise(
        input,
        tuple(range(2, input.dim())),
        None if weight is None else weight.reshape(per_channel),
        None if bias is None else bias.reshape(per_channel),
        eps,
    )


def _normalise(input, axes, weight, bias, eps):
    centred = input - input.mean(axes, keepdim=True)
    output = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def _prelu(input, weight):
    shape = [1] * input.dim()
    shape[min(1, input.dim() - 1)] = -1
    return torch.where(input > 0, input, weight.reshape(shape) * input)


def _affine_grid(theta, size, align_corners=None):
    if len(size) != 4:
        return F.affine_grid(theta, size, align_corners)
    sides = []
    for length in size[-2:]:
        steps = torch.arange(length, dtype=theta.dtype, device=theta.device)
        if align_corners:
            sides.append(2 * steps / max(1, length - 1) - float(length > 1))
        else:
            sides.append((2 * steps + 1) / length - 1)
    y, x = torch.meshgrid(*sides, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], -1)  # h x w x 3
    return places @ theta.mT[:, None]


_ELEMENTARY = {
    F.affine_grid: _affine_grid,
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    F.prelu: _prelu,
}
