"""Leave-one-out, conditional evidence and held-out density, against refits."""

import math

import pytest
import torch
from botorch.models import SingleTaskGP, SingleTaskVariationalGP
from botorch.models.transforms import ChainedOutcomeTransform, Log, Standardize
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import InducingPointKernel
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    SoftmaxLikelihood,
)
from gpytorch.means import ZeroMean
from gpytorch.mlls import LeaveOneOutPseudoLikelihood
from gpytorch.models import ApproximateGP
from gpytorch.variational import (
    CholeskyVariationalDistribution,
    IndependentMultitaskVariationalStrategy,
    VariationalStrategy,
)

from gpbridge import Exact, LinearizedGP
from gpbridge.checks import ShapeError
from gpbridge.linearized import Diagonal
from gpbridge.selection import (
    conditional_log_evidence,
    held_out_log_density,
    leave_one_out,
    log_evidence,
)
from gpbridge.testing import assert_module_unchanged
from tests import oracles_linearized
from tests import oracles_selection as oracles
from tests.linearized.problems import (
    PRIOR_VARIANCE,
    PROBLEMS,
    build,
    inputs,
    network,
    targets,
)
from tests.selection.test_marginal_likelihood import (
    NOISE,
    Multitask,
    N,
    Sparse,
    data,
    kernel,
    likelihood,
    quiet,
    single,
)

GAUSSIAN = [name for name, problem in PROBLEMS.items() if problem.gaussian]


def dense(X, Y):
    """Targets, mean and covariance of ``single``."""
    K = kernel()(X).to_dense().detach()
    return Y[:, 0], torch.zeros(len(X)).double(), K + NOISE * torch.eye(len(X)).double()


def dense_linear(name):
    """Targets, mean and covariance of the linear model, tasks of a point together."""
    X = inputs()
    tangent = oracles_linearized.tangent(network(PROBLEMS[name].m), X)
    J, Y = tangent.features(PRIOR_VARIANCE), targets(name, X).double()
    covariance = J @ J.T + PROBLEMS[name].noise(len(X))
    return Y.reshape(-1), tangent.mean(), covariance


# -- leave one out --------------------------------------------------------------------


@quiet
def test_leaving_one_out_equals_refits_of_an_exact_gp():
    X, Y = data()
    found = leave_one_out(single(X, Y))
    values, means, variances = oracles.leave_one_out(*dense(X, Y))
    tight = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found.log_density.detach(), values, **tight)
    torch.testing.assert_close(found.mean.detach(), means, **tight)
    torch.testing.assert_close(found.variance.detach(), variances, **tight)
    assert found.value.item() == pytest.approx(values.sum().item(), rel=1e-9)


@pytest.mark.parametrize("space", ["function", "weight"])
@pytest.mark.parametrize("name", GAUSSIAN)
def test_leaving_one_out_equals_refits_of_the_linear_model(name, space):
    found = leave_one_out(build(name, space))
    values, means, variances = oracles.leave_one_out(
        *dense_linear(name), PROBLEMS[name].m
    )
    torch.testing.assert_close(found.log_density.detach(), values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.mean.detach(), means, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.variance.detach(), variances, rtol=1e-9, atol=1e-9)


@quiet
def test_a_model_without_the_point_predicts_the_same():
    X, Y = data()
    model = SingleTaskGP(X, Y)  # standardised by the moments of all points
    found = leave_one_out(model)
    rest = torch.arange(1, N)
    twin = SingleTaskGP(X, Y)
    twin.set_train_data(X[rest], twin.train_targets[rest], strict=False)
    twin.outcome_transform.eval()
    predicted = twin.posterior(X[:1], observation_noise=True)
    scale = twin.outcome_transform.stdvs.item()
    shift = twin.outcome_transform.means.item()
    mean, variance = predicted.mean.item(), predicted.variance.item()
    assert mean == pytest.approx(shift + scale * found.mean[0, 0].item(), abs=1e-7)
    assert variance == pytest.approx(scale**2 * found.variance[0, 0].item(), abs=1e-7)


