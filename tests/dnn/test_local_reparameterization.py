"""Noise on outputs has the law that noise on weights gives."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from gpbridge.dnn.local_reparameterization import LocalNoise, local_weights
from tests import cases


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def moments_of(network):
    means = {name: p.detach().clone() for name, p in network.named_parameters()}
    variances = {
        name: 0.1 + random(*p.shape, seed=i).square()
        for i, (name, p) in enumerate(means.items())
    }
    return means, variances


def local_outputs(network, means, variances, X, names, seed=0):
    chosen = [{name: part[name] for name in names} for part in (means, variances)]
    with LocalNoise(*chosen, seeded(seed)):
        return functional_call(network, means, (X,))


LAYERS = {
    "linear": (nn.Linear(3, 4), (3,)),
    "conv1d": (nn.Conv1d(2, 3, 3, padding=1), (2, 5)),
    "conv2d": (nn.Conv2d(2, 4, 3, stride=2, groups=2), (2, 5, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "conv3d": (nn.Conv3d(1, 2, 2, dilation=2, bias=False), (1, 3, 4, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_have_the_moments_of_random_weights(kind):
    layer, shape = LAYERS[kind]
    layer = layer.double()
    means, variances = moments_of(layer)
    X = random(1, *shape, seed=9)
    many = 20_000
    rows = X.expand(many, *shape)
    found = local_outputs(layer, means, variances, rows, set(means))
    # The map is linear in its weights: moments by propagating each weight alone.
    expected_mean, expected_variance = functional_call(layer, means, (X,)), 0.0
    for name, variance in variances.items():
        for i in range(variance.numel()):
            unit = {k: torch.zeros_like(m) for k, m in means.items()}
            unit[name].view(-1)[i] = 1.0
            slope = functional_call(layer, unit, (X,))
            expected_variance = expected_variance + slope**2 * variance.reshape(-1)[i]
    error = (found.mean(0) - expected_mean[0]) / (expected_variance[0] / many).sqrt()
    assert error.abs().max() < 4.5
    ratio = found.var(0) / expected_variance[0]
    assert (ratio - 1).abs().max() < 4.5 * (2 / many) ** 0.5


def test_a_linear_layer_keeps_the_joint_law_of_its_outputs():
    layer = nn.Linear(2, 3).double()
    means, variances = moments_of(layer)
    X = random(1, 2, seed=4).expand(20_000, 2)
    found = local_outputs(layer, means, variances, X, set(means))
    correlation = torch.corrcoef(found.mT) - torch.eye(3)
    assert correlation.abs().max() < 4.5 / 20_000**0.5


def names_of(network, X, positions=False):
    params = dict(network.named_parameters())
    return local_weights(network, params, X, positions)


def test_weights_that_meet_a_datum_once_are_local():
    every = {"0.weight", "0.bias", "2.weight", "2.bias"}
    X = torch.randn(4, 3)
    assert names_of(cases.tanh_mlp(2), X) == every
    assert names_of(cases.no_bias(2), X) == {"0.weight", "2.weight"}
    nested = names_of(cases.Nested(2), X)
    assert nested == {
        *("head.out.weight", "head.out.bias"),
        *("body.0.0.weight", "body.0.0.bias"),
    }
    assert names_of(cases.layer_norm(1), X) == {
        *("0.weight", "0.bias", "3.weight", "3.bias"),
    }


def test_weights_that_are_shared_are_not_local():
    X = torch.randn(4, 3)
    assert "first.weight" not in names_of(cases.Tied(1), X)
    assert "first.bias" not in names_of(cases.Tied(1), X)
    assert "inner.weight" not in names_of(cases.CalledTwice(1), X)
    used = names_of(cases.UsedOutside(1), X)
    assert used == {"out.weight", "out.bias"}
    attention = names_of(cases.Attention(1), torch.randn(4, 3, 4))
    assert attention == {"out.weight", "out.bias"}
    assert names_of(cases.weight_norm(1), X) == {"2.weight", "2.bias"}


@pytest.mark.parametrize("n", [1, 4])
def test_several_positions_count_on_demand(n):
    image = torch.randn(n, 2, 5, 5)
    network = cases.images(2)
    # The second convolution sees one position only: nothing is approximate there.
    assert names_of(network, image) == {"2.weight", "4.weight", "4.bias"}
    assert names_of(network, image, positions=True) == {
        *("0.weight", "0.bias", "2.weight", "4.weight", "4.bias"),
    }


class ChangesItsMind(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 3), "once"

    def forward(self, x):
        if self.how == "elsewhere":
            return x @ self.layer.weight
        return self.layer(x) if self.how == "once" else self.layer(self.layer(x))


@pytest.mark.parametrize("how", ["elsewhere", "twice"])
def test_another_use_than_on_the_first_batch_is_an_error(how):
    network = ChangesItsMind().double()
    means, variances = moments_of(network)
    network.how = how
    with pytest.raises(RuntimeError, match=r"layer\.weight.*in another way"):
        local_outputs(network, means, variances, random(2, 3), set(means))


def test_shapes_may_be_read_and_zero_inputs_have_gradients():
    class Reads(nn.Linear):
        def forward(self, x):
            assert self.weight.shape[0] == 4
            return F.linear(x.to(self.weight.dtype), weight=self.weight)

    network = Reads(3, 4, bias=False).double()
    X = torch.zeros(2, 3, dtype=torch.float64)
    assert names_of(network, X) == {"weight"}
    means, variances = moments_of(network)
    variances["weight"].requires_grad_()
    outputs = local_outputs(network, means, variances, X, {"weight"})
    (gradient,) = torch.autograd.grad(outputs.sum(), variances["weight"])
    assert bool(gradient.isfinite().all())
