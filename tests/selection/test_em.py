"""Sample-based EM: fixed points of the exact evidence, resuming, refusals."""

import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.likelihoods import MultitaskGaussianLikelihood
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.linearized import Sampled
from gpbridge.selection import SampleBasedEM, fit_evidence
from gpbridge.solvers import ConjugateGradients
from tests import oracles as dense
from tests.linearized.problems import (
    PRIOR_VARIANCE,
    both_spaces,
    build,
    inputs,
    network,
    targets,
)
from tests.linearized.test_sampling import with_the_exact_law

TIGHT = ConjugateGradients(tolerance=1e-10, preconditioner_rank=0)


def sampled(name, **options):
    return build(name, inference=Sampled(solver=TIGHT), **options)


def slopes(model):
    """Derivatives of the exact evidence in the logs of its hyperparameters."""
    value = model.log_evidence()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(value, parameters)


@pytest.mark.parametrize(
    "name",
    [
        "gaussian",
        pytest.param("multitask", marks=pytest.mark.slow),
        "logistic",
        "softmax",
    ],
)
def test_a_fixed_point_is_a_stationary_point_of_the_exact_evidence(name):
    """MacKay (1992), section 4.2."""
    X = inputs(24, seed=2)
    Y = targets(name, X)
    model = with_the_exact_law(sampled(name, X=X, Y=Y))
    before = slopes(build(name, X=X, Y=Y))
    SampleBasedEM(model).run(200, 1e-6, progress=False)
    exact = build(name, X=X, Y=Y)
    exact.prior_variance = model.prior_variance.detach()
    exact.likelihood.load_state_dict(model.likelihood.state_dict())
    after = slopes(exact)
    for start, end in zip(before, after, strict=True):
        assert end.abs().max() < 1e-3 * start.abs().max().clamp_min(1.0)


def test_draws_reach_the_optimum_of_the_exact_search():
    X = inputs(60, seed=2)
    Y = targets("gaussian", X)
    exact = build("gaussian", X=X, Y=Y)
    best = fit_evidence(exact, warn=False)
    model = build("gaussian", X=X, Y=Y, inference=Sampled(200, TIGHT))
    history = SampleBasedEM(model).run(50, 1e-3, progress=False)
    exact.prior_variance = model.prior_variance.detach()
    exact.likelihood.noise = model.likelihood.noise.detach()
    assert float((best.value - exact.log_evidence()).detach()) < 0.1
    got = history[-1].effective_dimension[0]
    expected = float(exact.evidence().effective_dimension)
    assert abs(got - expected) < 4 * history[-1].std_error[0] + 0.05 * expected
    assert "sample-based EM" in repr(model)


def test_the_effective_dimension_is_that_of_the_weights():
    model = with_the_exact_law(sampled("softmax"))
    em = SampleBasedEM(model)
    draws = model.problem.draws(model.prior_variance.detach())
    in_outputs = float(em._squares_seen(draws).sum(0).mean())
    p = model.problem.num_params
    in_weights = p - float(draws.omega.square().sum(0).mean())
    assert in_outputs == pytest.approx(in_weights, rel=1e-6)
    net, X = network(3), inputs()
    J, root = dense.jacobian(net, X), dense.softmax_root(net(X).detach())
    M = PRIOR_VARIANCE * dense.ggn(J, root)
    exact = torch.linalg.solve(M + torch.eye(p).double(), M).trace().item()
    assert in_outputs == pytest.approx(exact, rel=1e-6)


def test_few_draws_know_the_effective_dimension_as_well_as_stated():
    model = build("softmax", inference=Sampled(500, TIGHT))
    em = SampleBasedEM(model)
    draws = model.problem.draws(torch.tensor([PRIOR_VARIANCE]).double())
    in_outputs = em._squares_seen(draws).sum(0)
    em.step()
    (gamma,), (error,) = em.history[0].effective_dimension, em.history[0].std_error
    exact = float(build("softmax").evidence().effective_dimension.detach())
    bound = (2 * exact / 500) ** 0.5
    assert abs(gamma - exact) < 4 * bound
    # A sum of squares with weights below one scatters by less than sqrt(2 gamma).
    assert 0.3 * bound < error < 1.1 * bound
    assert in_outputs.std() / 500**0.5 == pytest.approx(error, rel=1e-6)
    assert in_outputs.std() < draws.omega.square().sum(0).std()  # as in weights


