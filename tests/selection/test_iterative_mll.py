"""Gradients by linear solves are those of the evidence, and their fit ends near it."""

import copy
import math

import pytest
import torch
from gpytorch.constraints import Interval
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.priors import GammaPrior
from torch import nn

from gpbridge import SampledGP
from gpbridge.checks import NotConvergedWarning, ReliabilityWarning
from gpbridge.dnn import DivergedError
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.models import NetworkKernelGP
from gpbridge.selection import SubsetStart, fit_iterative
from gpbridge.selection.evidence_ascent import _surrogate
from gpbridge.solvers import Cholesky, ConjugateGradients
from tests import oracles_sampling as oracles


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(n, seed=1):
    return torch.rand(n, 2, dtype=torch.float64, generator=seeded(seed))


def targets(X, m=1):
    noise = torch.randn(len(X), m, dtype=torch.float64, generator=seeded(9))
    return torch.sin(5 * X.sum(-1, keepdim=True) + torch.arange(m).to(X)) + 0.1 * noise


def build(n=40, m=1, num_samples=64, **options):
    kernel = ScaleKernel(MaternKernel(1.5)).double()
    kernel.outputscale, kernel.base_kernel.lengthscale = 0.75, 0.5
    likelihood = GaussianLikelihood().double()
    likelihood.noise = 0.125
    # Each sample has frequencies of its own: few of them cost no bias.
    options = {"num_features": 16} | options
    options = {"covar_module": kernel, "likelihood": likelihood} | options
    X = points(n)
    model = SampledGP(X, targets(X, m), num_samples=num_samples, **options)
    nn.init.constant_(model.mean_module.raw_constant, 0.25)
    return model


def evidence(model, X, Y):
    """By the formulas of the textbook, differentiable in hyperparameters."""
    kernel = model.covar_module
    K = oracles.matern(X, X, kernel.base_kernel.lengthscale, 1.5, kernel.outputscale)
    mean = model.mean_module.constant
    return oracles.log_evidence(K, model.likelihood.noise, Y - mean)


