"""Kronecker, diagonal and low-rank posteriors against dense matrices."""

import pytest
import torch
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    MultitaskGaussianLikelihood,
)
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.linearized import Diagonal, Exact, Kronecker, LowRank
from gpbridge.linearized.curvature_sums import kronecker_sums
from gpbridge.linearized.low_rank import lanczos_eigenpairs
from gpbridge.linearized.predictive import probabilities
from gpbridge.linearized.structured_problem import StructuredProblem
from gpbridge.linearized.weight_blocks import BlockJacobian
from gpbridge.selection import fit_evidence
from gpbridge.testing import assert_module_unchanged
from tests import oracles_curvature as oracles
from tests.cases import every_net

EXACT = {"rtol": 1e-8, "atol": 1e-10}
NOISE = torch.tensor(0.05, dtype=torch.float64)
STRUCTURES = {
    "kronecker": Kronecker(),
    "reduce": Kronecker("reduce"),
    "ekfac": Kronecker(eigenvalue_correction=True),
    "diagonal": Diagonal(),
    "low-rank": LowRank(10),
    "lanczos": LowRank(10, method="lanczos", num_iterations=8),
    "monte-carlo": Kronecker(curvature="monte_carlo", num_samples=3),
}
every_structure = pytest.mark.parametrize(
    "inference", STRUCTURES.values(), ids=STRUCTURES
)
quiet = pytest.mark.filterwarnings("ignore:LowRank")


def tanh_net(m, width=6):
    torch.manual_seed(3)
    layers = nn.Linear(3, width), nn.Tanh(), nn.Linear(width, m)
    return nn.Sequential(*layers).double()


def points(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64)


def classifier(inference, n=30, net=None):
    X = points(n)
    labels = torch.arange(n) % 3
    return LinearizedGP(tanh_net(3) if net is None else net, X, labels,
                        inference=inference)  # fmt: skip


def regression(inference, n=30, m=1, **options):
    X = points(n)
    Y = torch.sin(X.sum(-1, keepdim=True) + torch.arange(m))
    options = {"noise": NOISE, **options} if m == 1 else options
    return LinearizedGP(tanh_net(m), X, Y, inference=inference, **options)


def one(model):
    return torch.ones(model.problem.channel_weights().shape, dtype=torch.float64)


def relative(error, size):
    return float(error.norm() / size.norm())


# -- the curvature ------------------------------------------------------------------


def test_kronecker_factors_of_a_network_are_those_of_the_paper():
    net, X = tanh_net(3), points(30)
    model = classifier(Kronecker(), net=net)
    hessians = oracles.softmax_hessians(net(X).detach())
    expected = oracles.kronecker_of_two_layers(net, X, hessians)
    torch.testing.assert_close(
        model.problem.curvature.dense(one(model)), expected, **EXACT
    )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kronecker_factors_of_shared_weights_are_those_of_the_paper(sharing):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 4, 3, generator=generator).double()
    signals = torch.randn(5, 2, 4, 6, generator=generator).double()
    sums = kronecker_sums(BlockJacobian(inputs, signals, None), 1, sharing)
    expected = oracles.kronecker_of_convolution(inputs, signals, sharing)
    got = torch.kron(sums.G[0], sums.A[0]) / sums.count
    torch.testing.assert_close(got, expected, **EXACT)


def test_kronecker_is_exact_for_one_layer_with_one_datum_or_one_output():
    for n, m in ((1, 3), (20, 1)):
        X = points(n)
        net = nn.Linear(3, m).double()
        J = oracles.jacobian(net, X)
        Y = torch.arange(n) % 3 if m > 1 else X.sum(-1, keepdim=True).sin()
        options = {} if m > 1 else {"noise": 1.0}
        model = LinearizedGP(net, X, Y, inference=Kronecker(), **options)
        hessians = oracles.softmax_hessians(net(X).detach())
        hessians = hessians if m > 1 else torch.ones(n, 1, 1).double()
        full = oracles.gauss_newton(J, hessians)
        got = model.problem.curvature.dense(one(model))
        torch.testing.assert_close(got, full, **EXACT)


def test_kronecker_blocks_of_a_deep_linear_network_are_exact():
    net = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False),
        nn.Linear(5, 2, bias=False),
    ).double()  # fmt: skip
    X = points(15)
    likelihood = MultitaskGaussianLikelihood(2).double()
    model = LinearizedGP(net, X, X[:, :2], likelihood, inference=Kronecker())
    M = oracles.gauss_newton(
        oracles.jacobian(net, X), torch.eye(2).double().expand(15, 2, 2)
    )
    got = model.problem.curvature.dense(one(model))
    start = 0
    for p in net.parameters():
        part = slice(start, start + p.numel())
        torch.testing.assert_close(got[part, part], M[part, part], **EXACT)
        start += p.numel()


