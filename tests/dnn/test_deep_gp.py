"""Deep GPs against dense formulas, and upstream's sparse GP."""

import copy
import math
import pickle

import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from gpytorch.means import ConstantMean
from gpytorch.mlls import DeepApproximateMLL, VariationalELBO
from gpytorch.models import ApproximateGP
from gpytorch.settings import num_likelihood_samples
from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.dnn import DeepGaussianProcess, build_deep_gp
from gpbridge.inducing_covariances import (
    inducing_covariance,
    inducing_cross_covariance,
    inducing_width,
)
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.surrogates import WeightSpaceModel
from tests import oracles_architecture as oracles
from tests.dnn.deep_gp_problems import kernel, moved, normal, problem, seeded

JITTER = 1e-6  # of float64, upstream's default


class UpstreamSVGP(ApproximateGP):
    """The one-layer model in gpytorch's own classes, with the same parameters."""

    def __init__(self, layer):
        q = layer.variational_strategy
        M = len(q.inducing_points)
        own = CholeskyVariationalDistribution(M)
        strategy = VariationalStrategy(self, q.inducing_points.detach(), own)
        super().__init__(strategy)
        self.mean_module, self.covar_module = ConstantMean(), layer.covar_module
        self.double()
        with torch.no_grad():
            own.variational_mean.copy_(q.mean[0])
            own.chol_variational_covar.copy_(q.factor[0])
            self.mean_module.constant.copy_(layer.mean_module.constant[0])
        strategy.variational_params_initialized.fill_(1)

    def forward(self, x):
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def one_layer():
    model, X, Y = problem(depth=1)
    with torch.no_grad():
        model.layers[0].mean_module.constant.fill_(0.3)
    return model, X, Y


def dense(model):
    """Kernel matrices and q(u) of a one-layer model, and its mean."""
    layer = model.layers[0]
    q, K = layer.variational_strategy, layer.covar_module
    scale, length = K.outputscale.item(), K.base_kernel.lengthscale.detach()
    Z = q.inducing_points.detach()
    Kuu = oracles.squared_exponential_gram(Z, Z, length, scale)
    Kuu = Kuu + JITTER * scale * torch.eye(len(Z))
    C = torch.linalg.cholesky(Kuu)
    mean, L = q.mean[0].detach(), q.factor[0].detach()
    return Z, length, scale, Kuu, C @ mean, C @ L @ L.mT @ C.mT


def test_one_layer_has_the_bound_of_a_sparse_gp():
    model, X, Y = one_layer()
    Z, length, scale, Kuu, mean, V = dense(model)
    Kuf = oracles.squared_exponential_gram(Z, X, length, scale)
    Kff = oracles.squared_exponential_gram(X, X, length, scale)
    noise = model.likelihood.noise.item()
    y = Y[:, 0] - 0.3
    expected = oracles.sparse_bound(Kuu, Kuf, Kff, mean, V, y, noise)
    assert abs(len(X) * model.elbo(X, Y) - expected) < 1e-10 * abs(expected)


def test_one_layer_has_the_posterior_of_a_sparse_gp():
    model, _, _ = one_layer()
    Z, length, scale, Kuu, mean, V = dense(model)
    x = normal(7, 2, seed=9)
    Kuf = oracles.squared_exponential_gram(Z, x, length, scale)
    Kff = oracles.squared_exponential_gram(x, x, length, scale)
    mean, V = oracles.sparse_posterior(Kuu, Kuf, Kff, mean, V)
    f = model.posterior(x)
    torch.testing.assert_close(f.mean, mean + 0.3, rtol=0, atol=1e-10)
    torch.testing.assert_close(f.covariance_matrix, V, rtol=0, atol=1e-10)
    y = model.predict(x)
    noise = model.likelihood.noise
    torch.testing.assert_close(y.mean[:, 0], mean + 0.3, rtol=0, atol=1e-10)
    torch.testing.assert_close(y.variance[:, 0], V.diagonal() + noise)


def test_one_layer_is_gpytorchs_sparse_gp_but_for_its_jitter_of_the_data():
    model, X, Y = one_layer()
    upstream = UpstreamSVGP(model.layers[0])
    noise, n = model.likelihood.noise.item(), len(X)
    bound = VariationalELBO(model.likelihood, upstream, n)
    upstream.train()
    theirs = bound(upstream(X), Y[:, 0])
    ours = model.elbo(X, Y)
    # The variance at every datum has it once more, each time over 2 noise variances.
    assert abs(ours - theirs - JITTER / (2 * noise)) < 1e-10
    upstream.eval()
    x = normal(5, 2, seed=3)
    V = upstream(x).covariance_matrix - JITTER * torch.eye(5)
    torch.testing.assert_close(
        model.posterior(x).covariance_matrix, V, atol=1e-10, rtol=0
    )


