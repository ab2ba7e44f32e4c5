"""The variational refinement of a linearised classifier, and its guard."""

import copy
import functools
import pickle

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.likelihoods import SoftmaxLikelihood
from torch import nn

from gpbridge import Exact, LinearizedGP, metrics
from gpbridge.dnn import fit_map
from gpbridge.linearized import Refinement, Sampled
from gpbridge.linearized.predictive import probabilities
from gpbridge.randomness import row_normals
from gpbridge.testing import assert_module_unchanged
from tests import oracles_likelihoods, oracles_linearized, oracles_selection
from tests.linearized.problems import (
    PRIOR_VARIANCE,
    PROBLEMS,
    N,
    both_spaces,
    build,
    curvature,
    inputs,
    label_likelihoods,
    network,
    targets,
)
from tests.linearized.test_calibration import Overconfident, labels_of, wide_inputs

EXACT = {"rtol": 1e-8, "atol": 1e-10}
SAME = {"rtol": 0, "atol": 0}
QUIET = {"progress": False}

pytestmark = pytest.mark.filterwarnings("ignore:BernoulliLikelihood is the probit link")


class Nested(nn.Module):
    """A residual network whose layers lie in a list, with a frozen weight."""

    def __init__(self, m=3):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, m)
        self.double()
        generator = torch.Generator().manual_seed(4)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator).double())
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.blocks[0](x))
        return self.head(x + torch.tanh(self.blocks[1](x)))


def confident(n=40, scale=6.0, **options):
    """A network that is sure of its own labels, so that Laplace's variance is broad."""
    net, X = Overconfident(network(3, scale=1.2), scale), wide_inputs(n, 0)
    with torch.no_grad():
        return LinearizedGP(net, X, net(X).argmax(-1), **options)


@functools.cache
def by_the_paper(name, rhos, num_pairs=40, seed=0):
    problem, X = PROBLEMS[name], inputs()
    net, m = network(problem.m), problem.m
    train = oracles_linearized.tangent(net, X)
    blocks = curvature(name, net, X)
    blocks = [blocks[i * m : (i + 1) * m, i * m : (i + 1) * m] for i in range(N)]
    return oracles_selection.refined_laplace(
        train.J,
        train.value.reshape(N, m),
        train.weights,
        torch.full_like(train.weights, 1 / PRIOR_VARIANCE),
        blocks,
        problem.log_density,
        targets(name, X),
        row_normals(N, num_pairs * m, seed).reshape(N, num_pairs, m),
        rhos,
    )


@both_spaces
@label_likelihoods
def test_steps_are_those_of_the_paper_and_halved_where_the_bound_falls(name, space):
    w, Sigma, bounds, _ = by_the_paper(name, (0.8, 0.8))
    assert (bounds[2] < bounds[1]) == (name == "softmax")
    if name == "softmax":
        w, Sigma, bounds, _ = by_the_paper(name, (0.8, 0.4))
    model = build(name, space)
    assert model.problem.space == space
    found = model.refine(max_steps=2, tolerance=1e-9, **QUIET)
    torch.testing.assert_close(found.bounds, bounds, **EXACT)
    X = inputs(5, seed=7)
    test = oracles_linearized.tangent(network(PROBLEMS[name].m), X)
    trained = oracles_linearized.tangent(network(PROBLEMS[name].m), X).weights
    mean, posterior = test.value + test.J @ (w - trained), model.posterior(X)
    torch.testing.assert_close(posterior.mean.flatten(), mean, **EXACT)
    covariance = posterior.distribution.covariance_matrix
    torch.testing.assert_close(covariance, test.J @ Sigma @ test.J.T, **EXACT)


@label_likelihoods
def test_both_spaces_take_the_same_steps(name):
    models = [build(name, space) for space in ("function", "weight")]
    found = [model.refine(max_steps=6, **QUIET) for model in models]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    X = inputs(5, seed=7)
    one, other = (model.posterior(X) for model in models)
    torch.testing.assert_close(one.mean, other.mean, **EXACT)
    torch.testing.assert_close(one.variance, other.variance, **EXACT)


def test_bounds_rise_and_the_first_step_already_agrees_with_the_labels():
    model = confident()
    laplace = model.train_gap
    assert laplace.posterior > laplace.network + 0.2
    found = model.refine(**QUIET)
    assert (found.bounds.diff() > 0).all()
    assert found.losses[1] < 0.5 * found.losses[0]
    assert model.train_gap.posterior < 0.3 * laplace.posterior
    assert f"refined in {len(found.bounds) - 1} steps" in repr(model)
    X, Y = model.train_inputs[0], model.train_targets
    loss = -model.predict(X).log_prob(Y).mean()
    torch.testing.assert_close(found.losses[-1], loss, rtol=1e-6, atol=0)
    plain = -model.predict(X, link="plugin").log_prob(Y).mean()
    torch.testing.assert_close(found.network_loss, plain, rtol=1e-6, atol=0)


