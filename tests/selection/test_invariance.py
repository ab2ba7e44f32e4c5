"""Learning the invariance of a network: direction, structures, doors."""

import copy
import math

import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.augmentation import AffineAugmentation2d, AveragedNetwork, Rotation2d
from gpbridge.augmentation.base import Augmentation, BoundedAugmentation
from gpbridge.checks import ShapeError
from gpbridge.linearized import Diagonal, Exact, Kronecker
from gpbridge.selection import (
    TangentBlocks,
    augerino_penalty,
    fit_online,
    learn_invariance,
)
from tests.selection.invariance_problems import N, Nested, equal, rings, run, tanh_net

# -- what it learns --------------------------------------------------------------------


def test_the_evidence_widens_the_law_for_a_circle_and_not_for_a_short_arc():
    found = {}
    for arc in (360, 10):
        fit = run(
            tanh_net(20),
            rings(80, arc),
            Rotation2d(6, init=0.3),
            orbit="fixed",
            prior_variance=20.0,
            burn_in=30,
            epochs=60,
            learning_rate=0.1,
            augmentation_learning_rate=0.15,
            batch_size=80,
        )
        found[arc] = math.degrees(fit.learnt["bound"].item())
        assert fit.steps[-1].evidence > fit.steps[0].evidence + 3
    start = math.degrees(0.3)
    assert found[360] > 2 * start and found[10] < 0.5 * start


@pytest.mark.slow
@pytest.mark.parametrize("arc, low, high", [(120, 40, 70), (360, 170, 180), (20, 0, 5)])
def test_half_widths_are_those_of_the_arc(arc, low, high):
    fit = run(
        tanh_net(50),
        rings(150, arc),
        Rotation2d(30),
        epochs=300,
        learning_rate=0.05,
        batch_size=150,
    )
    assert low <= math.degrees(fit.learnt["bound"].item()) <= high


def test_a_law_of_no_width_trains_as_the_plain_network_does():
    """With the augmentation held at nothing, this is fit_online."""
    X, Y = rings(N, 120)
    data, network = (X.double(), Y), tanh_net().double()
    law = Rotation2d(3, init=1e-6).double().requires_grad_(False)
    options = {"epochs": 6, "progress": False, "every": 2, "hyper_steps": 3}
    options |= {"structure": Exact(space="weight")}
    mine = learn_invariance(network, data, law, orbit="fixed", **options)
    theirs = fit_online(network, data, **options)
    torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        mine.evidence.value, theirs.evidence.value, rtol=1e-5, atol=0
    )
    assert mine.learnt == {} and mine.steps[0].augmentation is None


STRUCTURES = {
    "functions": Exact(space="function"),
    "sampled": TangentBlocks(block_size=10, outputs="sampled", num_blocks=1),
    "kronecker": Kronecker(),
    "diagonal": Diagonal(),
}


@pytest.mark.parametrize(
    "structure, orbit",
    [
        *((structure, "per_datum") for structure in STRUCTURES.values()),
        (STRUCTURES["sampled"], "fixed"),
        (STRUCTURES["sampled"], "resampled"),
    ],
)
def test_every_structure_moves_the_law_and_says_its_block_size(structure, orbit):
    fit = run(structure=structure, orbit=orbit, epochs=2)
    moved = fit.learnt["bound"].item() - Rotation2d(3).bound.item()
    assert abs(moved) > 1e-3
    size = 10 if isinstance(structure, TangentBlocks) else N
    assert fit.block_size == size and f"block size {size})" in repr(fit)
    assert [step.block_size for step in fit.steps] == [size] * 2
    bound = isinstance(structure, Diagonal | TangentBlocks)
    assert fit.evidence.lower_bound == bound
    assert ("at least" in repr(fit)) == bound
    assert torch.isfinite(fit.evidence.effective_dimension)


def test_defaults_serve_regression_and_a_nested_module():
    X, _ = rings(N, 120)
    Y = X.norm(dim=-1, keepdim=True)
    fit = run(Nested(1), (X, Y))
    assert fit.noise_variance.numel() == 1 and fit.losses[-1] < fit.losses[0]
    assert len(fit.steps) == 4 and "InvarianceFit(Nested, Rotation2d" in repr(fit)
    assert fit.history["augmentation"].shape == (4, 1)
    assert fit.history["block_size"].tolist() == [N] * 4


def test_the_fit_gives_the_averaged_network_and_its_gaussian_process():
    X, Y = rings(N, 120)
    fit = run(groups="layer", epochs=3)
    assert isinstance(fit.network, AveragedNetwork) and not fit.network.training
    orbit = fit.augmentation(X)
    mean = fit.network.network(orbit).mean(-2)
    torch.testing.assert_close(fit.network(X), mean)
    model = fit.model(X, Y)
    assert isinstance(model, LinearizedGP)
    weights = sum(p.numel() for p in fit.network.network.parameters())
    assert model.problem.net.num_params == weights  # the law is no weight
    assert model.predict(X[:3]).probs.shape == (3, 2)
    torch.testing.assert_close(
        model.prior_variance.double(), fit.prior_variance, rtol=1e-4, atol=0
    )


def test_images_come_flat_or_in_their_shape():
    generator = torch.Generator().manual_seed(0)
    X, Y = torch.rand(12, 1, 6, 6, generator=generator), torch.arange(12) % 3
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3))
    law = AffineAugmentation2d((6, 6), ["rotation", "tx"], num_samples=2, padding=1)
    structure = TangentBlocks(block_size=6, outputs="independent")
    fits = [
        run(net, (data, Y), law, epochs=2, structure=structure, input_shape=shape)
        for data, shape in ((X, None), (X.flatten(1), (1, 8, 8)))
    ]
    assert equal(*fits)
    assert fits[0].learnt["bound"].shape == (2,)
    assert fits[0].network(X.flatten(1)).shape == (12, 3)


