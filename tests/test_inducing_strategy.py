"""Inter-domain posteriors: averages of the base process's, compositions, refusals."""

import copy

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from botorch.models import SingleTaskVariationalGP
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import PeriodicKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import MultitaskGaussianLikelihood
from gpytorch.variational import (
    CholeskyVariationalDistribution,
    DeltaVariationalDistribution,
    VariationalStrategy,
)

from gpbridge.augmentation import FiniteOrbit
from gpbridge.checks import ShapeError
from gpbridge.inducing_gp import SparseGP
from gpbridge.inducing_strategy import InterdomainVariationalStrategy
from gpbridge.kernels import ConvolutionalKernel, InvariantKernel
from gpbridge.selection.variational_bound import inducing_strategy
from tests import oracles_architecture as dense
from tests.inducing_problems import (
    DOUBLE,
    LMC,
    NAMES,
    M,
    N,
    kernels,
    moments,
    normal,
    rbf,
    settle,
    sparse,
)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_posterior_is_the_average_of_the_base_process(name, scaled):
    """Section 4 of the reference: brute force at all points of the orbits."""
    inner, d, width = kernels(name)
    kernel = ScaleKernel(inner).double() if scaled else inner
    if scaled:
        kernel.outputscale = torch.tensor(2.5, dtype=DOUBLE)
    model, x = sparse(kernel, width).eval(), normal(N, d, seed=2)
    q = model.variational_strategy.variational_distribution
    scale = 2.5 if scaled else 1.0
    weights = inner.augmentation.weights
    mean, covariance = dense.averaged_sparse_posterior(
        lambda a, b: scale * dense.squared_exponential_gram(a, b, 1.5),
        model.variational_strategy.inducing_points.detach(),
        inner.augmentation(x).detach(),
        torch.ones(inner.augmentation.num_samples, dtype=DOUBLE)
        if weights is None
        else weights.detach(),
        *moments(q),
        jitter=1e-6,
    )
    found = moments(model(x))
    assert (found[0] - mean).abs().max() < 1e-10
    assert (found[1] - covariance).abs().max() < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_training_and_prediction_have_the_same_moments_and_gradients(name):
    kernel, d, width = kernels(name)
    model = sparse(kernel, width)
    x = normal(M + 4, d, seed=2)  # more than inducing points: upstream's fused path
    results = []
    for training in (True, False):
        output = model.train(training)(x)
        loss = output.mean.sin().sum() + output.variance.sqrt().sum()
        parameters = [p for n, p in model.named_parameters() if "likelihood" not in n]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append([loss, *(g for g in gradients if g is not None)])
    assert len(results[0]) >= 5
    for first, second in zip(*results, strict=True):
        assert torch.allclose(first, second, rtol=1e-8, atol=1e-10)


def test_without_orbits_the_posterior_is_that_of_upstream():
    model, x = sparse(rbf(), 3), normal(N, 3, seed=2)
    mean, covariance = moments(model.eval()(x))
    peer = copy.deepcopy(model)
    inducing = peer.variational_strategy
    upstream = VariationalStrategy(
        peer, inducing.inducing_points.data, inducing._variational_distribution
    )
    upstream.variational_params_initialized.fill_(1)
    peer.variational_strategy = upstream
    expected = moments(peer.eval()(x))
    # Upstream adds its jitter to the variance of every input as well.
    expected_covariance = expected[1] - 1e-6 * torch.eye(N, dtype=DOUBLE)
    assert (mean - expected[0]).abs().max() < 1e-10
    assert (covariance - expected_covariance).abs().max() < 1e-10


def test_an_orbit_of_one_element_is_no_orbit():
    orbit = FiniteOrbit(torch.arange(3)[None])
    x = normal(N, 3, seed=2)
    plain = moments(sparse(rbf(), 3).eval()(x))
    averaged = moments(sparse(InvariantKernel(rbf(), orbit), 3).eval()(x))
    for first, second in zip(plain, averaged, strict=True):
        assert (first - second).abs().max() < 1e-12


