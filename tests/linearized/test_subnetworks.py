"""Linearised networks whose random weights are single entries."""

import copy
import pickle
from functools import partial

import pytest
import torch

from gpbridge import Exact
from gpbridge.linearized import Diagonal, Kronecker, LowRank, Sampled, largest_variance
from gpbridge.selection import fit_evidence
from gpbridge.subnetworks import largest_magnitude, random_subset
from tests import oracles, oracles_linearized
from tests.linearized import problems
from tests.linearized.problems import PROBLEMS, build

INFERENCES = {
    "function": partial(Exact, space="function"),
    "weight": partial(Exact, space="weight"),
    "matrix_free": partial(Exact, space="matrix_free", tolerance=1e-10),
    "sampled": Sampled,
    "kronecker": Kronecker,
    "diagonal": Diagonal,
    "low_rank": partial(LowRank, rank=25),
}
every_inference = pytest.mark.parametrize("inference", INFERENCES)


def flat(masks):
    return torch.cat([mask.reshape(-1) for mask in masks.values()])


def taken(tangent, chosen):
    return oracles_linearized.Tangent(
        tangent.value, tangent.J[:, chosen], tangent.weights[chosen]
    )


def tangents(name, chosen, X_test):
    net = problems.network(PROBLEMS[name].m)
    return [
        taken(oracles_linearized.tangent(net, X), chosen)
        for X in (problems.inputs(), X_test)
    ]


@pytest.mark.parametrize("name", ["gaussian", "multitask"])
@pytest.mark.parametrize("space", ["function", "weight"])
def test_the_posterior_is_that_of_the_chosen_columns(name, space):
    net = problems.network(PROBLEMS[name].m)
    masks, X_test = largest_magnitude(net, 9), problems.inputs(4, seed=9)
    model = build(name, space, parameters=masks)
    train, test = tangents(name, flat(masks), X_test)
    y = problems.targets(name, problems.inputs()).reshape(-1)
    noise = PROBLEMS[name].noise(problems.N)
    mean, covariance = oracles_linearized.gaussian_posterior(
        train, test, problems.PRIOR_VARIANCE, noise, y
    )
    posterior = model.posterior(X_test)
    torch.testing.assert_close(posterior.mean.reshape(-1), mean, rtol=1e-7, atol=1e-8)
    got = posterior.distribution.covariance_matrix
    torch.testing.assert_close(got, covariance, rtol=1e-6, atol=1e-9)
    expected = oracles_linearized.gaussian_log_evidence(
        train, problems.PRIOR_VARIANCE, noise, y
    )
    assert model.log_evidence().item() == pytest.approx(float(expected), rel=1e-8)


def test_labels_condition_the_chosen_columns():
    net = problems.network(3)
    masks = random_subset(net, 8, torch.Generator().manual_seed(1))
    X_test = problems.inputs(4, seed=9)
    model = build("softmax", parameters=masks)
    train, test = tangents("softmax", flat(masks), X_test)
    curvature = problems.curvature("softmax", net, problems.inputs())
    expected = oracles_linearized.laplace_covariance(
        train, test, problems.PRIOR_VARIANCE, curvature
    )
    got = model.posterior(X_test).distribution.covariance_matrix
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gaussian", "multitask", "softmax"])
@every_inference
def test_a_mask_of_everything_equals_all(name, inference):
    make, net = INFERENCES[inference], problems.network(PROBLEMS[name].m)
    masks = {n: torch.ones_like(p, dtype=bool) for n, p in net.named_parameters()}
    X = problems.inputs(3, seed=9)
    moments = []
    for parameters in ("all", masks):
        options = {"inference": make(), "parameters": parameters}
        posterior = build(name, **options).posterior(X)
        moments.append((posterior.mean, posterior.variance))
    torch.testing.assert_close(moments[0], moments[1], rtol=0, atol=0)


@every_inference
def test_every_inference_and_its_draws_work_with_few_weights(inference):
    masks = largest_magnitude(problems.network(), 9)
    model = build("gaussian", parameters=masks, inference=INFERENCES[inference]())
    X = problems.inputs(3, seed=9)
    assert model.problem.num_params == model.functional.num_params == 9
    draws = model.draw(4000, torch.Generator().manual_seed(0))
    assert draws.change.shape == (4000, 9)
    posterior, values = model.posterior(X), draws(X)
    std = posterior.variance.sqrt()
    error = (values.mean(0) - posterior.mean).abs() / std
    assert error.max() < 6 / 4000**0.5
    spread = values.var(0) / posterior.variance - 1
    assert spread.abs().max() < 6 * (2 / 4000) ** 0.5