# -- the baseline ------------------------------------------------------


def test_augerino_rewards_the_norm_of_twice_the_half_widths():
    law = AffineAugmentation2d((4, 4), ["rotation", "tx"], init=0.3)
    penalty = augerino_penalty(law, 0.2)
    assert penalty.item() == pytest.approx(-0.2 * 0.6 * math.sqrt(2))
    penalty.backward()
    assert (law.raw_bound.grad < 0).all()  # descent widens
    with pytest.raises(TypeError, match="with uniform laws.*Augmentation"):
        augerino_penalty(Augmentation(2))
    with pytest.raises(ValueError, match="reg must be positive"):
        augerino_penalty(law, 0.0)


# -- doors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"orbit": "some"}, ValueError, "orbit must be one of 'fixed'"),
        ({"phases": "never"}, ValueError, "phases must be one of 'online'"),
        ({"epochs": 0}, ValueError, "epochs must be a whole number"),
        ({"prior_every": 0}, ValueError, "prior_every must be a whole number"),
        ({"prior_structure": "full"}, TypeError, "prior_structure must be .* is str"),
        (
            {"prior_structure": Exact(space="matrix_free")},
            ValueError,
            "prior_structure must not be",
        ),
        (
            {"orbit": "fixed", "augmentation": Rotation2d(1)},
            ValueError,
            "augmentation has the identity as its only element .num_samples=1.",
        ),
        ({"burn_in": -1}, ValueError, "burn_in must be a number of epochs"),
        ({"augmentation_learning_rate": 0.0}, ValueError, "augmentation_learning_rate"),
        ({"structure": "full"}, TypeError, "^structure must be .* but is str"),
        ({"checkpoint": "/nowhere/run"}, FileNotFoundError, "does not exist"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


@pytest.mark.parametrize(
    "orbit, law",
    [
        ("fixed", Rotation2d(1).requires_grad_(False)),
        ("per_datum", Rotation2d(1)),
        ("resampled", Rotation2d(1)),
    ],
)
def test_one_element_serves_where_it_is_held_or_drawn(orbit, law):
    fit = run(orbit=orbit, augmentation=law, epochs=2)
    moved = fit.network.augmentation.bound.item() != law.bound.item()
    assert moved == law.raw_bound.requires_grad


def test_arguments_of_another_type_are_refused():
    X, Y = rings(N, 120)
    with pytest.raises(TypeError, match="network must be a torch.nn.Module"):
        learn_invariance(X, (X, Y), Rotation2d(3))
    with pytest.raises(TypeError, match="augmentation must be .* but is Linear"):
        learn_invariance(tanh_net(), (X, Y), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="data must be a pair of tensors"):
        learn_invariance(tanh_net(), [(X, Y)], Rotation2d(3))
    with pytest.raises(ShapeError, match="Rotation2d needs two columns"):
        learn_invariance(
            nn.Linear(3, 2), (X[:4].repeat(1, 2)[:, :3], Y[:4]), Rotation2d(3)
        )


def test_a_likelihood_with_its_own_noise_is_copied():
    X, _ = rings(N, 120)
    likelihood = GaussianLikelihood()
    fit = run(tanh_net(m=1), (X, X[:, :1]), likelihood=likelihood)
    assert fit.likelihood is not likelihood
    assert fit.likelihood.noise.item() != pytest.approx(likelihood.noise.item())


def noise_likelihood(variance, dtype):
    likelihood = GaussianLikelihood().to(dtype)
    likelihood.noise = variance
    return likelihood


class Shifted(BoundedAugmentation):
    """A rotation and a shift; the name of the shift has the prefix in its middle."""

    def __init__(self):
        super().__init__(torch.tensor([3.0]), torch.tensor([0.4]), 3, "grid", 0)
        self.draw_shift = nn.Parameter(torch.tensor(0.1))

    def transform(self, x):
        angles = self.parameters_of(x)[:, 0]
        turned = torch.stack([x * a.cos() for a in angles], -2)
        return turned + self.draw_shift


@pytest.mark.parametrize("held", ["draw_shift", "raw_bound"])
def test_what_was_held_is_held_in_the_law_that_comes_back(held):
    law = Shifted()
    getattr(law, held).requires_grad_(False)
    fit = learn_invariance(tanh_net(), rings(20, 90.0), law, epochs=2, progress=False)
    learnt = {"draw_shift": "bound", "raw_bound": "draw_shift"}[held]
    assert set(fit.learnt) == {learnt}
    free = {n for n, p in fit.augmentation.named_parameters() if p.requires_grad}
    assert free == {"draw_shift", "raw_bound"} - {held}


def test_blocks_of_single_precision_have_the_evidence_of_double_precision():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 256), nn.Tanh(), nn.Linear(256, 1))
    X = rings(100, 360.0)[0]
    Y = torch.sin(3 * X[:, :1])
    found = {}
    for dtype in (torch.float32, torch.float64):
        fit = learn_invariance(
            copy.deepcopy(net).to(dtype),
            (X.to(dtype), Y.to(dtype)),
            Rotation2d(3).to(dtype).requires_grad_(False),
            noise_likelihood(1e-3, dtype),
            prior_variance=10.0,
            burn_in=5,
            epochs=1,
            progress=False,
        )
        found[dtype] = float(fit.evidence.complexity)
    assert found[torch.float32] == pytest.approx(found[torch.float64], abs=0.05)
