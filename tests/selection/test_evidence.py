"""Learning hyperparameters by evidence: the optimum, its bounds, its safety net."""

import math

import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior, NormalPrior

from gpbridge import Exact, FitResult, LinearizedGP
from gpbridge.metrics import gaussian_nll
from gpbridge.selection import fit_evidence, log_evidence
from gpbridge.testing import assert_module_unchanged
from tests import oracles_linearized as oracles
from tests.linearized.problems import (
    PROBLEMS,
    both_spaces,
    build,
    inputs,
    network,
    point_noise,
    targets,
)

N = 40


def easy(name, n=N):
    """Data that the tangent model explains, so that the optimum is an interior one."""
    X, m = inputs(n), PROBLEMS[name].m
    generator = torch.Generator().manual_seed(4)
    waves = torch.sin(3 * X.sum(-1, keepdim=True) + torch.arange(m))
    values = waves + 0.1 * torch.randn(n, m, generator=generator).double()
    if PROBLEMS[name].gaussian:
        return X, values
    return X, values.argmax(-1) if m > 1 else (values > 0).double()


def ready(name, space="auto", **options):
    X, Y = easy(name)
    if name == "fixed_noise":
        options["likelihood"] = FixedNoiseGaussianLikelihood(point_noise(N))
    return build(name, space, X, Y, **options)


@pytest.mark.filterwarnings("ignore:BernoulliLikelihood is the probit link")
@pytest.mark.parametrize(
    "name, space",
    [(name, "function") for name in PROBLEMS]
    + [(name, "weight") for name in ("gaussian", "multitask", "softmax")],
)
def test_the_value_is_the_models_and_no_neighbour_is_better(name, space):
    model = ready(name, space)
    before = model.log_evidence().item()
    found = fit_evidence(model, warn=False)
    # Under labels up to how well the optimum of the weights was iterated.
    assert model.log_evidence().item() == pytest.approx(found.value.item(), rel=1e-9)
    assert found.value.item() > before
    assert "fitted by evidence" in repr(model)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        for i in range(parameter.numel()):
            for step in (-0.2, 0.2):
                with torch.no_grad():
                    parameter.view(-1)[i] += step
                    assert model.log_evidence() < found.value + 1e-6
                    parameter.view(-1)[i] -= step


@both_spaces
def test_no_point_of_a_grid_is_better(space):
    # The surface has a basin where all is noise and one where all is signal.
    X, Y = easy("gaussian")
    train = oracles.tangent(network(), X)
    for targets_ in (Y, 1e3 * targets("gaussian", X)):
        model = LinearizedGP(network(), X, targets_, inference=Exact(space=space))
        found = fit_evidence(model, warn=False).value.item()
        power = float(targets_.var())
        for s in torch.logspace(-6, 3, 10).double() * power:
            for v in torch.logspace(-6, 1, 8).double() * power:
                noise = v * torch.eye(N).double()
                value = oracles.gaussian_log_evidence(train, s, noise, targets_)
                assert value < found + 1e-3


@both_spaces
def test_the_start_does_not_decide(space):
    values = []
    for prior_variance, noise in ((1e-3, 1.0), (100.0, 1e-3), (1.0, 0.1)):
        model = ready("gaussian", space)
        model.prior_variance = prior_variance
        model.likelihood.noise = torch.tensor([noise]).double()
        values.append(fit_evidence(model, warn=False).value.item())
    assert max(values) - min(values) < 1e-5


@pytest.mark.parametrize("groups", ["all", "layer"])
def test_a_prior_on_the_noise_counts(groups):
    # Far from what the data say, on either side, by the fast search and the other.
    X, Y = easy("gaussian")
    free = LinearizedGP(network(), X, Y, GaussianLikelihood().double(), groups=groups)
    fit_evidence(free, warn=False)
    for shift in (-0.5, 1.0):
        center = float(free.noise_variance.log()) + shift
        prior = LogNormalPrior(center, 0.02)
        likelihood = GaussianLikelihood(noise_prior=prior).double()
        model = LinearizedGP(network(), X, Y, likelihood, groups=groups)
        found = fit_evidence(model, warn=False)
        assert float(model.noise_variance.log()) == pytest.approx(center, abs=0.3)
        assert found.value.item() == pytest.approx(model.log_evidence().item())
        best = found.value + prior.log_prob(model.noise_variance)
        for parameter in model.parameters():
            for step in (-0.1, 0.1) if parameter.requires_grad else ():
                with torch.no_grad():
                    parameter.add_(step)
                    value = model.log_evidence()
                    value = value + prior.log_prob(model.noise_variance)
                    parameter.sub_(step)
                assert value < best + 1e-5