def test_a_sum_has_the_sum_of_the_base_processes():
    """u = g1(Z) + f2(Z): the joint covariance adds, block by block."""
    invariant, d, _ = kernels("turns")
    plain = ScaleKernel(rbf(0.7)).double()
    model = sparse(invariant + plain, d).eval()
    x, Z = normal(N, d, seed=2), model.variational_strategy.inducing_points.detach()
    orbits = invariant.augmentation(x)

    def k1(a, b):
        return dense.squared_exponential_gram(a, b, 1.5)

    def k2(a, b):
        return plain.outputscale.item() * dense.squared_exponential_gram(a, b, 0.7)

    flat = orbits.reshape(-1, d)
    single = k1(Z, flat).reshape(M, N, 4).mean(-1)
    double = k1(flat, flat).reshape(N, 4, N, 4).mean((1, 3))
    expected = dense.whitened_sparse_posterior(
        k1(Z, Z) + k2(Z, Z),
        single + k2(Z, x),
        double + k2(x, x),
        *moments(model.variational_strategy.variational_distribution),
        1e-6,
    )
    for first, second in zip(moments(model(x)), expected, strict=True):
        assert (first - second).abs().max() < 1e-10


def test_a_product_has_the_products_of_the_covariances():
    invariant, d, _ = kernels("turns")
    model = sparse(invariant * rbf(0.7), d).eval()
    x, Z = normal(N, d, seed=2), model.variational_strategy.inducing_points.detach()
    flat = invariant.augmentation(x).reshape(-1, d)
    k = dense.squared_exponential_gram
    expected = dense.whitened_sparse_posterior(
        k(Z, Z, 1.5) * k(Z, Z, 0.7),
        k(Z, flat, 1.5).reshape(M, N, 4).mean(-1) * k(Z, x, 0.7),
        k(flat, flat, 1.5).reshape(N, 4, N, 4).mean((1, 3)) * k(x, x, 0.7),
        *moments(model.variational_strategy.variational_distribution),
        1e-6,
    )
    for first, second in zip(moments(model(x)), expected, strict=True):
        assert (first - second).abs().max() < 1e-10


def test_a_kernel_that_selects_columns_selects_them_once():
    orbit = FiniteOrbit(torch.tensor([[0, 1], [1, 0]]))
    x = normal(N, 4, seed=2)
    chosen = InvariantKernel(rbf(), orbit, active_dims=[1, 3])
    expected = moments(sparse(InvariantKernel(rbf(), orbit), 2).eval()(x[:, [1, 3]]))
    nothing = ScaleKernel(chosen).double()
    nothing.outputscale = torch.tensor(1e-14, dtype=DOUBLE)
    for kernel in (chosen, chosen + nothing):  # by itself, and inside of a sum
        found = moments(sparse(kernel, 2).eval()(x))
        assert (found[0] - expected[0]).abs().max() < 1e-10
        assert (found[1] - expected[1]).abs().max() < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_inputs_is_a_loop_over_it(name):
    kernel, d, width = kernels(name)
    model, x = sparse(kernel, width).eval(), normal(2, 3, N, d, seed=2)
    output = model(x)
    assert output.mean.shape == (2, 3, N)
    one = moments(model(x[1, 2]))
    assert (output.mean[1, 2] - one[0]).abs().max() < 1e-10
    assert (output.covariance_matrix[1, 2] - one[1]).abs().max() < 1e-10


def test_a_permutation_of_the_inputs_permutes_the_posterior():
    kernel, d, width = kernels("convolutional")
    model, x = sparse(kernel, width).eval(), normal(N, d, seed=2)
    order = torch.tensor([3, 0, 4, 1, 2])
    mean, covariance = moments(model(x))
    permuted = moments(model(x[order]))
    assert (permuted[0] - mean[order]).abs().max() < 1e-12
    assert (permuted[1] - covariance[order][:, order]).abs().max() < 1e-12


