"""Operations spelled out: the same values, and right derivatives of derivatives."""

import pytest
import torch
from torch import nn
from torch.func import jacfwd, vmap
from torch.nn import functional as F

from gpbridge.tracing import ordinary_tensors, traceable


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


scale, shift = random(3, seed=2), random(3, seed=3)
OPERATIONS = {
    "layer_norm": lambda x: F.layer_norm(x, (5,)),
    "layer_norm of two axes": lambda x: F.layer_norm(x, (3, 5), eps=1e-2),
    "instance_norm": lambda x: F.instance_norm(x, weight=scale, bias=shift),
    "instance_norm of kept statistics": lambda x: F.instance_norm(
        x, shift, scale.square(), use_input_stats=False
    ),
    "prelu": lambda x: F.prelu(x, scale),
    "affine_grid": lambda x: F.affine_grid(
        x[:, :2, :3].contiguous(), [4, 1, 3, 5], align_corners=False
    ),
    "affine_grid of corners": lambda x: F.affine_grid(
        x[:, :2, :3].contiguous(), [4, 1, 3, 5], align_corners=True
    ),
    "affine_grid of volumes": lambda x: F.affine_grid(
        x[:, :, :4].contiguous(), [4, 1, 2, 3, 2], align_corners=False
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_values_are_those_of_torch(operation):
    x = random(4, 3, 5)
    expected = operation(x)
    with traceable():
        found = operation(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["layer_norm", "instance_norm", "prelu"])
def test_jacobians_are_those_of_finite_differences_once_more_differentiated(name):
    """The derivative of a Jacobian in the inputs, which torch.func gets wrong."""
    x, direction = random(4, 3, 5), random(4, 3, 5, seed=4)

    def squares(x):
        with traceable():
            slope = jacfwd(lambda t: OPERATIONS[name](x + t * direction).sin().sum())
            return slope(torch.zeros((), dtype=x.dtype))

    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(squares(leaf), leaf)
    step = 1e-6 * random(4, 3, 5, seed=5)
    change = (squares(x + step) - squares(x - step)).detach()
    torch.testing.assert_close(2 * (found * step).sum(), change, rtol=1e-6, atol=1e-12)


def test_attention_has_a_batching_rule_and_a_second_derivative():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    layer = layer.double().eval().requires_grad_(False)
    x = random(3, 2, 4)
    with traceable():
        torch.testing.assert_close(
            vmap(lambda row: layer(row[None])[0])(x), layer(x), rtol=1e-10, atol=1e-12
        )
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(
            layer(leaf).square().sum(), leaf, create_graph=True
        )[0]
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert second.abs().max() > 0


def test_the_switch_of_fast_paths_is_put_back():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError, match="inside"), traceable():
        assert not torch.backends.mha.get_fastpath_enabled()
        raise RuntimeError("inside")
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_kept_tensors_meet_later_gradients():
    weight = random(3).requires_grad_()
    with torch.inference_mode():
        with ordinary_tensors():
            kept = random(3) * 2
        spoilt = random(3) * 2
    assert spoilt.is_inference() and not kept.is_inference()
    (kept @ weight).backward()
    with torch.enable_grad(), ordinary_tensors():
        assert (weight * 2).requires_grad  # nothing changes outside of that mode
