"""The gradient of the evidence in the law of the orbits."""

import math

import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood, SoftmaxLikelihood
from torch import nn

from gpbridge.augmentation import PatchAugmentation, Rotation2d
from gpbridge.linearized import Diagonal, Exact, Kronecker
from gpbridge.selection import TangentBlocks
from gpbridge.selection.orbit_curvature import OrbitCurvature
from gpbridge.selection.orbit_jacobians import OrbitNet
from gpbridge.selection.orbit_likelihood import OrbitData
from tests.selection.orbit_problems import KINDS, STRUCTURES, N, S, evidence_at, points


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_the_gradient_is_that_of_finite_differences(kind, structure):
    if kind == "gaussian" and isinstance(structure, Kronecker):
        kind = "one noise"  # several share one basis, which the gradient holds
    found, slope = slopes(kind, structure)
    assert found == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_noises_of_kronecker_factors_share_the_basis_that_the_gradient_holds():
    """The basis of equal weights: some per cent off where noises differ."""
    found, slope = slopes("gaussian", Kronecker())
    assert found == pytest.approx(slope, rel=0.1)
    assert found != pytest.approx(slope, rel=1e-4)


def slopes(kind, structure):
    """The gradient, and finite differences, in the raw half-width."""
    bound = torch.tensor(0.9, dtype=torch.float64)
    _, gradients = evidence_at(bound, kind, structure, gradient=True)
    step = 1e-5
    values = [
        evidence_at(bound + sign * step, kind, structure)[0].value for sign in (1, -1)
    ]
    slope = (values[0] - values[1]).item() / (2 * step)
    share = 0.9 / math.pi
    return gradients["raw_bound"].item(), slope * math.pi * share * (1 - share)


@pytest.mark.parametrize(
    "structure", [Exact(space="weight"), TangentBlocks(block_size=7)]
)
def test_weights_of_an_orbit_have_the_gradient_of_finite_differences(structure):
    X, Y = points(20, 36), torch.arange(20) % 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    patches = PatchAugmentation((6, 6), (3, 3)).double()
    names = [[n for n, _ in net.named_parameters()]]
    likelihood = SoftmaxLikelihood(num_classes=2, mixing_weights=False)
    on_orbits = OrbitNet(net, patches, names, None, X)
    curvature = OrbitCurvature(on_orbits, likelihood, structure, 20)
    prior = torch.ones(1).double()

    def measured(values):
        generator = torch.Generator().manual_seed(0)
        return curvature.measure(OrbitData(X, Y), prior, None, values, generator)

    weights = patches.patch_weights
    got = measured({"patch_weights": weights}).gradients["patch_weights"]
    for k in range(2):
        sides = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                weights[k] += step
            sides.append(measured({}).evidence(prior, None).value.item())
        with torch.no_grad():
            weights[k] += 1e-5
        expected = (sides[0] - sides[1]) / 2e-5
        assert got[k].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_data_change_nothing(kind, monkeypatch):
    for structure in (Exact(space="weight"), Kronecker(), Diagonal()):
        whole = evidence_at(0.9, kind, structure, gradient=True)
        monkeypatch.setattr("gpbridge.selection.orbit_sums.CHUNK_BYTES", 1)
        parts = evidence_at(0.9, kind, structure, gradient=True)
        monkeypatch.undo()
        torch.testing.assert_close(parts[0].value, whole[0].value)
        torch.testing.assert_close(parts[1], whole[1])


def test_kronecker_factors_are_exact_without_spread_and_positions():
    """A law of no width leaves one layer with one output, where K-FAC is exact."""
    X, augmentation = points(), Rotation2d(S).double()
    augmentation.bound = 1e-9
    linear = nn.Linear(2, 1).double()
    Y = X[:, :1]
    at = torch.tensor([0.5]).double(), torch.tensor([0.1]).double()
    found = []
    for structure in (Kronecker(), Exact(space="weight")):
        on_orbits = OrbitNet(linear, augmentation, [["weight", "bias"]], None, X)
        curvature = OrbitCurvature(on_orbits, GaussianLikelihood(), structure, N)
        data = OrbitData(X, Y)
        measured = curvature.measure(data, *at, {}, torch.Generator())
        found.append(measured.evidence(*at).value)
    torch.testing.assert_close(found[0], found[1])