@quiet
def test_a_point_is_left_out_with_all_its_tasks():
    X, Y = data(m=2)
    model = Multitask(X, Y, rank=1)
    prior = model.likelihood(model.train()(X))
    mean, covariance = prior.mean.detach(), prior.covariance_matrix.detach()
    values, _, _ = oracles.leave_one_out(Y.reshape(-1), mean.reshape(-1), covariance, 2)
    torch.testing.assert_close(leave_one_out(model).log_density.detach(), values)


@quiet
def test_it_is_upstreams_pseudo_likelihood_in_total():
    X, Y = data()
    model = single(X, Y)
    upstream = LeaveOneOutPseudoLikelihood(model.likelihood, model)
    wanted = N * upstream(model.train()(X), model.train_targets)
    found = leave_one_out(model)
    torch.testing.assert_close(found.value, wanted)
    raw = model.likelihood.noise_covar.raw_noise
    got, expected = (torch.autograd.grad(v, raw)[0] for v in (found.value, wanted))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@quiet
def test_outputs_kept_in_the_batch_are_left_out_one_by_one():
    X, Y = data(m=2)
    both = leave_one_out(SingleTaskGP(X, Y))
    for i in range(2):
        alone = leave_one_out(SingleTaskGP(X, Y[:, i : i + 1]))
        torch.testing.assert_close(both.log_density[i], alone.log_density)
    assert both.value.shape == (2,)


@quiet
def test_the_order_of_points_is_the_order_of_densities():
    X, Y = data()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    found, shuffled = (
        leave_one_out(single(X[rows], Y[rows])) for rows in (torch.arange(N), order)
    )
    torch.testing.assert_close(shuffled.log_density, found.log_density[order])


# -- conditional evidence -------------------------------------------------------------


@quiet
@pytest.mark.parametrize("num_first", [0, 1, 6, N - 1])
def test_the_rest_given_the_first_is_the_density_of_the_posterior(num_first):
    X, Y = data()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    found = conditional_log_evidence(single(X, Y), num_first, orders=order[None])
    y, mean, covariance = dense(X, Y)
    seen, rest = order[:num_first], order[num_first:]
    moments = oracles.conditional(y, mean, covariance, seen, rest)
    expected = oracles.log_density(y[rest], *moments)
    assert found.value.item() == pytest.approx(expected, rel=1e-8)
    assert found.num_first == num_first and found.num_targets == N - num_first
    assert found.kind == "exact" and math.isnan(found.standard_error.item())


@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_chain_rule_of_the_linear_model(name):
    model = build(name)
    order = torch.arange(len(inputs())).flip(0)[None]
    whole = log_evidence(model).item()
    none = conditional_log_evidence(model, 0, orders=order).value.item()
    assert none == pytest.approx(whole, rel=1e-11)
    y, mean, covariance = dense_linear(name)
    m = PROBLEMS[name].m
    rows = torch.arange(len(y)).reshape(-1, m).flip(0)[:5].reshape(-1)
    first = oracles.log_density(y[rows], mean[rows], covariance[rows][:, rows])
    rest = conditional_log_evidence(model, 5, orders=order)
    assert rest.value.item() + first == pytest.approx(whole, rel=1e-11)
    assert rest.num_targets == (len(inputs()) - 5) * m


@quiet
def test_the_last_term_of_all_orders_is_leaving_one_out():
    X, Y = data()
    model = single(X, Y)
    # Every point stands last once.
    orders = torch.stack([torch.arange(N).roll(shift) for shift in range(N)])
    last = conditional_log_evidence(model, N - 1, orders=orders)
    assert N * last.value.item() == pytest.approx(leave_one_out(model).value.item())


