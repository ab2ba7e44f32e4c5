import math
import unittest

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    PoissonLikelihood,
    SoftmaxLikelihood,
)
from gpytorch.test.base_likelihood_test_case import BaseLikelihoodTestCase

from gpbridge.checks import ShapeError
from gpbridge.likelihoods import (
    LogisticLikelihood,
    hessian_root,
    is_gaussian,
    log_prob,
    noise_covariance,
    residual,
    sample_residual,
)
from tests import oracles_likelihoods as oracles

EXACT = {"rtol": 1e-9, "atol": 1e-12}
N = 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def gaussian():
    likelihood = GaussianLikelihood()
    likelihood.noise = 0.3
    return likelihood


def fixed():
    return FixedNoiseGaussianLikelihood(
        torch.linspace(0.1, 0.9, N, dtype=torch.float64), learn_additional_noise=True
    )


def multitask(rank=0, **options):
    likelihood = MultitaskGaussianLikelihood(num_tasks=3, rank=rank, **options)
    for k, parameter in enumerate(likelihood.parameters()):
        parameter.data = normal(*parameter.shape, seed=k)
    return likelihood


def softmax():
    return SoftmaxLikelihood(num_classes=3, mixing_weights=False)


# Name: likelihood, number of outputs.
CASES = {
    "gaussian": (gaussian, 1),
    "fixed": (fixed, 1),
    "multitask": (multitask, 3),
    "multitask, common noise only": (lambda: multitask(has_task_noise=False), 3),
    "multitask, own noises only": (lambda: multitask(has_global_noise=False), 3),
    "multitask, rank 1": (lambda: multitask(rank=1), 3),
    "multitask, rank 3, no common noise": (
        lambda: multitask(rank=3, has_global_noise=False),
        3,
    ),
    "softmax": (softmax, 3),
    "logistic": (LogisticLikelihood, 1),
    "probit": (BernoulliLikelihood, 1),
}
GAUSSIAN = [name for name in CASES if name.split(",")[0] in ("gaussian", "fixed")]
GAUSSIAN += [name for name in CASES if name.startswith("multitask")]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    make, m = CASES[request.param]
    likelihood = make().double()
    f = 2 * normal(N, m, seed=1)
    if is_gaussian(likelihood):
        y = normal(N, m, seed=2)
    elif m > 1:
        y = torch.tensor([0, 2, 1, 1, 0])
    else:
        y = torch.tensor([0.0, 1, 1, 0, 1], dtype=torch.float64).unsqueeze(-1)
    return likelihood, f, y


def marginal_noise(likelihood, f):
    """Upstream's own covariance of the noise: what it adds to a zero covariance."""
    n, m = f.shape
    zero = 1e-300 * torch.eye(n * m, dtype=f.dtype)
    if m > 1:
        prior = gpytorch.distributions.MultitaskMultivariateNormal(f, zero)
    else:
        prior = gpytorch.distributions.MultivariateNormal(f[:, 0], zero)
    dense = likelihood(prior).covariance_matrix.reshape(n, m, n, m)
    return torch.stack([dense[i, :, i] for i in range(n)])


def density(likelihood, f, i):
    if is_gaussian(likelihood):
        noise = marginal_noise(likelihood, f)[i]
        return lambda y, f: oracles.gaussian_log_density(y, f, noise)
    return {
        SoftmaxLikelihood: oracles.softmax_log_density,
        LogisticLikelihood: oracles.logistic_log_density,
        BernoulliLikelihood: oracles.probit_log_density,
    }[type(likelihood)]


def test_log_prob_is_the_log_density_of_each_point(case):
    likelihood, f, y = case
    dense = torch.stack([density(likelihood, f, i)(y[i], f[i]) for i in range(N)])
    torch.testing.assert_close(log_prob(likelihood, f, y), dense.reshape(N), **EXACT)


def test_residual_is_the_derivative_of_the_log_density(case):
    likelihood, f, y = case
    dense = [oracles.score(density(likelihood, f, i), y[i], f[i]) for i in range(N)]
    torch.testing.assert_close(
        residual(likelihood, f, y), torch.stack(dense).reshape(f.shape), **EXACT
    )


def test_root_squares_to_the_expected_curvature(case):
    likelihood, f, y = case
    R = hessian_root(likelihood, f)
    labels = range(f.shape[-1]) if f.shape[-1] > 1 else (0.0, 1.0)
    for i in range(N):
        log_density = density(likelihood, f, i)
        if is_gaussian(likelihood):
            dense = oracles.curvature(log_density, y[i], f[i])
        else:
            dense = oracles.fisher(log_density, labels, f[i])
        torch.testing.assert_close(R[i] @ R[i].T, dense.reshape(R[i].shape), **EXACT)