@label_likelihoods
def test_where_it_stops_the_expected_gradient_vanishes(name):
    # sum J' E[y - p] = S^-1 w, up to the noise of the draws that judge the curvature.
    start = by_the_paper(name, ())[-1].norm()
    model = build(name)
    found = model.refine(max_steps=40, tolerance=1e-9, **QUIET)
    train = oracles_linearized.tangent(network(PROBLEMS[name].m), inputs())
    w = train.weights + PRIOR_VARIANCE**0.5 * found.shift
    n, m = found.curvature.shape[:2]
    mean = (train.value + train.J @ (w - train.weights)).reshape(n, m)
    got, blocks = model.marginals(inputs())
    torch.testing.assert_close(got, mean, **EXACT)
    gradient = -w / PRIOR_VARIANCE
    generator = torch.Generator().manual_seed(11)
    for i in range(n):
        values, vectors = torch.linalg.eigh(blocks[i])
        normal = torch.randn(20000, m, generator=generator, dtype=torch.float64)
        normal = torch.cat([normal, -normal]) * values.clamp_min(0).sqrt()
        samples = mean[i] + normal @ vectors.T
        score = functools.partial(oracles_likelihoods.score, PROBLEMS[name].log_density)
        label = targets(name, inputs())[i]
        g = torch.func.vmap(functools.partial(score, label))(samples)
        gradient = gradient + train.J[i * m : (i + 1) * m].T @ g.mean(0)
    assert gradient.norm() < 0.05 * start


def test_without_prior_variance_it_is_the_network():
    model = confident(n=12)
    model.prior_variance = 1e-3
    start = Refinement(
        torch.zeros(model.problem.num_params, dtype=torch.float64),
        torch.zeros(12, 3, 3, dtype=torch.float64),
        model.prior_variance.detach(),
        *torch.zeros(2, 1, dtype=torch.float64),
        *torch.zeros(2, dtype=torch.float64),
    )
    model.refinement = start
    X = wide_inputs(5, 3)
    posterior = model.posterior(X)
    torch.testing.assert_close(posterior.mean, model.functional(X).detach(), **EXACT)
    features = model.problem.features(X, model.problem.unit_std).rows().double()
    prior = 1e-3 * features.square().sum(-1)  # no curvature: the prior
    torch.testing.assert_close(posterior.variance.flatten(), prior, **EXACT)


def test_prediction_and_draws_use_mean_and_covariance_together():
    model, X = confident(), wide_inputs(6, 3)
    network_mean = model.posterior(X).mean
    model.refine(**QUIET)
    posterior = model.posterior(X)
    assert (posterior.mean - network_mean).abs().max() > 0.1
    mean, blocks = model.marginals(X)
    torch.testing.assert_close(mean, posterior.mean, **EXACT)
    q = probabilities(model.likelihood, mean, blocks, "pairwise")
    torch.testing.assert_close(model.predict(X).probs, q, rtol=1e-6, atol=1e-9)
    plugin = model.functional(X).softmax(-1).detach()
    torch.testing.assert_close(model.predict(X, link="plugin").probs, plugin, **EXACT)
    draws = model.draw(4000, generator=torch.Generator().manual_seed(0))(X)
    std = posterior.variance.sqrt()
    assert ((draws.mean(0) - posterior.mean).abs() < 5 * std / 4000**0.5).all()
    assert (draws.std(0) / std - 1).abs().max() < 0.08
    subset = model.subset_output([2]).posterior(X)
    torch.testing.assert_close(subset.mean, posterior.mean[:, [2]], **EXACT)


def test_going_on_is_as_if_it_had_not_stopped(tmp_path):
    whole, part = confident(), confident()
    whole.refine(max_steps=4, tolerance=1e-9, **QUIET)
    part.refine(max_steps=1, tolerance=1e-9, **QUIET)
    torch.save(part.state_dict(), tmp_path / "model.pt")
    fresh = confident()
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    fresh.refine(max_steps=3, tolerance=1e-9, **QUIET)
    for one, other in zip(whole.refinement, fresh.refinement, strict=True):
        torch.testing.assert_close(one, other, **SAME)