@quiet
def test_orders_are_averaged_and_come_from_the_generator():
    X, Y = data()
    model = single(X, Y)
    before = torch.get_rng_state()
    found = conditional_log_evidence(model)
    assert torch.equal(before, torch.get_rng_state())
    assert found.values.shape == (10,) and found.num_first == N // 2
    torch.testing.assert_close(found.values.mean(), found.value)
    expected = found.values.std() / 10**0.5
    torch.testing.assert_close(found.standard_error, expected.detach())
    again = conditional_log_evidence(model, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.values, found.values)
    own = conditional_log_evidence(model, orders=None)
    given = conditional_log_evidence(model, orders=torch.arange(N)[None])
    assert torch.equal(own.values, given.values)
    other = conditional_log_evidence(model, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(other.values, found.values)
    raw = model.likelihood.noise_covar.raw_noise
    (slope,) = torch.autograd.grad(found.value, raw)
    with torch.no_grad():
        steps = []
        for sign in (1, -1):
            raw += sign * 1e-5
            steps.append(conditional_log_evidence(model).value.item())
            raw -= sign * 1e-5
    expected = (steps[0] - steps[1]) / 2e-5
    assert slope.item() == pytest.approx(expected, rel=1e-6)


@quiet
def test_a_prior_that_is_too_wide_is_charged_by_the_evidence_alone():
    X, Y = data(40)
    wide, narrow = single(X, Y), single(X, Y)
    wide.covar_module.outputscale = 1e6
    cost = log_evidence(narrow) - log_evidence(wide)
    later = [conditional_log_evidence(m, 30).value for m in (narrow, wide)]
    assert cost > 30 and later[0] - later[1] < 0.2 * cost


@pytest.mark.parametrize(
    "model",
    [("softmax", Exact()), ("softmax", Diagonal()), ("gaussian", Diagonal())],
    ids=["labels", "labels, diagonal", "diagonal"],
)
def test_where_it_is_a_difference_of_approximations(model):
    model = build(model[0], inference=model[1])
    found = conditional_log_evidence(model, 5, orders=2)
    assert found.kind == "approximation" and found.num_targets == 7
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(12, generator=generator)[:5]
    expected = model.log_evidence() - model.subset_rows(rows).log_evidence()
    assert found.values[0].item() == pytest.approx(expected.item())
    whole = conditional_log_evidence(model, 0, orders=1)
    assert whole.value.item() == pytest.approx(model.log_evidence().item())


# -- given data -----------------------------------------------------------------------


@quiet
def test_held_out_density_is_in_the_units_of_the_targets():
    X, Y = data()
    model = single(X[:10], Y[:10])
    found = held_out_log_density(model, X[10:], Y[10:])
    y, mean, covariance = dense(X, Y)
    for i in range(10, N):
        moments = oracles.conditional(
            y, mean, covariance, torch.arange(10), torch.tensor([i])
        )
        expected = oracles.log_density(y[i : i + 1], *moments)
        assert found[i - 10].item() == pytest.approx(expected, rel=1e-6)
    scaled = SingleTaskGP(X[:10], Y[:10])
    thousand = SingleTaskGP(X[:10], 1e3 * Y[:10])
    a = held_out_log_density(scaled, X[10:], Y[10:])
    b = held_out_log_density(thousand, X[10:], 1e3 * Y[10:])
    torch.testing.assert_close(a - math.log(1e3), b, rtol=1e-6, atol=1e-6)


@quiet
def test_held_out_density_of_every_class_of_model():
    X, Y = data()
    labels = (Y[:, 0] > 0).double()
    linear = LinearizedGP(network(), X, Y, noise=0.1)
    expected = linear.predict(X).log_prob(Y)[:, 0]
    torch.testing.assert_close(held_out_log_density(linear, X, Y), expected)
    torch.testing.assert_close(held_out_log_density(linear, X, Y[:, 0]), expected)
    softmax = build("softmax")
    y = targets("softmax", inputs())
    found = held_out_log_density(softmax, inputs(), y)
    torch.testing.assert_close(found, softmax.predict(inputs()).log_prob(y))
    sparse, noise = Sparse(X[:5]), likelihood()
    sparse(X)
    latent = sparse.eval()(X)
    normal = torch.distributions.Normal(latent.mean, (latent.variance + NOISE).sqrt())
    torch.testing.assert_close(
        held_out_log_density(sparse, X, Y, noise),
        normal.log_prob(Y[:, 0]).detach(),
        rtol=1e-6,
        atol=1e-8,
    )
    probit = BernoulliLikelihood()
    got = held_out_log_density(sparse, X, labels, probit)
    torch.testing.assert_close(got, probit(latent).log_prob(labels).detach())
    wrapped = SingleTaskVariationalGP(
        X, num_outputs=1, likelihood=probit, inducing_points=X[:5]
    )
    got = held_out_log_density(wrapped, X, labels)
    latent = wrapped.posterior(X).distribution
    torch.testing.assert_close(got, probit(latent).log_prob(labels).detach())
    multitask = Multitask(*data(m=2))
    X, Y = data(m=2)
    got = held_out_log_density(multitask, X[:3], Y[:3])
    moments = multitask.likelihood(multitask.eval()(X[:3]))
    normal = torch.distributions.Normal(moments.mean, moments.variance.sqrt())
    torch.testing.assert_close(got, normal.log_prob(Y[:3]).sum(-1).detach())


class SoftmaxSparse(ApproximateGP):
    """Three latent functions under a softmax."""

    def __init__(self, Z):
        batch = torch.Size([3])
        q = CholeskyVariationalDistribution(len(Z), batch_shape=batch)
        inner = VariationalStrategy(self, Z, q)
        strategy = IndependentMultitaskVariationalStrategy(inner, num_tasks=3)
        super().__init__(strategy)
        self.covar_module = kernel()
        self.double()

    def forward(self, X):
        mean = X.new_zeros(*X.shape[:-1])
        return MultivariateNormal(mean, self.covar_module(X))


@quiet
def test_a_transform_that_is_not_affine_changes_variables():
    X, Y = data()
    raw = single(X[:10], Y[:10])
    logged = SingleTaskGP(
        X[:10],
        Y[:10].exp(),
        covar_module=kernel(),
        likelihood=likelihood(),
        mean_module=ZeroMean(),
        outcome_transform=Log(),
    )
    expected = held_out_log_density(raw, X[10:], Y[10:]) - Y[10:, 0]
    names = list(logged._modules)
    for mode in (True, False):
        logged.train(mode)
        found = held_out_log_density(logged, X[10:], Y[10:].exp())
        torch.testing.assert_close(found, expected)
        assert logged.training == logged.outcome_transform.training == mode
    assert list(logged._modules) == names
    chained = ChainedOutcomeTransform(log=Log(), scale=Standardize(m=1))
    options = {"noise": 0.1, "mean": "linear_model"}
    log_scaled = LinearizedGP(
        network(), X[:10], Y[:10].exp(), outcome_transform=chained, **options
    )
    scaled = LinearizedGP(
        network(), X[:10], Y[:10], outcome_transform=Standardize(m=1), **options
    )
    expected = held_out_log_density(scaled, X[10:], Y[10:]) - Y[10:, 0]
    found = held_out_log_density(log_scaled, X[10:], Y[10:].exp())
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="Log makes 1 of 4 targets .* the first .* -1"):
        Y = torch.cat([Y[10:13].exp(), -torch.ones(1, 1)])
        held_out_log_density(logged, X[10:], Y)


