"""GP prior VAEs against dense Gaussian algebra."""

import copy
import pickle

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.kernels import (
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import GaussianLikelihood
from torch import nn

from gpbridge.checks import ReliabilityWarning
from gpbridge.dnn import DivergedError, GPPriorVAE, fit_gp_vae
from gpbridge.dnn.inducing_posterior import refine
from gpbridge.storage import load_state, save_state
from gpbridge.testing import assert_module_unchanged
from tests import oracles_weight_space as oracles
from tests.dnn.test_vae import linear, normal, seeded

NOISE = 0.3
LATENT = 2


class Sites(nn.Module):
    """For y = W z + b + noise with orthogonal W: the likelihood of z, normalised."""

    def __init__(self, W, b):
        super().__init__()
        self.layer = linear(W, b)  # nested, and shared with no one

    def forward(self, Y):
        size = self.layer.weight.square().sum(0)
        mean = (Y - self.layer.bias) @ self.layer.weight / size
        return torch.cat([mean, (NOISE / size).log().expand_as(mean)], -1)


def kernel(batch=True):
    shape = torch.Size([LATENT] if batch else [])
    parts = [
        RBFKernel(active_dims=[0], batch_shape=shape),
        PeriodicKernel(active_dims=[1], batch_shape=shape),
    ]
    if batch:
        parts[0].lengthscale = torch.tensor([0.5, 1.5]).reshape(-1, 1, 1)
    return ScaleKernel(parts[0] * parts[1], batch_shape=shape).double()


def problem(n=6, m=None, alpha=0.0, encoder=None, batch=True):
    """A linear decoder, and inducing points at the data or at some of them."""
    W = torch.linalg.qr(normal(4, LATENT, seed=1))[0]
    W, b = W * torch.tensor([1.5, 0.7]).double(), normal(4, seed=2)
    X = torch.rand(n, 2, generator=seeded(3), dtype=torch.float64)
    Y = normal(n, LATENT, seed=4) @ W.T + b + NOISE**0.5 * normal(n, 4, seed=5)
    likelihood = GaussianLikelihood().double()
    likelihood.noise = NOISE
    encoder = Sites(W, b) if encoder is None else encoder
    model = GPPriorVAE(
        encoder, linear(W, b), LATENT, kernel(batch), X[:m], likelihood,
        latent_noise_variance=alpha,
    )  # fmt: skip
    return model, X, Y, W, b


def any_encoder():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2 * LATENT)).double()


def dense_kernels(model, X, Z=None):
    """One kernel matrix per latent dimension."""
    with torch.no_grad():
        K = model.kernel(X, X if Z is None else Z).to_dense()
    return K.expand(LATENT, *K.shape[-2:])