def test_the_effective_dimension_is_unbiased_where_it_is_near_its_limit():
    X = inputs(3, seed=2)
    options = {"X": X, "Y": targets("gaussian", X)}
    model = build("gaussian", inference=Sampled(500, TIGHT), **options)
    exact = build("gaussian", **options)
    model.prior_variance = exact.prior_variance = 10.0
    em = SampleBasedEM(model)
    em.step()
    expected = float(exact.evidence().effective_dimension.detach())
    assert expected > 2.5
    got = em.history[0].effective_dimension[0]
    assert abs(got - expected) < 4 * (2 * expected / 500) ** 0.5


def test_groups_share_what_their_weights_determined():
    X = inputs(40, seed=2)
    Y = targets("gaussian", X)
    model = with_the_exact_law(sampled("gaussian", X=X, Y=Y, groups="layer"))
    before = model.prior_variance.detach().clone()
    history = SampleBasedEM(model).run(5, 1e-6, progress=False)
    assert len(history[-1].effective_dimension) == len(before) == 2
    total = sum(history[0].effective_dimension)
    exact = build("gaussian", X=X, Y=Y, groups="layer")
    exact.prior_variance = before
    assert total == pytest.approx(
        float(exact.evidence().effective_dimension.detach()), rel=1e-6
    )


@both_spaces
@pytest.mark.parametrize("name", ["softmax", "multitask"])
def test_an_interrupted_run_resumes_to_the_same_numbers(name, space):
    # So loose that where a solve starts shows in what it ends at.
    loose = ConjugateGradients(tolerance=0.05, preconditioner_rank=0)

    def make():
        return build(name, inference=Sampled(6, loose, space=space))

    whole = make()
    SampleBasedEM(whole).run(4, 1e-9, progress=False)
    first = SampleBasedEM(make())
    first.run(2, 1e-9, progress=False)
    model = make()
    second = SampleBasedEM(model)
    second.load_state_dict(first.state_dict())
    history = second.run(2, 1e-9, progress=False)
    assert len(history) == 4
    exact = {"rtol": 1e-10, "atol": 0}
    torch.testing.assert_close(model.prior_variance, whole.prior_variance, **exact)
    if name == "multitask":
        torch.testing.assert_close(model.noise_variance, whole.noise_variance, **exact)


def test_a_state_is_plain_enough_to_be_loaded_without_running_code(tmp_path):
    em = SampleBasedEM(build("gaussian", inference=Sampled(3, TIGHT)))
    em.run(1, progress=False)
    torch.save(em.state_dict(), tmp_path / "em.pt")
    state = torch.load(tmp_path / "em.pt", weights_only=True)
    other = SampleBasedEM(build("gaussian", inference=Sampled(3, TIGHT)))
    other.load_state_dict(state)
    assert other.history == em.history


def test_hyperparameters_stay_inside_their_bounds():
    X = inputs(20, seed=2)
    Y = torch.zeros(20, 1, dtype=torch.float64)  # no signal: the variance wants to 0
    model = sampled("gaussian", X=X, Y=Y, offset=False)
    SampleBasedEM(model).run(30, 1e-9, progress=False)
    bounds = model.covar_module.raw_prior_variance_constraint
    assert bool((model.prior_variance >= bounds.lower_bound).all())
    assert bool(model.prior_variance.isfinite().all())
    assert float(model.likelihood.noise.detach()) > 0