def test_the_model_works_with_gpytorchs_own_objective():
    model, X, Y = problem()
    objective = DeepApproximateMLL(VariationalELBO(model.likelihood, model, len(X)))
    with num_likelihood_samples(4):
        f = model(X, generator=seeded(0))
        assert f.batch_shape == (4,)
    expected = model.elbo(X, Y, num_samples=4, generator=seeded(0))
    assert torch.equal(objective(f, Y[:, 0]), expected)


def test_minibatch_bounds_average_to_the_bound_of_all_data():
    model, X, Y = problem(depth=3, m=2)
    noise = model.draw_noise([len(X)], 5, seeded(0))
    full = model.elbo(X, Y, noise=noise)
    parts = [
        model.elbo(
            X[rows], Y[rows], num_data=len(X), noise=[one[:, rows] for one in noise]
        )
        for rows in torch.arange(12).split(4)
    ]
    assert abs(torch.stack(parts).mean() - full) < 1e-12


def dense_draws(model, X, s, seed=0):
    """Joint values of a deep GP of squared exponentials by dense matrices."""
    values, generator = X.expand(s, *X.shape), seeded(seed)
    with torch.no_grad():
        for layer in model.layers:
            q, K = layer.variational_strategy, layer.covar_module
            noise = torch.randn(
                s, len(X), layer.output_dims, generator=generator, dtype=X.dtype
            )
            drawn = oracles.sparse_layer_values(
                values, q.inducing_points, K.base_kernel.lengthscale[0],
                K.outputscale, JITTER, q.mean, q.factor, noise,
            )  # fmt: skip
            mean = layer.mean_module(values.reshape(-1, values.shape[-1])).mT
            values = drawn + mean.reshape(drawn.shape)
    return values


def moments(values):
    rows = values.flatten(1)
    return rows.mean(0), torch.cov(rows.mT)


def close(values, others, sigmas=5):
    """Means and covariances of two sets of draws agree within their errors."""
    (a, A), (b, B) = moments(values), moments(others)
    s = min(len(values), len(others))
    std = B.diagonal().sqrt()
    off = (a - b).abs() / std
    error = (A - B).abs() / (std[:, None] * std)
    return off.max() < sigmas * (2 / s) ** 0.5 and error.max() < sigmas * (4 / s) ** 0.5


def test_joint_draws_have_the_covariance_of_dense_monte_carlo():
    model, _, _ = problem(m=2)
    x = 0.2 * normal(4, 2, seed=5)
    expected = dense_draws(model, x, 8000)
    with torch.no_grad():
        sampled = model.sample_joint(x, 8000, seeded(1))
        drawn = model.draw(2000, seeded(2), num_features=128)(x)
        assert close(sampled, expected)
        assert close(drawn, expected)
        # Draws of marginals, which gpytorch's deep GPs give, have no such covariance.
        mean, variance = model.marginals(x, 8000, seeded(3))
        alone = mean + variance.sqrt() * normal(*mean.shape, seed=4)
    assert not close(alone, expected)


def test_the_joint_posterior_has_the_moments_of_the_draws():
    model, _, _ = problem(m=2)
    x = normal(4, 2, seed=5)
    f = model.posterior(x, num_samples=4000)
    mean, covariance = moments(dense_draws(model, x, 8000))
    std = covariance.diagonal().sqrt()
    assert f.mean.shape == (4, 2)
    assert ((f.mean.flatten() - mean).abs() / std).max() < 0.1
    error = (f.covariance_matrix - covariance) / (std[:, None] * std)
    assert error.abs().max() < 0.2