def pieces(model, X, Y, **options):
    """Latent means and variances, and all divergences of the bound, summed."""
    with torch.no_grad():
        q = model.infer(X, Y, **options)
        f = q.marginal(*model._covariances(X))
        alpha = model.latent_noise_variance[:, None]
        mean, variance, local = refine(*f, *model._sites(Y), alpha)
        return mean, variance, q.divergence().sum() + local.sum()


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_with_an_inducing_point_at_every_datum_the_bound_is_the_dense_one(alpha):
    model, X, Y, W, b = problem(alpha=alpha, encoder=any_encoder())
    mean, variance, divergence = pieces(model, X, Y)
    q, total = model.encode(Y), 0.0
    noise = alpha * torch.eye(len(X)).double()
    for i, K in enumerate(dense_kernels(model, X)):
        dense = oracles.gp_prior_vae_terms(K + noise, q.mean[:, i], q.variance[:, i])
        torch.testing.assert_close(mean[i], dense[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            variance[i], dense[1].diagonal(), rtol=1e-5, atol=1e-6
        )
        total = total - dense[2]
    torch.testing.assert_close(divergence, total.detach(), rtol=1e-5, atol=1e-6)
    fit = oracles.linear_elbo_terms(Y, W, b, NOISE, mean.mT, variance.mT)
    expected = fit.mean() - divergence / len(X)
    found = model.elbo(X, Y, num_samples=20_000, generator=seeded())
    # Three standard errors of the draws.
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=0.08)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_where_the_factors_are_exact_the_bound_is_the_evidence(alpha):
    def evidence_and_bound(m):
        model, X, Y, W, b = problem(alpha=alpha, m=m)
        n, d = Y.shape
        covariance = NOISE * torch.eye(n * d).double()
        for K, w in zip(dense_kernels(model, X), W.T, strict=True):
            K = K + alpha * torch.eye(n).double()
            covariance = covariance + torch.kron(K, torch.outer(w, w))
        exact = oracles.gaussian_log_density(Y.reshape(-1), b.repeat(n), covariance) / n
        return exact, model.elbo(X, Y, num_samples=20_000, generator=seeded()).detach()

    exact, bound = evidence_and_bound(None)
    torch.testing.assert_close(bound, exact, rtol=0, atol=0.02)
    exact, bound = evidence_and_bound(2)
    assert bound < exact - 0.05


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_few_inducing_points_give_the_published_sparse_posterior(weight):
    model, X, Y, _, _ = problem(n=9, m=4, encoder=any_encoder())
    mean, variance, divergence = pieces(model, X, Y, num_data=int(9 * weight))
    Z, q, total = X[:4], model.encode(Y), 0.0
    for i in range(LATENT):
        K_mm, K_mn = dense_kernels(model, Z)[i], dense_kernels(model, Z, X)[i]
        K_nn = dense_kernels(model, X)[i]
        sites = q.mean[:, i].detach(), q.variance[:, i].detach()
        mean_u, A, mean_f, cov_f = oracles.sparse_gp_moments(
            K_mm, K_mn, K_nn, *sites, weight
        )
        torch.testing.assert_close(mean[i], mean_f, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance[i], cov_f.diagonal(), rtol=1e-5, atol=1e-6)
        # The published form: a sparse bound of the pseudo-observations, minus the
        # expectation of their factors.
        bound = oracles.hensman_bound(K_mm, K_mn, K_nn, *sites, mean_u, A)
        error = (sites[0] - mean_f).square() + cov_f.diagonal()
        factors = -0.5 * (error / sites[1] + (2 * torch.pi * sites[1]).log())
        total = total - (bound - factors.sum())
    torch.testing.assert_close(divergence, total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_minibatches_are_unbiased_with_all_data_as_support_and_only_then(alpha):
    model, X, Y, W, b = problem(n=8, m=3, alpha=alpha, encoder=any_encoder())
    constant = linear(torch.zeros_like(W), b)  # no noise from latent draws
    model.decoder.load_state_dict(constant.state_dict())
    whole = model.elbo(X, Y)
    halves = list(zip(X.split(4), Y.split(4), strict=True))

    def mean_of(**options):
        return sum(model.elbo(*half, num_data=8, **options) for half in halves) / 2

    torch.testing.assert_close(mean_of(support=(X, Y)), whole)
    assert (mean_of() - whole).abs() > 1e-4
    torch.testing.assert_close(model.elbo(X, Y, support=(X, Y)), whole)
    torch.testing.assert_close(model.elbo(X.flip(0), Y.flip(0)), whole)
    # Any support that the batch has no part in makes one q for all batches.
    torch.testing.assert_close(
        mean_of(support=halves[0]), model.elbo(X, Y, num_data=8, support=halves[0])
    )


def test_the_fit_of_minibatches_is_unbiased_too():
    model, X, Y, _, _ = problem(n=8, m=3, alpha=0.1, encoder=any_encoder())
    whole = model.elbo(X, Y, num_samples=20_000, generator=seeded()).detach()
    parts = [
        model.elbo(
            *half, num_data=8, support=(X, Y), num_samples=20_000, generator=seeded(i)
        ).detach()
        for i, half in enumerate(zip(X.split(4), Y.split(4), strict=True), 1)
    ]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=0, atol=0.02)