def exact_gradients(model, X, Y):
    named = dict(model.named_parameters())
    value = evidence(model, X, Y)
    gradients = torch.autograd.grad(value, list(named.values()))
    return dict(zip(named, gradients, strict=True))


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("estimator", ["pathwise", "standard"])
def test_probes_that_have_their_law_exactly_give_the_gradient_exactly(estimator, m):
    X, model = points(40), build(m=m, compute_dtype=torch.float64)
    Y, n = targets(X, m), len(X)
    exact = exact_gradients(model, X, Y)
    H = oracles.matern(X, X, 0.5, 1.5, 0.75) + 0.125 * torch.eye(n).double()
    # The mean of z z' over these columns is the identity, or H.
    probes = n**0.5 * torch.eye(n).double()
    if estimator == "pathwise":
        probes = (torch.linalg.cholesky(H) @ probes).repeat(1, m)
    solutions = torch.linalg.solve(H, probes)
    right = solutions if estimator == "pathwise" else probes
    _, data = model.system(model.covar_module, model.mean_module)
    v = torch.linalg.solve(H, Y - 0.25)
    value = _surrogate(model, data, v, solutions, right)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(named.values()))
    for name, gradient in zip(named, found, strict=True):
        torch.testing.assert_close(gradient, exact[name], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("estimator", ["pathwise", "standard"])
def test_gradients_are_unbiased(estimator, m):
    X = points(40)
    exact = exact_gradients(build(m=m), X, targets(X, m))
    samples = {name: [] for name in exact}
    for seed in range(24):
        model = build(m=m, num_samples=64, generator=seeded(seed))
        fit = fit_iterative(
            model, estimator=estimator, steps=1, generator=seeded(seed + 1)
        )
        for name, values in fit.gradients.items():
            samples[name].append(values[0])
    for name, values in samples.items():
        values = torch.stack(values)
        error = (values.mean(0) - exact[name]).abs()
        # The mean function meets no probes: its gradient is exact.
        assert (error < 4 * values.std(0) / 24**0.5 + 1e-7).all(), name


def test_gradients_of_one_point():
    model = build(1)
    exact = exact_gradients(model, points(1), targets(points(1)))
    fit = fit_iterative(model, steps=1, num_probes=20000)
    for name, value in exact.items():
        assert (fit.gradients[name][0] - value).abs().max() < 0.02 * (1 + abs(value))


def test_pathwise_probes_are_solved_for_in_fewer_passes():
    solver = ConjugateGradients(tolerance=1e-3, preconditioner_rank=0)
    passes = {}
    for estimator in ("pathwise", "standard"):
        model = build(80, num_samples=16)
        model.likelihood.noise = 1e-3
        fit = fit_iterative(model, estimator=estimator, steps=1, solver=solver)
        assert all(fit.converged)
        passes[estimator] = fit.total_passes
    assert passes["pathwise"] < 0.9 * passes["standard"]


@pytest.fixture(scope="module")
def exact_fit():
    """The evidence before and after as many exact steps."""
    X, Y, exact = points(60), targets(points(60)), build(60)
    start = evidence(exact, X, Y).item()
    optimizer = torch.optim.Adam(exact.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (-evidence(exact, X, Y)).backward()
        optimizer.step()
    return start, evidence(exact, X, Y).item()


@pytest.mark.parametrize("estimator", ["pathwise", "standard"])
def test_the_fit_ends_near_the_optimum_of_the_evidence(estimator, exact_fit):
    X, Y, model = points(60), targets(points(60)), build(60)
    fit = fit_iterative(model, estimator=estimator, steps=60)
    start, best = exact_fit
    assert best - evidence(model, X, Y) < 0.02 * (best - start)
    lengthscales = fit.hyperparameters["covar_module.base_kernel.lengthscale"]
    assert len(lengthscales) == 61 and len(fit.passes) == len(fit.residuals) == 60
    torch.testing.assert_close(
        lengthscales[-1], model.covar_module.base_kernel.lengthscale
    )
    assert lengthscales[0] == 0.5


def test_warm_starts_and_fixed_probes_save_passes():
    solver = ConjugateGradients(tolerance=1e-2, preconditioner_rank=0)
    passes = {}
    for warm in (True, False):
        fit = fit_iterative(
            build(80), steps=15, learning_rate=0.005, solver=solver, warm_start=warm
        )
        passes[warm] = fit.passes
        assert all(fit.converged)
    assert passes[True][0] == passes[False][0]
    assert sum(passes[True][1:]) < 0.8 * sum(passes[False][1:])


def test_unfinished_solves_make_progress_over_the_steps():
    solver = ConjugateGradients(1e-8, max_iterations=12, preconditioner_rank=0)
    residuals = {}
    for warm in (True, False):
        with pytest.warns(NotConvergedWarning, match="solve of the last step ended at"):
            fit = fit_iterative(
                build(80), steps=15, learning_rate=0.005, solver=solver, warm_start=warm
            )
        residuals[warm] = fit.residuals
    assert residuals[True][0] == residuals[False][0]
    assert residuals[True][-1] < 0.3 * residuals[False][-1]


def test_the_last_solution_is_where_the_posterior_starts():
    model = build(60)
    fit_iterative(model, steps=10, learning_rate=0.01)
    calls = []

    def solve(operator, rhs, initial=None):
        calls.append((initial is not None, (operator @ initial - rhs).norm()))
        return Cholesky()(operator, rhs)

    model.solver = solve
    model.posterior(points(1))
    warm, residual = calls[0]
    assert warm and residual < 0.05 * 64**0.5 * 60**0.5
    other = build(60)
    fit_iterative(other, steps=1, num_probes=7)
    assert other._initial is None


def test_hyperparameters_stay_within_their_constraints_and_see_their_priors():
    kernel = ScaleKernel(
        MaternKernel(1.5, lengthscale_constraint=Interval(0.4, 0.6))
    ).double()
    kernel.base_kernel.lengthscale = 0.5
    model = build(covar_module=kernel)
    fit_iterative(model, steps=30, learning_rate=0.5)
    assert 0.4 < kernel.base_kernel.lengthscale < 0.6
    plain, prior = build(), build()
    prior.covar_module.register_prior(
        "outputscale_prior", GammaPrior(2.0, 0.15), "outputscale"
    )
    prior.double()
    name = "covar_module.raw_outputscale"
    gradients = [fit_iterative(m, steps=1).gradients[name][0] for m in (plain, prior)]
    raw = build().covar_module.raw_outputscale.detach().requires_grad_()
    log_prior = GammaPrior(2.0, 0.15).double().log_prob(nn.functional.softplus(raw))
    (expected,) = torch.autograd.grad(log_prior, raw)
    torch.testing.assert_close(gradients[1] - gradients[0], expected)


def test_a_subset_start_finds_the_lengthscale_of_the_whole():
    X = points(400)
    model = build(400)
    start = SubsetStart(size=80, repeats=2, steps=40)
    fit = fit_iterative(model, steps=1, subset_start=start, num_probes=4)
    first = fit.hyperparameters["covar_module.base_kernel.lengthscale"][0]
    assert first != 0.5
    values = [evidence(m, X, targets(X)) for m in (build(400), model)]
    assert values[1] > values[0]
    again = fit_iterative(build(400), steps=1, subset_start=start, num_probes=4)
    assert (
        again.hyperparameters["likelihood.noise_covar.noise"][0]
        == (fit.hyperparameters["likelihood.noise_covar.noise"][0])
    )


def test_networks_and_frozen_parameters():
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    kernel = NeuralTangentKernel(net).double()
    weights = copy.deepcopy(net.state_dict())
    model = build(covar_module=kernel, num_samples=4000)
    model.mean_module.raw_constant.requires_grad_(False)
    X, Y = points(40), targets(points(40))
    dense = NetworkKernelGP(X, Y, covar_module=copy.deepcopy(kernel))
    K = dense.covar_module(X).to_dense()
    value = oracles.log_evidence(K, 0.125, Y - 0.25)
    (exact,) = torch.autograd.grad(value, dense.covar_module.raw_prior_variance)
    fit = fit_iterative(model, steps=1)
    (found,) = fit.gradients["covar_module.raw_prior_variance"]
    # K is proportional to its variance: a probe's variance is that of u'K u / 2.
    K = K.detach()
    H = K + 0.125 * torch.eye(40).double()
    A, v = torch.linalg.solve(H, K), torch.linalg.solve(H, Y - 0.25)
    in_logs = 0.5 * ((v * (K @ v)).sum() - A.trace())
    spread = 0.5 * (2 * (A @ A).trace() / 4000) ** 0.5 * (exact / in_logs).abs()
    assert (found - exact).abs() < 4 * spread
    assert set(fit.gradients) == {
        "covar_module.raw_prior_variance",
        "likelihood.noise_covar.raw_noise",
    }
    assert all(
        torch.equal(value, net.state_dict()[name]) for name, value in weights.items()
    )


def test_callbacks_see_each_solution_and_float32_models_are_fitted_in_float64():
    seen = []
    X = points(20).float()
    model = SampledGP(X, targets(X.double()).float(), RBFKernel(), num_samples=4)
    fit = fit_iterative(
        model, steps=2, callback=lambda step, s: seen.append((step, s.value.dtype))
    )
    assert seen == [(0, torch.float64), (1, torch.float64)]
    assert model.covar_module.raw_lengthscale.dtype == torch.float32
    assert fit.total_passes == 2.0 and math.isfinite(fit.residuals[0])
    assert "2 steps, 2 passes" in repr(fit)


class TestRefusals:
    def test_other_models(self):
        model = NetworkKernelGP(points(9), targets(points(9)))
        with pytest.raises(TypeError, match="but model is NetworkKernelGP. Build one"):
            fit_iterative(model)

    def test_options(self):
        with pytest.raises(ValueError, match="estimator must be one of 'pathwise', 's"):
            fit_iterative(build(), estimator="exact")
        with pytest.raises(ValueError, match="steps must be a whole number above zero"):
            fit_iterative(build(), steps=0)
        with pytest.raises(ValueError, match="size must be positive"):
            SubsetStart(size=0)

    def test_nothing_to_learn(self):
        model = build()
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="No parameter of the model requires a gr"):
            fit_iterative(model)

    def test_fantasies(self):
        X = points(6).reshape(3, 2, 2)
        model = build().condition_on_observations(X, X.sum(-1, keepdim=True))
        with pytest.raises(ValueError, match="Fit the model that they were added to"):
            fit_iterative(model)


@pytest.mark.parametrize("estimator", ["pathwise", "standard"])
def test_an_interrupted_run_resumes_to_the_same_numbers(tmp_path, estimator):
    options = {"estimator": estimator, "solver": ConjugateGradients(1e-2)}
    whole, parts = build(40, num_samples=4), build(40, num_samples=4)
    expected = fit_iterative(whole, steps=6, **options)

    class Interruption(Exception):
        pass

    def interrupt(step, solution):
        if step == 3:
            raise Interruption

    path = tmp_path / "fit.state"
    with pytest.raises(Interruption):
        fit_iterative(parts, steps=6, callback=interrupt, checkpoint=path, **options)
    calls = []
    found = fit_iterative(
        parts,
        steps=6,
        checkpoint=path,
        callback=lambda step, solution: calls.append(step),
        **options,
    )
    assert calls == [3, 4, 5]
    assert found.passes == expected.passes and found.residuals == expected.residuals
    for name, values in expected.hyperparameters.items():
        assert torch.equal(
            torch.stack(values), torch.stack(found.hyperparameters[name])
        )
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    # A finished run is only read; more steps prolong it.
    again = fit_iterative(parts, steps=6, checkpoint=path, **options)
    assert len(again.passes) == 6
    assert len(fit_iterative(parts, steps=8, checkpoint=path, **options).passes) == 8


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "fit.state"
    fit_iterative(build(20), steps=1, checkpoint=path)
    with pytest.raises(ValueError, match="its learning_rate is 0.1, and now 0.2"):
        fit_iterative(build(20), steps=2, checkpoint=path, learning_rate=0.2)
    with pytest.raises(ValueError, match=r"MaternKernel .*'nu': 1.5.*and now.*RBF"):
        other = build(20, covar_module=ScaleKernel(RBFKernel()).double())
        fit_iterative(other, steps=2, checkpoint=path)
    with pytest.raises(ValueError, match=r"num_features=.*and now.*num_features=64"):
        fit_iterative(build(20, num_features=64), steps=2, checkpoint=path)
    with pytest.raises(ValueError, match=r"its data is \(20, .*, and now \(21, "):
        fit_iterative(build(21), steps=2, checkpoint=path)


def test_gradients_are_those_of_float64_where_the_noise_is_low():
    found = []
    for dtype in (None, torch.float64):
        model = build(400, num_samples=8, compute_dtype=dtype)
        model.likelihood.noise = 1.5e-4
        fit = fit_iterative(model, steps=1, solver=Cholesky(1e-3))
        found.append(fit.gradients)
    for name, (value,) in found[0].items():
        torch.testing.assert_close(value, found[1][name][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rate", [1e3, 1e306])
def test_a_learning_rate_that_is_far_too_large_stops_at_the_last_good_state(rate):
    model = build(20)
    before = [p.detach().clone() for p in model.parameters()]
    message = r"extreme, and (one is|draws).*\.last_good.*Lower learning_rate, which is"
    with pytest.raises(DivergedError, match=message) as caught:
        fit_iterative(model, steps=5, learning_rate=rate)
    record = caught.value.last_good
    assert len(record.passes) >= 1 and all(
        bool(v.isfinite().all())
        for values in record.hyperparameters.values()
        for v in values
    )
    parameters = list(model.parameters())
    assert all(bool(p.isfinite().all()) for p in parameters)
    if len(record.passes) == 1:  # nothing better than the start
        assert all(map(torch.equal, parameters, before))
    assert bool(model.posterior(model.train_inputs[0][:2]).mean.isfinite().all())


def test_a_hyperparameter_that_ends_all_but_zero_is_named():
    model = build(20)
    with torch.no_grad():
        model.covar_module.base_kernel.raw_lengthscale.fill_(-60.0)
    with pytest.warns(ReliabilityWarning, match=r"ended at .*lengthscale = .*e-27, "):
        fit_iterative(model, steps=1, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"subset_start": 100}, TypeError, r"must be a SubsetStart\(...\), but is 100"),
        ({"steps": 2.5}, ValueError, "steps must be a whole number above zero"),
        ({"checkpoint": "/no/such/folder/f"}, FileNotFoundError, "does not exist"),
    ],
)
def test_options_of_another_kind(options, error, message):
    with pytest.raises(error, match=message):
        fit_iterative(build(20), **({"steps": 1} | options))


def test_subsets_are_local_beside_a_constant_column():
    X = torch.cat([points(300), torch.full((300, 1), 10.0).double()], -1)
    seen = []

    class Watching(RBFKernel):
        def forward(self, x1, x2, **params):
            seen.append(x1[:, :2])
            return super().forward(x1, x2, **params)

    model = SampledGP(X, targets(X[:, :2]), Watching().double(), num_samples=2)
    model.covar_module = Watching().double()
    del seen[:]
    fit_iterative(
        model,
        steps=1,
        subset_start=SubsetStart(20, repeats=1, steps=1),
    )
    subset = next(x for x in seen if len(x) == 20)
    assert subset.std(0).max() < 0.15  # of all points: 0.29