def test_a_draw_is_one_function():
    model, _, _ = problem(m=2)
    draw = model.draw(3, seeded(0), num_features=32)
    x = normal(5, 4, 2, seed=1)
    whole = draw(x)
    assert whole.shape == (3, 5, 4, 2)
    torch.testing.assert_close(whole, torch.stack([draw(one) for one in x], 1))
    torch.testing.assert_close(draw(x), whole, rtol=0, atol=0)
    assert not torch.allclose(whole[0], whole[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(draw(x), whole)
    x.requires_grad_()
    assert torch.isfinite(torch.autograd.grad(draw(x).sum(), x)[0]).all()


def test_a_kernel_for_each_output_gives_what_one_layer_of_each_gives():
    def each(num_inputs):
        made = RBFKernel(ard_num_dims=num_inputs, batch_shape=torch.Size([2]))
        made.lengthscale = torch.tensor([0.5, 1.5])[:, None, None]
        return made

    model, _, _ = problem(depth=1, m=2, kernels=each)
    layer, x = model.layers[0], normal(3, 4, 2, seed=1)
    mean, variance = layer.marginals(x)
    joint_mean, joint = layer.joint(x)
    for o in range(2):
        alone, _, _ = problem(depth=1, m=1, kernels=lambda d, o=o: each(d)[o])
        with torch.no_grad():
            q = alone.layers[0].variational_strategy.distribution
            own = layer.variational_strategy
            q.variational_mean.copy_(own.mean[o : o + 1])
            q.chol_variational_covar.copy_(own.factor[o : o + 1])
        expected, V = alone.layers[0].joint(x)
        torch.testing.assert_close(joint_mean[..., o], expected[..., 0])
        torch.testing.assert_close(joint[:, o], V[:, 0])
        torch.testing.assert_close(mean[..., o], expected[..., 0])
        torch.testing.assert_close(variance[..., o], V[:, 0].diagonal(dim1=-2, dim2=-1))
    drawn = model.draw(2000, seeded(0), num_features=64)(x[0])
    f = model.posterior(x[0])
    std = f.variance.sqrt()
    assert ((drawn.mean(0) - f.mean).abs() / std).max() < 0.15
    assert (drawn.var(0) / f.variance - 1).abs().max() < 0.2


def test_predictions_are_mixtures_over_draws():
    model, X, Y = problem(m=2)
    mean, variance = model.marginals(X, 7, seeded(1))
    std = (variance + model.likelihood.task_noises).sqrt()
    parts = torch.distributions.Normal(mean, std).log_prob(Y).sum(-1)
    expected = parts.logsumexp(0) - math.log(7)
    y = model.predict(X, 7, seeded(1))
    torch.testing.assert_close(y.log_prob(Y), expected)
    normals = torch.distributions.Normal(y.mean, y.variance.sqrt())
    assert (normals.log_prob(Y).sum(-1) - expected).abs().max() > 1e-2
    again = model.predict(X), model.predict(X)
    assert torch.equal(*(one.mean for one in again))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "likelihood, classes",
    [
        (BernoulliLikelihood(), 2),
        (LogisticLikelihood(), 2),
        (SoftmaxLikelihood(num_classes=3, mixing_weights=False), 3),
    ],
    ids=["probit", "logistic", "softmax"],
)
def test_labels(likelihood, classes, depth):
    model, X, _ = problem(depth, likelihood=likelihood)
    y = torch.arange(len(X)) % classes
    before = torch.get_rng_state()
    bounds = [model.elbo(X, y, num_samples=9, generator=seeded(0)) for _ in range(2)]
    assert torch.equal(*bounds) and torch.isfinite(bounds[0])
    p = model.predict(X, 3000)
    assert torch.equal(torch.get_rng_state(), before)
    if depth == 1:
        mean, variance = model.marginals(X)
        f = (mean + variance.sqrt() * normal(200_000, *mean.shape[1:])).detach()
        if classes == 3:
            expected = f.softmax(-1).mean(0)
        elif isinstance(likelihood, BernoulliLikelihood):
            expected = torch.special.ndtr(f).mean(0)
        else:
            expected = f.sigmoid().mean(0)
        torch.testing.assert_close(p.probs, expected, rtol=0, atol=0.05)
    if classes == 3:
        assert p.probs.shape == (len(X), 3)
        torch.testing.assert_close(p.probs.sum(-1), torch.ones(len(X)).double())
    else:
        assert p.batch_shape == (len(X), 1)


class MeanOfParts(Kernel):
    """f(x) is the mean of g over the columns of x, a kernel with its own domain."""

    def __init__(self):
        super().__init__()
        self.base = RBFKernel()

    def forward(self, x1, x2, diag=False, **params):
        a, b = x1[..., None], x2[..., None]  # ... x n x d x 1
        K = self.base(a.unsqueeze(-3), b.unsqueeze(-4)).to_dense().mean((-1, -2))
        return K.diagonal(dim1=-2, dim2=-1) if diag else K


@inducing_covariance.register(MeanOfParts)
def _(kernel, Z):
    return kernel.base(Z).to_dense()


@inducing_cross_covariance.register(MeanOfParts)
def _(kernel, Z, X):
    return kernel.base(Z, X.reshape(-1, 1)).to_dense().unflatten(-1, X.shape).mean(-1)


@inducing_width.register(MeanOfParts)
def _(kernel, width):
    return 1


def test_a_kernel_may_have_inducing_points_in_a_domain_of_its_own():
    factories = [lambda _: MeanOfParts(), None]
    parts = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    with pytest.raises(ShapeError, match="layer 0 must have 1 columns.*MeanOfParts"):
        problem(kernels=factories, width=1)
    own = {"inducing_points": [parts, None], "width": 1}
    model, X, Y = problem(kernels=factories, **own)
    layer = model.layers[0]
    q, K = layer.variational_strategy, layer.covar_module
    Z = q.inducing_points.detach()
    assert Z.shape == (6, 1)
    assert isinstance(K, ScaleKernel)
    assert torch.isfinite(model.elbo(X, Y))
    length, scale = K.base_kernel.base.lengthscale.detach(), K.outputscale.item()
    Kuu = oracles.squared_exponential_gram(
        Z, Z, length, scale
    ) + JITTER * scale * torch.eye(6)
    parts = X.reshape(-1, 1)
    Kuf = oracles.squared_exponential_gram(Z, parts, length, scale)
    Kuf = Kuf.unflatten(-1, X.shape).mean(-1)
    Kff = oracles.squared_exponential_gram(parts, parts, length, scale)
    Kff = Kff.unflatten(-1, X.shape).unflatten(0, X.shape).mean((1, 3))
    C, L = torch.linalg.cholesky(Kuu), q.factor[0].detach()
    u = C @ q.mean[0].detach(), C @ L @ L.mT @ C.mT
    mean, V = oracles.sparse_posterior(Kuu, Kuf, Kff, *u)
    ours, joint = layer.joint(X)
    fixed = layer.mean_module(X)[0]
    torch.testing.assert_close(ours[:, 0] - fixed, mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(joint[0], V, rtol=0, atol=1e-9)
    assert model.sample_joint(X, 2, seeded(0)).shape == (2, 12, 1)
    with pytest.raises(NotImplementedError, match="Try sample_joint"):
        model.draw(2)


class Nested(nn.Module):
    """A network that is more than a Sequential."""

    def __init__(self, d):
        super().__init__()
        self.body = nn.ModuleDict({"a": nn.Linear(d, 4), "b": nn.Linear(4, 1)})

    def forward(self, x):
        return self.body["b"](torch.tanh(self.body["a"](x)))


def test_a_networks_tangent_kernel_is_a_layer():
    def tangent(d):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return NeuralTangentKernel(Nested(d).double())

    model, X, Y = problem(kernels=[tangent, kernel])
    assert torch.isfinite(model.elbo(X, Y, generator=seeded(0)))
    x = normal(3, 2, seed=2)
    with torch.no_grad():
        drawn = model.draw(500, seeded(1), num_features=64)(x)
        assert close(drawn, model.sample_joint(x, 1000, seeded(2)))


def test_it_is_a_botorch_model_by_its_draws():
    model, X, Y = problem()
    surrogate = WeightSpaceModel(
        model, X, Y, likelihood=model.likelihood, num_samples=16
    )
    x = normal(5, 3, 2, seed=1)
    posterior = surrogate.posterior(x)
    assert posterior.values.shape == (5, 16, 3, 1)
    assert surrogate.predict(X).log_prob(Y).shape == (12, 1)


def test_it_can_be_copied_pickled_and_loaded():
    model, X, Y = problem()
    expected = model.elbo(X, Y, generator=seeded(0))
    fresh = build_deep_gp(
        X + 1, num_inducing=6, kernels=kernel, hidden_variance=0.1, num_outputs=1
    )
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other.elbo(X, Y, generator=seeded(0)), expected)
    draw = model.draw(2, seeded(0), num_features=16)
    assert torch.equal(pickle.loads(pickle.dumps(draw))(X), draw(X))


def test_everything_is_in_the_dtype_of_the_inputs():
    X = normal(30, 2).float()
    model = build_deep_gp(X, depth=3, num_inducing=10)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    moved(model)
    for value in (
        model.elbo(X, X[:, :1]),
        model.predict(X).mean,
        model.posterior(X[:5]).mean,
        model.sample_joint(X[:5], 2),
        model.draw(2, num_features=16)(X),
    ):
        assert value.dtype == torch.float32 and torch.isfinite(value).all()


def test_another_precision_is_the_same_function():
    X = normal(80, 2).float()
    model = build_deep_gp(X, depth=2, num_inducing=30, hidden_variance=0.1)
    moved(model)
    wide = copy.deepcopy(model).double()
    for layer, other in zip(model.layers, wide.layers, strict=True):
        assert layer.jitter_share == other.jitter_share
        got, expected = layer.marginals(X), other.marginals(X.double())
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=5e-3)