def exact_predictive(model, X, Y, W, b, X_new, alpha):
    """Mean and covariance of one new datum each, given all data."""
    n, d = Y.shape
    noise = NOISE * torch.eye(n * d).double()
    K_all, cross = noise, 0.0
    for i, w in enumerate(W.T):
        K = dense_kernels(model, X)[i] + alpha * torch.eye(n).double()
        K_all = K_all + torch.kron(K, torch.outer(w, w))
        cross = cross + torch.kron(dense_kernels(model, X_new, X)[i], torch.outer(w, w))
    prior = NOISE * torch.eye(d).double()
    for i, w in enumerate(W.T):
        k = dense_kernels(model, X_new[:1])[i].squeeze() + alpha
        prior = prior + k * torch.outer(w, w)
    for rows in cross.reshape(len(X_new), d, n * d):
        gain = rows @ torch.linalg.inv(K_all)
        yield b + gain @ (Y - b).reshape(-1), prior - gain @ rows.T


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_predictions_are_the_exact_ones_where_the_factors_are_exact(alpha):
    model, X, Y, W, b = problem(n=6, alpha=alpha)
    X_new = torch.rand(3, 2, generator=seeded(9), dtype=torch.float64)
    Y_new = normal(3, 4, seed=10)
    model.condition(X, Y)
    exact = list(exact_predictive(model, X, Y, W, b, X_new, alpha))
    expected = torch.stack([
        oracles.gaussian_log_density(y, *moments)
        for y, moments in zip(Y_new, exact, strict=True)
    ])  # fmt: skip
    for k in (1, 5):  # the importance weights are constant
        found = model.log_likelihood(X_new, Y_new, k, seeded())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    mean, variance = model.predict(X_new, 20_000, seeded())
    for i, (m, C) in enumerate(exact):
        torch.testing.assert_close(mean[i], m, rtol=0, atol=0.03)
        torch.testing.assert_close(variance[i], C.diagonal(), rtol=0.05, atol=0)


def test_a_worse_encoder_bounds_the_predictive_density_from_below():
    model, X, Y, W, b = problem(n=6, alpha=0.1)
    model.condition(X, Y)
    exact = oracles.gaussian_log_density(
        Y[0] + 1, *next(exact_predictive(model, X, Y, W, b, X[:1], 0.1))
    )
    with torch.no_grad():  # of the proposal only: the posterior is kept
        model.encoder.layer.bias.add_(0.5)
    means = [
        model.log_likelihood(X[:1].expand(400, -1), (Y[:1] + 1).expand(400, -1), k,
                             seeded()).mean()
        for k in (1, 10, 100)
    ]  # fmt: skip
    assert means[0] < means[1] < means[2] < exact + 0.01
    assert exact - means[2] < 0.2 * (exact - means[0])