@quiet
def test_draws_for_a_likelihood_without_closed_form_are_seeded():
    X, Y = data()
    labels = torch.arange(N) % 3
    model, noise = SoftmaxSparse(X[:5]), SoftmaxLikelihood(3, 3, mixing_weights=False)
    model(X)  # places the inducing values
    for mode in (True, False):
        model.train(mode), noise.train(not mode)
        before = torch.get_rng_state()
        found = held_out_log_density(model, X, labels, noise)
        assert torch.equal(before, torch.get_rng_state())
        assert model.training == mode and noise.training != mode
        again = held_out_log_density(model, X, labels, noise)
        assert torch.equal(found, again)
    other = torch.Generator().manual_seed(1)
    other = held_out_log_density(model, X, labels, noise, generator=other)
    assert not torch.equal(other, found)
    latent = model.eval()(X)
    f = torch.randn(100_000, N, 3, generator=torch.Generator().manual_seed(2)).double()
    f = latent.mean + latent.variance.sqrt() * f
    exact = f.softmax(-1)[:, torch.arange(N), labels].mean(0).log().detach()
    # The standard deviation of a log mean of 256 probabilities near a third.
    torch.testing.assert_close(found, exact, rtol=0, atol=0.15)


@quiet
def test_the_likelihood_that_is_passed_goes_before_the_models_own():
    X, Y = data()
    model, wide = single(X, Y), likelihood()
    wide.noise = 1.0
    X = X + 0.01
    latent = model.eval()(X)
    normal = torch.distributions.Normal(latent.mean, (latent.variance + 1).sqrt())
    found = held_out_log_density(model, X, Y, wide)
    torch.testing.assert_close(found, normal.log_prob(Y[:, 0]).detach())
    with pytest.raises(ValueError, match="Sparse has no likelihood of its own"):
        held_out_log_density(Sparse(X[:5]), X, Y)