def test_a_prior_on_the_logarithm_of_the_noise_is_one_on_the_logarithm():
    X, Y = easy("gaussian")
    model = LinearizedGP(network(), X, Y, GaussianLikelihood().double())
    fit_evidence(model, warn=False)
    center = float(model.noise_variance.log()) - 0.5
    prior = NormalPrior(center, 0.05)
    noise = model.likelihood.noise_covar
    noise.register_prior("log_noise_prior", prior, lambda m: m.noise.log())
    before = noise.raw_noise.detach().clone()
    found = fit_evidence(model, warn=False).value
    assert not torch.equal(noise.raw_noise, before)
    best = found + prior.log_prob(model.noise_variance.log()).sum()
    for shift in (-0.05, -0.01, 0.01, 0.05):
        with torch.no_grad():
            noise.raw_noise += shift
            value = model.log_evidence()
            value = value + prior.log_prob(model.noise_variance.log()).sum()
            noise.raw_noise -= shift
        assert value < best + 1e-4


@pytest.mark.parametrize(
    "name, space",
    [
        ("gaussian", "function"),
        ("gaussian", "weight"),
        ("multitask", "weight"),
        ("softmax", "function"),
    ],
)
def test_several_groups_explain_at_least_as_much_as_one(name, space):
    one = fit_evidence(ready(name, space), warn=False).value
    with_groups = ready(name, space, groups="layer")
    several = fit_evidence(with_groups, warn=False).value
    assert several > one - 1e-3
    again = with_groups.log_evidence().item()
    assert several.item() == pytest.approx(again, rel=1e-9)


@both_spaces
def test_layers_found_by_gradient_beat_a_grid(space):
    X, Y = easy("gaussian")
    model = ready("gaussian", space, groups="layer")
    found = fit_evidence(model, warn=False).value.item()
    train = oracles.tangent(network(), X)
    noise = model.noise_variance * torch.eye(N).double()
    for a in torch.logspace(-4, 2, 7).double():
        for b in torch.logspace(-4, 2, 7).double():
            variance = torch.cat([a.expand(18), b.expand(7)])
            value = oracles.gaussian_log_evidence(train, variance, noise, Y)
            assert value < found + 1e-4


def test_noise_stops_at_the_likelihoods_own_floor():
    X = inputs(10)
    Y = network()(X).detach()  # the network passes through all its targets
    model = LinearizedGP(network(), X, Y)
    found = fit_evidence(model, warn=False)
    floor = 1e-7 * Y.var(correction=0).item()
    assert model.noise_variance.item() == pytest.approx(floor, rel=1e-2)
    assert found.value.item() == model.log_evidence().item()
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-2)).double()
    model = LinearizedGP(network(), X, Y, likelihood)
    found = fit_evidence(model, warn=False)
    assert model.noise_variance.item() == pytest.approx(1e-2, rel=1e-2)
    assert model.likelihood is likelihood
    assert found.value.item() == model.log_evidence().item()


@both_spaces
def test_what_is_fixed_stays(space):
    X, Y = easy("gaussian")
    options = {"inference": Exact(space=space)}
    model = LinearizedGP(network(), X, Y, noise=0.2, **options)
    fit_evidence(model, warn=False)
    assert model.noise_variance.item() == pytest.approx(0.2, rel=1e-6)
    assert model.prior_variance.item() != 1.0
    model = LinearizedGP(network(), X, Y, **options)
    model.covar_module.raw_prior_variance.requires_grad_(False)
    fit_evidence(model, warn=False)
    assert model.prior_variance.item() == 1.0
    free = LinearizedGP(network(), X, Y, **options)
    assert fit_evidence(free, warn=False).value > model.log_evidence()
    labels = ready("softmax", space)
    labels.covar_module.raw_prior_variance.requires_grad_(False)
    fit_evidence(labels)
    assert labels.prior_variance.item() == pytest.approx(0.4)


def test_rescaling_the_targets_rescales_the_optimum():
    X, Y = easy("gaussian")
    # Without offset the model is linear in its targets.
    one, big = (LinearizedGP(network(), X, c * Y, offset=False) for c in (1.0, 100.0))
    first, second = (fit_evidence(m, warn=False).value.item() for m in (one, big))
    assert second == pytest.approx(first - N * math.log(100.0), abs=1e-3)
    ratio = big.prior_variance.item() / one.prior_variance.item()
    assert ratio == pytest.approx(1e4, rel=1e-2)


# -- select="validation" --------------------------------------------------------------


def fit_result(net, X, Y, rows=8, spoil=0.0):
    fit, held_out = torch.arange(rows, len(X)), torch.arange(rows)
    with torch.no_grad():
        misfit = (Y - net(X)).square()
    return FitResult(
        net,
        fit,
        held_out,
        misfit[fit].mean(0) + spoil,
        misfit[held_out].mean(0),
        1e-4,
    )