@pytest.mark.parametrize("batch", [True, False])
def test_the_latent_posterior_is_regression_on_the_pseudo_observations(batch):
    model, X, Y, _, _ = problem(n=6, alpha=0.2, encoder=any_encoder(), batch=batch)
    X_new = torch.rand(4, 2, generator=seeded(9), dtype=torch.float64)
    prior = model.posterior(X_new)
    assert prior.mean.abs().max() == 0 and int(model.num_conditioned) == 0
    torch.testing.assert_close(
        prior.variance, dense_kernels(model, X_new).diagonal(dim1=1, dim2=2).mT
    )
    joint = model.condition(X, Y).posterior(X_new)
    assert joint.mean.shape == (4, LATENT) and int(model.num_conditioned) == 6
    q = model.encode(Y)
    C = joint.covariance_matrix.detach().reshape(4, LATENT, 4, LATENT)
    for i in range(LATENT):
        K, cross = dense_kernels(model, X)[i], dense_kernels(model, X_new, X)[i]
        gain = cross @ torch.linalg.inv(K + torch.diag(q.variance[:, i] + 0.2))
        mean, cov = gain @ q.mean[:, i], dense_kernels(model, X_new)[i] - gain @ cross.T
        torch.testing.assert_close(joint.mean[:, i], mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(C[:, i, :, i], cov.detach(), rtol=1e-5, atol=1e-5)
    # In parts it is the same.
    chunked = copy.deepcopy(model).condition(X, Y, batch_size=4)
    torch.testing.assert_close(chunked.posterior(X_new).mean, joint.mean)


def test_one_kernel_per_dimension_is_a_loop_over_dimensions():
    model, X, Y, _, _ = problem(m=3, encoder=any_encoder(), alpha=0.1)
    mean, variance, divergence = pieces(model, X, Y)
    total = 0.0
    for i in range(LATENT):
        single, _, _, _, _ = problem(m=3, encoder=any_encoder(), alpha=0.1, batch=False)
        scale = model.kernel.base_kernel.kernels[0].lengthscale[i]
        single.kernel.base_kernel.kernels[0].lengthscale = scale
        each = pieces(single, X, Y)
        torch.testing.assert_close(mean[i], each[0][i])
        torch.testing.assert_close(variance[i], each[1][i])
        q = single.infer(X, Y)
        f = q.marginal(*single._covariances(X))
        alpha = single.latent_noise_variance[:, None]
        local = refine(*f, *single._sites(Y), alpha)[2]
        total = total + (q.divergence()[i] + local[i].sum()).detach()
    torch.testing.assert_close(divergence, total)


class ObjectVectors(nn.Module):
    """(number of an object, angle) to (its vector, angle)."""

    def __init__(self, num_objects, width):
        super().__init__()
        self.table = nn.ModuleDict({"vectors": nn.Embedding(num_objects, width)})

    def forward(self, X):
        return torch.cat([self.table["vectors"](X[:, 0].long()), X[:, 1:]], -1)


def rotating(num_objects=4, num_angles=6):
    """Float32 rows that turn with an angle, each object with a phase of its own."""
    angle = torch.arange(num_angles) * 2 * torch.pi / num_angles
    X = torch.cartesian_prod(torch.arange(num_objects).float(), angle)
    phase = X[:, :1] + X[:, 1:] + torch.tensor([0.0, 1.0, 2.0])
    noise = 0.1 * torch.randn(phase.shape, generator=seeded(2))
    return X, phase.sin() + noise


def object_model(**options):
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    product = LinearKernel(active_dims=[0, 1]) * PeriodicKernel(active_dims=[2])
    points = torch.randn(5, 3, generator=seeded())
    return GPPriorVAE(
        encoder, decoder, 2, product, points, embedding=ObjectVectors(4, 2), **options
    )


@pytest.mark.parametrize("support", ["data", "batch"])
def test_training_learns_every_part_and_changes_nothing_of_the_callers(support):
    X, Y = rotating()
    random = torch.get_rng_state()
    model = object_model()
    torch.set_rng_state(random)
    with assert_module_unchanged(model):
        fit = fit_gp_vae(
            model, X, Y, epochs=25, batch_size=10, support=support, learning_rate=1e-2,
            progress=False,
        )  # fmt: skip
    assert torch.equal(random, torch.get_rng_state())
    assert fit.history["elbo"][-1] > fit.history["elbo"][0] + 0.3
    before = dict(model.named_parameters())
    for name, p in fit.model.named_parameters():
        assert not torch.equal(p, before[name]), name
    assert int(fit.model.num_conditioned) == len(X) and not fit.model.training
    assert fit.model.predict(X).mean.shape == Y.shape
    assert fit.model.log_likelihood(X, Y).dtype == torch.float32


def test_the_callers_modules_are_copied():
    X, Y = rotating()
    parts = nn.Linear(3, 4), nn.Linear(2, 3), RBFKernel(), GaussianLikelihood()
    for part in parts:
        part.register_forward_hook(lambda *args: None)
    encoder, decoder, base, likelihood = parts
    with assert_module_unchanged(nn.ModuleList(parts)):
        model = GPPriorVAE(encoder, decoder, 2, base, X[:4, 1:], likelihood)
        fit_gp_vae(model, X[:, 1:], Y, epochs=1)
    assert not model.encoder._forward_hooks and base.lengthscale.dtype == torch.float32


def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path):
    X, Y = rotating()
    options = {"batch_size": 7, "progress": False}
    whole = fit_gp_vae(object_model(), X, Y, epochs=4, generator=seeded(5), **options)
    half = fit_gp_vae(object_model(), X, Y, epochs=2, generator=seeded(5), **options)
    save_state(half.state, tmp_path / "state")
    state = load_state(tmp_path / "state")
    rest = fit_gp_vae(object_model(), X, Y, epochs=2, resume=state, **options)
    assert rest.history == whole.history
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name


def test_copies_predict_the_same():
    X, Y = rotating()
    model = object_model().condition(X, Y)
    expected = model.log_likelihood(X, Y, 3, seeded())
    other = object_model()
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(twin.log_likelihood(X, Y, 3, seeded()), expected)
    mean = model.posterior(X).mean
    single = model.float().posterior(X).mean  # kernel and all
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), mean, rtol=0, atol=1e-2)
    assert torch.isfinite(model.log_likelihood(X, Y, 3, seeded())).all()


def test_predictions_repeat_by_default_and_without_data_they_say_so():
    X, Y = rotating()
    model = object_model()
    with pytest.warns(ReliabilityWarning, match="a prediction of its prior"):
        model.predict(X[:2], 3)
    model.condition(X, Y)
    first = model.predict(X[:2], 3)
    assert torch.equal(first.mean, model.predict(X[:2], 3).mean)
    assert torch.equal(first.mean, model.predict(X[:2], 3, seeded(0)).mean)
    assert not torch.equal(first.mean, model.predict(X[:2], 3, seeded(1)).mean)