@pytest.mark.parametrize("name", ["softmax", "logistic"])
def test_root_of_a_canonical_link_is_that_of_the_hessian_for_every_label(name):
    make, m = CASES[name]
    f = normal(N, m)
    R = hessian_root(make(), f)
    for y in range(max(m, 2)):
        for i in range(N):
            dense = oracles.curvature(density(make(), f, i), y, f[i])
            torch.testing.assert_close(R[i] @ R[i].T, dense, **EXACT)


def test_root_of_softmax_is_that_of_diag_p_minus_p_p():
    f = 30 * normal(7, 10)
    R = hessian_root(SoftmaxLikelihood(num_classes=10, mixing_weights=False), f)
    p = torch.softmax(f, -1)
    expected = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    torch.testing.assert_close(R @ R.mT, expected, **EXACT)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_noise_covariance_is_what_upstream_adds_to_a_prior(name):
    make, m = CASES[name]
    likelihood, f = make().double(), normal(N, m)
    noise = noise_covariance(likelihood, f)
    torch.testing.assert_close(noise, marginal_noise(likelihood, f), **EXACT)
    R = hessian_root(likelihood, f)
    identity = torch.eye(m, dtype=f.dtype).expand(N, m, m)
    torch.testing.assert_close(noise @ R @ R.mT, identity, **EXACT)


