"""The target in a subspace: sums over data, gradients, chunks."""

import math

import pytest
import torch
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.dnn.subspace import Subspace
from gpbridge.dnn.subspace_likelihood import SubspaceLikelihood
from gpbridge.functional import FunctionalNet
from gpbridge.likelihoods import LogisticLikelihood
from tests.dnn.subspace_problems import Block, gaussian, linear_problem

NOISE, STD = 0.3, 1.5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_the_target_is_the_sum_over_data_and_chunks_do_not_matter():
    torch.manual_seed(0)
    net = FunctionalNet(Block())
    subspace = Subspace.random(net, None, 3, generator=seeded())
    X, Y = normal(23, 2).float(), normal(23, 1).float()
    z = normal(4, 3, seed=5).float()
    whole = SubspaceLikelihood(subspace, X, Y, gaussian().float(), temperature=2.0)
    expected = []
    for row in z:
        f = net.apply_network(net.unflatten(subspace.weights(row)), X)
        expected.append(-0.5 * ((Y - f).square() / NOISE + math.log(NOISE)).sum())
    expected = torch.stack(expected) / 2 - 23 / 4 * math.log(2 * math.pi)
    torch.testing.assert_close(whole(z), expected.double(), rtol=1e-5, atol=0)
    value, gradient = whole.value_and_gradient(z)
    for size in (1, 5, 22):
        part = SubspaceLikelihood(
            *(subspace, X, Y, gaussian().float()), temperature=2.0, batch_size=size
        )
        torch.testing.assert_close(part(z), whole(z), rtol=1e-5, atol=0)
        parts = part.value_and_gradient(z)
        torch.testing.assert_close(parts[0], value, rtol=1e-5, atol=0)
        torch.testing.assert_close(parts[1], gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(value, whole(z))
    single = torch.stack([whole(row[None])[0] for row in z])
    torch.testing.assert_close(single, whole(z), rtol=1e-6, atol=0)
    order = torch.randperm(23, generator=seeded())
    shuffled = SubspaceLikelihood(
        *(subspace, X[order], Y[order], gaussian().float()), temperature=2.0
    )
    torch.testing.assert_close(shuffled(z), whole(z), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "network", [Block(), nn.Sequential(nn.Linear(2, 3), nn.Tanh())]
)
def test_the_gradient_of_the_target_is_that_of_differences(network):
    net = FunctionalNet(network.double())
    subspace = Subspace.random(net, None, 2, generator=seeded())
    outputs = net.probe(normal(1, 2))
    kinds = {
        1: LogisticLikelihood(),
        3: SoftmaxLikelihood(num_classes=3, mixing_weights=False),
    }
    if outputs == 3:
        Y = torch.tensor([0, 1, 2, 1, 0])
    else:
        Y = torch.tensor([0.0, 1, 1, 0, 1]).double()
    target = SubspaceLikelihood(subspace, normal(5, 2), Y, kinds[outputs])
    z, step = normal(3, 2), 1e-6
    _, gradient = target.value_and_gradient(z)
    for i in range(2):
        shift = step * torch.eye(2)[i].double()
        slope = (target(z + shift) - target(z - shift)) / (2 * step)
        torch.testing.assert_close(gradient[:, i], slope, rtol=1e-6, atol=1e-8)


def test_likelihoods_of_a_user_and_with_noise_of_their_own_are_chunked():
    subspace, X, Y = linear_problem()
    noise = 0.1 + normal(len(X)).square()
    fixed = FixedNoiseGaussianLikelihood(noise)
    z = normal(4, 3, seed=9)
    parts = SubspaceLikelihood(subspace, X, Y, fixed, batch_size=5)
    whole = SubspaceLikelihood(subspace, X, Y, fixed)
    torch.testing.assert_close(parts(z), whole(z))
    rows = subspace.net.apply_network(subspace.net.unflatten(subspace.weights(z[0])), X)
    normals = torch.distributions.Normal(rows[:, 0], noise.sqrt())
    torch.testing.assert_close(whole(z)[0], normals.log_prob(Y[:, 0]).sum())

    def tails(outputs, targets):
        return -(targets - outputs).abs().sum(-1)

    own = SubspaceLikelihood(subspace, X, Y, tails, batch_size=7)
    torch.testing.assert_close(own(z)[0], -(Y - rows).abs().sum())
    with pytest.raises(ShapeError, match="per draw and datum, ``4 x 12``.*shape .4,."):
        SubspaceLikelihood(subspace, X, Y, lambda f, y: tails(f, y).sum(-1))(z)