@pytest.mark.parametrize("batched", [False, True])
def test_several_outputs_are_a_loop_over_outputs(batched):
    """With one kernel for all outputs, or one per output."""
    shape = [2] if batched else []
    base = RBFKernel(batch_shape=torch.Size(shape)).double()
    lengthscales = torch.tensor([1.5, 0.8], dtype=DOUBLE)
    base.lengthscale = lengthscales[:, None, None] if batched else lengthscales[:1]
    kernel = ConvolutionalKernel(base, (4, 4), (2, 2)).double()
    noise = MultitaskGaussianLikelihood(num_tasks=2).double()
    model, x = sparse(kernel, 4, noise, num_outputs=2), normal(N, 16, seed=2)
    strategy = inducing_strategy(model)
    both = model.eval()(x)
    assert both.mean.shape == (N, 2)
    for task, lengthscale in enumerate([1.5, 0.8 if batched else 1.5]):
        own = ConvolutionalKernel(rbf(lengthscale), (4, 4), (2, 2)).double()
        single = SparseGP(own, strategy.inducing_points.data)
        q = single.variational_strategy._variational_distribution
        for name, value in strategy._variational_distribution.named_parameters():
            getattr(q, name).data = value.data[task]
        single.variational_strategy.variational_params_initialized.fill_(1)
        mean, covariance = moments(single.eval()(x))
        assert (both.mean[:, task] - mean).abs().max() < 1e-10
        assert (both.variance[:, task] - covariance.diagonal()).abs().max() < 1e-10


def test_mixed_outputs_have_the_mixture_of_latent_covariances():
    model, x = settle(LMC()).eval(), normal(N, 16, seed=2)
    latent = model.variational_strategy.base_variational_strategy(x)
    mixing = model.variational_strategy.lmc_coefficients  # 2 x 3
    mean = torch.einsum("ln,lt->nt", latent.mean, mixing)
    variance = torch.einsum("ln,lt->nt", latent.variance, mixing.square())
    output = model(x)
    assert (output.mean - mean).abs().max() < 1e-10
    jitter = model.variational_strategy.jitter_val  # the wrapper's own
    assert (output.variance - variance - jitter).abs().max() < 1e-10


def test_the_model_of_botorch_takes_the_strategy():
    kernel, d, width = kernels("convolutional")
    model = SingleTaskVariationalGP(
        normal(N, d),
        num_outputs=1,
        covar_module=ScaleKernel(kernel).double(),
        variational_strategy=InterdomainVariationalStrategy,
        inducing_points=normal(M, width, seed=1),
    ).double()
    posterior = model.posterior(normal(3, d, seed=2))
    assert posterior.mean.shape == (3, 1)
    assert (posterior.variance > 0).all()


def test_the_variance_never_exceeds_the_prior_nor_turns_negative():
    kernel, d, width = kernels("convolutional")
    model = SparseGP(kernel, normal(M, width, seed=1)).eval()
    q = model.variational_strategy._variational_distribution
    q.chol_variational_covar.data.mul_(1e-4)  # u is known
    model.variational_strategy.variational_params_initialized.fill_(1)
    x = normal(40, d, seed=2)
    variance = model(x).covariance_matrix.diagonal()
    assert (variance >= 0).all()
    assert (variance <= kernel(x, diag=True) + 1e-12).all()


def test_a_point_estimate_of_the_inducing_values_has_no_covariance():
    kernel, d, width = kernels("convolutional")
    model = SparseGP(kernel, normal(M, width, seed=1))
    q = DeltaVariationalDistribution(M).double()
    model.variational_strategy._variational_distribution = q
    q.variational_mean.data = normal(M, seed=5)
    model.variational_strategy.variational_params_initialized.fill_(1)
    x = normal(N, d, seed=2)
    known = torch.zeros(M, M, dtype=DOUBLE)
    expected = dense.averaged_sparse_posterior(
        lambda a, b: dense.squared_exponential_gram(a, b, 1.5),
        model.variational_strategy.inducing_points.detach(),
        kernel.augmentation(x).detach(),
        kernel.augmentation.weights.detach(),
        q.variational_mean.detach(),
        known,
        1e-6,
    )
    for first, second in zip(moments(model.eval()(x)), expected, strict=True):
        assert (first - second).abs().max() < 1e-10


def test_inducing_points_of_another_width_are_refused():
    kernel, d, _ = kernels("convolutional")
    model = SparseGP(kernel, normal(M, 9))
    with pytest.raises(ShapeError, match="must have 4 columns.*have 9"):
        model(normal(N, d))