def test_the_diagonal_and_the_full_rank_are_those_of_the_dense_matrix():
    masks = largest_magnitude(problems.network(), 9)
    exact = build("gaussian", parameters=masks)
    full = exact.problem.precision()
    model = build("gaussian", parameters=masks, inference=Diagonal())
    weights = model.problem.channel_weights()
    got = model.problem.curvature.dense(weights)
    torch.testing.assert_close(got, full.diagonal().diag(), rtol=1e-6, atol=1e-8)
    low = build("gaussian", parameters=masks, inference=LowRank(rank=9))
    assert low.problem.curvature.captured == pytest.approx(1.0, rel=1e-9)
    got = low.problem.curvature.dense(low.problem.channel_weights())
    torch.testing.assert_close(got, full, rtol=1e-6, atol=1e-6)


def test_hyperparameters_are_learnt_and_groups_and_g_prior_go_with_it():
    masks = largest_magnitude(problems.network(), 9)
    model = build("gaussian", parameters=masks, groups="tensor")
    assert len(model.prior_variance) == sum(bool(m.any()) for m in masks.values())
    before = model.log_evidence().item()
    fit_evidence(model, warn=False)
    assert model.log_evidence().item() > before
    scaled = build("gaussian", parameters=masks, g_prior=True)
    J = oracles.jacobian(problems.network(), problems.inputs())[..., flat(masks)]
    squares = J.square().sum((0, 1))
    torch.testing.assert_close(scaled.functional.weight_scale, squares.rsqrt())


def test_states_and_copies_keep_the_subnetwork():
    X, masks = problems.inputs(3, seed=9), largest_magnitude(problems.network(), 9)
    model = build("gaussian", parameters=masks)
    expected = model.posterior(X).mean
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.posterior(X).mean, expected, rtol=0, atol=0)
    other = build("gaussian", parameters=masks, net=problems.network(scale=0.5))
    other.posterior(X)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.posterior(X).mean, expected, rtol=0, atol=0)
    model.float()
    got = model.posterior(X.float()).mean
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_state_of_other_entries_moves_them():
    X = problems.inputs(3, seed=9)
    places = [{"0.weight": torch.tensor(rows)} for rows in ([0, 3, 5], [1, 2, 11])]
    model, other = (build("gaussian", parameters=chosen) for chosen in places)
    other.posterior(X)
    other.load_state_dict(model.state_dict())
    got, expected = other.posterior(X), model.posterior(X)
    torch.testing.assert_close(got.variance, expected.variance, rtol=0, atol=0)


# --- by variance


def test_the_chosen_weights_have_the_least_curvature():
    net = problems.network(2)
    X, Y = problems.inputs(), problems.targets("multitask", problems.inputs())
    masks = largest_variance(net, X, Y, problems.multitask(), count=7, noise="learn")
    J = oracles.jacobian(net, X)
    weights = 1 / torch.tensor([0.02, 0.05], dtype=torch.float64)
    curvature = torch.einsum("nmp,m->p", J.square(), weights)
    chosen = flat(masks)
    assert int(chosen.sum()) == 7
    assert curvature[chosen].max() <= curvature[~chosen].min()


def test_dead_weights_come_last():
    net = problems.network()
    with torch.no_grad():
        net[2].weight[:, 0] = 0.0  # nothing reaches the output from this unit
    X, Y = problems.inputs(), problems.targets("gaussian", problems.inputs())
    masks = largest_variance(net, X, Y, count=22)  # of 25, three are dead
    assert not masks["0.weight"][0].any() and not masks["0.bias"][0]
    assert masks["0.weight"][1:].all() and masks["2.weight"].all()


def test_labels_and_a_part_of_the_network_are_chosen_from():
    net = problems.network(3)
    X, Y = problems.inputs(), problems.targets("softmax", problems.inputs())
    masks = largest_variance(net, X, Y, count=4, within="last_layer")
    assert list(masks) == ["2.weight", "2.bias"]
    model = build("softmax", parameters=masks)
    assert model.functional.num_params == 4


def test_another_structure_or_too_many_weights_are_refused():
    net, X = problems.network(), problems.inputs()
    Y = problems.targets("gaussian", X)
    with pytest.raises(TypeError, match=r"must be Diagonal\(...\), but is Exact"):
        largest_variance(net, X, Y, count=3, inference=Exact())
    with pytest.raises(ValueError, match="at most the 25 weights"):
        largest_variance(net, X, Y, count=26)
