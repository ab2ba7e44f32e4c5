"""Copies side by side, against each of them alone."""

import pytest
import torch
from torch import nn

from gpbridge.draws import WeightDraws
from gpbridge.functional import FunctionalNet
from gpbridge.stacked_layers import stack_chain, stack_layers


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Tanh())

    def forward(self, x):
        return x + self.body(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def frozen(*names):
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    for name in names:
        network.get_parameter(name).requires_grad_(False)
    return network


def tied():
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, nn.ELU(0.5), layer)


def orthogonal():
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(2, 3))
    return nn.Sequential(layer)


CHAINS = {
    "linear": lambda: nn.Linear(2, 3),
    "no bias": lambda: nn.Sequential(nn.Linear(2, 3, bias=False), nn.GELU()),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(0.3)), nn.Dropout(), nn.Linear(3, 2)
    ),
    "frozen weight": lambda: frozen("0.weight"),
    "frozen bias": lambda: frozen("2.bias"),
    "frozen layer": lambda: frozen("0.weight", "0.bias"),
    "tied": tied,
}
OTHERS = {
    "residual": Residual,
    "subclass": lambda: nn.Sequential(Doubled(2, 3), nn.Tanh()),
    "norm": lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)),
    "softmax": lambda: nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1)),
    "parametrized": orthogonal,
}


@pytest.mark.parametrize("kind", [*CHAINS, *OTHERS])
@pytest.mark.parametrize("k", [1, 4])
def test_copies_are_evaluated_as_each_would_be_alone(kind, k):
    net = FunctionalNet({**CHAINS, **OTHERS}[kind]().double())
    assert (stack_chain(net) is not None) == (kind in CHAINS)
    X, params = random(k, 5, 2, seed=1), net.unflatten(random(k, net.num_params))
    each = [
        net.apply_network({n: v[r] for n, v in params.items()}, X[r]) for r in range(k)
    ]
    torch.testing.assert_close(stack_layers(net)(params, X), torch.stack(each))
    draws = WeightDraws(net, net.flatten(params))
    for shape in ((2,), (7, 2), (3, 4, 2), (3, 1, 2)):
        Z = random(*shape, seed=2)
        each = [
            net.apply_network({n: v[r] for n, v in params.items()}, Z) for r in range(k)
        ]
        torch.testing.assert_close(draws(Z), torch.stack(each))


def test_one_dropped_number_is_not_that_of_another_copy():
    net = FunctionalNet(nn.Sequential(nn.Linear(1, 50), nn.Dropout(0.5)))
    net.network.train()
    params = {"0.weight": torch.ones(2, 50, 1), "0.bias": torch.ones(2, 50)}
    with torch.random.fork_rng():
        values = stack_layers(net)(params, torch.ones(2, 3, 1))
    assert (values[0] != values[1]).any() and (values[0, 0] != values[0, 1]).any()


@pytest.mark.parametrize("k", [1, 3])
def test_a_first_layer_that_works_in_place_is_no_chain(k):
    def build(inplace):
        return FunctionalNet(
            nn.Sequential(nn.ReLU(inplace), nn.Linear(2, 1), nn.ReLU(True)).double()
        )

    assert stack_chain(build(True)) is None and stack_chain(build(False)) is not None
    weights, X = random(k, 3), random(4, 2, seed=1)
    values = WeightDraws(build(True), weights)(X.clone())
    torch.testing.assert_close(values, WeightDraws(build(False), weights)(X))


def test_images_are_no_chain():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    assert stack_chain(FunctionalNet(network)) is None
    net = FunctionalNet(nn.Linear(2, 1), input_shape=(2, 2))  # acts on each row
    assert stack_chain(net) is None
    assert stack_layers(net)(
        {"weight": torch.ones(3, 1, 2), "bias": torch.ones(3, 1)}, torch.ones(3, 5, 4)
    ).shape == (3, 5, 2)
