"""Feature kernels, and compositions of kernels as feature maps and as functions."""

import copy
import pickle
import unittest

import pytest
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.transforms import Normalize
from botorch.sampling.pathwise import get_matheron_path_model
from botorch.sampling.pathwise.features import gen_kernel_features
from botorch.sampling.pathwise.features.maps import FeatureMap, KernelFeatureMap
from gpytorch.kernels import (
    AdditiveKernel,
    LinearKernel,
    MaternKernel,
    PolynomialKernel,
    ProductKernel,
    RBFKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import BernoulliLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import GammaPrior
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.kernels.compositions import (
    ExactFeatureMap,
    draw_feature_map,
    same_inputs,
)
from gpbridge.kernels.feature import FeatureKernel
from gpbridge.pathwise import draw_path_model, draw_posterior_paths, draw_prior_paths

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def moments(x):
    """Works for any number of columns: a map without weights."""
    return torch.stack([x.sum(-1), x.square().sum(-1), torch.ones_like(x[..., 0])], -1)


class Padded(nn.Module):
    """Accepts any number of columns, with layers nested in layers."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        inner = nn.Sequential(nn.Linear(10, 5), nn.Tanh())
        self.layers = nn.Sequential(inner, nn.Sequential(nn.Linear(5, 60)))
        for p in self.layers.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=generator)

    def forward(self, x):
        return self.layers(nn.functional.pad(x, (0, 10 - x.shape[-1])))


class TestFunctionContract(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs):
        return FeatureKernel(moments, **kwargs)


class TestNetworkContract(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs):
        return FeatureKernel(Padded(), freeze=False, **kwargs)


class TestScaledContract(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        batch_shape = batch_shape or torch.Size()
        kernel = FeatureKernel(Padded(), batch_shape=batch_shape, **kwargs)
        return ScaleKernel(kernel, batch_shape=batch_shape)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def X(generator):
    return torch.rand(12, 2, dtype=torch.float64, generator=generator)


@pytest.fixture
def Y(X):
    return torch.sin(4 * X[:, :1]) + X[:, 1:]


def network(f=5):
    return nn.Sequential(nn.Linear(2, f), nn.Tanh()).double()


def test_default_variance_is_one(X):
    phi = moments(X)
    torch.testing.assert_close(FeatureKernel(moments)(X).to_dense(), phi @ phi.mT)


@pytest.mark.parametrize("f", [5, 40])
def test_covariance_is_the_variance_times_the_inner_product(X, f):
    net = network(f)
    kernel = FeatureKernel(net).double()
    kernel.variance = 0.3
    phi = net(X)
    expected = 0.3 * phi @ phi.mT
    torch.testing.assert_close(kernel(X).to_dense(), expected, **EXACT)
    torch.testing.assert_close(kernel(X, X[:3]).to_dense(), expected[:, :3], **EXACT)
    torch.testing.assert_close(kernel(X, diag=True), expected.diagonal(), **EXACT)


def test_one_point_and_no_point(X):
    kernel = FeatureKernel(network(1)).double()
    assert kernel(X[:1]).to_dense().shape == (1, 1)
    assert kernel(X[:0]).shape == (0, 0)


def test_posterior_equals_bayesian_linear_regression(X, Y):
    net = network()
    kernel = FeatureKernel(net).to(X)
    kernel.variance = 0.7
    model = SingleTaskGP(X, Y, covar_module=kernel, outcome_transform=None)
    model.likelihood.noise = 0.01
    Xt = X[:4] + 0.1
    posterior = model.posterior(Xt)
    # Rasmussen and Williams 2006, eqs. (2.8) and (2.9).
    phi, phi_t = net(X), net(Xt)
    A = phi.mT @ phi / 0.01 + torch.eye(5).to(X) / 0.7
    mean = phi_t @ torch.linalg.solve(A, phi.mT @ Y / 0.01)
    covariance = phi_t @ torch.linalg.solve(A, phi_t.mT)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        posterior.distribution.covariance_matrix, covariance, rtol=1e-6, atol=1e-8
    )


def test_batch_shares_the_features_and_keeps_active_dims(X):
    wide = torch.cat([X, X.flip(0)], dim=-1)
    kernel = FeatureKernel(
        network(), batch_shape=torch.Size([2]), active_dims=[0, 2]
    ).double()
    kernel.variance = torch.tensor([0.5, 2.0])
    whole = kernel(wide).to_dense()
    assert whole.shape == (2, 12, 12)
    torch.testing.assert_close(kernel[1](wide).to_dense(), whole[1], **EXACT)
    expanded = kernel.expand_batch(torch.Size([3, 2]))
    torch.testing.assert_close(expanded(wide).to_dense()[2], whole, **EXACT)


@pytest.mark.parametrize("freeze", [True, False])
def test_fitting_moves_only_what_it_should(X, Y, freeze):
    net = nn.Sequential(network(), nn.BatchNorm1d(5).double(), nn.Dropout(0.5))
    before = copy.deepcopy(net.state_dict())
    kernel = FeatureKernel(net, freeze=freeze)
    model = SingleTaskGP(X, Y, covar_module=kernel)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 3}})
    own = kernel.feature_map.network.state_dict()
    assert all(
        torch.equal(before[name], value) for name, value in net.state_dict().items()
    )
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert torch.equal(own["1.running_mean"], before["1.running_mean"])
    assert torch.equal(own["0.0.weight"], before["0.0.weight"]) is freeze
    assert kernel.variance != 1


def test_gradients_equal_finite_differences_also_where_inputs_coincide(X):
    kernel = FeatureKernel(network()).double()
    x = X[:2].clone().requires_grad_()
    others = X[:2].clone()
    assert torch.autograd.gradcheck(lambda x: kernel(x, others).to_dense(), x)
    assert torch.autograd.gradcheck(lambda x: kernel(x).to_dense(), x)
    assert torch.autograd.gradcheck(lambda x: kernel(x, diag=True), x)


def test_inputs_are_one_only_if_their_gradients_are(X):
    assert same_inputs(X, X) and same_inputs(X, X.clone())
    assert not same_inputs(X, X + 1) and not same_inputs(X, X[:3])
    x = X.clone().requires_grad_()
    assert same_inputs(x[:3], x[:3])
    assert not same_inputs(x, x.detach()) and not same_inputs(x, x * 1)


def test_variance_has_bounds_and_an_optional_prior(X, Y):
    kernel = FeatureKernel(moments, variance_prior=GammaPrior(2.0, 1.0))
    model = SingleTaskGP(X, Y, covar_module=kernel)
    names = [name for name, *_ in model.named_priors()]
    assert "covar_module.variance_prior" in names
    kernel.sample_from_prior("variance_prior")
    assert kernel.variance > 0
    bounds = FeatureKernel(moments).raw_variance_constraint
    assert (bounds.lower_bound, bounds.upper_bound) == (
        pytest.approx(1e-8),
        pytest.approx(1e6),
    )


def test_kernel_survives_copies_pickle_and_state_dict(X):
    kernel = FeatureKernel(network()).double()
    kernel.variance = 0.2
    other = FeatureKernel(network()).double()
    other.load_state_dict(kernel.state_dict())
    expected = kernel(X).to_dense()
    for twin in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel)), other):
        torch.testing.assert_close(twin(X).to_dense(), expected, **EXACT)


def test_a_botorch_feature_map_is_used_as_it_is(X, generator):
    rbf = RBFKernel().double()
    feature_map = draw_feature_map(rbf, 2, 64, generator)
    kernel = FeatureKernel(feature_map).double()
    phi = feature_map(X)
    torch.testing.assert_close(kernel(X).to_dense(), phi @ phi.mT, **EXACT)
    assert kernel.batch_shape == torch.Size() and not list(kernel.sub_kernels())
    assert not kernel.feature_map.kernel.raw_lengthscale.requires_grad
    assert rbf.raw_lengthscale.requires_grad


@pytest.mark.parametrize(
    "make",
    [
        RBFKernel,
        lambda: ScaleKernel(MaternKernel(2.5)),
        lambda: FeatureKernel(moments) * RBFKernel(),
    ],
    ids=["rbf", "scaled matern", "product"],
)
def test_feature_maps_are_fresh_without_a_generator_except_through_botorch(X, make):
    kernel = make().double()
    state = torch.get_rng_state()
    one, other = (draw_feature_map(kernel, 2, 64)(X) for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)

    def seeded():
        torch.manual_seed(4)
        return gen_kernel_features(kernel, num_inputs=2, num_outputs=64)(X)

    assert torch.equal(seeded(), seeded())


def test_float32_inputs_give_float32(X):
    kernel = FeatureKernel(network().float())
    assert kernel(X.float()).to_dense().dtype == torch.float32


COMPOSITIONS = {
    "feature": lambda: FeatureKernel(network()),
    "scaled": lambda: ScaleKernel(FeatureKernel(network())),
    "columns": lambda: ScaleKernel(FeatureKernel(moments, active_dims=[1])),
    "sum": lambda: FeatureKernel(network()) + FeatureKernel(moments),
    "product": lambda: FeatureKernel(network()) * FeatureKernel(moments),
    "scaled sum": lambda: ScaleKernel(
        FeatureKernel(network()) + ScaleKernel(FeatureKernel(moments, active_dims=[0]))
    ),
    "product of sums": lambda: (
        (FeatureKernel(network()) + FeatureKernel(moments)) * FeatureKernel(moments)
    ),
}
RANDOM = {
    "rbf": lambda: RBFKernel(ard_num_dims=2),
    "matern": lambda: ScaleKernel(MaternKernel(1.5, active_dims=[1])),
    "with rbf": lambda: FeatureKernel(network()) + ScaleKernel(RBFKernel()),
    "times rbf": lambda: FeatureKernel(network()) * ScaleKernel(RBFKernel()),
    "rbf times matern": lambda: RBFKernel() * ScaleKernel(MaternKernel(2.5)),
    "everything": lambda: ScaleKernel(
        FeatureKernel(network()) * RBFKernel() * MaternKernel(2.5, active_dims=[0])
        + MaternKernel(0.5)
    ),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_of_finite_features_are_exact(X, name, generator):
    kernel = COMPOSITIONS[name]().double()
    for part in kernel.modules():
        if isinstance(part, ScaleKernel):
            part.outputscale = 0.4
    feature_map = draw_feature_map(kernel, 2, 8, generator)
    phi = feature_map(X)
    assert phi.shape[-1] == feature_map.num_outputs
    torch.testing.assert_close(phi @ phi.mT, kernel(X).to_dense(), **EXACT)
    upstream = gen_kernel_features(kernel, num_inputs=2, num_outputs=8)(X)
    torch.testing.assert_close(upstream @ upstream.mT, kernel(X).to_dense(), **EXACT)


@pytest.mark.parametrize("name", RANDOM)
def test_random_features_converge_to_the_kernel(X, name, generator):
    kernel = RANDOM[name]().double()
    exact = kernel(X).to_dense()
    errors = []
    for num_features in (256, 2**15):
        feature_map = draw_feature_map(kernel, 2, num_features, generator)
        phi = feature_map(X)
        assert phi.shape[-1] == feature_map.num_outputs
        errors.append((phi @ phi.mT - exact).abs().max() / exact.max())
    # 2^14 frequencies: a Monte Carlo standard error of at most 0.008.
    assert errors[1] < 0.03
    assert errors[1] < errors[0]


@pytest.mark.parametrize("join", [torch.add, torch.mul])
def test_batches_of_kernels_have_batches_of_features(X, join, generator):
    batch = torch.Size([2])
    own = FeatureKernel(network(), batch_shape=batch).double()
    own.variance = torch.tensor([0.5, 2.0])
    rbf = ScaleKernel(RBFKernel(batch_shape=batch), batch_shape=batch).double()
    rbf.outputscale = torch.tensor([1.0, 3.0])
    kernel = own + rbf if join is torch.add else own * rbf * MaternKernel(2.5).double()
    feature_map = draw_feature_map(kernel, 2, 2**14, generator)
    phi = feature_map(X)
    assert feature_map.batch_shape == torch.Size([2])
    assert phi.shape == (2, 12, feature_map.num_outputs)
    exact = kernel(X).to_dense()
    torch.testing.assert_close(
        phi @ phi.mT, exact, rtol=0, atol=0.05 * exact.max().item()
    )


def test_paired_frequencies_are_independent(X, generator):
    # Quasi-random points of the same index share their signs in both factors. The
    # product of two RBF kernels with the same lengthscale is one with lengthscale
    # divided by the root of two, whose frequencies have twice the variance.
    kernel = (RBFKernel() * RBFKernel()).double()
    feature_map = draw_feature_map(kernel, 1, 2**12, generator)
    first, second = (part.weight[:, 0] for part in feature_map.fourier)
    agreement = (first.sign() * second.sign()).mean()
    assert agreement.abs() < 4 / len(first) ** 0.5


def posterior_kernels():
    names = ["scaled", "sum", "product"]
    return {name: COMPOSITIONS[name] for name in names} | {
        "with rbf": RANDOM["with rbf"],
        "times rbf": RANDOM["times rbf"],
    }


@pytest.mark.parametrize("name", posterior_kernels())
@pytest.mark.parametrize("upstream", [True, False])
def test_posterior_functions_have_the_moments_of_the_posterior(
    X, Y, name, upstream, generator
):
    model = SingleTaskGP(X, Y, covar_module=posterior_kernels()[name]())
    model.likelihood.noise = 0.05
    Xt = torch.rand(6, 2, dtype=torch.float64, generator=generator)
    size = torch.Size([2048])
    if upstream:
        values = get_matheron_path_model(model.eval(), size)(Xt).squeeze(-1)
    else:
        paths = draw_posterior_paths(model.eval(), size, generator=generator)
        values = paths(Xt)
    posterior = model.posterior(Xt)
    mean, variance = posterior.mean.squeeze(-1), posterior.variance.squeeze(-1)
    std_error = (variance / 2048).sqrt()
    # Four standard errors, and a margin for the finite number of Fourier features.
    margin = 0.05 if "rbf" in name else 0.0
    assert (
        (values.mean(0) - mean).abs() < 4 * std_error + margin * variance**0.5
    ).all()
    ratio = values.var(0) / variance
    assert ((ratio - 1).abs() < 4 * (2 / 2048) ** 0.5 + 2 * margin).all()


def test_prior_functions_have_the_moments_of_the_prior(X, Y, generator):
    kernel = FeatureKernel(network())
    model = SingleTaskGP(X, Y, covar_module=kernel, outcome_transform=None)
    model.mean_module.constant = 2.0
    values = draw_prior_paths(model, torch.Size([4096]), generator=generator)(X)
    covariance = kernel(X).to_dense()
    error = (torch.cov(values.T) - covariance).abs().max()
    assert error < 6 * covariance.max() / 4096**0.5
    assert (values.mean(0) - 2).abs().max() < 4 * (covariance.max() / 4096) ** 0.5


def test_draws_come_from_the_generator_and_leave_the_global_state(X, Y):
    kernel = FeatureKernel(network()) * RBFKernel() + MaternKernel(2.5)
    model = SingleTaskGP(X, Y, covar_module=kernel).eval()
    before = torch.random.get_rng_state()
    paths = [
        draw_posterior_paths(model, generator=torch.Generator().manual_seed(seed))(X)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(paths[0], paths[1])
    assert not torch.equal(paths[0], paths[2])


def test_path_models_are_functions_for_botorch(X, Y, generator):
    single = SingleTaskGP(
        X, Y, covar_module=FeatureKernel(network()), input_transform=Normalize(2)
    ).eval()
    both = torch.cat([Y, -Y], -1)
    batch = torch.Size([2])
    double = SingleTaskGP(
        X, both, covar_module=FeatureKernel(network(), batch_shape=batch)
    ).eval()
    many = ModelListGP(single, SingleTaskGP(X, -Y)).eval()
    for model, m in ((single, 1), (double, 2), (many, 2)):
        draw = draw_path_model(model, generator=generator)
        values = draw.posterior(X[None, :4].expand(3, 4, 2)).mean
        assert values.shape == (3, 4, m)
        torch.testing.assert_close(values[0], draw.posterior(X[:4]).mean, **EXACT)


def test_more_features_than_upstreams_quasi_random_weights_allow(X, Y, generator):
    def wide(x):
        return x.sum(-1, keepdim=True) * torch.linspace(0, 1, 22000).to(x)

    model = SingleTaskGP(X, Y, covar_module=FeatureKernel(wide)).eval()
    assert draw_posterior_paths(model, generator=generator)(X).shape == (12,)


def test_exact_feature_maps_follow_the_hyperparameters(X):
    kernel = FeatureKernel(network()).double()
    feature_map = ExactFeatureMap(kernel, 5)
    before = feature_map(X)
    kernel.variance = 4.0
    torch.testing.assert_close(feature_map(X), 2 * before, **EXACT)


def test_upstreams_registry_knows_sums_and_products():
    for kernel_type in (AdditiveKernel, ProductKernel):
        kernel = kernel_type(RBFKernel(), RBFKernel())
        feature_map = gen_kernel_features(kernel, num_inputs=2, num_outputs=8)
        assert isinstance(feature_map, FeatureMap)
        assert not isinstance(feature_map, KernelFeatureMap)


class TestRefusals:
    def test_feature_map_must_be_callable(self):
        with pytest.raises(TypeError, match="feature_map must be a function, a torch"):
            FeatureKernel(torch.zeros(3))

    def test_batched_maps_are_refused(self, generator):
        rbf = RBFKernel(batch_shape=torch.Size([2]))
        feature_map = draw_feature_map(rbf, 2, 8, generator)
        with pytest.raises(ValueError, match=r"batch_shape \(2,\). A batch of Feature"):
            FeatureKernel(feature_map)

    def test_features_must_keep_the_rows(self, X):
        with pytest.raises(ShapeError, match=r"shape \(12, 2\) gave \(2,\)"):
            FeatureKernel(lambda x: x.sum(0)).double()(X).to_dense()

    def test_features_must_be_a_tensor(self, X):
        with pytest.raises(ShapeError, match="gave <class 'list'>"):
            FeatureKernel(lambda x: [x]).double()(X).to_dense()

    def test_last_dim_is_batch_is_refused(self, X):
        with pytest.raises(NotImplementedError, match="last_dim_is_batch"):
            FeatureKernel(moments).double().forward(X, X, last_dim_is_batch=True)

    def test_odd_numbers_of_fourier_features_are_refused(self, generator):
        with pytest.raises(Exception, match="num_features must be even, a sine and a"):
            draw_feature_map(RBFKernel(), 2, 7, generator)

    def test_huge_products_are_refused(self, generator):
        wide = FeatureKernel(nn.Linear(2, 1024))
        with pytest.raises(MemoryError, match="1048576 columns at 1000 points"):
            draw_feature_map(wide * wide, 2, 8, generator)

    def test_kernels_without_features_are_refused(self, generator):
        kernel = FeatureKernel(moments) + PolynomialKernel(2)
        with pytest.raises(NotImplementedError, match="PolynomialKernel"):
            draw_feature_map(kernel, 2, 8, generator)

    def test_posterior_paths_need_gaussian_noise(self, X, Y):
        model = SingleTaskGP(X, Y, covar_module=LinearKernel()).eval()
        model.covar_module = FeatureKernel(moments).double()
        model.likelihood = BernoulliLikelihood()
        with pytest.raises(NotImplementedError, match="with BernoulliLikelihood"):
            draw_posterior_paths(model)