def test_each_output_has_the_noise_that_it_was_given():
    X = inputs(400, seed=2)
    std = torch.tensor([0.05, 0.4], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = std * torch.randn(400, 2, generator=generator, dtype=torch.float64)
    waves = torch.cat([X.sum(-1, keepdim=True).cos(), X.prod(-1, keepdim=True)], -1)
    model = build("multitask", X=X, Y=waves + noise, inference=Sampled(50))
    history = SampleBasedEM(model).run(30, 0.02, progress=False)
    assert len(history[-1].noise_variance) == 2
    got = model.likelihood.task_noises.detach()
    assert (got / std.square() - 1).abs().max() < 4 * (2 / 400) ** 0.5
    torch.testing.assert_close(model.noise_variance, got)


def test_noise_in_common_is_learnt_alone():
    likelihood = MultitaskGaussianLikelihood(2, rank=0, has_task_noise=False).double()
    X = inputs(24, seed=2)
    Y = targets("multitask", X)
    model = sampled("multitask", X=X, Y=Y, likelihood=likelihood)
    SampleBasedEM(with_the_exact_law(model)).run(200, 1e-6, progress=False)
    exact = build("multitask", X=X, Y=Y, likelihood=likelihood)
    exact.prior_variance = model.prior_variance.detach()
    assert max(slope.abs().max() for slope in slopes(exact)) < 1e-3


@pytest.mark.parametrize("name", ["multitask_common", "multitask_rank_1"])
def test_noise_that_no_step_moves_is_announced(name):
    model = sampled(name)
    before = model.noise_variance
    with pytest.warns(UserWarning, match="SampleBasedEM leaves .*raw_noise"):
        em = SampleBasedEM(model)
    em.run(2, progress=False)
    assert em.history[0].noise_variance is None
    torch.testing.assert_close(model.noise_variance, before)


@pytest.mark.parametrize("name", ["gaussian", "multitask", "fixed_noise"])
def test_noise_that_was_fixed_stays_without_a_word(name):
    options = {} if name == "fixed_noise" else {"noise": 0.03}
    model = sampled(name, **options)
    before = model.noise_variance
    SampleBasedEM(model).run(2, progress=False)
    assert torch.equal(model.noise_variance, before)


def test_noise_around_the_network_is_not_learnt():
    model = sampled("gaussian", mean="network", noise=0.03)
    SampleBasedEM(model).step()
    model.likelihood.noise_covar.raw_noise.requires_grad_(True)
    with pytest.raises(ValueError, match="mean='network' cannot learn its noise"):
        SampleBasedEM(model)


def test_other_models_are_refused_with_what_serves_them():
    X = inputs()
    with pytest.raises(TypeError, match="needs a gpbridge.LinearizedGP"):
        SampleBasedEM(SingleTaskGP(X, targets("gaussian", X)))
    with pytest.raises(TypeError, match=r"has Exact\. Call fit_evidence"):
        SampleBasedEM(build("gaussian"))


def test_a_loose_solver_ends_at_the_same_hyperparameters():
    # The data say much about few directions: to the right-hand side, the rest is small.
    torch.manual_seed(0)
    X = inputs(80, seed=3)
    Y = torch.sin(2 * X.sum(-1, keepdim=True)) + 0.1 * torch.randn(80, 1).double()
    network = nn.Sequential(nn.Linear(X.shape[-1], 12), nn.Tanh(), nn.Linear(12, 1))
    found = []
    for tolerance in (1e-2, 1e-7):
        solver = ConjugateGradients(tolerance, preconditioner_rank=0)
        model = LinearizedGP(
            network.double(),
            X,
            Y,
            inference=Sampled(64, solver),
        )
        model.likelihood.noise = 0.01
        SampleBasedEM(model).run(12, tolerance=1e-3, progress=False)
        found.append(model.prior_variance.item())
    assert found[0] == pytest.approx(found[1], rel=0.03)


def test_a_state_of_something_else():
    em = SampleBasedEM(sampled("gaussian"))
    with pytest.raises(ValueError, match="state lacks .*prior_variance"):
        em.load_state_dict({"a": 1})
