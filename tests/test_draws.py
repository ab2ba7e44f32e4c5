"""Draws are frozen functions, joint over all inputs, with the right moments."""

import copy
import pickle

import pytest
import torch
from botorch.sampling.pathwise import get_matheron_path_model
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from torch import nn

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.draws import TangentDraws, WeightDraws
from gpbridge.functional import FunctionalNet
from gpbridge.testing import assert_gradients_match_finite_differences
from gpbridge.types import FunctionDraws
from tests import oracles
from tests.cases import LOOPED, NETS
from tests.linearized.problems import (
    PROBLEMS,
    build,
    every_likelihood,
    inputs,
    point_noise,
    targets,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}
CASES = {name: NETS[name] for name in ("tanh_mlp", "images", "tied", "scalar_weight")}
SPACES = ("function", "weight", "matrix_free")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def frozen(case, m):
    net = FunctionalNet(case.network(m), input_shape=case.input_shape)
    net.probe(case.inputs(3))
    return net


def shaped(case, X):
    return X if case.input_shape is None else X.reshape(-1, *case.input_shape)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_tangent_draws_are_first_order_in_the_change(name, m):
    net, X = frozen(CASES[name], m), CASES[name].inputs(4)
    change = torch.randn(5, net.num_params, dtype=torch.float64, generator=seeded())
    J = oracles.jacobian(net.network.requires_grad_(), shaped(CASES[name], X))
    net.network.requires_grad_(False)
    moved = torch.einsum("nmp,sp->snm", J, change)
    draws = TangentDraws(net, change)
    assert isinstance(draws, FunctionDraws)
    torch.testing.assert_close(draws(X), net(X) + moved, **EXACT)
    torch.testing.assert_close(TangentDraws(net, change, 0.0)(X), moved, **EXACT)


@pytest.mark.filterwarnings("ignore:torch.func cannot vectorise")
@pytest.mark.parametrize("name", LOOPED)
def test_networks_without_vectorisation_have_draws(name):
    net, X = frozen(LOOPED[name], 3), LOOPED[name].inputs(4)
    assert not net.vectorized
    change = torch.randn(5, net.num_params, dtype=torch.float64, generator=seeded())
    J = oracles.jacobian(net.network.requires_grad_(), X)
    net.network.requires_grad_(False)
    moved = torch.einsum("nmp,sp->snm", J, change)
    draws = TangentDraws(net, change)
    torch.testing.assert_close(draws(X), net(X) + moved, **EXACT)
    each = draws.each(X.expand(5, -1, -1))
    torch.testing.assert_close(each, net(X) + moved, **EXACT)
    weights = net.flatten(net.params) + 0.1 * change
    values = WeightDraws(net, weights)(X)
    assert values.shape == (5, 4, 3)


def test_each_draw_can_have_inputs_of_its_own():
    net, case = frozen(NETS["tanh_mlp"], 2), NETS["tanh_mlp"]
    change = torch.randn(5, net.num_params, dtype=torch.float64, generator=seeded())
    draws, X = TangentDraws(net, change), case.inputs(5, 4)
    expected = torch.stack([draws(X[s])[s] for s in range(5)])
    torch.testing.assert_close(draws.each(X), expected, **EXACT)


def test_batches_of_points_equal_a_loop():
    net, case = frozen(NETS["tanh_mlp"], 2), NETS["tanh_mlp"]
    change = torch.randn(5, net.num_params, dtype=torch.float64, generator=seeded())
    X = case.inputs(2, 3, 4)
    for draws in (TangentDraws(net, change), WeightDraws(net, change)):
        whole = draws(X)
        assert whole.shape == (5, 2, 3, 4, 2)
        torch.testing.assert_close(whole[:, 1, 2], draws(X[1, 2]), **EXACT)
        assert draws(X[:, :, :0]).shape == (5, 2, 3, 0, 2)


def test_weight_draws_are_the_network_at_other_weights():
    case = NETS["tanh_mlp"]
    net, X = frozen(case, 2), case.inputs(4)
    weights = torch.randn(3, net.num_params, dtype=torch.float64, generator=seeded())
    values = WeightDraws(net, weights)(X)
    for s in range(3):
        module = copy.deepcopy(net.network)
        torch.nn.utils.vector_to_parameters(weights[s], module.parameters())
        torch.testing.assert_close(values[s], module(X), **EXACT)


# -- of the model ---------------------------------------------------------------------


def standard_errors(draws, mean, covariance):
    """Largest deviation of the sample moments, in standard errors of each entry."""
    s = len(draws)
    flat = draws.flatten(1)
    std = covariance.diagonal().sqrt()
    of_mean = (flat.mean(0) - mean.reshape(-1)).abs() / (std / s**0.5)
    error = flat - mean.reshape(-1)
    sample = error.T @ error / s
    # Var of a product of two Gaussians: c_ii c_jj + c_ij^2.
    spread = (std[:, None] ** 2 * std**2 + covariance**2).sqrt() / s**0.5
    return of_mean.max().item(), ((sample - covariance).abs() / spread).max().item()


