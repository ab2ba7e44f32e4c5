"""Inputs and signals of layers: together they are the Jacobian."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from gpbridge.functional import FunctionalNet
from gpbridge.layer_signals import (
    LayerSignal,
    Uncontractible,
    is_contractible,
    record_signals,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Images(nn.Module):
    """A dilated and padded convolution in a module, and a linear layer."""

    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.body = nn.ModuleDict({"conv": conv})
        self.head = nn.Linear(3 * 3 * 7, 2)

    def forward(self, x):
        return self.head(self.body["conv"](x).tanh().flatten(1))


class Series(nn.Module):
    """A convolution along a line."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 3, 2, padding=1), nn.Linear(18, 2)

    def forward(self, x):
        return self.head(self.conv(x).tanh().flatten(1))


CASES = {
    "images": (Images, (2, 5, 5), ("body.conv", "head")),
    "series": (Series, (2, 5), ("conv", "head")),
}


def frozen(case):
    build, shape, layers = CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build().double()
    net = FunctionalNet(network, input_shape=shape)
    rows = random(4, torch.Size(shape).numel())
    net.probe(rows)
    return net, rows, layers


def weight_jacobian(net, rows, name):
    def outputs(weight):
        shape = net.input_shape
        return functional_call(
            net.network, {name: weight}, (rows.reshape(len(rows), *shape),)
        )

    return jacrev(outputs)(dict(net.network.named_parameters())[name].detach())


@pytest.mark.parametrize("case", CASES)
def test_inputs_and_signals_are_the_jacobian_of_the_weight(case):
    net, rows, layers = frozen(case)
    value, signals = record_signals(net, rows, layers)
    torch.testing.assert_close(value, net(rows), **EXACT)
    assert not value.requires_grad and list(signals) == list(layers)
    for layer, (inputs, signal) in signals.items():
        J = LayerSignal(inputs[None], signal[None]).jacobian()[0]
        expected = weight_jacobian(net, rows, f"{layer}.weight").flatten(2)
        torch.testing.assert_close(J, expected, **EXACT)


@pytest.mark.parametrize("count", [1, 3])  # fewer and more than there are outputs
@pytest.mark.parametrize("case", CASES)
def test_directions_combine_the_outputs(case, count):
    net, rows, layers = frozen(case)
    R = random(4, 2, count, seed=2)
    _, one = record_signals(net, rows, layers)
    _, sent = record_signals(net, rows, layers, lambda outputs: R)
    for layer in layers:
        expected = torch.einsum("nmto,nmr->nrto", one[layer][1], R)
        torch.testing.assert_close(sent[layer][1], expected, **EXACT)


@pytest.mark.parametrize("count", [1, 3])
def test_roots_are_constants_unless_the_graph_is_kept(count):
    net, rows, layers = frozen("images")
    R = random(4, 2, count, seed=2).requires_grad_()
    _, signals = record_signals(net, rows, layers, lambda outputs: R)
    assert not any(signal.requires_grad for _, signal in signals.values())
    _, signals = record_signals(net, rows, layers, lambda outputs: R, keep_graph=True)
    assert all(signal.requires_grad for _, signal in signals.values())


def test_signals_are_differentiable_in_rows_that_require_it():
    net, rows, layers = frozen("images")

    def total(rows):
        _, signals = record_signals(net, rows, layers)
        parts = (x.square().sum() + s.square().sum() for x, s in signals.values())
        return sum(parts)

    rows.requires_grad_()
    (slope,) = torch.autograd.grad(total(rows), rows)
    step = 1e-6 * random(*rows.shape, seed=3)
    with torch.no_grad():
        change = total(rows + step) - total(rows - step)
    torch.testing.assert_close(2 * (slope * step).sum(), change, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert not total(rows).requires_grad


def test_inference_mode_gives_the_same():
    net, rows, layers = frozen("images")
    with torch.inference_mode():
        _, found = record_signals(net, rows.clone(), layers)
    _, expected = record_signals(net, rows, layers)
    for layer in layers:
        torch.testing.assert_close(found[layer], expected[layer], **EXACT)


def test_layers_of_other_kinds_are_not_contractible():
    assert is_contractible(nn.Linear(2, 2)) and is_contractible(nn.Conv2d(2, 2, 3))
    others = (
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(2, 2, 3, padding_mode="circular"),
        nn.Conv1d(2, 2, 3, padding="same"),
        nn.Bilinear(2, 2, 2),
        type("Other", (nn.Linear,), {})(2, 2),
    )
    assert not any(map(is_contractible, others))


class Careless(nn.Module):
    """Calls a layer twice, not at all, or overwrites its input."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer, self.out = kind, nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        if self.kind != "skipped":
            x = x * 1.0
            y = self.layer(x)
            if self.kind == "overwritten":
                x.mul_(2.0)
            x = self.layer(y) if self.kind == "twice" else y
        return self.out(x)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("twice", "layer is not called once"),
        ("skipped", "a layer is not called"),
        ("overwritten", "the input of layer is overwritten in place"),
    ],
)
def test_layers_that_do_not_determine_their_jacobian_are_refused(kind, message):
    net = FunctionalNet(Careless(kind).double())
    with pytest.raises(Uncontractible, match=message):
        record_signals(net, random(4, 3), ("layer", "out"))
    assert not any(m._forward_hooks for m in net.network.modules())
