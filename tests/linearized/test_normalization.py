"""Normalisation layers: weights in front have no scale, their own can be fixed.

Rescaling the weights in front changes nothing in the function, and must change nothing
in the predictions (Antoran et al. 2022, section 4): under a g-prior it does not.
"""

import copy

import pytest
import torch
from torch import nn

from gpbridge import Exact, LinearizedGP
from gpbridge.functional import FunctionalNet
from gpbridge.linearized import Sampled
from gpbridge.solvers import ConjugateGradients

IMAGE = (1, 4, 4)
FACTOR = 10.0


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def dense(norm):
    return nn.Sequential(nn.Linear(16, 8), norm, nn.Tanh(), nn.Linear(8, 3))


def images(norm):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )


NETS = {
    "LayerNorm": (lambda: dense(nn.LayerNorm(8, eps=1e-14)), None),
    "BatchNorm1d": (lambda: dense(nn.BatchNorm1d(8, eps=1e-14)), None),
    "GroupNorm": (lambda: images(nn.GroupNorm(2, 4, eps=1e-14)), IMAGE),
    "BatchNorm2d": (lambda: images(nn.BatchNorm2d(4, eps=1e-14)), IMAGE),
}
every_normalization = pytest.mark.parametrize("name", NETS)


def same_function_twice(name):
    """A network, and one with ten times the weights in front of its normalisation."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = make().double()
    net(random(60, 16, seed=3).reshape(60, *(shape or (16,))))  # statistics
    net.eval()
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled[0].weight *= FACTOR
        scaled[0].bias *= FACTOR
        if hasattr(scaled[1], "running_mean"):  # the statistics of scaled inputs
            scaled[1].running_mean *= FACTOR
            scaled[1].running_var *= FACTOR**2
    x = random(5, 16).reshape(5, *(shape or (16,)))
    torch.testing.assert_close(scaled(x), net(x), rtol=1e-9, atol=1e-9)
    return net, scaled, shape


def variances(nets, shape, **options):
    X, labels = random(24, 16, seed=1), torch.arange(24) % 3
    return [
        LinearizedGP(net, X, labels, input_shape=shape, **options)
        .posterior(random(6, 16, seed=2))
        .variance
        for net in nets
    ]


@every_normalization
@pytest.mark.parametrize("g_prior", [True, 8], ids=["exact", "probed"])
@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_a_scale_that_changes_nothing_changes_no_prediction(name, kind, g_prior):
    *nets, shape = same_function_twice(name)
    inference = Exact()
    if kind == "sampled":
        solver = ConjugateGradients(1e-10, preconditioner_rank=0)
        inference = Sampled(20, solver, space="weight")
    options = {"inference": inference}
    one, other = variances(nets, shape, g_prior=g_prior, **options)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    plain, moved = variances(nets, shape, **options)
    assert not torch.allclose(plain, moved, rtol=0.1)  # which an isotropic prior does


@every_normalization
def test_the_layer_in_front_takes_part(name):
    """Else independence of its scale would be no news."""
    net, _, shape = same_function_twice(name)
    (whole,) = variances([net], shape, g_prior=True)
    behind = [n for n, _ in net.named_parameters() if not n.startswith("0.")]
    (without,) = variances([net], shape, g_prior=True, parameters=behind)
    assert not torch.allclose(whole, without, rtol=0.05)


@every_normalization
def test_weights_of_the_normalization_can_be_fixed(name):
    net, scaled, shape = same_function_twice(name)
    option = "without_normalization"
    functional = FunctionalNet(net, option, shape)
    expected = [n for n, _ in net.named_parameters() if not n.startswith("1.")]
    assert list(functional.params) == expected and len(expected) == 4
    by_names = variances([net], shape, parameters=expected)
    torch.testing.assert_close(variances([net], shape, parameters=option), by_names)
    both = {"g_prior": True, "parameters": option}
    one, other = variances((net, scaled), shape, **both)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_other_kinds_and_nested_layers_are_found():
    block = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    net = nn.Sequential(block, nn.Linear(4, 1, bias=False))
    net.extra = nn.InstanceNorm1d(2, affine=True)
    names = list(FunctionalNet(net, "without_normalization").params)
    assert names == ["0.0.weight", "0.0.bias", "1.weight"]


def test_without_any_normalization_all_weights_are_random():
    net = nn.Linear(2, 1)
    assert list(FunctionalNet(net, "without_normalization").params) == [
        "weight",
        "bias",
    ]


class MyNorm(nn.Module):
    """Divides by the largest input."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.gain * x / x.abs().amax(-1, keepdim=True)


def test_an_unknown_normalization_works_and_is_never_excluded_in_silence():
    net = nn.Sequential(nn.Linear(16, 8), MyNorm(8), nn.Linear(8, 3)).double()
    assert "1.gain" in FunctionalNet(net).params
    (variance,) = variances([net], None, g_prior=True)
    assert bool((variance > 0).all())
    with pytest.raises(ValueError, match=r"whether 1 \(MyNorm\) normalise.* predicate"):
        FunctionalNet(net, "without_normalization")
    chosen = FunctionalNet(net, lambda name: not name.startswith("1."))
    assert "1.gain" not in chosen.params and len(chosen.params) == 4


def test_a_network_of_normalization_alone_has_nothing_left():
    with pytest.raises(ValueError, match="no random weight left"):
        FunctionalNet(nn.LayerNorm(3), "without_normalization")
