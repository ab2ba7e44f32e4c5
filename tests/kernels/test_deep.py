"""Deep kernels: the upstream contract, equality with the base kernel, and isolation."""

import copy
import pickle
import unittest

import gpytorch
import pytest
import torch
from botorch.acquisition import qLogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP, SingleTaskVariationalGP
from botorch.models.transforms import Normalize
from botorch.optim import optimize_acqf
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.kernels.compositions import draw_feature_map
from gpbridge.kernels.deep import DeepKernel, network_body, parameter_groups

EXACT = {"rtol": 1e-9, "atol": 1e-12}


class Padded(nn.Module):
    """Accepts any number of columns, as the contract of upstream demands."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 3))
        for p in self.layers.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator)

    def forward(self, x):
        return self.layers(nn.functional.pad(x, (0, 10 - x.shape[-1])))


class TestDeepKernelContract(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        base = RBFKernel(batch_shape=batch_shape or torch.Size())
        return DeepKernel(Padded(), base, **kwargs)

    def create_kernel_ard(self, num_dims, batch_shape=None, **kwargs):
        base = RBFKernel(ard_num_dims=3, batch_shape=batch_shape or torch.Size())
        return DeepKernel(Padded(), base, **kwargs)


class TestScaledDeepKernelContract(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        batch_shape = batch_shape or torch.Size()
        base = MaternKernel(nu=2.5, batch_shape=batch_shape)
        deep = DeepKernel(Padded(), base, spectral_norm=0.9, freeze=True, **kwargs)
        return ScaleKernel(deep, batch_shape=batch_shape)


class Mixture(nn.Module):
    """Batch normalisation, dropout and nesting, in one network of tests."""

    def __init__(self, d=2, f=3):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(d, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, f))

    def forward(self, x):
        return self.head(self.block(x))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def X(generator):
    return torch.rand(14, 2, dtype=torch.float64, generator=generator)


@pytest.fixture
def Y(X):
    return torch.sin(4 * X[:, :1]) + X[:, 1:]


def snapshot(network):
    state = {name: value.clone() for name, value in network.state_dict().items()}
    flags = [p.requires_grad for p in network.parameters()]
    hooks = [len(m._forward_hooks) for m in network.modules()]
    return state, flags, hooks, [m.training for m in network.modules()]


def assert_same(before, after):
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name
    assert before[1:] == after[1:]


@pytest.mark.parametrize("base", [RBFKernel, lambda: ScaleKernel(MaternKernel(1.5))])
@pytest.mark.parametrize("spectral_norm", [None, 0.8])
def test_covariance_is_the_base_kernel_of_the_networks_output(X, base, spectral_norm):
    network = Mixture().double().eval()
    kernel = DeepKernel(network, base().double(), spectral_norm=spectral_norm)
    bounded = copy.deepcopy(network)
    if spectral_norm is not None:
        for module in bounded.modules():
            if isinstance(module, nn.Linear):
                top = torch.linalg.svdvals(module.weight)[0]
                module.weight.data *= min(1.0, spectral_norm / top.item())
    features = bounded(X)
    expected = base().double()(features, features[:4]).to_dense()
    torch.testing.assert_close(kernel(X, X[:4]).to_dense(), expected, **EXACT)
    same = base().double()(features).to_dense()
    torch.testing.assert_close(kernel(X).to_dense(), same, **EXACT)
    torch.testing.assert_close(kernel(X, diag=True), same.diagonal(), **EXACT)


def test_default_arguments_leave_the_features_as_they_are(X):
    kernel = DeepKernel(nn.Linear(2, 3).double(), RBFKernel().double())
    assert kernel.network.scale == 1
    assert all(p.requires_grad for p in kernel.parameters())


def test_features_of_train_x_spread_as_in_the_unit_cube(X):
    network = nn.Sequential(nn.Linear(2, 5), nn.Tanh()).double()
    kernel = DeepKernel(network, RBFKernel(), train_X=X)
    features = kernel.network(X)
    mean_variance = features.var(0, unbiased=False).mean()
    torch.testing.assert_close(
        mean_variance, torch.tensor(1 / 12, dtype=X.dtype), **EXACT
    )
    assert kernel.dtype == torch.float64


def test_scale_does_not_depend_on_what_the_kernel_sees_later(X):
    kernel = DeepKernel(Mixture().double(), RBFKernel(), train_X=X)
    before = kernel(X[:3], X[:2]).to_dense()
    kernel.train()
    kernel(100 * X).to_dense()
    kernel.eval()
    torch.testing.assert_close(kernel(X[:3], X[:2]).to_dense(), before, **EXACT)


def test_scale_travels_in_the_state_dict(X):
    network = Mixture().double()
    kernel = DeepKernel(network, RBFKernel(), train_X=X)
    other = DeepKernel(Mixture().double(), RBFKernel().double())
    other.load_state_dict(kernel.state_dict())
    torch.testing.assert_close(other(X).to_dense(), kernel(X).to_dense(), **EXACT)


def test_batch_of_inputs_equals_a_loop(X):
    kernel = DeepKernel(Mixture().double(), RBFKernel().double())
    stacked = torch.stack([X, 2 * X])
    expected = torch.stack([kernel(X).to_dense(), kernel(2 * X).to_dense()])
    torch.testing.assert_close(kernel(stacked).to_dense(), expected, **EXACT)
    assert kernel(X[:0]).shape == (0, 0)


def test_indexing_a_batch_keeps_active_dims(X):
    base = RBFKernel(batch_shape=torch.Size([2])).double()
    base.lengthscale = torch.tensor([0.3, 2.0]).double().reshape(2, 1, 1)
    wide = torch.cat([X, X], dim=-1)
    kernel = DeepKernel(Mixture().double(), base, active_dims=[1, 3])
    second = kernel[1]
    assert second.batch_shape == torch.Size([])
    expected = kernel(wide).to_dense()[1]
    torch.testing.assert_close(second(wide).to_dense(), expected, **EXACT)
    expanded = kernel.expand_batch(torch.Size([3, 2]))
    assert expanded.batch_shape == torch.Size([3, 2])
    torch.testing.assert_close(expanded(wide).to_dense()[2, 1], expected, **EXACT)


def test_spectral_norm_holds_after_the_weights_have_moved(X):
    kernel = DeepKernel(Mixture().double(), RBFKernel().double(), spectral_norm=0.5)
    for p in kernel.network.parameters():
        p.data = 10 * torch.ones_like(p)
    bounded = kernel.network._bounded_weights()
    assert set(bounded) == {"block.0.weight", "head.1.weight"}
    for weight in bounded.values():
        norm = torch.linalg.svdvals(weight)[0]
        torch.testing.assert_close(norm, torch.tensor(0.5).double(), **EXACT)


def test_images_are_unflattened_and_convolutions_bounded(X):
    network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten()).double()
    kernel = DeepKernel(
        network, RBFKernel().double(), input_shape=(1, 3, 4), spectral_norm=1.0
    )
    images = torch.rand(2, 5, 12).double()
    assert kernel(images).to_dense().shape == (2, 5, 5)


@pytest.mark.parametrize("freeze", [True, False])
def test_fitting_moves_only_what_it_should(X, Y, freeze):
    network = Mixture()
    calls = []
    network.register_forward_hook(lambda *args: calls.append(1))
    before = snapshot(network)
    kernel = DeepKernel(network, RBFKernel(), freeze=freeze, train_X=X)
    own = snapshot(kernel.network)
    model = SingleTaskGP(X, Y, covar_module=kernel)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 3}})
    mll.train()
    assert not any(m.training for m in kernel.network.network.modules())
    assert not calls, "the copy must not run the caller's hooks"
    assert_same(before, snapshot(network))
    now = kernel.network.state_dict()
    statistics = [name for name in now if "running" in name or "tracked" in name]
    assert all(torch.equal(own[0][name], now[name]) for name in statistics)
    weights = [name for name, _ in kernel.network.named_parameters()]
    moved = any(not torch.equal(own[0][name], now[name]) for name in weights)
    assert moved is not freeze


def test_kernel_gradients_equal_finite_differences(X):
    kernel = DeepKernel(
        nn.Sequential(nn.Linear(2, 3), nn.Tanh()).double(),
        RBFKernel().double(),
        spectral_norm=0.4,
    )
    x = X[:2].clone().requires_grad_()
    others = X[:2].clone()  # equal in value, another point for the derivative
    assert torch.autograd.gradcheck(lambda x: kernel(x, others).to_dense(), x)
    assert torch.autograd.gradcheck(lambda x: kernel(x).to_dense(), x)


def test_model_survives_copies_pickle_and_state_dict(X, Y):
    def build():
        kernel = DeepKernel(Mixture(), RBFKernel(), train_X=X, spectral_norm=0.9)
        return SingleTaskGP(X, Y, covar_module=kernel, input_transform=Normalize(2))

    model = build().eval()
    expected = model.posterior(X[:5])
    other = build()
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other.eval()):
        posterior = twin.posterior(X[:5])
        torch.testing.assert_close(posterior.mean, expected.mean, **EXACT)
        torch.testing.assert_close(posterior.variance, expected.variance, **EXACT)


def test_two_outputs_share_the_network(X, Y):
    base = RBFKernel(batch_shape=torch.Size([2]))
    kernel = DeepKernel(Mixture(), base, train_X=X)
    model = SingleTaskGP(X, torch.cat([Y, -Y], -1), covar_module=kernel)
    posterior = model.posterior(X[None, :4])
    assert posterior.mean.shape == (1, 4, 2)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    loss = mll(model.train()(*model.train_inputs), model.train_targets).sum()
    loss.backward()
    assert kernel.network.network.head[1].weight.grad.abs().max() > 0


def test_acquisition_functions_optimise_through_the_network(X, Y):
    kernel = DeepKernel(Mixture(), RBFKernel(), freeze=True, train_X=X)
    model = SingleTaskGP(X, Y, covar_module=kernel)
    acquisition = qLogExpectedImprovement(model, best_f=Y.max())
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
    candidate, value = optimize_acqf(
        acquisition, bounds, q=2, num_restarts=2, raw_samples=8,
        options={"maxiter": 5},
    )  # fmt: skip
    assert candidate.shape == (2, 2)
    assert torch.isfinite(value)


def test_conditioning_equals_refitting_without_search(X, Y):
    kernel = DeepKernel(Mixture(), RBFKernel(), freeze=True, train_X=X)
    model = SingleTaskGP(X[:10], Y[:10], covar_module=kernel, outcome_transform=None)
    model.posterior(X[:2])
    grown = model.condition_on_observations(X[10:], Y[10:])
    whole = SingleTaskGP(X, Y, covar_module=kernel, outcome_transform=None)
    whole.likelihood, whole.mean_module = model.likelihood, model.mean_module
    test = X[:3] + 0.1
    got, expected = grown.posterior(test), whole.posterior(test)
    torch.testing.assert_close(got.mean, expected.mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got.variance, expected.variance, rtol=1e-6, atol=1e-9)


def test_variational_gp_trains_the_network(X, Y):
    kernel = DeepKernel(Mixture(), RBFKernel(), train_X=X)
    model = SingleTaskVariationalGP(X, Y, covar_module=kernel, inducing_points=6)
    mll = gpytorch.mlls.VariationalELBO(model.likelihood, model.model, len(X))
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-2, 1e-2))
    weight = kernel.network.network.head[1].weight
    before, losses = weight.detach().clone(), []
    model.train()
    for _ in range(15):
        optimizer.zero_grad()
        loss = -mll(model(X), Y.squeeze(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(before, weight)
    assert model.eval().posterior(X[:3]).mean.shape == (3, 1)


def test_frozen_weights_are_in_no_parameter_group(X, Y):
    network = Mixture()
    joint = DeepKernel(network, RBFKernel())
    model = SingleTaskGP(X, Y, covar_module=ScaleKernel(joint))
    groups = parameter_groups(model, 1e-3, 1e-2)
    assert [group["lr"] for group in groups] == [1e-3, 1e-2]
    assert len(groups[0]["params"]) == len(list(network.parameters()))
    free = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(free)
    frozen = SingleTaskGP(
        X, Y, covar_module=DeepKernel(network, RBFKernel(), freeze=True)
    )
    assert [g["lr"] for g in parameter_groups(frozen, 1e-3, 1e-2)] == [1e-2]


def test_the_network_body_is_everything_but_the_last_layer(X):
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    torch.testing.assert_close(
        network[2](network_body(network)(X)), network(X), **EXACT
    )


def test_feature_map_reproduces_the_kernel(X, generator):
    kernel = ScaleKernel(
        DeepKernel(Mixture(), RBFKernel(), train_X=X, active_dims=[0, 1])
    ).to(X)
    phi = draw_feature_map(kernel, 2, 4096, generator)(X)
    torch.testing.assert_close(phi @ phi.mT, kernel(X).to_dense(), rtol=0, atol=5e-3)


def test_float32_data_gives_a_float32_kernel(X):
    kernel = DeepKernel(Mixture().double(), RBFKernel(), train_X=X.float())
    assert kernel(X.float()).to_dense().dtype == torch.float32


class TestRefusals:
    def test_batch_shape_belongs_to_the_base_kernel(self):
        with pytest.raises(ValueError, match=r"batch shape of \(2,\). Pass it to base"):
            DeepKernel(nn.Linear(2, 2), RBFKernel(), batch_shape=torch.Size([2]))

    def test_base_kernel_must_be_a_kernel(self):
        with pytest.raises(TypeError, match="base_kernel must be a gpytorch kernel"):
            DeepKernel(nn.Linear(2, 2), nn.Linear(2, 2))

    def test_network_must_be_a_module(self):
        with pytest.raises(
            TypeError, match="network must be a torch.nn.Module, but is"
        ):
            DeepKernel(torch.tanh, RBFKernel())

    def test_features_must_be_one_row_per_point(self, X):
        kernel = DeepKernel(nn.Unflatten(-1, (1, 2)), RBFKernel())
        with pytest.raises(ShapeError, match=r"gave \(14, 1, 2\). End it with"):
            kernel(X).to_dense()

    def test_constant_features_have_no_scale(self, X):
        network = nn.Linear(2, 2)
        nn.init.zeros_(network.weight)
        with pytest.raises(ValueError, match="features do not vary over the 14 rows"):
            DeepKernel(network, RBFKernel(), train_X=X)

    def test_fresh_randomness_is_refused(self, X):
        class Noisy(nn.Linear):
            def forward(self, x):
                return super().forward(x) + torch.randn(len(x), 2).to(x)

        with pytest.raises(ValueError, match="draws fresh randomness per call"):
            DeepKernel(Noisy(2, 2), RBFKernel(), train_X=X)

    def test_mixing_rows_is_refused(self, X):
        class Centred(nn.Linear):
            def forward(self, x):
                return super().forward(x - x.mean(0))

        with pytest.raises(ValueError, match="mixes rows"):
            DeepKernel(Centred(2, 2), RBFKernel(), train_X=X)

    def test_broken_weights_are_refused(self, X):
        network = nn.Linear(2, 2)
        network.weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="returns NaN or Inf on train_X"):
            DeepKernel(network, RBFKernel(), train_X=X)

    def test_spectral_norm_must_be_positive(self):
        with pytest.raises(ValueError, match="spectral_norm must be positive"):
            DeepKernel(nn.Linear(2, 2), RBFKernel(), spectral_norm=0.0)

    def test_learning_rates_must_be_positive(self):
        kernel = DeepKernel(nn.Linear(2, 2), RBFKernel())
        with pytest.raises(ValueError, match="learning_rate must be positive"):
            parameter_groups(kernel, 0.0, 0.1)

    @pytest.mark.parametrize(
        "network", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())]
    )
    def test_body_needs_a_head(self, network):
        with pytest.raises(TypeError, match="ends with a torch.nn.Linear, but found"):
            network_body(network)

    def test_last_dim_is_batch_is_refused(self, X):
        kernel = DeepKernel(nn.Linear(2, 2), RBFKernel()).double()
        with pytest.raises(NotImplementedError, match="last_dim_is_batch"):
            kernel.forward(X, X, last_dim_is_batch=True)