def full_curvature(net, X):
    hessians = oracles.softmax_hessians(net(X).detach())
    return oracles.gauss_newton(oracles.jacobian(net, X), hessians)


def test_corrected_eigenvalues_are_never_worse_and_the_diagonal_is_the_diagonal():
    net, X = tanh_net(3), points(30)
    full = full_curvature(net, X)
    error = {}
    for name in ("kronecker", "ekfac", "diagonal"):
        model = classifier(STRUCTURES[name], net=net)
        got = model.problem.curvature.dense(one(model))
        error[name] = float((got - full).norm())
    assert error["ekfac"] < error["kronecker"]
    torch.testing.assert_close(got, full.diag().diag(), **EXACT)


def test_a_low_rank_keeps_the_leading_eigenvectors_and_all_of_a_small_matrix():
    net, X = tanh_net(3), points(30)
    full = full_curvature(net, X)
    values, vectors = torch.linalg.eigh(full)
    whole = classifier(LowRank(len(full)), net=net)
    dense = whole.problem.curvature.dense(one(whole))
    torch.testing.assert_close(dense, full, rtol=1e-7, atol=1e-8)
    some = classifier(LowRank(8, num_iterations=8, seed=1), net=net)
    best = vectors[:, -8:] * values[-8:] @ vectors[:, -8:].mT
    got = some.problem.curvature.dense(one(some))
    assert relative(got - best, best) < 1e-4
    share = float(values[-8:].sum() / values.sum())
    assert some.problem.curvature.captured == pytest.approx(share, rel=1e-4)


def test_a_low_rank_that_captures_little_warns():
    with pytest.warns(
        UserWarning, match=r"LowRank\(rank=1\) captures .*Choose a larger"
    ):
        _ = classifier(LowRank(1)).problem.curvature


def test_sums_over_minibatches_are_the_sums_over_all_data(monkeypatch):
    whole = classifier(Kronecker(eigenvalue_correction=True), n=31)
    expected = whole.problem.curvature.dense(one(whole))
    parts = classifier(Kronecker(eigenvalue_correction=True), n=31)
    chunks = []

    def small(self, root):
        for x, r in zip(self.X.split(4), root.split(4), strict=True):
            chunks.append(len(x))
            yield self._features(x, r)

    monkeypatch.setattr(StructuredProblem, "_chunks_of", small)
    got = parts.problem.curvature.dense(one(parts))
    assert len(chunks) == 16
    torch.testing.assert_close(got, expected, **EXACT)


def test_monte_carlo_curvature_is_unbiased_and_the_empirical_one_its_definition():
    net, X = tanh_net(3), points(30)
    full = classifier(Diagonal(), net=net)
    many = classifier(Diagonal(curvature="monte_carlo", num_samples=4000), net=net)
    a, b = (m.problem.curvature.dense(one(m)).diag() for m in (full, many))
    assert relative(a - b, a) < 0.02
    empirical = classifier(Diagonal(curvature="empirical"), net=net)
    p = net(X).softmax(-1).detach()
    gradient = nn.functional.one_hot(torch.arange(30) % 3, 3) - p
    J = oracles.jacobian(net, X)
    expected = (gradient[:, None] @ J).square().sum((0, 1))
    got = empirical.problem.curvature.dense(one(empirical)).diag()
    torch.testing.assert_close(got, expected, **EXACT)


# -- the posterior ------------------------------------------------------------------


def dense_posterior(model):
    """H^-1 in the scaled weights, from the structure's dense matrix."""
    problem = model.problem
    M = problem.curvature.dense(problem.channel_weights().detach())
    std = problem.expand(model.prior_variance.detach().double().sqrt())
    return torch.linalg.inv(torch.eye(len(M)).double() + std[:, None] * M * std)


