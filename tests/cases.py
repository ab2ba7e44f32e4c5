"""Networks on which everything is tested: one entry per structure that breaks things.

Each case makes a float64 module with m outputs from ``torch.nn`` alone; its initial
weights come from the global random state, which conftest.py sets before each test.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn


class Case(NamedTuple):
    """A network, and what an input of it looks like."""

    build: Callable[[int], nn.Module]
    width: int = 3
    input_shape: tuple[int, ...] | None = None
    outputs: tuple[int, ...] = (1, 3)  # numbers of outputs that the case has

    def network(self, m: int) -> nn.Module:
        return self.build(m).double()

    def inputs(self, *batch_and_n: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (*batch_and_n, self.width)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


class Nested(nn.Module):
    """ReLU layers inside modules, with weights defined after those that use them."""

    def __init__(self, m):
        super().__init__()
        self.head = nn.ModuleDict({"out": nn.Linear(6, m)})
        self.body = nn.Sequential(nn.Sequential(nn.Linear(3, 6), nn.ReLU()))

    def forward(self, x):
        return self.head["out"](self.body(x))


class Tied(nn.Module):
    """Two layers with one weight matrix."""

    def __init__(self, m):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.out = nn.Linear(3, m)

    def forward(self, x):
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class CalledTwice(nn.Module):
    """One layer in two places."""

    def __init__(self, m):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.start, self.out = nn.Linear(3, 4), nn.Linear(4, m)

    def forward(self, x):
        h = torch.tanh(self.start(x))
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(h)))))


class UsedOutside(nn.Module):
    """A layer whose weight is also used beside it, which no inspection can see."""

    def __init__(self, m):
        super().__init__()
        self.layer, self.out = nn.Linear(3, 5), nn.Linear(5, m)

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return self.out(h) + (h @ self.layer.weight).sum(-1, keepdim=True)


class ScalarWeight(nn.Module):
    """A weight without axes."""

    def __init__(self, m):
        super().__init__()
        self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, m)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.gain * self.out(torch.tanh(self.layer(x)))


class Residual(nn.Module):
    """A sum of branches, and a layer that is called by keyword."""

    def __init__(self, m):
        super().__init__()
        self.start, self.branch, self.out = (
            nn.Linear(3, 4),
            nn.Linear(4, 4),
            nn.Linear(4, m),
        )

    def forward(self, x):
        h = torch.tanh(self.start(x))
        h = h + self.branch(h).tanh()
        return self.out(input=h)


class Flat(nn.Module):
    """One output without its axis, ``n``."""

    def __init__(self, m):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        return self.layers(x).squeeze(-1)


class Attention(nn.Module):
    """Self-attention over the positions of one input."""

    def __init__(self, m):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, m)

    def forward(self, x):
        h, _ = self.attention(x, x, x, need_weights=False)
        return self.out(h.mean(1))


class SkipsOnData(nn.Module):
    """A branch that torch.func cannot trace, and a constant for some points."""

    def __init__(self, m):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, m))
        self.m = m

    def forward(self, x):
        rows = [
            self.layers(row) if row[0].item() > -0.5 else row.new_zeros(self.m)
            for row in x
        ]
        return torch.stack(rows) if rows else x.new_zeros(0, self.m)


def tanh_mlp(m):
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, m))


def inplace_relu(m):
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, m))


def no_bias(m):
    return nn.Sequential(
        nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, m, bias=False)
    )


def images(m):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(3, 2, 2, dilation=2, bias=False),
        nn.Flatten(),
        nn.Linear(2, m),
    )


def grouped_images(m):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding="same"),
        nn.Tanh(),
        nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, m),
    )


def series(m):
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, m)
    )


def batch_norm(m):
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, m))
    net(torch.randn(20, 3))  # statistics that are not those of the start
    return net


def layer_norm(m):
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, m))


def dropout(m):
    return nn.Sequential(
        nn.Linear(3, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, m)
    ).train()


def transformer(m):
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, m))


def frozen(m):
    net = nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, m)
    )
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


def weight_norm(m):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, m))


class Cube(torch.autograd.Function):
    """A custom function with a vmap rule, and no rule for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class OldCube(torch.autograd.Function):
    """A custom function in the form that torch.func cannot use."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def no_forward_mode(m):
    return nn.Sequential(nn.Linear(3, 5), Activation(Cube), nn.Linear(5, m))


def old_function(m):
    return nn.Sequential(nn.Linear(3, 5), Activation(OldCube), nn.Linear(5, m))


NETS = {
    "tanh_mlp": Case(tanh_mlp),
    "nested": Case(Nested),
    "inplace_relu": Case(inplace_relu),
    "no_bias": Case(no_bias),
    "images": Case(images, 50, (2, 5, 5)),
    "grouped_images": Case(grouped_images, 32, (2, 4, 4)),
    "series": Case(series, 8, (2, 4)),
    "tied": Case(Tied),
    "called_twice": Case(CalledTwice),
    "used_outside": Case(UsedOutside),
    "batch_norm": Case(batch_norm),
    "layer_norm": Case(layer_norm),
    "dropout": Case(dropout),
    "attention": Case(Attention, 12, (3, 4)),
    "transformer": Case(transformer, 12, (3, 4)),
    "frozen": Case(frozen),
    "scalar_weight": Case(ScalarWeight),
    "residual": Case(Residual),
    "weight_norm": Case(weight_norm),
    "flat": Case(Flat, outputs=(1,)),
    "no_forward_mode": Case(no_forward_mode),
}
# Networks that torch.func cannot trace: they work one point at a time, and say so.
LOOPED = {
    "skips_on_data": Case(SkipsOnData),
    "old_function": Case(old_function),
}

# torch says that it loops over points where an operation has no batching rule.
SLOW = pytest.mark.filterwarnings("ignore:There is a performance drop")

every_net = pytest.mark.parametrize(
    "case, m",
    [
        pytest.param(
            case, m, id=f"{name}-{m}", marks=[SLOW] if name == "weight_norm" else []
        )
        for name, case in NETS.items()
        for m in case.outputs
    ],
)
every_looped_net = pytest.mark.parametrize(
    "case, m",
    [
        pytest.param(case, m, id=f"{name}-{m}")
        for name, case in LOOPED.items()
        for m in case.outputs
    ],
)
