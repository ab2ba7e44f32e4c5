"""Inter-domain posteriors: averages of the base process's, compositions, refusals."""

import copy
import pickle

import gpytorch
import pytest
import torch
from botorch.exceptions.errors import InputDataError
from botorch.models import SingleTaskVariationalGP
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import PeriodicKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import MultitaskGaussianLikelihood, SoftmaxLikelihood
from gpytorch.mlls import VariationalELBO
from gpytorch.models import ApproximateGP
from gpytorch.variational import (
    CholeskyVariationalDistribution,
    DeltaVariationalDistribution,
    IndependentMultitaskVariationalStrategy,
    LMCVariationalStrategy,
    VariationalStrategy,
)

from gpbridge.augmentation import FiniteOrbit, Rotation2d
from gpbridge.checks import ShapeError
from gpbridge.inducing_covariances import (
    inducing_covariance,
    inducing_cross_covariance,
)
from gpbridge.inducing_gp import SparseGP
from gpbridge.inducing_strategy import InterdomainVariationalStrategy
from gpbridge.kernels import ConvolutionalKernel, InvariantKernel
from gpbridge.selection.variational_bound import inducing_strategy
from tests import oracles_architecture as dense

M, N = 6, 5
DOUBLE = torch.float64


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def rbf(lengthscale=1.5, **options):
    kernel = RBFKernel(**options).double()
    # A Python number would pass through float32.
    kernel.lengthscale = torch.tensor(lengthscale, dtype=DOUBLE)
    return kernel


def convolutional(**options):
    kernel = ConvolutionalKernel(rbf(), (4, 4), (2, 2), **options).double()
    kernel.augmentation.patch_weights.data = 1 + 0.3 * normal(9, seed=9)
    return kernel


def kernels(name):
    """A kernel with orbits, and the widths of its inputs and inducing points."""
    if name == "convolutional":
        return convolutional(), 16, 4
    if name == "rotation":
        kernel = InvariantKernel(rbf(), Rotation2d(num_samples=4).double())
        return kernel, 2, 2
    return InvariantKernel(rbf(), FiniteOrbit.quarter_turns((3, 3))), 9, 9


NAMES = ["convolutional", "rotation", "turns"]


def settle(model, seed=5):
    """Give a model variational parameters that are not the prior's."""
    strategy = inducing_strategy(model)
    q = strategy._variational_distribution
    q.variational_mean.data = normal(*q.variational_mean.shape, seed=seed)
    if hasattr(q, "chol_variational_covar"):
        root = 0.3 * normal(*q.chol_variational_covar.shape, seed=seed + 1)
        q.chol_variational_covar.data = root.tril() + 0.5 * torch.eye(M, dtype=DOUBLE)
    strategy.variational_params_initialized.fill_(1)
    return model


def sparse(kernel, width, likelihood=None, **options):
    return settle(SparseGP(kernel, normal(M, width, seed=1), likelihood, **options))


def moments(distribution):
    return distribution.mean.detach(), distribution.covariance_matrix.detach()


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


class LMC(ApproximateGP):
    """Two latent functions mixed into three tasks, as gpytorch's users write it."""

    def __init__(self):
        latent = torch.Size([2])
        q = CholeskyVariationalDistribution(M, latent).double()
        base = InterdomainVariationalStrategy(self, normal(M, 4, seed=1), q)
        super().__init__(LMCVariationalStrategy(base, 3, num_latents=2, latent_dim=-1))
        self.double()
        self.mean_module = gpytorch.means.ConstantMean(batch_shape=latent)
        self.covar_module = ScaleKernel(convolutional(), batch_shape=latent).double()

    def forward(self, x):
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


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


def test_state_dict_pickle_and_deepcopy_keep_the_posterior():
    kernel, d, width = kernels("convolutional")
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    model = sparse(ScaleKernel(kernel).double(), width, softmax, num_outputs=3).eval()
    x = normal(N, d, seed=2)
    expected = model(x).mean
    fresh = ConvolutionalKernel(rbf(0.3), (4, 4), (2, 2)).double()
    other = SparseGP(
        ScaleKernel(fresh).double(),
        torch.zeros(M, width, dtype=DOUBLE),
        SoftmaxLikelihood(num_classes=3, mixing_weights=False),
        num_outputs=3,
    ).eval()
    other.load_state_dict(model.state_dict())
    twins = other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        assert torch.equal(twin(x).mean, expected)
    other.load_state_dict(
        SparseGP(
            ScaleKernel(convolutional()).double(),
            normal(M, width),
            softmax,
            num_outputs=3,
        ).state_dict()
    )
    assert (other(x).mean - expected).abs().max() > 0.1  # nothing kept of before


