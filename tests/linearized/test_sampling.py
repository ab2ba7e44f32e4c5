"""Draws by solving: their law without Monte Carlo error, warm starts, one posterior."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.data_features import PrecisionOperator
from gpbridge.linearized import Sampled, posterior
from gpbridge.linearized.calibration import _covariances, _sampled_covariances
from gpbridge.linearized.evidence import frozen_spectrum
from gpbridge.linearized.posterior import TangentPosterior
from gpbridge.linearized.sampling import BaseDraws, rescale, solve_draws
from gpbridge.selection import SampleBasedEM
from gpbridge.solvers import ConjugateGradients
from tests import oracles as dense
from tests.cases import NETS
from tests.linearized.problems import (
    PRIOR_VARIANCE,
    both_spaces,
    build,
    every_likelihood,
    inputs,
    label_likelihoods,
    network,
    targets,
)

TIGHT = ConjugateGradients(tolerance=1e-11, preconditioner_rank=0)
CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def with_the_exact_law(model):
    """Replace the randomness by all unit vectors, in which a draw is linear.

    The mean of the outer products of these draws is the covariance of a draw.
    """
    problem = model.problem
    (rows, p), n = problem.data.shape, len(problem.X)
    both = (rows + p) ** 0.5 * torch.eye(rows + p, dtype=torch.float64)
    noise = both[p:].reshape(n, -1, rows + p)
    problem._base = BaseDraws(both[:p], noise)
    return model


def assert_same_joint(sampled, exact, X):
    got, expected = sampled.posterior(X), exact.posterior(X)
    torch.testing.assert_close(got.mean, expected.mean, **CLOSE)
    torch.testing.assert_close(
        got.distribution.covariance_matrix,
        expected.distribution.covariance_matrix,
        **CLOSE,
    )


@both_spaces
@every_likelihood
def test_draws_have_the_exact_posterior_covariance(name, space):
    X = inputs(7, seed=5)
    inference = Sampled(solver=TIGHT, space=space)
    model = with_the_exact_law(build(name, inference=inference))
    assert_same_joint(model, build(name), X)


@pytest.mark.parametrize("name", ["batch_norm", "images", "tied", "frozen"])
@both_spaces
def test_networks_of_any_structure_have_the_exact_covariance(name, space):
    case = NETS[name]
    net, X, labels = case.network(3), case.inputs(8), torch.arange(8) % 3
    before = copy.deepcopy(net.state_dict())
    shape = {"input_shape": case.input_shape}
    inference = Sampled(solver=TIGHT, space=space)
    model = LinearizedGP(net, X, labels, inference=inference, **shape)
    exact = LinearizedGP(net, X, labels, **shape)
    assert_same_joint(with_the_exact_law(model), exact, case.inputs(4, seed=1))
    for key, value in net.state_dict().items():  # the statistics of a batch norm, too
        assert torch.equal(value, before[key])


def test_the_last_layer_alone_can_be_sampled():
    options = {"parameters": "last_layer", "noise": 0.03}
    exact = build("gaussian", **options)
    model = build("gaussian", inference=Sampled(solver=TIGHT), **options)
    assert model.problem.num_params == 7
    assert_same_joint(with_the_exact_law(model), exact, inputs(5, seed=5))


@pytest.mark.filterwarnings("ignore:.*train_gap")
@pytest.mark.parametrize("link", ["monte_carlo", "probit", "pairwise"])
@label_likelihoods
def test_predicted_labels_are_those_of_the_exact_posterior(name, link):
    X = inputs(7, seed=5)
    exact = build(name).predict(X, link)
    model = with_the_exact_law(build(name, inference=Sampled(solver=TIGHT)))
    got = model.predict(X, link)
    torch.testing.assert_close(got.probs, exact.probs, rtol=1e-5, atol=1e-7)
    few = build(name, inference=Sampled(400, TIGHT)).predict(X, link)
    assert 0 < (few.probs - exact.probs).abs().max() < 0.05


def round_trip(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build("softmax", inference=model.inference, net=network(3, scale=0.5))
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), round_trip],
    ids=["copied", "pickled", "loaded"],
)
def test_copies_make_the_same_draws_again(again):
    """Draws are not saved: the seed is an option, and loaded models are built alike."""
    X = inputs(4, seed=5)
    model = build("softmax", inference=Sampled(6, TIGHT))
    model.prior_variance = 0.7
    posterior = model.posterior(X)
    other = again(model)
    assert other._problem is None
    got = other.posterior(X)
    torch.testing.assert_close(got.mean, posterior.mean, **CLOSE)
    torch.testing.assert_close(got.variance, posterior.variance, **CLOSE)


@both_spaces
def test_the_spread_of_a_few_draws_is_that_of_a_chi_square(space):
    X = inputs(20, seed=5)
    exact = build("gaussian").posterior(X).variance
    s = 400
    model = build("gaussian", inference=Sampled(s, TIGHT, space=space))
    ratio = model.posterior(X).variance / exact
    assert (ratio - 1).abs().max() < 5 * (2 / s) ** 0.5
    assert (ratio - 1).abs().max() > 0.1 * (2 / s) ** 0.5


@label_likelihoods
def test_the_mean_of_the_linear_model_is_found_by_products(name):
    X = inputs(7, seed=5)
    exact = build(name, mean="linear_model").posterior(X).mean
    inference = Sampled(4, TIGHT)
    model = build(name, mean="linear_model", inference=inference)
    torch.testing.assert_close(model.posterior(X).mean, exact, rtol=1e-3, atol=1e-3)


@both_spaces
def test_a_rescaled_right_hand_side_is_a_rebuilt_one(space):
    """(M + lam I) z = sqrt(lam) e + G, where G has no lam: Antoran et al. (2023)."""
    inference = Sampled(5, TIGHT, space=space)
    model, X = build("softmax", inference=inference), inputs()
    problem, net = model.problem, network(3)
    J = dense.jacobian(net, X)  # n x m x p
    root = dense.softmax_root(net(X).detach())
    M = dense.ggn(J, root)
    e, xi = problem.base
    G = torch.einsum("nmp,nmk,nks->ps", J, root, xi)
    for variance in (0.3, 2.0, 0.05):
        lam = 1 / variance
        H = M + lam * torch.eye(len(M)).double()
        expected = torch.linalg.solve(H, lam**0.5 * e + G)
        draws = problem.draws(torch.tensor([variance]).double())  # from the last ones
        z = draws.std[:, None] * draws.omega
        torch.testing.assert_close(z, expected, **CLOSE)


def test_base_draws_are_independent_of_each_other():
    """One key for every leaf would draw leaves of one shape alike."""
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)], nn.Linear(3, 2)).double()
    X, s = torch.rand(4, 3).double(), 2000
    model = LinearizedGP(net, X, torch.arange(4) % 2, inference=Sampled(s, TIGHT))
    e, xi = model.problem.base
    values = torch.cat([e, xi.flatten(0, 1)])
    correlation = values @ values.mT / s - torch.eye(len(values))
    assert len(e) == 3 * 12 + 8 and len(values) == len(e) + 8
    # Squares have twice the variance of products.
    assert correlation.abs().max() < 5 * (2 / s) ** 0.5
    products = correlation[~torch.eye(len(values), dtype=bool)]
    assert products.abs().max() < 5 / s**0.5


def test_a_start_from_the_last_prior_is_close():
    problem = build("softmax", inference=Sampled(5, TIGHT)).problem
    old = problem.draws(torch.tensor([10.0]))
    std = problem.flat_prior_std(torch.tensor([10.5]))
    operator = PrecisionOperator(problem.root().detach(), std, problem.data)
    rhs = problem.base.prior + operator.to_weights(problem.base.noise)
    left = rhs - operator @ rescale(old, std)
    assert left.norm() < 0.05 * rhs.norm()
    without = rhs - operator @ old.omega  # the weights in the old scale
    assert left.norm() < 0.5 * without.norm()


def test_draws_of_the_last_prior_save_passes():
    loose = ConjugateGradients(tolerance=1e-2, preconditioner_rank=0)
    inference = Sampled(5, loose, space="weight")
    problem = build("softmax", inference=inference).problem
    problem.draws(torch.tensor([10.0]))
    warm = problem.draws(torch.tensor([10.5])).solution
    problem._draws = None
    cold = problem.draws(torch.tensor([10.5])).solution
    assert warm.converged and cold.converged
    assert warm.passes < 0.8 * cold.passes


def test_dead_weights_stay_dead_in_another_scale():
    model = build("gaussian", inference=Sampled(3, TIGHT))
    draws = model.problem.draws(torch.tensor([1.0]))
    std = 2 * draws.std
    std[0] = 0.0
    moved = rescale(draws, std)
    torch.testing.assert_close(moved[1:], 0.5 * draws.omega[1:])
    assert bool((moved[0] == 0).all())


class Normalised(nn.Module):
    """Weights whose scale a layer norm takes out again."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.first(x))))