def test_gradients_agree_with_finite_differences(case):
    likelihood, f, y = case

    class Rules(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.likelihood = likelihood

        def forward(self, f):
            R = hessian_root(self.likelihood, f)
            return log_prob(self.likelihood, f, y), R @ R.mT

    rules = Rules()
    names = [name for name, _ in rules.named_parameters()]

    def call(f, *values):
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(rules, named, (f,))

    values = [value.detach().clone() for value in rules.parameters()]
    inputs = [value.requires_grad_() for value in (f.clone(), *values)]
    assert torch.autograd.gradcheck(call, inputs)


def test_batches_are_loops(case):
    likelihood, f, y = case
    f = torch.stack([f, f.flip(0), 2 * f])
    y = torch.stack([y, y.flip(0), y])
    for rule in (
        lambda f, y: log_prob(likelihood, f, y),
        lambda f, y: residual(likelihood, f, y),
        lambda f, y: hessian_root(likelihood, f),
    ):
        looped = torch.stack([rule(f[k], y[k]) for k in range(3)])
        torch.testing.assert_close(rule(f, y), looped, **EXACT)


def test_samples_of_outputs_share_their_targets(case):
    likelihood, f, y = case
    samples = torch.stack([f, f + 1])
    together = log_prob(likelihood, samples, y)
    apart = torch.stack([log_prob(likelihood, one, y) for one in samples])
    torch.testing.assert_close(together, apart, **EXACT)
    assert residual(likelihood, samples, y).shape == samples.shape


def test_batched_noise_gives_batched_roots():
    likelihood = GaussianLikelihood(batch_shape=torch.Size([2]))
    likelihood.noise = torch.tensor([[0.1], [0.4]])
    R = hessian_root(likelihood.double(), normal(N, 1))
    assert R.shape == (2, N, 1, 1)
    torch.testing.assert_close(
        R[1], torch.full_like(R[1], 0.4**-0.5), rtol=1e-6, atol=0
    )


def test_no_points_give_empty_results(case):
    likelihood, f, y = case
    if isinstance(likelihood, FixedNoiseGaussianLikelihood):
        pytest.skip("fixed noise belongs to its points")
    assert log_prob(likelihood, f[:0], y[:0]).shape == (0,)
    assert hessian_root(likelihood, f[:0]).shape == (0, *2 * f.shape[-1:])


def test_float32_outputs_give_float32_results(case):
    likelihood, f, y = case
    g = f.float()
    z = y.float() if y.is_floating_point() else y
    for got, exact in (
        (log_prob(likelihood, g, z), log_prob(likelihood, f, y)),
        (residual(likelihood, g, z), residual(likelihood, f, y)),
        (hessian_root(likelihood, g), hessian_root(likelihood, f)),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def test_sampled_residuals_have_the_covariance_of_the_curvature(case):
    likelihood, f, _ = case
    copies = 20_000
    many = f.expand(copies, *f.shape)
    draws = sample_residual(likelihood, many, generator=seeded())
    covariance = torch.einsum("sni,snj->nij", draws, draws) / copies
    R = hessian_root(likelihood, f)
    exact = R @ R.mT
    own = exact.diagonal(dim1=-2, dim2=-1)
    error = (own.unsqueeze(-1) * own.unsqueeze(-2) + exact**2) / copies
    assert ((covariance - exact).abs() <= 4 * error.sqrt() + 1e-12).all()


def test_sampling_is_reproducible_and_leaves_the_global_state_alone():
    f, state = normal(N, 3), torch.get_rng_state()
    first = sample_residual(softmax(), f, generator=seeded(3))
    again = sample_residual(softmax(), f, generator=seeded(3))
    fresh = [sample_residual(softmax(), f) for _ in range(2)]
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(*fresh)
    assert torch.equal(torch.get_rng_state(), state)


def test_given_noise_replaces_the_noise_of_the_likelihood():
    f, noise = normal(3, 1), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    R = hessian_root(gaussian().double(), f, noise)
    torch.testing.assert_close(R.flatten(), noise.rsqrt(), **EXACT)
    plain = FixedNoiseGaussianLikelihood(torch.ones(N, dtype=torch.float64))
    R = hessian_root(plain, f, noise)
    torch.testing.assert_close(R.flatten(), noise.rsqrt(), **EXACT)
    learned = fixed().double()
    R = hessian_root(learned, f, noise)
    total = noise + learned.second_noise
    torch.testing.assert_close(R.flatten(), total.rsqrt(), **EXACT)
    several = normal(3, 3).exp()
    R = hessian_root(multitask(rank=1).double(), normal(3, 3), several)
    torch.testing.assert_close(R, torch.diag_embed(several.rsqrt()), **EXACT)


@pytest.mark.parametrize("f", [3.0, 8.0, 14.0, 30.0])
def test_probit_is_accurate_in_both_tails(f):
    tail = oracles.log_normal_tail(f)
    log_density = -0.5 * (f * f + math.log(2 * math.pi))
    log_root = log_density - 0.5 * (tail + math.log1p(-math.exp(tail)))
    outputs = torch.tensor([[f], [-f]], dtype=torch.float64)
    wrong = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    likelihood = BernoulliLikelihood()
    both = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(
        log_prob(likelihood, outputs, wrong), tail * both, **EXACT
    )
    roots = hessian_root(likelihood, outputs).flatten()
    torch.testing.assert_close(roots.log(), log_root * both, **EXACT)
    slopes = residual(likelihood, outputs, wrong).flatten()
    exact = math.exp(log_density - tail) * (2 * wrong - 1).flatten()
    torch.testing.assert_close(slopes, exact, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["softmax", "logistic", "probit"])
def test_extreme_outputs_give_finite_values_and_gradients(name, dtype):
    make, m = CASES[name]
    size = 1e4 if name != "probit" else 30.0
    f = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]], dtype=dtype)[:, :m] * size
    f.requires_grad_()
    y = torch.tensor([1, 0]) if m > 1 else torch.tensor([[0.0], [1.0]], dtype=dtype)
    values = (
        log_prob(make(), f, y),
        residual(make(), f, y),
        hessian_root(make(), f),
    )
    for value in values:
        (slope,) = torch.autograd.grad(value.sum(), f, retain_graph=True)
        assert value.isfinite().all() and slope.isfinite().all()


def test_binary_softmax_is_logistic_in_the_difference_of_logits():
    f, y = normal(N, 2), torch.tensor([0, 1, 1, 0, 1])
    two = SoftmaxLikelihood(num_classes=2, mixing_weights=False)
    difference, label = f[:, 1:] - f[:, :1], y.double().unsqueeze(-1)
    logistic = LogisticLikelihood()
    torch.testing.assert_close(
        log_prob(two, f, y), log_prob(logistic, difference, label), **EXACT
    )
    D = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    R, r = hessian_root(two, f), hessian_root(logistic, difference)
    torch.testing.assert_close(R @ R.mT, D @ r @ r.mT @ D.T, **EXACT)


def test_only_gaussian_likelihoods_are_gaussian():
    found = {name for name, (make, _) in CASES.items() if is_gaussian(make())}
    assert found == set(GAUSSIAN)


def test_likelihoods_without_a_rule_are_refused_by_name():
    f = normal(N, 1)
    known = {type(make()).__name__ for make, _ in CASES.values()}
    for rule, targets in ((log_prob, (f,)), (residual, (f,)), (hessian_root, ())):
        with pytest.raises(
            NotImplementedError, match="has no rule for PoissonLikelihood"
        ) as error:
            rule(PoissonLikelihood(), f, *targets)
        assert all(name in str(error.value) for name in known)
        assert f"@gpbridge.likelihoods.{rule.__name__}.register(" in str(error.value)
    with pytest.raises(NotImplementedError, match="hessian_root has no rule"):
        sample_residual(PoissonLikelihood(), f)


