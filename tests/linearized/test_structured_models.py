"""Models with curvature structures as BoTorch models: the contract, states, updates."""

import copy
import pickle
import unittest
from functools import partial
from unittest import mock

import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood

from gpbridge.linearized import Diagonal, Kronecker, LinearizedGP, LowRank
from gpbridge.linearized.structured_problem import StructuredProblem
from gpbridge.testing import ModelContractTestCase
from tests import oracles_linearized
from tests.linearized import problems
from tests.linearized.problems import PROBLEMS, build
from tests.linearized.test_gp import likelihood, network

STRUCTURES = {
    "expand": Kronecker,
    "corrected": partial(Kronecker, eigenvalue_correction=True),
    "diagonal": Diagonal,
    "empirical": partial(Diagonal, curvature="empirical"),
    "sampled": partial(Kronecker, curvature="monte_carlo", num_samples=2),
    "low_rank": partial(LowRank, rank=12),
    "lanczos": partial(LowRank, rank=12, method="lanczos"),
}
every_structure = pytest.mark.parametrize("structure", STRUCTURES)
quiet = pytest.mark.filterwarnings("ignore:LowRank")


class Contract(ModelContractTestCase):
    # Conditioning adds the exact curvature of the new points, a refit their structure.
    conditioning_equals_refit = False
    structure = Kronecker()

    def create_model(self, dtype, num_outputs=1, **options):
        model = LinearizedGP(
            self.watch(network(num_outputs, dtype)),
            likelihood=likelihood(num_outputs, dtype),
            inference=self.structure,
            **options,
        )
        model.prior_variance = 0.5
        return model


@pytest.mark.slow
class TestDiagonal(Contract, unittest.TestCase):
    structure = Diagonal()


@pytest.mark.slow
class TestKronecker(Contract, unittest.TestCase):
    structure = Kronecker()


@pytest.mark.slow
class TestLowRank(Contract, unittest.TestCase):
    structure = LowRank(rank=1000)  # all of it
    conditioning_equals_refit = True


@pytest.mark.slow
class TestLabels(ModelContractTestCase, unittest.TestCase):
    classification = True
    outputs = (1, 3)

    def create_model(self, dtype, num_outputs=1, **options):
        model = LinearizedGP(
            self.watch(network(num_outputs, dtype)), inference=Kronecker(), **options
        )
        model.prior_variance = 0.5
        return model


# -- states ---------------------------------------------------------------------------


def fitted(name, structure, **options):
    model = build(name, inference=STRUCTURES[structure](), **options)
    model.posterior(problems.inputs(2))
    return model


def no_pass():
    """A curvature or an optimum that is computed is an error."""
    error = AssertionError("computed anew")
    return (
        mock.patch.object(StructuredProblem, "_make", side_effect=error),
        mock.patch("gpbridge.linearized.posterior.find_mode", side_effect=error),
    )


def same(got, expected):
    torch.testing.assert_close(got.mean, expected.mean, rtol=0, atol=0)
    torch.testing.assert_close(got.variance, expected.variance, rtol=0, atol=0)


@quiet
@every_structure
@pytest.mark.parametrize("name", ["multitask", "softmax"])
def test_a_loaded_state_needs_no_pass_over_the_data(name, structure, tmp_path):
    model, X = fitted(name, structure, groups="layer"), problems.inputs(4, seed=9)
    expected = model.posterior(X)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    net = problems.network(PROBLEMS[name].m, scale=0.7)
    options = {"inference": STRUCTURES[structure](), "groups": "layer"}
    other = build(name, X=problems.inputs().flip(0), net=net, **options)
    other.posterior(X)
    assert other.load_state_dict(state).unexpected_keys == []
    first, second = no_pass()
    with first, second:
        same(other.posterior(X), expected)
        same(copy.deepcopy(other).posterior(X), expected)
        same(pickle.loads(pickle.dumps(model)).posterior(X), expected)
        again = build(name, **options)
        again.load_state_dict(other.state_dict())  # also of what was loaded itself
        same(again.posterior(X), expected)
        moved = copy.deepcopy(model).to(model._train_X.device)
        same(moved.posterior(X), expected)
    assert other.log_evidence().item() == model.log_evidence().item()


def test_other_hyperparameters_keep_the_curvature_and_move_the_mean():
    model, X = fitted("gaussian", "expand"), problems.inputs(4, seed=9)
    other = build("gaussian", inference=Kronecker())
    other.load_state_dict(model.state_dict())
    other.prior_variance = 0.9
    model.prior_variance = 0.9
    with no_pass()[0]:
        same(other.posterior(X), model.posterior(X))


def check_made_anew(model, expected):
    X = problems.inputs(4, seed=9)
    with mock.patch.object(
        StructuredProblem, "_make", autospec=True, side_effect=StructuredProblem._make
    ) as made:
        same(model.posterior(X), expected.posterior(X))
    assert made.call_count == 2


def test_other_options_make_the_curvature_anew():
    state = fitted("softmax", "expand").state_dict()
    for other in (Kronecker(sharing="reduce"), Diagonal(), LowRank(rank=25 + 14)):
        model = build("softmax", inference=other)
        model.load_state_dict(state)
        check_made_anew(model, build("softmax", inference=other))
    grouped = build("gaussian", inference=Kronecker(), groups="tensor")
    state = fitted("gaussian", "expand").state_dict()
    state = {k: v for k, v in state.items() if "raw_prior_variance" not in k}
    grouped.load_state_dict(state, strict=False)
    expected = build("gaussian", inference=Kronecker(), groups="tensor")
    check_made_anew(grouped, expected)