@quiet
@every_structure
@pytest.mark.parametrize("groups", ["all", "layer"])
def test_moments_products_and_draws_are_those_of_the_dense_matrix(inference, groups):
    X = points(30)
    model = LinearizedGP(tanh_net(3), X, torch.arange(30) % 3, inference=inference,
                         groups=groups)  # fmt: skip
    model.prior_variance = torch.linspace(0.5, 2, len(model.prior_variance)).double()
    inverse = dense_posterior(model)
    posterior = model._conditioned()
    strategy = posterior.strategy
    features = posterior.features(points(4, seed=9))
    rows = features.rows()
    seen = strategy.project(features)
    expected = rows @ inverse @ rows.mT
    torch.testing.assert_close(strategy.covariance(seen), expected, **EXACT)
    other = strategy.project(posterior.features(X[:2]))
    cross = rows @ inverse @ other.features.rows().mT
    torch.testing.assert_close(strategy.covariance(seen, other), cross, **EXACT)
    blocks = torch.stack(
        [expected[3 * k : 3 * k + 3, 3 * k : 3 * k + 3] for k in range(4)]
    )
    torch.testing.assert_close(seen.blocks, blocks, **EXACT)
    torch.testing.assert_close(strategy.cross_weights(seen), rows @ inverse, **EXACT)
    draws = strategy.draw_weights(20_000, torch.Generator().manual_seed(0))
    assert relative(draws.mT @ draws / len(draws) - inverse, inverse) < 0.1


@quiet
@every_structure
def test_covariances_at_unit_scale_are_those_of_a_model_at_that_prior(inference):
    model = classifier(inference)
    problem = model.problem
    variance = torch.tensor([0.3], dtype=torch.float64)
    strategy = problem.structured_strategy(variance)
    X = points(4, seed=9)
    unit = strategy.unit_blocks(problem.features(X, problem.unit_std), variance)
    model.prior_variance = variance
    posterior = model._conditioned()
    expected = posterior.strategy.project(posterior.features(X)).blocks
    torch.testing.assert_close(unit, expected, **EXACT)


@quiet
@every_structure
def test_draws_are_functions_with_the_covariance_of_the_posterior(inference):
    model = regression(inference)
    X = points(3, seed=2)
    draws = model.draw(4000, torch.Generator().manual_seed(0))
    values = draws(X)[..., 0]
    posterior = model.posterior(X)
    covariance = posterior.distribution.covariance_matrix
    assert relative(values.mT.cov() - covariance, covariance) < 0.15
    error = values.mean(0) - posterior.mean[:, 0]
    assert bool((error.abs() < 5 * covariance.diag().sqrt() / 4000**0.5).all())
    torch.testing.assert_close(draws(X), draws(X), rtol=0, atol=0)


@quiet
@every_structure
def test_the_mean_is_the_linear_models_own(inference):
    X = points(5, seed=7)
    exact = regression(Exact()).posterior(X).mean
    torch.testing.assert_close(regression(inference).posterior(X).mean, exact, **EXACT)


def test_a_large_problem_finds_its_mean_by_products(monkeypatch):
    monkeypatch.setattr("gpbridge.linearized.mode._DENSE", 0)
    X = points(5, seed=7)
    exact = regression(Exact()).posterior(X)
    mean = regression(Kronecker()).posterior(X).mean
    assert bool(((mean - exact.mean).abs() < 1e-3 * exact.variance.sqrt()).all())
    labels = torch.arange(30) % 3
    twins = [
        LinearizedGP(tanh_net(3), points(30), labels, mean="linear_model", inference=i)
        for i in (Exact(), Kronecker())
    ]
    a, b = (twin.posterior(X).mean for twin in twins)
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@every_net
def test_every_network_has_every_structure_and_is_not_changed(case, m):
    net = case.network(m)
    X, X_test = case.inputs(6), case.inputs(2, seed=5)
    Y = torch.sin(2 * X[:, :1] + torch.arange(m))
    options = {"noise": 0.05} if m == 1 else {}
    exact = LinearizedGP(net, X, Y, input_shape=case.input_shape, **options)
    with assert_module_unchanged(net):
        for inference in (Kronecker(), Diagonal(), LowRank(exact.problem.num_params)):
            model = LinearizedGP(
                net, X, Y, inference=inference, input_shape=case.input_shape, **options
            )
            got = model.posterior(X_test).variance
            assert bool((got > 0).all())
    # The last of them has full rank.
    expected = exact.posterior(X_test).variance
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_lanczos_does_not_depend_on_the_unit_of_the_matrix(scale):
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(30, 30, generator=generator).double()).Q
    M = Q * torch.logspace(0, -3, 30).double() @ Q.mT
    found = [
        lanczos_eigenpairs(
            lambda columns, f=factor: f * M @ columns, 30, 10, 18,
            torch.Generator().manual_seed(1), M,
        )
        for factor in (1.0, scale)
    ]  # fmt: skip
    torch.testing.assert_close(found[1].values / scale, found[0].values)
    expected = torch.logspace(0, -3, 30).double()[:5]
    torch.testing.assert_close(found[1].values[:5] / scale, expected)