def test_a_covariance_that_is_no_kernel_at_inputs_is_refused():
    class Summed(SparseGP):
        def forward(self, x):
            covariance = self.covar_module(x) + self.covar_module(x)
            return MultivariateNormal(self.mean_module(x), covariance)

    kernel, d, width = kernels("convolutional")
    with pytest.raises(TypeError, match="Put sums and scales into the kernel"):
        Summed(kernel, normal(M, width))(normal(N, d))


@pytest.mark.parametrize(
    "points, error, message",
    [
        (torch.zeros(M), ShapeError, r"must be ``\.\.\. x m x d``"),
        (torch.zeros(M, 4).long(), TypeError, "float32 or float64"),
        (torch.full((M, 4), torch.nan), InputDataError, "NaN or Inf"),
        ([[0.0]], TypeError, "must be a torch.Tensor"),
    ],
)
def test_bad_inducing_points_are_refused(points, error, message):
    q = CholeskyVariationalDistribution(M)
    with pytest.raises(error, match=message):
        InterdomainVariationalStrategy(None, points, q)


def test_a_variational_distribution_of_another_size_is_refused():
    q = CholeskyVariationalDistribution(M + 1)
    with pytest.raises(ShapeError, match="has 7 inducing values, but there are 6"):
        InterdomainVariationalStrategy(None, torch.zeros(M, 4), q)


def test_an_orbit_cannot_be_redrawn_inside_a_prediction():
    kernel, d, width = kernels("rotation")
    model = sparse(kernel, width).eval()
    model(normal(N, d))
    with pytest.raises(RuntimeError, match="cannot be redrawn in eval mode"):
        kernel.augmentation.resample()
    kernel.augmentation.train()
    kernel.augmentation.resample(torch.Generator().manual_seed(0))
    kernel.augmentation.eval()
    with pytest.raises(RuntimeError, match="redrawn while this kernel was in eval"):
        model(normal(N, d)).variance  # noqa: B018


def test_conditioning_on_new_data_is_refused_with_the_reason():
    kernel, d, width = kernels("turns")
    model = sparse(kernel, width).eval()
    with pytest.raises(NotImplementedError, match="No fantasy model"):
        model.get_fantasy_model(normal(1, d), normal(1))
    with pytest.raises(NotImplementedError, match="no pseudo-observations"):
        model.variational_strategy.pseudo_points  # noqa: B018


def test_any_kernel_of_gpytorch_is_its_own_base_kernel():
    model = sparse(PeriodicKernel().double(), 2).eval()
    assert isinstance(model.variational_strategy, InterdomainVariationalStrategy)
    assert model(normal(N, 2)).mean.shape == (N,)


class OfFeatures(SparseGP):
    """The kernel sees features of the inputs: here the same columns, and their sum."""

    def forward(self, x):
        features = torch.cat([x.sum(-1, keepdim=True), x], -1)
        return MultivariateNormal(self.mean_module(x), self.covar_module(features))


def test_columns_of_features_are_refused_since_they_cannot_be_known():
    """K_uu and K_uf would take columns of x, where K_ff takes columns of features."""
    kernel = RBFKernel(active_dims=[0, 1]).double()
    model = OfFeatures(kernel, normal(M, 3, seed=1))
    with pytest.raises(ValueError, match=r"columns \[0, 1\] of features.*unset"):
        model(normal(N, 3))
    with pytest.raises(ValueError, match="columns"):  # not the first time only
        model(normal(N, 3))
    beyond = OfFeatures(RBFKernel(active_dims=[3]).double(), normal(M, 3, seed=1))
    with pytest.raises(ValueError, match=r"columns \[3\] of features"):
        beyond(normal(N, 3))


def test_features_of_all_columns_are_the_inputs_of_the_kernel():
    model = settle(OfFeatures(rbf(), normal(M, 4, seed=1))).eval()
    plain = sparse(rbf(), 4).eval()
    x = normal(N, 3, seed=2)
    features = torch.cat([x.sum(-1, keepdim=True), x], -1)
    for first, second in zip(moments(model(x)), moments(plain(features)), strict=True):
        assert (first - second).abs().max() < 1e-12