def test_copies_pickles_and_state_dicts_stay_refined():
    model, X = confident(), wide_inputs(6, 3)
    plain = model.state_dict()
    model.refine(**QUIET)
    expected, fresh = model.posterior(X), confident()
    fresh.load_state_dict(model.state_dict())
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.posterior(X).mean, expected.mean, **SAME)
        torch.testing.assert_close(
            twin.posterior(X).variance, expected.variance, **SAME
        )
        torch.testing.assert_close(
            twin.predict(X).probs, model.predict(X).probs, **SAME
        )
    fresh.load_state_dict(plain)  # a state without one has none
    assert fresh.refinement is None
    moved = copy.deepcopy(model).float()
    got = moved.posterior(X.float()).mean
    torch.testing.assert_close(got.double(), expected.mean, rtol=1e-3, atol=1e-3)
    assert moved.refinement is not None
    assert model.subset_rows(torch.arange(9)).refinement is None


def test_the_same_seed_gives_the_same_and_the_network_is_untouched():
    net, X = Nested(), inputs()
    random_state = torch.get_rng_state()
    with assert_module_unchanged(net):
        found = []
        for seed in (0, 0, 1):
            model = LinearizedGP(net, X, targets("softmax", X))
            found.append(model.refine(seed=seed, **QUIET))
    torch.testing.assert_close(found[0].shift, found[1].shift, **SAME)
    assert (found[0].shift - found[2].shift).abs().max() > 1e-6
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_change_of_a_hyperparameter_drops_it_and_says_so():
    model, X = confident(), wide_inputs(6, 3)
    before = model.posterior(X)
    model.refine(**QUIET)
    prior_variance = model.prior_variance.item()
    model.prior_variance = 3 * prior_variance
    with pytest.warns(UserWarning, match="dropped, since the prior variance .* refine"):
        model.posterior(X)
    assert model.refinement is None
    model.prior_variance = prior_variance
    after = model.posterior(X)
    torch.testing.assert_close(after.variance, before.variance, **EXACT)
    torch.testing.assert_close(after.mean, before.mean, **EXACT)
    torch.testing.assert_close(
        model.predict(X).probs, model.predict(X, link="plugin").probs, **SAME
    )
    model.refine(**QUIET)
    model.likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    with pytest.warns(UserWarning, match="since the network, the likelihood or an opt"):
        model.posterior(X)
    model.refine(**QUIET)
    model.prior_variance = 3 * prior_variance
    model.refine(**QUIET)  # anew, and silent: it was asked for
    assert model.refinement.fits(model.prior_variance, "network")


def test_calibration_after_it_chooses_its_temperature():
    net, X = network(3, scale=1.2), wide_inputs(60, 0)
    model = LinearizedGP(Overconfident(net), X, labels_of(net, X, 0))
    X_val, X_test = wide_inputs(100, 1), wide_inputs(400, 5)
    Y_val, Y_test = labels_of(net, X_val, 1), labels_of(net, X_test, 5)
    model.refine(**QUIET)
    mean, variance = model.posterior(X_test).mean, model.prior_variance.item()
    logs = model.predict(X_val).logits
    temperature = metrics.fit_temperature(logs, Y_val, (0.5, 10.0))
    found = model.calibrate(X_val, Y_val)
    assert found.temperature == pytest.approx(temperature, rel=1e-4)
    assert found.prior_variance == model.prior_variance.item() == variance
    assert found.gain > found.gain_std_error
    torch.testing.assert_close(model.posterior(X_test).mean, mean, **EXACT)
    calibrated = -model.predict(X_test).log_prob(Y_test).mean()
    plain = -model.predict(X_test, link="plugin").log_prob(Y_test).mean()
    assert calibrated < plain - 0.5 * found.gain
    twin = copy.deepcopy(model)
    torch.testing.assert_close(
        twin.predict(X_test).probs, model.predict(X_test).probs, **SAME
    )
    model.refine(max_steps=1, **QUIET)  # a temperature belongs to one refinement
    assert model.calibration is None


def test_what_held_out_data_do_not_confirm_is_dropped():
    model = confident()
    model.refine(**QUIET)
    X, plain = wide_inputs(1, 1), model.functional(wide_inputs(6, 3)).softmax(-1)
    with pytest.warns(UserWarning, match="drops the refinement .* the refined ones sa"):
        assert model.calibrate(X, torch.tensor([0])) is None
    assert model.refinement is None
    torch.testing.assert_close(
        model.predict(wide_inputs(6, 3)).probs, plain.detach(), **EXACT
    )