def test_one_datum_and_defaults_work():
    X, Y = rotating()
    model = object_model()
    fit = fit_gp_vae(model, X[:1], Y[:1], epochs=1)
    assert torch.isfinite(fit.model.log_likelihood(X, Y)).all()
    assert torch.isfinite(model.elbo(X, Y))
    assert object_model(learn_inducing_points=False).inducing_points.requires_grad is (
        False
    )


def test_the_latent_posterior_has_gradients_in_the_inputs():
    model, X, Y, _, _ = problem()
    x = X[:2].clone().requires_grad_()
    model.condition(X, Y).posterior(x).mean.sum().backward()
    assert x.grad.abs().sum() > 0


def build(width=4, points=(5, 3), kernel=None):
    encoder, decoder = nn.Linear(3, width), nn.Linear(2, 3)
    kernel = MaternKernel() if kernel is None else kernel
    return GPPriorVAE(encoder, decoder, 2, kernel, torch.rand(points))


class Overflowing(nn.Linear):
    """NaN from the third pass in training mode on."""

    passes = 0

    def forward(self, x):
        self.passes += self.training
        return super().forward(x) * (
            torch.nan if self.training and self.passes > 2 else 1
        )


def test_a_fit_that_diverges_keeps_the_last_good_state_conditioned():
    torch.manual_seed(0)
    encoder, X, Y = Overflowing(3, 4), torch.rand(7, 3), torch.rand(7, 3)
    model = GPPriorVAE(encoder, nn.Linear(2, 3), 2, MaternKernel(), torch.rand(5, 3))
    with pytest.raises(DivergedError, match=r"after 2 of 9 epochs.*\.last_good") as e:
        fit_gp_vae(model, X, Y, epochs=9, progress=False)
    good = fit_gp_vae(model, X, Y, epochs=2, progress=False).model
    found = e.value.last_good.model
    assert torch.equal(found.predict(X).mean, good.predict(X).mean)
    assert bool(found.predict(X).mean.isfinite().all())
    model.encoder.passes = 2
    with pytest.raises(DivergedError, match="after 0 of 9 epochs"):
        fit_gp_vae(model, X, Y, epochs=9, progress=False)


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda X, Y: build(width=6).elbo(X, Y), r"n x 4.*latent_dim 2.*\(7, 6\)"),
        (lambda X, Y: build(points=(5, 2)).elbo(X, Y),
         r"X_aux must be ``n x 2``.*\(5, 2\).*shape \(7, 3\)"),
        (lambda X, Y: build(points=(5,)), "inducing_points must be"),
        (lambda X, Y: build(points=(0, 3)), r"one row or more.*\(0, 3\)"),
        (lambda X, Y: build(kernel=RBFKernel(batch_shape=torch.Size([3]))),
         r"latent_dim 2.*batch_shape \(3,\)"),
        (lambda X, Y: build().elbo(X[:3], Y), "numbers of rows must agree"),
        (lambda X, Y: build().elbo(X[:0], Y[:0]), "X_aux has no rows"),
        (lambda X, Y: build().elbo(X / 0, Y), "X_aux contains NaN or Inf"),
        (lambda X, Y: build().elbo(X, Y / 0), "Y contains NaN or Inf"),
        (lambda X, Y: build().elbo(X, Y[:, :2]), "shapes cannot be multiplied"),
        (lambda X, Y: build().elbo(X, Y, num_data=0), "num_data must be"),
        (lambda X, Y: build().infer(X[:3], Y), "numbers of rows must agree"),
        (lambda X, Y: build().infer(X, Y, num_data=0), "num_data must be"),
        (lambda X, Y: build().predict(X[0]), "X_aux must be"),
        (lambda X, Y: fit_gp_vae(build(), X, Y, support="all"),
         "support must be one of 'data', 'batch', but is 'all'"),
        (lambda X, Y: fit_gp_vae(build(), X, Y, epochs=0), "epochs must be"),
        (lambda X, Y: fit_gp_vae(build(), X, Y, prior_learning_rate=0.0),
         "prior_learning_rate must be positive"),
        (lambda X, Y: object_model(latent_noise_variance=-1.0),
         "latent_noise_variance must be positive"),
    ],
)  # fmt: skip
def test_bad_input_is_named(run, message):
    with pytest.raises((ValueError, InputDataError, RuntimeError), match=message):
        run(torch.ones(7, 3), torch.ones(7, 3))