# -- the evidence -------------------------------------------------------------------


@quiet
@pytest.mark.parametrize(
    "inference",
    [
        LowRank(6),
        LowRank(6, method="lanczos", num_iterations=8),
        Diagonal(),
        Kronecker(eigenvalue_correction=True),
    ],
    ids=["low-rank", "lanczos", "diagonal", "ekfac"],
)
@pytest.mark.parametrize("m", [1, 2])
def test_what_is_called_a_lower_bound_of_the_evidence_is_one(inference, m):
    for variance in (1e-3, 1.0, 1e3):
        model, exact = (regression(i, m=m) for i in (inference, Exact()))
        for each in (model, exact):
            each.prior_variance = variance
        got, expected = model.evidence(), exact.evidence()
        assert got.lower_bound and not expected.lower_bound
        assert got.fit.item() == pytest.approx(expected.fit.item(), rel=1e-6)
        assert got.complexity > expected.complexity + 1e-6


@pytest.mark.filterwarnings("ignore")
def test_evidence_does_not_choose_noise_for_directions_that_a_low_rank_leaves_out():
    noise = []
    for inference in (Exact(), LowRank(20)):
        model = regression(inference, n=60, noise="learn")
        with torch.no_grad():
            model._targets.add_(0.1 * points(60, seed=7)[:, :1])
        fit_evidence(model, warn=False)
        noise.append(model.noise_variance.item())
    assert noise[1] > 0.5 * noise[0]


class TestNoiseThatIsNoChannel:
    """Noise that moves the roots of the output curvature point by point."""

    @staticmethod
    def model(inference):
        X = points(40)
        likelihood = FixedNoiseGaussianLikelihood(
            torch.linspace(0.01, 0.1, 40).double(), learn_additional_noise=True
        ).double()
        Y = X.sum(-1, keepdim=True).sin()
        return LinearizedGP(tanh_net(1, 4), X, Y, likelihood, inference=inference)

    @pytest.mark.parametrize("space", ["weight", "function"])
    def test_the_exact_evidence_has_its_gradient(self, space):
        model = self.model(Exact(space))
        raw = model.likelihood.second_noise_covar.raw_noise
        (got,) = torch.autograd.grad(model.log_evidence(), [raw])
        sides = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                raw.add_(step)
            sides.append(model.log_evidence().item())
        assert got.item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6)

    @pytest.mark.parametrize("inference", [Kronecker(), Diagonal(), LowRank(21)])
    def test_structures_refuse_a_gradient_that_would_be_wrong(self, inference):
        model = self.model(inference)
        value = model.log_evidence()
        assert value.isfinite()
        torch.autograd.grad(value, [model.covar_module.raw_prior_variance],
                            retain_graph=True)  # fmt: skip
        with pytest.raises(NotImplementedError, match=r"no gradient.*Exact\(\)"):
            value.backward()