def test_the_global_random_state_is_left_alone():
    model, X, Y = problem()
    before = torch.get_rng_state()
    model(X)
    model.elbo(X, Y)
    model.draw(2, num_features=16)
    model.sample_joint(X)
    assert torch.equal(torch.get_rng_state(), before)


def test_likelihoods_that_need_more_than_a_point_are_refused():
    layers = problem()[0].layers
    for likelihood, message in [
        (FixedNoiseGaussianLikelihood(torch.ones(12)), "GaussianLikelihood()"),
        (MultitaskGaussianLikelihood(2, rank=1), "rank=0"),
        (SoftmaxLikelihood(num_features=2, num_classes=3), "mixing_weights=False"),
    ]:
        with pytest.raises(ValueError, match="cannot be trained with this") as error:
            DeepGaussianProcess(list(layers), likelihood)
        assert message in str(error.value)


def test_layers_must_fit():
    layers = list(problem()[0].layers)
    with pytest.raises(ValueError, match="Layer 0 has 1 outputs"):
        DeepGaussianProcess(layers[::-1], GaussianLikelihood())


def test_bad_inputs_are_named():
    model, X, Y = problem()
    with pytest.raises(ShapeError, match="X must have 2 columns"):
        model(X[:, :1])
    with pytest.raises(TypeError, match="X must be torch.float64"):
        model.predict(X.float())
    with pytest.raises(ShapeError, match="Y must be ``12 x 1``"):
        model.elbo(X, Y[:-1, 0])
    with pytest.raises(ValueError, match="num_samples must be a whole number"):
        model.draw(0)
    with pytest.raises(MemoryError, match="draw"):
        model.sample_joint(X.repeat(2000, 1), 100)
    with pytest.raises(ShapeError, match="joint over points.*shape \\(1, 12, 2\\)"):
        model.posterior(X[None])
    with pytest.raises(TypeError, match="must be factories.* but one is a RBFKernel"):
        build_deep_gp(X, kernels=RBFKernel())