def by_hand(net, X, Y, mean, result, space):
    """Fitted on the fit rows, scored on the validation rows."""
    fit, held_out = result.fit_rows, result.validation_rows
    noise = "learn" if mean == "linear_model" else float(result.residual_variance)
    model = LinearizedGP(
        net, X[fit], Y[fit], mean=mean, noise=noise, inference=Exact(space=space)
    )
    fit_evidence(model, warn=False)
    law = model.predict(X[held_out])
    return float(gaussian_nll(law.mean, law.variance, Y[held_out]))


@both_spaces
@pytest.mark.parametrize("good_network", [True, False])
def test_validation_rows_decide_between_linear_model_and_network(good_network, space):
    X, net = inputs(N), network()
    with torch.no_grad():
        Y = net(X)
    generator = torch.Generator().manual_seed(1)
    if good_network:
        Y = Y + 0.3 * torch.randn(Y.shape, generator=generator).double()
    else:
        Y = Y + torch.sin(3 * X[:, :1])
    result = fit_result(net, X, Y, rows=28)
    model = LinearizedGP.from_fit(result, X, Y, inference=Exact(space=space))
    assert model.select == "validation"
    found = fit_evidence(model, warn=False)
    assert model.mean == ("network" if good_network else "linear_model")
    for mean, nll in model.validation_nll.items():
        expected = by_hand(net, X, Y, mean, result, space)
        assert nll == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert found.value.item() == model.log_evidence().item()
    assert len(model.train_targets) == N  # conditioned on all rows
    if good_network:
        torch.testing.assert_close(model.posterior(X).mean, net(X).detach())
        assert model.noise_variance.item() == pytest.approx(
            float(result.residual_variance), rel=1e-6
        )


def test_selection_needs_validation_rows():
    X, Y = easy("gaussian")
    result = fit_result(network(), X, Y, rows=0)
    with pytest.raises(ValueError, match="needs validation rows, but the fit result"):
        LinearizedGP.from_fit(result, X, Y, select="validation")
    model = LinearizedGP.from_fit(fit_result(network(), X, Y), X, Y, select=None)
    assert model.select is None and model.mean == "linear_model"


def test_a_fit_result_of_other_data_is_refused():
    X, Y = easy("gaussian")
    result = fit_result(network(), X, Y)
    with pytest.raises(ValueError, match="names row 39, but train_X has 30 rows"):
        LinearizedGP.from_fit(result, X[:30], Y[:30])


# -- log_evidence of any GP -----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Data .outcome observations. is not standardized")
@pytest.mark.parametrize("m", [1, 2])
def test_of_an_exact_gp_it_is_the_marginal_likelihood_in_total(m):
    X, Y = inputs(30), targets("multitask", inputs(30))[:, :m]
    model = SingleTaskGP(
        X,
        Y,
        covar_module=ScaleKernel(
            MaternKernel(batch_shape=torch.Size([m] * (m > 1))),
            batch_shape=torch.Size([m] * (m > 1)),
        ),
        likelihood=GaussianLikelihood(batch_shape=torch.Size([m] * (m > 1))).double(),
        outcome_transform=None,
    )
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    model.train()
    expected = 30 * mll(model(*model.train_inputs), model.train_targets)
    model.eval()
    got = log_evidence(model)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0.0)
    assert not model.training
    raw = model.likelihood.noise_covar.raw_noise
    slopes = [torch.autograd.grad(v.sum(), raw)[0] for v in (got, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=0.0)


def test_of_a_linearized_gp_it_is_its_own():
    model = build("gaussian")
    assert log_evidence(model).item() == model.log_evidence().item()


# -- refusals and isolation -----------------------------------------------------------


def test_beyond_the_memory_budget_the_fit_is_refused():
    model = build("gaussian", inference=Exact(memory_budget=4000))
    with pytest.raises(MemoryError, match="Learning hyperparameters .* needs about"):
        fit_evidence(model)
    model.posterior(inputs(3))  # conjugate gradients serve


@pytest.mark.parametrize("name", ["gaussian", "multitask", "probit", "softmax"])
def test_the_users_network_is_not_changed(name):
    net = network(PROBLEMS[name].m).train()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    with assert_module_unchanged(net):
        fit_evidence(build(name, net=net), warn=False)
        with pytest.raises(MemoryError):
            fit_evidence(build(name, net=net, inference=Exact(memory_budget=100)))


def test_the_global_random_state_is_left_alone():
    models = [build(name) for name in ("gaussian", "multitask", "softmax")]
    before = torch.get_rng_state()
    for model in models:
        fit_evidence(model, warn=False)
    assert torch.equal(before, torch.get_rng_state())
