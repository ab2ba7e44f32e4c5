"""The evidence of averaged networks: values, bounds, memory, doors."""

import math

import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood, SoftmaxLikelihood
from torch import nn

from gpbridge.augmentation import AffineAugmentation2d, Rotation2d
from gpbridge.linearized import Exact, Kronecker
from gpbridge.selection import TangentBlocks
from gpbridge.selection.orbit_curvature import OrbitCurvature
from gpbridge.selection.orbit_jacobians import OrbitNet, row_noise
from gpbridge.selection.orbit_likelihood import OrbitData
from gpbridge.selection.tangent_blocks import OUTPUTS, BlockCurvature, GramBlock
from tests import oracles_invariance as oracles
from tests.peak_memory import peak_bytes
from tests.selection.orbit_problems import (
    KINDS,
    STRUCTURES,
    N,
    S,
    dense,
    evidence_at,
    points,
    problem,
)

# -- values ----------------------------------------------------------------------------


@pytest.mark.parametrize("per_datum", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("space", ["weights", "functions"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_evidence_is_that_of_the_dense_formula(kind, space, per_datum):
    found, _ = evidence_at(0.9, kind, STRUCTURES[space], per_datum)
    expected = oracles.averaged_evidence(*dense(kind, per_datum))
    torch.testing.assert_close(found.value, expected, rtol=1e-10, atol=1e-10)
    assert not found.lower_bound


@pytest.mark.parametrize("kind", KINDS)
def test_both_spaces_count_the_same_dimension(kind):
    values = [
        evidence_at(0.9, kind, STRUCTURES[s])[0] for s in ("weights", "functions")
    ]
    for a, b in zip(values[0][:4], values[1][:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_linear_model_has_the_evidence_of_the_exact_gp_of_averaged_inputs():
    X, augmentation = points(12), Rotation2d(S).double()
    augmentation.bound = 1.1
    Y = (X[:, :1] - 0.4 * X[:, 1:]).tanh()
    inputs = augmentation(X).mean(-2)  # the features of the averaged linear kernel
    prior, noise = 0.8, 0.2
    K = prior * inputs @ inputs.mT + noise * torch.eye(12)
    exact = torch.distributions.MultivariateNormal(torch.zeros(12).double(), K)
    linear = nn.Linear(2, 1, bias=False).double()
    A = inputs.mT @ inputs / noise + torch.eye(2) / prior
    mode = torch.linalg.solve(A, inputs.mT @ Y / noise)
    linear.weight.data = mode.mT.clone()
    on_orbits = OrbitNet(linear, augmentation, [["weight"]], None, X)
    for space in ("weight", "function"):
        curvature = OrbitCurvature(
            on_orbits, GaussianLikelihood(), Exact(space=space), 12
        )
        at = torch.tensor([prior]).double(), torch.tensor([noise]).double()
        values = dict(augmentation.named_parameters())
        generator = torch.Generator()
        measured = curvature.measure(OrbitData(X, Y), *at, values, generator)
        expected = exact.log_prob(Y[:, 0])
        torch.testing.assert_close(measured.evidence(*at).value, expected)

        # At the mode, moving the weights changes nothing: the whole gradient is there.
        def log_prob(raw):
            angles = math.pi * torch.sigmoid(raw) * augmentation.noise
            quarter = torch.stack([-X[:, 1], X[:, 0]], -1)
            mean = angles.cos().mean() * X + angles.sin().mean() * quarter
            cov = prior * mean @ mean.mT + noise * torch.eye(12)
            zero = torch.zeros(12).double()
            return torch.distributions.MultivariateNormal(zero, cov).log_prob(Y[:, 0])

        raw = augmentation.raw_bound.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_prob(raw), raw)
        torch.testing.assert_close(
            measured.gradients["raw_bound"], slope, rtol=1e-6, atol=1e-8
        )


# -- bounds ----------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["joint", "independent"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_partition_bounds_the_evidence(kind, outputs):
    exact = oracles.averaged_evidence(*dense(kind)).item()
    for seed in range(8):
        size = 1 + seed % (N - 1)
        blocks = TangentBlocks(block_size=size, outputs=outputs)
        found, _ = evidence_at(0.9, kind, blocks, seed=seed)
        assert found.lower_bound
        assert found.value.item() <= exact + 1e-9
    assert found.value.item() < exact - 1e-3  # no equality by accident


@pytest.mark.parametrize("kind", KINDS)
def test_one_block_of_all_outputs_is_the_whole(kind):
    exact = oracles.averaged_evidence(*dense(kind))
    found, _ = evidence_at(0.9, kind, TangentBlocks(block_size=N))
    torch.testing.assert_close(found.value, exact, rtol=1e-10, atol=1e-10)
    assert not found.lower_bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_output_estimates_the_bound_of_independent_outputs(kind):
    whole = TangentBlocks(block_size=N, outputs="independent")
    expected = evidence_at(0.9, kind, whole)[0].complexity.item()
    drawn = TangentBlocks(block_size=N, outputs="sampled")
    found = [
        evidence_at(0.9, kind, drawn, seed=seed)[0].complexity.item()
        for seed in range(15)
    ]
    by_output = sorted({round(value, 8) for value in found})
    assert len(by_output) == 3  # each output was drawn
    assert sum(by_output) / 3 == pytest.approx(expected, rel=1e-7)


def test_drawn_blocks_are_counted_as_all_are():
    # Blocks of one datum: the mean over draws of the block is the whole sum.
    whole = evidence_at(0.9, "softmax", TangentBlocks(block_size=1))[0]
    one = TangentBlocks(block_size=1, num_blocks=1)
    found = [evidence_at(0.9, "softmax", one, seed=seed)[0] for seed in range(60)]
    assert not found[0].lower_bound
    seen = {round(e.complexity.item(), 8): e.complexity.item() for e in found}
    assert len(seen) == N
    mean = sum(seen.values()) / N
    assert mean == pytest.approx(whole.complexity.item(), rel=1e-8)


def test_the_root_basis_bounds_where_outputs_alone_do_not():
    """Blocks of S'KS by output bound; p - p^2 by output is lower on such problems."""
    generator = torch.Generator().manual_seed(0)
    worst_root, worst_plain = math.inf, math.inf
    for _ in range(100):
        J = 0.3 * torch.randn(6, 4, 2, generator=generator).double()
        logits = 2 * torch.randn(6, 4, generator=generator).double()
        exact, root, plain = oracles.output_blocks(J, logits.softmax(-1))
        R = oracles.softmax_root(logits)
        rows = (R.mT @ J).movedim(1, 0)  # C x n x p
        gram = GramBlock((rows @ rows.mT)[None], torch.zeros(4, 6, dtype=torch.long))
        one = torch.ones(1).double()
        ours = BlockCurvature([gram], 1.0, True).logdet(one, one)
        torch.testing.assert_close(ours, root, rtol=1e-10, atol=1e-10)
        worst_root = min(worst_root, (root / exact).item())
        worst_plain = min(worst_plain, (plain / exact).item())
    assert worst_root >= 1 - 1e-9
    assert worst_plain < 0.99  # so that the basis matters


# -- doors -----------------------------------------------------------------------------


def test_structures_that_do_not_fit_are_refused():
    on_orbits, _, _, likelihood, _ = problem("softmax")

    def build(structure, n=N):
        return OrbitCurvature(on_orbits, likelihood, structure, n)

    with pytest.raises(TypeError, match="TangentBlocks.*but is str"):
        build("full")
    with pytest.raises(ValueError, match="curvature='ggn'"):
        build(Kronecker(eigenvalue_correction=True))
    with pytest.raises(ValueError, match="no log determinant"):
        build(Exact(space="matrix_free"))
    with pytest.raises(MemoryError, match="The full curvature of"):
        build(Exact(space="weight", memory_budget=1.0))
    with pytest.raises(MemoryError, match="A block of 9 data.*smaller block_size"):
        build(Exact(space="function", memory_budget=1.0))
    assert isinstance(build(Exact(), 1).structure, TangentBlocks)
    assert isinstance(build(Exact(), 10**4).structure, Exact)


SOFTPLUS = nn.Sequential(
    nn.Conv2d(1, 6, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(384, 3)
)

WIDE = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 3))


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize(
    "net, shape", [(SOFTPLUS, (1, 8, 8)), (WIDE, None)], ids=["images", "rows"]
)
def test_a_block_takes_about_the_memory_that_is_checked(net, shape, outputs):
    """Images of orbits, positions and the graph included."""
    n, law = 24, AffineAugmentation2d((8, 8), ["rotation"], num_samples=8)
    X, Y = points(n, 64).float(), torch.arange(n) % 3
    names = [[name for name, _ in net.named_parameters()]]
    on_orbits = OrbitNet(net, law, names, shape, X)
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    data = OrbitData(X, Y, row_noise(law, n, torch.Generator().manual_seed(0)))
    values, prior = dict(law.named_parameters()), torch.ones(1).double()

    def build(budget):
        blocks = TangentBlocks(block_size=n, outputs=outputs, memory_budget=budget)
        return OrbitCurvature(on_orbits, softmax, blocks, n)

    def measure():
        generator = torch.Generator().manual_seed(0)
        return build(2.0**32).measure(data, prior, None, values, generator)

    peak = peak_bytes(measure)
    build(1.5 * peak)
    with pytest.raises(MemoryError, match="A block of 24 data"):
        build(0.7 * peak)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 0}, "block_size must be a whole number"),
        ({"outputs": "some"}, "outputs must be one of 'joint'"),
        ({"num_blocks": 0}, "num_blocks must be a whole number"),
        ({"memory_budget": 0.0}, "memory_budget must be positive"),
    ],
)
def test_options_of_blocks_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TangentBlocks(**options)