def test_a_registered_rule_is_used():
    class Doubled(GaussianLikelihood):
        pass

    hessian_root.register(Doubled, lambda likelihood, f, noise=None: f.unsqueeze(-1))
    f = normal(N, 1)
    torch.testing.assert_close(hessian_root(Doubled(), f), f.unsqueeze(-1))


def test_mixing_weights_are_refused():
    mixed = SoftmaxLikelihood(num_features=3, num_classes=3)
    with pytest.raises(ValueError, match="must have mixing_weights=False"):
        hessian_root(mixed, normal(N, 3))


@pytest.mark.parametrize("name", ["softmax", "logistic", "probit"])
def test_noise_for_labels_is_refused(name):
    make, m = CASES[name]
    with pytest.raises(ValueError, match="noise must be None for"):
        hessian_root(make(), normal(N, m), torch.ones(N))


def test_fixed_noise_for_other_points_is_refused():
    with pytest.raises(
        ShapeError, match="holds the noise of 5 points, but there are 2"
    ):
        hessian_root(fixed(), normal(2, 1))


def test_noise_of_another_length_is_refused():
    with pytest.raises(ShapeError, match=r"must be ``... x 5`` variances.*\(2,\)"):
        hessian_root(gaussian(), normal(N, 1), torch.ones(2))
    with pytest.raises(ShapeError, match="``... x 5 x 3`` variances for several"):
        hessian_root(multitask(), normal(N, 3), torch.ones(N))


def test_noise_that_is_singular_by_construction_is_refused():
    singular = multitask(rank=1, has_global_noise=False)
    with pytest.raises(ValueError, match="of rank 1 for 3 outputs is singular"):
        hessian_root(singular, normal(N, 3))


def test_labels_have_no_noise_covariance():
    with pytest.raises(TypeError, match="Only Gaussian likelihoods have a noise"):
        noise_covariance(softmax(), normal(N, 3))


class TestLogisticLikelihood(BaseLikelihoodTestCase, unittest.TestCase):
    seed = 2

    def create_likelihood(self):
        return LogisticLikelihood()

    def _create_targets(self, batch_shape=torch.Size()):
        return torch.distributions.Bernoulli(0.5).sample((*batch_shape, 5))


@pytest.mark.parametrize("f, v", [(0.0, 1.0), (1.5, 0.3), (-2.0, 3.0), (4.0, 9.0)])
def test_logistic_marginal_is_the_average_over_the_latent_function(f, v):
    latent = gpytorch.distributions.MultivariateNormal(
        torch.tensor([f]).double(), torch.tensor([[v]]).double()
    )
    marginal = LogisticLikelihood().double()(latent)
    exact = oracles.logistic_average(f, v)
    assert marginal.probs.item() == pytest.approx(exact, abs=2e-4)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    both = [LogisticLikelihood().log_marginal(y, latent).exp() for y in (one, zero)]
    assert sum(both).item() == pytest.approx(1.0, abs=1e-6)


def test_logistic_marginal_keeps_its_tails():
    latent = gpytorch.distributions.MultivariateNormal(
        torch.tensor([60.0, -60.0, 2000.0]).double(), torch.eye(3).double()
    )
    logs = LogisticLikelihood().log_marginal(torch.zeros(3).double(), latent)
    assert logs.isfinite().all() and logs[0] == pytest.approx(-59.5, abs=0.1)


def test_sparse_variational_gaussian_process_learns_with_the_logistic_likelihood():
    class Sparse(gpytorch.models.ApproximateGP):
        def __init__(self, inducing):
            q = gpytorch.variational.CholeskyVariationalDistribution(len(inducing))
            strategy = gpytorch.variational.VariationalStrategy(self, inducing, q)
            super().__init__(strategy)
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(
                gpytorch.kernels.RBFKernel()
            )

        def forward(self, x):
            mean, covariance = self.mean_module(x), self.covar_module(x)
            return gpytorch.distributions.MultivariateNormal(mean, covariance)

    x = torch.linspace(-1, 1, 40).unsqueeze(-1)
    y = (x[:, 0] > 0).float()
    model, likelihood = Sparse(x[::8].clone()), LogisticLikelihood()
    mll = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=len(x))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(-mll(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    probability = likelihood(model.eval()(x)).probs
    assert probability[0] < 0.3 and probability[-1] > 0.7