def test_the_model_follows_its_dtype():
    kernel, d, width = kernels("convolutional")
    model = sparse(kernel, width).eval()
    expected = model(normal(N, d, seed=2)).mean
    single = model.float()(normal(N, d, seed=2).float())
    assert single.mean.dtype == single.variance.dtype == torch.float32
    assert (single.mean - expected).abs().max() < 1e-3  # jitter 1e-4 in float32


def test_inducing_points_of_another_width_are_refused():
    kernel, d, _ = kernels("convolutional")
    model = SparseGP(kernel, normal(M, 9))
    with pytest.raises(ShapeError, match="must have 4 columns.*have 9"):
        model(normal(N, d))


def test_parts_that_see_different_columns_are_refused():
    kernel, d, width = kernels("convolutional")
    model = SparseGP(kernel + rbf(), normal(M, width))
    with pytest.raises(ShapeError, match="see 4, 16 columns"):
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


def test_a_bound_and_its_gradients_are_finite_in_all_parameters():
    kernel, d, width = kernels("convolutional")
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    model = SparseGP(
        ScaleKernel(kernel).double(), normal(M, width), softmax, num_outputs=3
    )
    elbo = VariationalELBO(softmax, model, num_data=20)
    labels = torch.tensor([0, 1, 2, 0, 1])
    elbo(model(normal(N, d)), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_any_kernel_of_gpytorch_is_its_own_base_kernel():
    model = sparse(PeriodicKernel().double(), 2).eval()
    assert isinstance(model.variational_strategy, InterdomainVariationalStrategy)
    assert model(normal(N, 2)).mean.shape == (N,)


def test_the_model_refuses_an_unknown_distribution():
    with pytest.raises(ValueError, match="one of 'cholesky', 'natural'"):
        SparseGP(rbf(), normal(M, 2), distribution="full")


def test_several_outputs_stand_in_the_wrapper_of_gpytorch():
    noise = MultitaskGaussianLikelihood(num_tasks=2)
    model = SparseGP(rbf(), normal(M, 2), noise, num_outputs=2)
    wrapper = model.variational_strategy
    assert isinstance(wrapper, IndependentMultitaskVariationalStrategy)


@pytest.mark.parametrize("name", ["cholesky", "natural", "mean_field"])
def test_the_start_has_the_asked_standard_deviation_and_no_noise(name):
    state = torch.get_rng_state()
    model = SparseGP(rbf(), normal(M, 2), distribution=name, initial_std=0.3)
    model(normal(N, 2))
    q = model.variational_strategy.variational_distribution
    identity = torch.eye(M, dtype=DOUBLE)
    assert (q.covariance_matrix - 0.09 * identity).abs().max() < 1e-8
    assert torch.equal(q.mean, torch.zeros(M, dtype=DOUBLE))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="initial_std must be positive"):
        SparseGP(rbf(), normal(M, 2), initial_std=0.0)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_marginals_are_those_of_the_posterior_and_need_no_other_pairs(num_outputs):
    kernel, d, width = kernels("convolutional")
    model = sparse(kernel, width, num_outputs=num_outputs).eval()
    x = normal(N, d, seed=2)
    joint, alone = model(x), model.marginals(x)
    assert torch.allclose(alone.mean, joint.mean)
    assert torch.allclose(alone.variance, joint.variance)
    kernel._matrix = None  # would be called for pairs of different inputs
    softmax = SoftmaxLikelihood(num_classes=max(2, num_outputs), mixing_weights=False)
    if num_outputs > 1:
        assert softmax(model.marginals(x)).probs.shape[-2:] == (N, 3)
    assert model.marginals(x).rsample().shape == joint.mean.shape


def test_columns_of_a_scale_are_those_of_upstream():
    kernel = ScaleKernel(RBFKernel(), active_dims=[0]).double()
    Z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).double()
    expected = kernel(Z, x).to_dense()
    torch.testing.assert_close(inducing_cross_covariance(kernel, Z, x), expected)
    torch.testing.assert_close(inducing_covariance(kernel, Z), kernel(Z).to_dense())
    orbits = ScaleKernel(
        InvariantKernel(RBFKernel(), Rotation2d(4)), active_dims=[0, 1]
    )
    with pytest.raises(ValueError, match="active_dims on the inner kernel"):
        inducing_covariance(orbits, Z)