def test_a_layer_takes_values_and_nothing_else():
    model, X, _ = problem()
    layer = model.layers[0]
    assert layer(X).mean.shape == (12, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'are_samples'"):
        layer(X, are_samples=True)
    with pytest.raises(TypeError, match="inputs is a MultitaskMultivariateNormal"):
        layer(layer(X))


def test_joint_values_at_no_tensor_are_refused_by_name():
    model, X, _ = problem()
    for method in (model.sample_joint, model.posterior, model.predict):
        with pytest.raises(TypeError, match="X must be a torch.Tensor"):
            method(X.tolist())


@pytest.mark.parametrize("depth, m", [(1, 1), (1, 3), (2, 1)])
def test_joint_covariances_beyond_the_budget_are_refused(depth, m, monkeypatch):
    """One layer has one covariance for all draws; outputs have a joint one."""
    model, X, _ = problem(depth=depth, m=m)
    draws = 20 * 2 if depth > 1 else 1 * m
    needed = 3 * 8 * (draws + m**2) * len(X) ** 2
    name = "gpbridge.dnn.deep_gp_predictions.MEMORY_BUDGET"
    monkeypatch.setattr(name, needed)
    assert model.posterior(X, 20).mean.isfinite().all()
    monkeypatch.setattr(name, needed - 1)
    with pytest.raises(MemoryError, match="Pass fewer points"):
        model.posterior(X, 20)


def test_targets_of_one_output_may_be_a_vector():
    model, X, Y = problem()
    noise = model.draw_noise((len(X),), 2, torch.Generator().manual_seed(0))
    vector, column = (model.elbo(X, y, noise=noise) for y in (Y[:, 0], Y))
    assert torch.equal(vector, column)