def test_options_that_do_not_matter_keep_it():
    state = fitted("softmax", "expand").state_dict()
    model = build("softmax", inference=Kronecker(memory_budget=1e9))
    model.load_state_dict(state)
    with no_pass()[0]:
        model.posterior(problems.inputs(4))


def test_other_data_make_the_curvature_anew():
    model = fitted("softmax", "expand")
    rows = torch.arange(8)
    part = model.subset_rows(rows)  # a copy with other data
    X, Y = model._train_X[rows], model._targets[rows]
    check_made_anew(part, build("softmax", X=X, Y=Y, inference=Kronecker()))


def test_another_network_or_noise_makes_the_curvature_anew():
    model, expected = (fitted("softmax", "expand") for _ in range(2))
    with torch.no_grad():
        for twin in (model, expected):
            twin.functional.network[0].weight.mul_(0.5)
    expected._saved = None
    state = model.state_dict()  # what was computed is of another network
    assert not any("_saved" in key for key in state)
    check_made_anew(model, expected)
    fixed = [
        build(
            "fixed_noise",
            inference=Kronecker(),
            likelihood=FixedNoiseGaussianLikelihood(scale * problems.point_noise()),
        )
        for scale in (1.0, 2.0, 2.0)
    ]
    fixed[0].posterior(problems.inputs(2))
    state = {k: v for k, v in fixed[0].state_dict().items() if "likelihood" not in k}
    fixed[1].load_state_dict(state, strict=False)
    check_made_anew(fixed[1], fixed[2])


def test_a_state_without_a_curvature_forgets_it():
    plain = build("softmax", inference=Kronecker()).state_dict()
    assert not any("_saved" in key for key in plain)
    model = fitted("softmax", "expand")
    assert any("_saved" in key for key in model.state_dict())
    model.load_state_dict(plain)
    assert not any("_saved" in key for key in model.state_dict())


@pytest.mark.parametrize("structure", ["expand", "diagonal", "low_rank"])
@quiet
def test_moves_between_precisions_keep_the_answers(structure):
    model, X = fitted("gaussian", structure), problems.inputs(4, seed=9)
    expected = model.posterior(X)
    model.float()
    got = model.posterior(X.float())
    torch.testing.assert_close(got.mean.double(), expected.mean, rtol=0, atol=3e-3)
    spread = got.variance.double()
    torch.testing.assert_close(spread, expected.variance, rtol=0.02, atol=1e-4)


# -- a second data set, same network --------------------------------------------------


@quiet
@pytest.mark.parametrize("name", ["gaussian", "multitask"])
@every_structure
def test_conditioning_adds_the_exact_curvature_of_the_new_points(name, structure):
    model, m = fitted(name, structure), PROBLEMS[name].m
    X, X_test = problems.inputs(5, seed=8), problems.inputs(4, seed=9)
    Y = problems.targets(name, X, seed=5)
    conditioned = model.condition_on_observations(X, Y)
    problem, s = model.problem, problems.PRIOR_VARIANCE
    H = problem.curvature.dense(problem.channel_weights().detach())
    H = H + torch.eye(len(H)).double() / s
    new, test = (
        oracles_linearized.tangent(problems.network(m), x) for x in (X, X_test)
    )
    noise = PROBLEMS[name].noise(len(X))
    updated = H + new.J.mT @ torch.linalg.solve(noise, new.J)
    covariance = test.J @ torch.linalg.solve(updated, test.J.mT)
    got = conditioned.posterior(X_test)
    torch.testing.assert_close(
        got.distribution.covariance_matrix, covariance, rtol=1e-6, atol=1e-9
    )
    # The mean moves from that of the first data, at the new points and elsewhere.
    before = [model.posterior(x).mean.reshape(-1) for x in (X, X_test)]
    gain = torch.linalg.solve(noise, Y.reshape(-1) - before[0])
    mean = before[1] + test.J @ torch.linalg.solve(updated, new.J.mT @ gain)
    torch.testing.assert_close(got.mean.reshape(-1), mean, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("structure", ["expand", "diagonal"])
def test_labels_join_the_data(structure):
    model = fitted("softmax", structure)
    X, X_test = problems.inputs(5, seed=8), problems.inputs(4, seed=9)
    Y = problems.targets("softmax", X, seed=5)
    conditioned = model.condition_on_observations(X, Y)
    data = {
        "X": torch.cat([problems.inputs(), X]),
        "Y": torch.cat([problems.targets("softmax", problems.inputs()), Y]),
    }
    same(
        conditioned.posterior(X_test),
        fitted("softmax", structure, **data).posterior(X_test),
    )


def test_draws_of_a_conditioned_model_have_its_covariance():
    model = fitted("gaussian", "expand")
    X, X_test = problems.inputs(5, seed=8), problems.inputs(3, seed=9)
    conditioned = model.condition_on_observations(X, problems.targets("gaussian", X))
    values = conditioned.draw(1000, torch.Generator().manual_seed(0))(X_test)[..., 0]
    posterior = conditioned.posterior(X_test)
    covariance = posterior.distribution.covariance_matrix
    scale = covariance.diagonal().sqrt()
    error = (values.T.cov() - covariance) / (scale * scale[:, None])
    assert error.abs().max() < 6 * (2 / 1000) ** 0.5
    shift = (values.mean(0) - posterior.mean[:, 0]) / scale
    assert shift.abs().max() < 6 / 1000**0.5
