"""The evidence of two parallel paths keeps the one that the data need.

A linear network has itself as tangent model, so that its evidence is exact and the
answer follows from the data: a filter of three taps explains a local target with fewer
directions than the dense map that could imitate it.
"""

import copy

import pytest
import torch
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.selection import fit_evidence, group_dimensions
from gpbridge.testing import assert_module_unchanged
from tests import oracles_linearized

N, LENGTH, NOISE = 24, 8, 0.01
WEIGHTS = LENGTH**2


class ParallelPaths(nn.Module):
    """A sum of branches, nested, and no Sequential."""

    def __init__(self):
        super().__init__()
        dense = nn.Linear(LENGTH, LENGTH, bias=False)
        conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.branches = nn.ModuleDict({"dense": dense, "conv": conv})

    def forward(self, x):
        dense, conv = self.branches.values()
        return dense(x) + conv(x[:, None])[:, 0]


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def paths():
    network = ParallelPaths().double()
    with torch.no_grad():
        for seed, weight in enumerate(network.parameters()):
            weight.copy_(0.3 * normal(*weight.shape, seed=seed))
    return network


def data(target, seed):
    """A shifted, filtered or mixed copy of the input, and noise."""
    X = normal(N, LENGTH, seed=10 + seed)
    dense = normal(LENGTH, LENGTH, seed=20 + seed) / LENGTH**0.5
    taps = torch.tensor([0.5, 1.0, -0.7], dtype=torch.float64)
    band = sum(
        tap * torch.diag(torch.ones(LENGTH - abs(k), dtype=torch.float64), k)
        for k, tap in enumerate(taps, start=-1)
    )
    matrix = {"local": band, "dense": dense, "both": dense + 2 * band}[target]
    Y = X @ matrix.T + NOISE**0.5 * normal(N, LENGTH, seed=30 + seed)
    return X, Y


def fitted(target, seed, network=None, groups=None):
    network = paths() if network is None else network
    names = [name for name, _ in network.named_parameters()]
    groups = [[name] for name in names] if groups is None else groups
    model = LinearizedGP(network, *data(target, seed), groups=groups, noise=NOISE)
    before = group_dimensions(model)
    evidence = fit_evidence(model, warn=False)
    return model, evidence, before


@pytest.mark.parametrize("seed", range(3))
def test_a_local_target_switches_the_dense_path_off(seed):
    model, _, before = fitted("local", seed)
    dense, conv = model.prior_variance.tolist()
    assert dense < 1e-2 * conv
    after = group_dimensions(model)
    assert before[0] > 0.8 * WEIGHTS and after[0] < 0.4 * WEIGHTS
    assert after[1] > 2.9  # of three taps


@pytest.mark.parametrize("seed", range(3))
def test_a_target_without_locality_switches_the_convolution_off(seed):
    model, _, before = fitted("dense", seed)
    dense, conv = model.prior_variance.tolist()
    assert conv < 1e-4 * dense
    after = group_dimensions(model)
    assert after[0] > 0.9 * WEIGHTS
    assert before[1] > 2 and after[1] < 0.01


def test_a_sum_of_both_keeps_both():
    model, _, _ = fitted("both", 0)
    dense, conv = group_dimensions(model).tolist()
    assert dense > 0.9 * WEIGHTS and conv > 2.5


@pytest.mark.parametrize("target", ["local", "dense"])
def test_the_evidence_is_that_of_the_weights_it_stands_for(target):
    model, evidence, _ = fitted(target, 0)
    X, Y = data(target, 0)
    train = oracles_linearized.tangent(paths(), X)
    variance = model.prior_variance.detach()
    sizes = torch.tensor([WEIGHTS, 3])
    noise = NOISE * torch.eye(Y.numel(), dtype=torch.float64)
    expected = oracles_linearized.gaussian_log_evidence(
        train, variance.repeat_interleave(sizes), noise, Y
    )
    torch.testing.assert_close(evidence.value, expected)


def test_a_path_that_is_not_needed_costs_evidence_under_one_prior_variance():
    _, two, _ = fitted("local", 1)
    _, one, _ = fitted("local", 1, groups="all")
    assert two.value > one.value + 50


def test_trained_weights_do_not_matter_to_a_linear_network():
    # Its tangent model is the same everywhere: the offset takes the weights back out.
    trained = paths()
    with torch.no_grad():
        for weight in trained.parameters():
            weight.mul_(-3)
    _, one, _ = fitted("local", 1)
    with assert_module_unchanged(trained):
        _, other, _ = fitted("local", 1, network=trained)
    torch.testing.assert_close(one.value, other.value, rtol=1e-6, atol=1e-6)


def test_a_copy_and_a_saved_state_keep_the_paths():
    model, _, _ = fitted("local", 0)
    found = group_dimensions(model)
    assert torch.equal(group_dimensions(copy.deepcopy(model)), found)
    network = paths()
    groups = [[name] for name, _ in network.named_parameters()]
    other = LinearizedGP(network, *data("local", 0), groups=groups, noise=NOISE)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(group_dimensions(other), found)