@pytest.mark.parametrize("precision", [17.0, 100.0, 1e4])
def test_a_prior_too_narrow_for_the_labels_is_given_up_or_agrees(precision):
    model, X = confident(), wide_inputs(6, 3)
    model.prior_variance = 1 / precision
    before, laplace = model.posterior(X), model.train_gap
    with pytest.warns(UserWarning, match="keeps the posterior as it was, .* no step"):
        assert model.refine(**QUIET) is None
    assert model.refinement is None and model.train_gap == laplace
    torch.testing.assert_close(model.posterior(X).mean, before.mean, **SAME)
    torch.testing.assert_close(
        model.predict(X).probs, model.predict(X, link="plugin").probs, **SAME
    )


@pytest.mark.slow
def test_on_digits_the_posterior_comes_to_agree_with_its_labels():
    # Weight decay 5e-4 of the mean loss, and the prior that it stands for.
    X, y = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    X, y = torch.tensor(X[:600]).float() / 16, torch.tensor(y[:600])
    net = nn.Sequential(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
    generator = torch.Generator().manual_seed(0)
    fit = fit_map(
        net,
        X,
        y,
        epochs=150,
        weight_decay=5e-4,
        early_stopping=False,
        learning_rate=1e-2,
        generator=generator,
        progress=False,
    )
    model = LinearizedGP(fit.network, X, y)
    model.prior_variance = 1 / (len(X) * 5e-4)
    laplace = model.train_gap
    found = model.refine(**QUIET)
    assert laplace.posterior > 0.5 and laplace.network < 0.1
    assert model.train_gap.posterior < 0.1
    assert found.losses[1] < found.losses[0]


@both_spaces
def test_scaled_weights_and_groups_take_the_same_steps(space):
    scaled = build("softmax", space, g_prior=True)
    assert (scaled.refine(max_steps=6, **QUIET).bounds.diff() > 0).all()
    grouped = build("softmax", space, groups="layer")
    alone = build("softmax", space)
    one, other = (
        grouped.refine(max_steps=6, **QUIET),
        alone.refine(max_steps=6, **QUIET),
    )
    torch.testing.assert_close(one.bounds, other.bounds, **EXACT)
    torch.testing.assert_close(one.shift, other.shift, **EXACT)
    with pytest.raises(ValueError, match="has 2 groups. Build it with groups='all'"):
        grouped.calibrate(inputs() + 1, targets("softmax", inputs()))


def test_features_that_do_not_fit_are_computed_again():
    budget = 8 * 4 * 39**2  # of the 39 x 39 matrix, not of the features
    X = inputs(20)
    small = build("softmax", X=X, inference=Exact("weight", memory_budget=budget))
    assert small.problem.rows() is None
    found, expected = (
        m.refine(max_steps=6, **QUIET) for m in (small, build("softmax", X=X))
    )
    torch.testing.assert_close(found.shift, expected.shift, **EXACT)


def test_one_point_is_enough():
    X, Y = inputs(1), torch.tensor([1])
    model = LinearizedGP(network(3), X, Y)
    assert model.refine(max_steps=6, **QUIET).curvature.shape == (1, 3, 3)
    assert model.train_gap.posterior < 0.5


def test_what_it_cannot_do_is_refused():
    X = inputs()
    with pytest.raises(TypeError, match="refine is for classification: under Gaussian"):
        build("gaussian").refine()
    with pytest.raises(ValueError, match="mean='linear_model'. Build it with mean="):
        build("softmax", mean="linear_model").refine()
    for inference in (Sampled(), Exact(space="matrix_free")):
        with pytest.raises(NotImplementedError, match="with inference=Exact()"):
            build("softmax", inference=inference).refine()
    with pytest.raises(MemoryError, match="The variational refinement of 12 .*GiB"):
        build("softmax", inference=Exact(memory_budget=1e3)).refine()
    model = build("softmax")
    with pytest.raises(ValueError, match="max_steps must be a whole number above zero"):
        model.refine(max_steps=0)
    with pytest.raises(ValueError, match="num_pairs must be a whole number above zero"):
        model.refine(num_pairs=1.5)
    with pytest.raises(ValueError, match="tolerance must be"):
        model.refine(tolerance=0.0)
    with pytest.raises(ValueError, match=r"seed must be .* below 2\^31, but is -1"):
        model.refine(seed=-1)
    model.refine(max_steps=6, **QUIET)
    with pytest.raises(NotImplementedError, match="Condition first and call refine()"):
        model.condition_on_observations(X + 1, targets("softmax", X))
    model.refinement = None
    assert len(model.condition_on_observations(X, targets("softmax", X)).train_targets)
    with pytest.raises(InputDataError, match="X_val contains NaN"):
        confident().calibrate(X * float("nan"), targets("softmax", X))