# -- bad input ------------------------------------------------------------------------


@quiet
def test_what_has_no_closed_form_is_refused():
    X, Y = data()
    sparse = Sparse(X[:4])
    for call in (leave_one_out, conditional_log_evidence):
        with pytest.raises(NotImplementedError, match="for a variational GP .Sparse"):
            call(sparse)
        with pytest.raises(NotImplementedError, match="SingleTaskVariationalGP"):
            call(SingleTaskVariationalGP(X, Y, inducing_points=X[:4]))
    points = InducingPointKernel(kernel(), X[:4], GaussianLikelihood())
    titsias = single(X, Y, covar_module=points)
    for call in (leave_one_out, conditional_log_evidence):
        what = f"{call.__name__} has no closed form for .* InducingPointKernel"
        with pytest.raises(NotImplementedError, match=what):
            call(titsias)
    with pytest.raises(NotImplementedError, match="has a SoftmaxLikelihood"):
        leave_one_out(build("softmax"))
    by_network = LinearizedGP(network(), X, Y, mean="network", noise=0.1)
    with pytest.raises(ValueError, match="the network's output has seen all points"):
        leave_one_out(by_network)


@quiet
def test_orders_that_do_not_fit_are_refused():
    X, Y = data()
    model = single(X, Y)
    for wrong in (-1, N, 0.5):
        with pytest.raises(ValueError, match=f"int from 0 to 13.*but is {wrong}"):
            conditional_log_evidence(model, wrong)
    with pytest.raises(ValueError, match="orders must be a whole number"):
        conditional_log_evidence(model, orders=0)
    with pytest.raises(ShapeError, match="orders must be ``orders x 14``"):
        conditional_log_evidence(model, orders=torch.arange(5)[None])
    with pytest.raises(ValueError, match="row 0 is not. Try torch.randperm"):
        conditional_log_evidence(model, orders=torch.zeros(1, N).long())


def test_the_users_network_and_the_models_mode_stay():
    X, Y = data()
    net = network().train()
    with assert_module_unchanged(net):
        model = LinearizedGP(net, X, Y, GaussianLikelihood().double())
        leave_one_out(model)
        conditional_log_evidence(model, 3)
        held_out_log_density(model, X, Y)
    exact = SingleTaskGP(X, Y)
    for mode in (True, False):
        exact.train(mode)
        leave_one_out(exact)
        assert exact.training == mode