@pytest.mark.parametrize(
    "mean, space", [("network", "weight"), *(("linear_model", s) for s in SPACES)]
)
@every_likelihood
def test_they_have_the_moments_of_the_posterior(name, mean, space):
    options = {"mean": mean}
    if mean == "network" and PROBLEMS[name].gaussian:
        if name in ("fixed_noise", "multitask_rank_1"):
            return  # their noise cannot be set, which the network's mean needs
        options["noise"] = 0.05
    model, X = build(name, space, **options), inputs(3, seed=7)
    values = model.draw(1000, seeded())(X)
    assert values.shape == (1000, 3, PROBLEMS[name].m)
    posterior = model.posterior(X)
    errors = standard_errors(
        values, posterior.mean, posterior.distribution.covariance_matrix
    )
    assert max(errors) < 4, errors


@pytest.mark.parametrize("space", ["function", "weight"])
@pytest.mark.parametrize(
    "name", ["gaussian", "fixed_noise", "multitask_rank_1", "subset", "softmax"]
)
def test_conditioned_models_draw_from_their_own_posterior(name, space):
    subset, name = name == "subset", "multitask" if name == "subset" else name
    X_new = inputs(3, seed=9)
    Y_new, extra = targets(name, X_new), {}
    if name == "fixed_noise":
        extra["noise"] = torch.full((3, 1), 0.01, dtype=torch.float64)
    model = build(name, space)
    if subset:
        model, Y_new = model.subset_output([1]), Y_new[:, 1:]
    model = model.condition_on_observations(X_new, Y_new, **extra)
    X = torch.cat([inputs(2, seed=7), X_new[:1]])
    posterior = model.posterior(X)
    errors = standard_errors(
        model.draw(1000, seeded())(X),
        posterior.mean,
        posterior.distribution.covariance_matrix,
    )
    assert max(errors) < 4, errors


@pytest.mark.parametrize("space", SPACES)
def test_they_are_reproducible_and_leave_the_global_random_state_alone(space):
    model, X = build("multitask", space), inputs(4, seed=7)
    before = torch.get_rng_state()
    first, again = model.draw(3, seeded(5)), model.draw(3, seeded(5))
    other = model.draw(3, seeded(6))
    assert torch.equal(first(X), again(X)) and not torch.equal(first(X), other(X))
    assert torch.equal(first(X), first(X))  # frozen
    conditioned = model.condition_on_observations(X, targets("multitask", X))
    pair = [conditioned.draw(3, seeded(5))(X) for _ in range(2)]
    assert torch.equal(*pair)
    model.posterior(X), model.predict(X), model.log_evidence()
    assert torch.equal(before, torch.get_rng_state())
    twin = pickle.loads(pickle.dumps(first))
    torch.testing.assert_close(twin(X), first(X), **EXACT)


def test_without_a_generator_they_are_fresh_and_the_global_state_stays():
    model, X = build("gaussian"), inputs(4, seed=7)
    before = torch.get_rng_state()
    assert not torch.equal(model.draw(2)(X), model.draw(2)(X))
    assert torch.equal(before, torch.get_rng_state())


def test_their_gradient_in_the_inputs_matches_finite_differences():
    draws = build("multitask").draw(3, seeded())
    assert_gradients_match_finite_differences(draws, inputs(2, seed=7))


def test_they_follow_the_callers_dtype():
    model = build("gaussian")
    X = inputs(4, seed=7)
    values = model.draw(3, seeded())(X.float())
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        values, model.draw(3, seeded())(X).float(), rtol=1e-4, atol=1e-5
    )


def test_paths_of_botorch_are_draws_of_the_model():
    model, X = build("multitask"), inputs(4, seed=7)
    paths = get_matheron_path_model(model, sample_shape=torch.Size([2, 3]))
    values = paths.posterior(X).mean
    assert values.shape == (2, 3, 4, 2)
    assert torch.equal(values, paths.posterior(X).mean)


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_draws_must_be_positive(number):
    with pytest.raises(ValueError, match="num_samples must be positive"):
        build("gaussian").draw(number)


def test_fixed_noise_of_each_point_enters_the_draws():
    likelihood = FixedNoiseGaussianLikelihood(100 * point_noise())
    loose = build("fixed_noise", likelihood=likelihood).draw(2000, seeded())
    tight = build("fixed_noise").draw(2000, seeded())
    X = inputs(3, seed=7)
    assert (loose(X).var(0) > 3 * tight(X).var(0)).all()


@pytest.mark.parametrize("name", ["chain", "convolution", "batch norm of its own"])
def test_chunks_of_draws_change_nothing(name):
    network = {
        "chain": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        "convolution": nn.Sequential(
            nn.Unflatten(-1, (1, 2, 2)), nn.Conv2d(1, 2, 2), nn.Flatten()
        ),
        "batch norm of its own": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
    }[name].double()
    net = FunctionalNet(network)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, net.num_params, generator=generator, dtype=torch.float64)
    X = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    draws = WeightDraws(net, weights)
    refresh_batch_norm(draws, [X])
    whole = draws(X)
    for size in (1, 2, 5, 9):
        draws.chunk_size = size
        torch.testing.assert_close(draws(X), whole)
    with pytest.raises(ValueError, match="chunk_size must be a whole number"):
        WeightDraws(net, weights, chunk_size=0)