@pytest.mark.parametrize("inference", [Kronecker(), LowRank(4)], ids=["kron", "low"])
def test_evidence_of_a_linear_model_is_that_of_the_exact_gp_with_its_gradients(
    inference,
):
    X = points(20)
    found = []
    for options in (Exact(), inference):
        torch.manual_seed(0)
        net = nn.Linear(3, 1).double()
        model = LinearizedGP(net, X, X.sum(-1, keepdim=True).sin(), inference=options)
        value = model.log_evidence()
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append((value, *torch.autograd.grad(value, parameters)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@quiet
@every_structure
@pytest.mark.parametrize("m", [1, 2])
def test_gradients_of_the_evidence_are_finite_differences(inference, m):
    model = regression(
        inference, m=m, groups="layer", **({"noise": "learn"} if m == 1 else {})
    )
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("noise" in name for name in parameters)
    value = model.log_evidence()
    gradients = torch.autograd.grad(value, list(parameters.values()))
    for p, gradient in zip(parameters.values(), gradients, strict=True):
        for k in range(p.numel()):
            sides = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    p.view(-1)[k] += step
                    sides.append(model.log_evidence())
                    p.view(-1)[k] -= step
            slope = (sides[0] - sides[1]) / 2e-5
            torch.testing.assert_close(
                gradient.view(-1)[k], slope, rtol=1e-5, atol=1e-5
            )


def test_the_diagonal_evidence_is_a_lower_bound_and_says_so():
    for make in (regression, classifier):
        with torch.no_grad():
            exact, bound = make(Exact()).evidence(), make(Diagonal()).evidence()
        assert bound.lower_bound and not exact.lower_bound
        assert bound.value.item() < exact.value.item()
        torch.testing.assert_close(bound.fit, exact.fit, **EXACT)
    assert not classifier(Kronecker()).evidence().lower_bound
    assert not classifier(Diagonal(curvature="empirical")).evidence().lower_bound


def test_a_new_prior_or_noise_costs_no_pass_over_the_data(monkeypatch):
    model = regression(Kronecker(), noise="learn")
    _ = model.problem.curvature
    monkeypatch.setattr(StructuredProblem, "_make", None)
    before = model.log_evidence().item()
    model.prior_variance = 2.0
    model.likelihood.noise = 0.3
    assert model.log_evidence().item() != before
    assert bool((model.posterior(points(2)).variance > 0).all())


def test_fit_evidence_climbs_for_every_structure():
    for inference in (Kronecker(), Diagonal()):
        model = regression(inference, noise="learn")
        before = model.log_evidence().item()
        after = fit_evidence(model, warn=False)
        assert after.value.item() > before
        assert after.value.item() == pytest.approx(model.log_evidence().item())


@quiet
@every_structure
def test_calibration_predicts_by_the_structures_posterior_at_the_prior_it_chose(
    inference,
):
    model = classifier(inference, n=60)
    X_val = points(60, seed=11)
    labels = (X_val[:, 0] > 0).long() + (X_val[:, 1] > 0).long()
    found = model.calibrate(X_val, labels)
    assert found is not None and model.prior_variance.item() == pytest.approx(
        found.prior_variance
    )
    X = points(4, seed=9)
    rows = model._conditioned().features(X).rows().unflatten(0, (4, 3))
    blocks = rows @ dense_posterior(model) @ rows.mT
    logits = model.functional(X)
    expected = probabilities(
        model.likelihood, logits, blocks, found.link, found.temperature
    )
    torch.testing.assert_close(model.predict(X).probs, expected, **EXACT)


# -- refusals -----------------------------------------------------------------------


def test_factors_beyond_the_budget_name_the_layer_and_what_takes_it():
    model = classifier(Kronecker(memory_budget=1e3))
    with pytest.raises(MemoryError, match=r"2.weight and 2.bias \(3 x 7\).*Diagonal"):
        _ = model.problem.curvature
    model = classifier(LowRank(50, memory_budget=1e3))
    with pytest.raises(MemoryError, match="rank 50 .*smaller rank"):
        _ = model.problem.curvature


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Kronecker("both"), "sharing must be"),
        (lambda: Diagonal(curvature="hessian"), "curvature must be"),
        (lambda: LowRank(0), "rank must be a whole number above zero, but is 0"),
        (lambda: LowRank(2.5), "rank must be a whole number above zero, but is 2.5"),
        (lambda: LowRank(method="power"), "method must be"),
        (lambda: Kronecker(curvature="monte_carlo", num_samples=0), "num_samples"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_low_rank_of_float32_data_loses_no_digits_where_variances_are_tiny():
    torch.manual_seed(0)
    X = torch.randn(500, 3)
    net = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 1))
    Y = X.sum(-1, keepdim=True).sin()
    options = {"noise": torch.tensor(1e-3), "parameters": "last_layer"}
    model = LinearizedGP(net, X, Y, inference=LowRank(51), **options)
    exact = LinearizedGP(net, X, Y, **options)
    model.prior_variance = exact.prior_variance = 900.0
    got, expected = model.posterior(X[:40]), exact.posterior(X[:40])
    torch.testing.assert_close(got.variance, expected.variance, rtol=0.05, atol=0.0)
    eigenvalues = torch.linalg.eigvalsh(got.covariance_matrix.double())
    assert eigenvalues.min() > -1e-6 * eigenvalues.max()
    assert model.predict(X).stddev.isfinite().all()


def test_noise_that_is_fixed_per_point_and_float32_have_structures():
    X = points(12).float()
    Y = X.sum(-1, keepdim=True).sin()
    likelihood = FixedNoiseGaussianLikelihood(torch.linspace(0.01, 0.1, 12))
    for inference in (Kronecker(), Diagonal(), LowRank(31)):
        model = LinearizedGP(tanh_net(1).float(), X, Y, likelihood, inference=inference)
        posterior = model.posterior(X)
        assert posterior.variance.dtype == torch.float32
        assert bool((posterior.variance > 0).all())
    exact = LinearizedGP(tanh_net(1).float(), X, Y, likelihood)
    got, want = posterior.variance, exact.posterior(X).variance
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)