def test_a_g_prior_makes_predictions_independent_of_a_scale_that_changes_nothing():
    """Antoran et al. (2022), section 4: weights in front of a normalisation layer."""
    torch.manual_seed(0)
    net = Normalised().double()
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled.first.weight *= 10
        scaled.first.bias *= 10
    net.norm.eps = scaled.norm.eps = 1e-14
    X = torch.randn(15, 4, dtype=torch.float64)
    labels = torch.arange(15) % 3
    torch.testing.assert_close(net(X), scaled(X), rtol=1e-10, atol=1e-10)
    found, learnt = {}, {}
    for g_prior in (True, False):
        models = [
            with_the_exact_law(
                LinearizedGP(
                    one, X, labels, g_prior=g_prior, inference=Sampled(solver=TIGHT)
                )
            )
            for one in (net, scaled)
        ]
        found[g_prior] = [model.posterior(X[:5]).variance for model in models]
        for model in models:
            SampleBasedEM(model).run(2, 1e-9, progress=False)
        learnt[g_prior] = [
            (m.prior_variance.detach(), m.predict(X[:5], "probit").probs)
            for m in models
        ]
    torch.testing.assert_close(*found[True], rtol=1e-6, atol=0)
    for one, other in zip(*learnt[True], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    one, other = found[False]
    assert (one / other - 1).abs().max() > 0.2
    one, other = learnt[False]
    assert (one[1] - other[1]).abs().max() > 1e-3
    # The weights in front of the normalisation are not pruned: they carry variance.
    last = LinearizedGP(net, X, labels, g_prior=True, parameters="last_layer")
    rest = 1 - last.posterior(X[:5]).variance / found[True][0]
    assert rest.min() > 0.2


def test_draws_are_functions_whose_covariance_is_the_posteriors():
    model = build("gaussian", inference=Sampled(50, TIGHT))
    X = inputs(6, seed=5)
    generator = torch.Generator().manual_seed(0)
    values = model.draw(4000, generator)(X)[..., 0]
    covariance = model.posterior(X).distribution.covariance_matrix
    got = torch.cov(values.mT)
    assert (got - covariance).norm() < 0.1 * covariance.norm()


def test_further_observations_update_the_draws():
    model = with_the_exact_law(build("gaussian", inference=Sampled(solver=TIGHT)))
    exact = build("gaussian")
    X, Y = inputs(2, seed=8), torch.tensor([[0.3], [-0.1]], dtype=torch.float64)
    at = inputs(5, seed=9)
    got = model.condition_on_observations(X, Y).posterior(at)
    expected = exact.condition_on_observations(X, Y).posterior(at)
    torch.testing.assert_close(got.mean, expected.mean, **CLOSE)
    torch.testing.assert_close(got.variance, expected.variance, **CLOSE)


def test_the_randomness_is_the_options_and_stays():
    X = inputs(4, seed=5)
    one, same, other = (
        build("gaussian", inference=Sampled(8, TIGHT, seed=seed)).posterior(X).variance
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_the_posterior_is_differentiable_in_its_inputs():
    model = build("softmax", inference=Sampled(6, TIGHT))
    X = inputs(2, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda X: model.posterior(X).variance, X)


def test_calibration_agrees_with_the_exact_one_at_the_same_prior():
    X, labels = inputs(60, seed=2), targets("softmax", inputs(60, seed=2))
    model = with_the_exact_law(
        build("softmax", inference=Sampled(solver=TIGHT), X=X, Y=labels)
    )
    problem = model.problem
    exact = build("softmax", X=X, Y=labels).problem
    Z = inputs(9, seed=3)
    for prior_variance in (0.1, 3.0):
        got = _sampled_covariances(problem, Z)(prior_variance)
        expected = _covariances(exact, frozen_spectrum(exact), Z)(prior_variance)
        torch.testing.assert_close(got, expected, **CLOSE)


def test_many_points_are_seen_in_chunks_of_their_features(monkeypatch):
    model = build("softmax", inference=Sampled(4, TIGHT))
    X = inputs(40, seed=5)
    whole = model.marginals(X)
    seen = []
    features = TangentPosterior.features

    def counted(self, Z, outputs=None):
        seen.append(len(Z))
        return features(self, Z, outputs)

    monkeypatch.setattr(TangentPosterior, "features", counted)
    monkeypatch.setattr(posterior, "_CHUNK_BYTES", 1)
    torch.testing.assert_close(model.marginals(X), whole, **CLOSE)
    assert seen == [16, 16, 8]
    data = model.problem.data
    assert data.numbers_per_point >= model.problem.net.num_params // 10


def test_options_are_checked():
    with pytest.raises(ValueError, match="space must be one of"):
        Sampled(space="matrix_free")
    with pytest.raises(ValueError, match="num_samples must be positive"):
        Sampled(0)


def test_the_exact_evidence_is_refused_beyond_the_budget():
    model = build("gaussian", inference=Sampled(4, TIGHT, memory_budget=100))
    with pytest.raises(MemoryError, match="The exact evidence"):
        model.log_evidence()


def test_both_systems_have_the_same_draws_as_solutions():
    problem = build("gaussian", inference=Sampled(3, TIGHT)).problem
    std = problem.flat_prior_std(torch.tensor([PRIOR_VARIANCE]))
    root = problem.root().detach()
    got = [
        solve_draws(problem.data, root, std, problem.base, TIGHT, None, in_outputs)
        for in_outputs in (True, False)
    ]
    torch.testing.assert_close(got[0].omega, got[1].omega, **CLOSE)
