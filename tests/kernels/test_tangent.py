"""The tangent kernel: upstream's contract, a dense oracle, and its life in gpytorch."""

import copy
import pickle
import unittest

import pytest
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP, SingleTaskVariationalGP
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.means import MultitaskMean, ZeroMean
from gpytorch.mlls import ExactMarginalLogLikelihood, VariationalELBO
from gpytorch.models import ExactGP
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase
from linear_operator.operators import DiagLinearOperator
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.functional import FunctionalNet
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.kernels.feature_gram import FeatureGramOperator
from gpbridge.testing import (
    assert_gradients_match_finite_differences,
    assert_module_unchanged,
)
from tests import oracles
from tests.cases import NETS, SLOW

EXACT = {"rtol": 1e-9, "atol": 1e-12}
REPRESENTATIONS = ("auto", "weight", "function", "matrix_free")
every_representation = pytest.mark.parametrize("representation", REPRESENTATIONS)


class Padded(nn.Module):
    """Takes any width up to ten, since upstream's contract feeds several."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 1))
        for p in self.layers.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator)

    def forward(self, x):
        return self.layers(nn.functional.pad(x, (0, 10 - x.shape[-1])))


class TestDefaults(BaseKernelTestCase, unittest.TestCase):
    options = {}

    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        batch_shape = torch.Size() if batch_shape is None else batch_shape
        kernel = NeuralTangentKernel(
            Padded(), batch_shape=batch_shape, **self.options, **kwargs
        )
        if len(batch_shape):  # so that the kernels of a batch differ
            shape = kernel.prior_variance.shape
            kernel.prior_variance = torch.linspace(0.5, 2, shape.numel()).reshape(shape)
        return kernel


class TestWeightSpace(TestDefaults):
    options = {"representation": "weight", "groups": "layer"}


class TestFunctionSpace(TestDefaults):
    options = {"representation": "function", "groups": "tensor"}


class TestLayerByLayer(TestDefaults):
    options = {"representation": "function", "method": "layers"}


class TestDenseJacobian(TestDefaults):
    options = {"representation": "function", "method": "dense"}


class TestTrainableNetwork(TestDefaults):
    options = {"freeze": False}


class TestMatrixFree(TestDefaults):
    options = {"representation": "matrix_free"}

    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        if batch_shape is not None and len(batch_shape):
            self.skipTest("refused by message, see below")
        return super().create_kernel_no_ard(batch_shape, **kwargs)


class TestScaledSum(TestDefaults):
    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        batch_shape = torch.Size() if batch_shape is None else batch_shape
        tangent = super().create_kernel_no_ard(batch_shape)
        both = tangent + MaternKernel(nu=2.5, batch_shape=batch_shape)
        return ScaleKernel(both, batch_shape=batch_shape, **kwargs)

    def test_kernel_getitem_broadcast(self):
        self.skipTest("upstream's own sums of batched kernels cannot be indexed so")


def shaped(case, X):
    return X if case.input_shape is None else X.reshape(-1, *case.input_shape)


# -- the matrix -----------------------------------------------------------------------


@SLOW
@pytest.mark.parametrize("name", NETS)
def test_it_is_the_product_of_jacobians(name):
    torch.manual_seed(1)
    case = NETS[name]
    net = case.network(case.outputs[-1])
    frozen = FunctionalNet(net, input_shape=case.input_shape)
    X, Z, paired = (case.inputs(4, seed=seed) for seed in range(3))
    J, J_other, J_paired = (
        oracles.tangent_rows(net, shaped(case, x), 0.6) for x in (X, Z, paired)
    )
    for representation in REPRESENTATIONS[1:]:  # automatic is one of these
        kernel = NeuralTangentKernel(frozen, representation=representation)
        kernel.prior_variance = 0.6
        torch.testing.assert_close(kernel(X).to_dense(), J @ J.T, **EXACT)
        torch.testing.assert_close(kernel(X, Z).to_dense(), J @ J_other.T, **EXACT)
        torch.testing.assert_close(kernel(X, diag=True), (J * J).sum(-1), **EXACT)
        diagonal = kernel(X, paired, diag=True)
        torch.testing.assert_close(diagonal, (J * J_paired).sum(-1), **EXACT)


def mlp(m=1, width=6):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, m)).double()


def points(n, *batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, n, 3, generator=generator, dtype=torch.float64)


GROUPS = {
    "all": ("all", [["0.weight", "0.bias", "2.weight", "2.bias"]]),
    "layer": ("layer", [["0.weight", "0.bias"], ["2.weight", "2.bias"]]),
    "tensor": ("tensor", [["0.weight"], ["0.bias"], ["2.weight"], ["2.bias"]]),
    "lists": (
        [["2.bias", "0.weight"], ["0.bias"], ["2.weight"]],
        [["2.bias", "0.weight"], ["0.bias"], ["2.weight"]],
    ),
}


def test_groups_may_be_a_generator():
    own = [[name] for name, _ in mlp().named_parameters()]
    kernel = NeuralTangentKernel(mlp(), groups=(group for group in own))
    assert kernel.groups == own


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("groups", GROUPS)
@every_representation
def test_groups_have_a_variance_each(groups, representation, m):
    option, names = GROUPS[groups]
    net, X = mlp(m), points(5)
    kernel = NeuralTangentKernel(net, groups=option, representation=representation)
    assert kernel.groups == names
    variances = torch.linspace(0.3, 1.7, len(names), dtype=torch.float64)
    kernel.prior_variance = variances
    torch.testing.assert_close(kernel.prior_variance, variances, **EXACT)
    expected = 0.0
    for s, group in zip(variances, names, strict=True):
        J = oracles.jacobian(net, X, group).flatten(0, 1)
        expected = expected + s * J @ J.T
    torch.testing.assert_close(kernel(X).to_dense(), expected, **EXACT)
    torch.testing.assert_close(kernel(X, diag=True), expected.diagonal(), **EXACT)


@pytest.mark.parametrize("representation", ["auto", "weight", "function"])
@pytest.mark.parametrize("m", [1, 2])
def test_a_covariance_of_weights_takes_the_place_of_the_diagonal(representation, m):
    net, X, Z = mlp(m), points(5), points(4, seed=1)
    p = sum(w.numel() for w in net.parameters())
    root = torch.randn(p, p, dtype=torch.float64)
    S = root @ root.T / p
    kernel = NeuralTangentKernel(
        net, weight_covariance=S, representation=representation
    )
    kernel.prior_variance = 0.7
    J = oracles.jacobian(net, X).flatten(0, 1)
    J_other = oracles.jacobian(net, Z).flatten(0, 1)
    loose = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(kernel(X).to_dense(), 0.7 * J @ S @ J.T, **loose)
    torch.testing.assert_close(
        kernel(X, Z).to_dense(), 0.7 * J @ S @ J_other.T, **loose
    )
    diagonal = (0.7 * J @ S @ J.T).diagonal()
    torch.testing.assert_close(kernel(X, diag=True), diagonal, **loose)


def test_a_diagonal_covariance_is_one_variance_per_weight():
    net, X = mlp(), points(5)
    variances = torch.linspace(0.1, 2, 31, dtype=torch.float64)
    J = oracles.tangent_rows(net, X, variances)
    for representation in ("weight", "function"):
        kernel = NeuralTangentKernel(
            net,
            weight_covariance=DiagLinearOperator(variances),
            representation=representation,
        )
        torch.testing.assert_close(kernel(X).to_dense(), J @ J.T, **EXACT)


@pytest.mark.parametrize("parameters", ["last_layer", ["0"], lambda n: "bias" in n])
@every_representation
def test_only_the_chosen_weights_are_random(parameters, representation):
    net, X = mlp(2), points(4)
    names = {
        "last_layer": ["2.weight", "2.bias"],
        "0": ["0.weight", "0.bias"],
    }.get(str(parameters[0]) if isinstance(parameters, list) else parameters)
    names = names or ["0.bias", "2.bias"]
    kernel = NeuralTangentKernel(net, parameters, representation=representation)
    J = oracles.tangent_rows(net, X, 1.0, names)
    torch.testing.assert_close(kernel(X).to_dense(), J @ J.T, **EXACT)


@pytest.mark.parametrize("representation", ["auto", "weight", "function"])
def test_a_batch_of_kernels_shares_the_network(representation):
    net, X = mlp(), points(5)
    shape = torch.Size([2, 3])
    kernel = NeuralTangentKernel(
        net, groups="layer", representation=representation, batch_shape=shape
    )
    variances = torch.linspace(0.3, 1.7, 12, dtype=torch.float64).reshape(2, 3, 2)
    kernel.prior_variance = variances
    whole = kernel(X).to_dense()
    diagonal = kernel(X, diag=True)
    assert whole.shape == (2, 3, 5, 5)
    for i in range(2):
        for j in range(3):
            one = NeuralTangentKernel(
                net, groups="layer", representation=representation
            )
            one.prior_variance = variances[i, j]
            expected = one(X).to_dense()
            torch.testing.assert_close(whole[i, j], expected, **EXACT)
            torch.testing.assert_close(diagonal[i, j], expected.diagonal(), **EXACT)
    batched = points(5, 3)
    torch.testing.assert_close(
        kernel(batched).to_dense()[:, 1],
        kernel[:, 1](batched[1]).to_dense(),
        **EXACT,
    )


@every_representation
def test_a_batch_of_inputs_equals_a_loop(representation):
    kernel = NeuralTangentKernel(mlp(2), representation=representation)
    X, Z = points(4, 2, 3), points(3, 2, 3, seed=1)
    whole, cross = kernel(X).to_dense(), kernel(X, Z).to_dense()
    assert whole.shape == (2, 3, 8, 8) and cross.shape == (2, 3, 8, 6)
    torch.testing.assert_close(whole[1, 2], kernel(X[1, 2]).to_dense(), **EXACT)
    torch.testing.assert_close(
        cross[1, 2], kernel(X[1, 2], Z[1, 2]).to_dense(), **EXACT
    )
    assert kernel(X[:, :, :0], Z).to_dense().shape == (2, 3, 0, 6)
    assert kernel(X[:0]).to_dense().shape == (0, 3, 8, 8)


@every_representation
def test_active_dims_select_the_networks_inputs(representation):
    kernel = NeuralTangentKernel(
        mlp(), representation=representation, active_dims=[3, 0, 4]
    )
    plain = NeuralTangentKernel(mlp(), representation=representation)
    X = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(
        kernel(X).to_dense(), plain(X[:, [3, 0, 4]]).to_dense(), **EXACT
    )


@every_representation
@pytest.mark.parametrize("m", [1, 2])
def test_its_gradient_in_the_inputs_matches_finite_differences(representation, m):
    kernel = NeuralTangentKernel(mlp(m), groups="layer", representation=representation)
    Z = points(2, seed=1)
    for function in (
        lambda X: kernel(X).to_dense(),
        lambda X: kernel(X, Z).to_dense(),
        lambda X: kernel(Z, X).to_dense(),
        lambda X: kernel(X, diag=True),
    ):
        assert_gradients_match_finite_differences(function, points(2))


@every_representation
def test_its_gradient_in_the_variances_is_the_matrix_of_the_group(representation):
    kernel = NeuralTangentKernel(mlp(), groups="layer", representation=representation)
    X, weight = points(4), points(4) @ points(4, seed=3).T
    loss = (kernel(X).to_dense() * weight).sum()
    (gradient,) = torch.autograd.grad(loss, kernel.raw_prior_variance)
    for g, names in enumerate(kernel.groups):
        J = oracles.tangent_rows(mlp(), X, 1.0, names)
        slope = torch.autograd.grad(
            kernel.prior_variance[g], kernel.raw_prior_variance
        )[0][g]
        expected = slope * ((J @ J.T) * weight).sum()
        torch.testing.assert_close(gradient[g], expected, **EXACT)


def test_the_representation_decides_the_operator():
    X = points(40)
    kernels = {r: NeuralTangentKernel(mlp(), representation=r) for r in REPRESENTATIONS}
    operators = {r: k(X).evaluate_kernel() for r, k in kernels.items()}
    assert isinstance(operators["weight"], FeatureGramOperator)
    assert isinstance(operators["auto"], FeatureGramOperator)  # 31 < 40
    assert type(operators["function"]).__name__ == "DenseLinearOperator"
    product = operators["matrix_free"] @ torch.ones(40, 2, dtype=torch.float64)
    expected = operators["function"].to_dense().sum(-1, keepdim=True).expand(40, 2)
    torch.testing.assert_close(product, expected, **EXACT)


def test_features_are_rows_of_the_jacobian():
    kernel = NeuralTangentKernel(mlp(), groups="layer")
    kernel.prior_variance = torch.tensor([0.5, 2.0], dtype=torch.float64)
    X = points(4)
    rows = kernel.features(X)
    torch.testing.assert_close(rows @ rows.T, kernel(X).to_dense(), **EXACT)
    with pytest.raises(
        ShapeError, match="need a network with one output, but this one"
    ):
        NeuralTangentKernel(mlp(2)).features(X)


def test_features_beyond_the_memory_budget_are_refused_and_products_are_not():
    message = (
        r"features of 40 outputs in 31 random weights needs about 0.00 GiB, but the "
        r"budget is .* Choose representation='matrix_free', fewer weights by parameters"
    )
    X, Z = points(40), points(39)
    needed = 2 * 40 * 31 * 8
    free = NeuralTangentKernel(
        mlp(), representation="matrix_free", memory_budget=needed - 1
    )
    expected = free(X).to_dense()
    S = torch.eye(31, dtype=torch.float64)
    for options in ({"representation": "weight"}, {"weight_covariance": S}):
        tight = NeuralTangentKernel(mlp(), memory_budget=needed - 1, **options)
        for call in (
            lambda kernel: kernel(X).to_dense(),
            lambda kernel: kernel(Z, X).to_dense(),
            lambda kernel: kernel.features(X),
        ):
            with pytest.raises(MemoryError, match=message):
                call(tight)
        enough = NeuralTangentKernel(mlp(), memory_budget=needed, **options)
        torch.testing.assert_close(enough(X).to_dense(), expected, **EXACT)
    with pytest.raises(ValueError, match="memory_budget must be positive"):
        NeuralTangentKernel(mlp(), memory_budget=0)


# -- state ----------------------------------------------------------------------------


def test_the_gram_matrices_are_formed_once_and_never_stale(monkeypatch):
    calls = []
    plain = NeuralTangentKernel._features

    def counted(self, x, group):
        calls.append(group)
        return plain(self, x, group)

    monkeypatch.setattr(NeuralTangentKernel, "_features", counted)

    def fresh(X, kernel):
        other = NeuralTangentKernel(kernel.functional, representation="function")
        other.prior_variance = kernel.prior_variance.detach()
        return other(X).to_dense()

    kernel = NeuralTangentKernel(mlp(), representation="function")
    X = points(6)
    for variance in (1.0, 0.5, 2.0):
        kernel.prior_variance = variance
        kernel(X).to_dense()
    assert len(calls) == 1
    X[0] += 1.0  # the same memory, another value
    torch.testing.assert_close(kernel(X).to_dense(), fresh(X, kernel), **EXACT)
    Z = points(6, seed=4)
    torch.testing.assert_close(kernel(Z).to_dense(), fresh(Z, kernel), **EXACT)
    torch.testing.assert_close(kernel(X).to_dense(), fresh(X, kernel), **EXACT)
    state = {
        k: v + 0.3 if v.is_floating_point() else v
        for k, v in kernel.state_dict().items()
        if "bound" not in k
    }
    kernel.load_state_dict(state, strict=False)
    torch.testing.assert_close(kernel(X).to_dense(), fresh(X, kernel), **EXACT)
    kernel.float()
    got = kernel(X.float()).to_dense()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, fresh(X.float(), kernel))
    kernel.double()
    torch.testing.assert_close(kernel(X).to_dense(), fresh(X, kernel), **EXACT)


def test_a_dropped_tensor_does_not_lend_its_address_to_the_next():
    kernel = NeuralTangentKernel(mlp(), representation="function")
    for seed in range(20):
        X = points(6, seed=seed)
        got = kernel(X).to_dense()
        J = oracles.tangent_rows(mlp(), X, 1.0)
        torch.testing.assert_close(got, J @ J.T, **EXACT)
        del X


@pytest.mark.parametrize("representation", ["auto", "weight", "function"])
def test_kept_features_of_the_second_argument_are_never_stale(representation):
    kernel = NeuralTangentKernel(mlp(), representation=representation)
    X, Z = points(40), points(3, seed=1)

    def assert_right():
        net = copy.deepcopy(kernel.functional.network).requires_grad_()
        J, J_other = (oracles.tangent_rows(net, x, 1.0) for x in (Z, X))
        torch.testing.assert_close(kernel(Z, X).to_dense(), J @ J_other.T, **EXACT)
        batched = kernel(Z.expand(2, 3, 3), X.expand(2, 40, 3)).to_dense()
        torch.testing.assert_close(batched[1], J @ J_other.T, **EXACT)

    assert_right()
    assert_right()
    X[0] += 1.0
    assert_right()
    with torch.no_grad():
        for p in kernel.functional.network.parameters():
            p.add_(0.1)
    assert_right()
    state = kernel.state_dict()
    name = next(key for key in state if key.endswith("0.weight"))
    kernel.load_state_dict({**state, name: 2 * state[name]})
    assert_right()
    X = points(40, seed=5)
    assert_right()


def with_covariance(representation, seed=5):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(31, 31, dtype=torch.float64, generator=generator)
    S = root @ root.T / 31
    options = {"weight_covariance": S, "representation": representation}
    return NeuralTangentKernel(mlp(), **options), S


@pytest.mark.parametrize("representation", ["weight", "function"])
def test_a_covariance_written_in_place_is_seen(representation):
    kernel, S = with_covariance(representation)
    X, Z = points(6), points(4, seed=1)
    before = [kernel(X).to_dense(), kernel(Z, X).to_dense(), kernel(X, diag=True)]
    S.mul_(3)
    after = [kernel(X).to_dense(), kernel(Z, X).to_dense(), kernel(X, diag=True)]
    for new, old in zip(after, before, strict=True):
        torch.testing.assert_close(new, 3 * old, **EXACT)


@pytest.mark.parametrize("representation", ["weight", "function"])
def test_a_covariance_is_saved_moved_and_copied_with_the_kernel(representation):
    kernel, S = with_covariance(representation)
    twin, other = with_covariance(representation, seed=6)
    X = points(6)
    expected = kernel(X).to_dense()
    assert (twin(X).to_dense() - expected).abs().max() > 0.1
    twin.load_state_dict(kernel.state_dict())
    torch.testing.assert_close(twin(X).to_dense(), expected, **EXACT)
    for copied in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        copied.load_state_dict(twin.state_dict())
        torch.testing.assert_close(copied(X).to_dense(), expected, **EXACT)
    kernel.float()
    assert kernel.weight_covariance.dtype == torch.float32
    loose = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(kernel(X.float()).to_dense(), expected.float(), **loose)


def test_a_structured_covariance_keeps_its_structure_and_a_batch_shares_it():
    variances = torch.linspace(0.1, 2, 31, dtype=torch.float64)
    S = DiagLinearOperator(variances)
    kernel = NeuralTangentKernel(
        mlp(), weight_covariance=S, batch_shape=torch.Size([2])
    )
    assert isinstance(kernel.weight_covariance, DiagLinearOperator)
    kernel.prior_variance = torch.tensor([[0.5], [2.0]])
    X = points(5)
    both = kernel(X).to_dense()
    torch.testing.assert_close(kernel[1](X).to_dense(), both[1], **EXACT)
    kernel.weight_covariance = None
    plain = NeuralTangentKernel(mlp())(X).to_dense()
    torch.testing.assert_close(kernel(X).to_dense()[0], 0.5 * plain, **EXACT)


@pytest.mark.parametrize("representation", ["auto", "weight", "function"])
def test_weights_that_are_exchanged_are_seen(representation):
    kernel = NeuralTangentKernel(mlp(), representation=representation)
    X, Z = points(6), points(4, seed=1)
    kernel(X).to_dense(), kernel(Z, X).to_dense()
    for factor in (1.5, 0.5, 2.0):  # freed memory is not taken for what was there
        for p in kernel.functional.network.parameters():
            p.data = p.data * factor
        fresh = NeuralTangentKernel(kernel.functional, representation=representation)
        torch.testing.assert_close(kernel(X).to_dense(), fresh(X).to_dense(), **EXACT)
        mine, theirs = kernel(Z, X).to_dense(), fresh(Z, X).to_dense()
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("change", ["move", "load"])
def test_nothing_is_kept_of_a_kernel_that_moves_or_is_loaded(change):
    kernel = NeuralTangentKernel(mlp(), representation="function")
    X = points(6)
    kernel(X).to_dense(), kernel(points(4, seed=1), X).to_dense()
    assert kernel._cache is not None and kernel._train is not None
    if change == "move":
        kernel.to("cpu")
    else:
        kernel.load_state_dict(kernel.state_dict())
    assert kernel._cache is None and kernel._train is None


def test_inputs_are_compared_once_per_call_and_not_with_themselves(monkeypatch):
    calls = []
    plain = torch.equal

    def counted(*tensors):
        calls.append(tensors)
        return plain(*tensors)

    kernel = NeuralTangentKernel(mlp(), groups="tensor", representation="function")
    X, Z = points(6), points(3, seed=1)
    expected = kernel(Z, X).to_dense(), kernel(X).to_dense()
    monkeypatch.setattr(torch, "equal", counted)
    torch.testing.assert_close(kernel(Z, X).to_dense(), expected[0], **EXACT)
    assert len(calls) == 1  # each comparison waits for the device
    torch.testing.assert_close(kernel(X, X.view_as(X)).to_dense(), expected[1], **EXACT)
    assert len(calls) == 2


@every_representation
@pytest.mark.parametrize("method", ["auto", "dense"])
def test_what_inference_mode_keeps_serves_gradients_later(representation, method):
    options = {"representation": representation, "method": method}
    kernel = NeuralTangentKernel(mlp(), **options)
    X, Z = points(40), points(3, seed=1)
    with torch.inference_mode():
        expected = kernel(X).to_dense(), kernel(Z, X).to_dense()
    Z.requires_grad_()
    got = kernel(X).to_dense(), kernel(Z, X).to_dense()
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    sum(matrix.sum() for matrix in got).backward()
    assert Z.grad.abs().max() > 0 and kernel.raw_prior_variance.grad.abs() > 0


@every_representation
def test_copies_and_pickles_are_the_same_kernel(representation):
    kernel = NeuralTangentKernel(mlp(), groups="layer", representation=representation)
    kernel.prior_variance = torch.tensor([0.5, 2.0], dtype=torch.float64)
    X = points(5)
    expected = kernel(X).to_dense()
    for twin in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        torch.testing.assert_close(twin(X).to_dense(), expected, rtol=0, atol=0)
        twin.prior_variance = 1.0
    torch.testing.assert_close(kernel(X).to_dense(), expected, rtol=0, atol=0)


def test_a_state_dict_carries_weights_and_variances(tmp_path):
    kernel = NeuralTangentKernel(mlp(), groups="layer")
    kernel.prior_variance = torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.save(kernel.state_dict(), tmp_path / "kernel.pt")
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    twin = NeuralTangentKernel(other, groups="layer")
    twin.load_state_dict(torch.load(tmp_path / "kernel.pt", weights_only=True))
    X = points(5)
    torch.testing.assert_close(twin(X).to_dense(), kernel(X).to_dense(), **EXACT)


def test_the_network_is_copied_frozen_and_left_in_eval_mode():
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Tanh())
    net = nn.Sequential(net, nn.Linear(8, 1)).double().train()
    net(points(10))
    with assert_module_unchanged(net):
        kernel = NeuralTangentKernel(net)
        kernel.train()
        assert [name for name, p in kernel.named_parameters() if p.requires_grad] == [
            "raw_prior_variance"
        ]
        X = points(5)
        first = kernel(X).to_dense()
        torch.testing.assert_close(kernel(X).to_dense(), first, rtol=0, atol=0)
        with pytest.raises(ValueError, match="random weight left"):
            NeuralTangentKernel(net, parameters=lambda name: False)


def test_two_kernels_can_share_one_frozen_network():
    net = FunctionalNet(mlp())
    both = NeuralTangentKernel(net, groups="layer") + NeuralTangentKernel(net)
    assert both.kernels[0].functional is both.kernels[1].functional is net
    X = points(4)
    J = oracles.tangent_rows(mlp(), X, 1.0)
    torch.testing.assert_close(both(X).to_dense(), 2 * J @ J.T, **EXACT)


# -- inside gpytorch and botorch ------------------------------------------------------


def data(n=15):
    X = points(n)
    return X, torch.sin(2 * X.sum(-1, keepdim=True)) + 0.5 * X[:, :1]


def composed(name, net):
    tangent = NeuralTangentKernel(net)
    tangent.prior_variance = 0.3
    matern = MaternKernel(nu=2.5).double()
    matern.lengthscale = torch.tensor(0.8, dtype=torch.float64)
    if name == "alone":
        return tangent
    if name == "product":
        return tangent * matern
    scaled = ScaleKernel(tangent).double()
    scaled.outputscale = torch.tensor(0.7, dtype=torch.float64)
    return scaled + matern


def dense_composed(name, net, X, Z):
    J, J_other = (oracles.tangent_rows(net, x, 0.3) for x in (X, Z))
    r = 5**0.5 * torch.cdist(X, Z, compute_mode="donot_use_mm_for_euclid_dist") / 0.8
    matern = (1 + r + r**2 / 3) * torch.exp(-r)  # Rasmussen and Williams, eq. (4.17)
    tangent = J @ J_other.T
    return {
        "alone": tangent,
        "product": tangent * matern,
        "sum": 0.7 * tangent + matern,
    }[name]


@pytest.mark.parametrize("name", ["alone", "sum", "product"])
@pytest.mark.parametrize("width", [2, 6])  # p = 11 < n = 15 < p = 31
def test_a_gp_with_it_has_the_dense_posterior_and_evidence(name, width):
    net, (X, Y), X_test = mlp(width=width), data(), points(4, seed=5)
    model = SingleTaskGP(
        X,
        Y,
        likelihood=GaussianLikelihood().double(),
        covar_module=composed(name, net),
        mean_module=ZeroMean(),
        outcome_transform=None,
    )
    model.likelihood.noise = torch.tensor([0.05], dtype=torch.float64)
    C = dense_composed(name, net, X, X) + 0.05 * torch.eye(15).double()
    cross = dense_composed(name, net, X_test, X)
    mean = cross @ torch.linalg.solve(C, Y)
    covariance = dense_composed(name, net, X_test, X_test)
    covariance = covariance - cross @ torch.linalg.solve(C, cross.T)
    posterior = model.posterior(X_test)
    loose = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(posterior.mean, mean, **loose)
    torch.testing.assert_close(
        posterior.distribution.covariance_matrix, covariance, **loose
    )
    model.train()
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    law = torch.distributions.MultivariateNormal(torch.zeros(15).double(), C)
    torch.testing.assert_close(
        15 * mll(model(X), Y[:, 0]), law.log_prob(Y[:, 0]), **loose
    )


@pytest.mark.parametrize("name", ["alone", "sum", "product"])
def test_a_gp_with_it_can_be_fitted(name):
    net, (X, Y) = mlp(), data()
    with assert_module_unchanged(net):
        model = SingleTaskGP(
            X, Y, covar_module=composed(name, net), outcome_transform=None
        )
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        model.train()
        before = mll(model(X), Y[:, 0]).item()
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 20}})
        model.train()
        assert mll(model(X), Y[:, 0]).item() > before + 0.01
        kernel = next(k for k in model.modules() if isinstance(k, NeuralTangentKernel))
        for own, theirs in zip(
            kernel.functional.network.parameters(), net.parameters(), strict=True
        ):
            assert torch.equal(own, theirs)


def test_an_unfrozen_network_is_trained_by_the_fit_and_the_users_is_not():
    net, (X, Y) = mlp(), data()
    with assert_module_unchanged(net):
        kernel = NeuralTangentKernel(net, freeze=False)
        model = SingleTaskGP(X, Y, covar_module=kernel, outcome_transform=None)
        names = [name for name, _ in model.named_parameters()]
        assert any("network" in name for name in names)
        before = kernel(X).to_dense().detach()
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 10}})
        after = kernel(X).to_dense().detach()
        for own, theirs in zip(
            kernel.functional.network.parameters(), net.parameters(), strict=True
        ):
            if own.numel() > 1:  # the last bias moves nothing
                assert not torch.equal(own, theirs)
        assert (after - before).abs().max() > 1e-3
        J = oracles.tangent_rows(kernel.functional.network.requires_grad_(), X, 1.0)
        expected = kernel.prior_variance.detach() * J @ J.T
        torch.testing.assert_close(after, expected.detach(), rtol=1e-7, atol=1e-9)


def test_a_variational_gp_with_it_learns():
    X, Y = data(40)
    model = SingleTaskVariationalGP(
        X,
        Y,
        covar_module=ScaleKernel(NeuralTangentKernel(mlp())) + RBFKernel(),
        inducing_points=10,
        outcome_transform=None,
    ).double()
    mll = VariationalELBO(model.likelihood, model.model, num_data=40)
    optimizer = torch.optim.Adam(mll.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = -mll(model(X), Y[:, 0])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    posterior = model.posterior(points(3, seed=5))
    assert torch.isfinite(posterior.mean).all() and (posterior.variance > 0).all()


class Multitask(ExactGP):
    def __init__(self, X, Y, likelihood, net):
        super().__init__(X, Y, likelihood)
        self.mean_module = MultitaskMean(ZeroMean(), 2)
        self.covar_module = NeuralTangentKernel(net)

    def forward(self, X):
        return MultitaskMultivariateNormal(self.mean_module(X), self.covar_module(X))


def test_several_outputs_serve_a_multitask_gp():
    net, X, X_test = mlp(2), points(10), points(3, seed=5)
    Y = torch.cat([X[:, :1].sin(), X[:, 1:2].cos()], -1)
    likelihood = MultitaskGaussianLikelihood(2, has_task_noise=False).double()
    likelihood.noise = torch.tensor([0.1], dtype=torch.float64)
    model = Multitask(X, Y, likelihood, net).eval()
    J, J_test = (oracles.tangent_rows(net, x, 1.0) for x in (X, X_test))
    C = J @ J.T + 0.1 * torch.eye(20).double()
    cross = J_test @ J.T
    posterior = model(X_test)
    mean = cross @ torch.linalg.solve(C, Y.reshape(-1))
    covariance = J_test @ J_test.T - cross @ torch.linalg.solve(C, cross.T)
    loose = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(posterior.mean.reshape(-1), mean, **loose)
    torch.testing.assert_close(posterior.covariance_matrix, covariance, **loose)


def test_float32_is_close_to_float64():
    net, X = mlp(), points(6)
    exact = NeuralTangentKernel(net)(X).to_dense()
    single = NeuralTangentKernel(copy.deepcopy(net).float())(X.float()).to_dense()
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)
    mixed = NeuralTangentKernel(copy.deepcopy(net).float())(X).to_dense()
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed, exact, rtol=1e-4, atol=1e-5)


# -- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups, message",
    [
        (
            "weights",
            r"groups must be one of 'all', 'layer', 'tensor', but is 'weights'",
        ),
        ([["0.weight"]], r"exactly once, but miss \['0.bias', '2.bias', '2.weight'\]"),
        (
            [["0.weight", "0.bias", "2.weight", "2.bias", "3.bias"]],
            r"name \['3.bias'\] besides",
        ),
    ],
)
def test_groups_that_are_no_partition_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        NeuralTangentKernel(mlp(), groups=groups)


def test_a_group_that_names_a_weight_twice_is_refused():
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    with pytest.raises(ValueError, match="exactly once"):
        NeuralTangentKernel(mlp(), groups=[names, ["0.bias"]])


def test_options_are_checked_at_the_door():
    with pytest.raises(ValueError, match="representation must be one of 'auto'"):
        NeuralTangentKernel(mlp(), representation="dense")
    with pytest.raises(ValueError, match="method must be one of 'auto'"):
        NeuralTangentKernel(mlp(), method="fast")
    with pytest.raises(ShapeError, match="p x p`` with p = 31 random weights, but"):
        NeuralTangentKernel(mlp(), weight_covariance=torch.eye(30))
    with pytest.raises(TypeError, match="must be a torch.nn.Module, but is function"):
        NeuralTangentKernel(lambda x: x)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_variances_must_be_positive(value):
    kernel = NeuralTangentKernel(mlp())
    with pytest.raises(ValueError, match="prior_variance must be positive and finite"):
        kernel.prior_variance = value
    assert kernel.prior_variance.item() == pytest.approx(1.0)


def test_what_has_no_matrix_free_form_is_refused():
    for options in (
        {"batch_shape": torch.Size([2])},
        {"weight_covariance": torch.eye(31).double()},
    ):
        kernel = NeuralTangentKernel(mlp(), representation="matrix_free", **options)
        with pytest.raises(
            NotImplementedError, match="Choose representation='function'"
        ):
            kernel(points(4)).to_dense()


def test_a_batch_of_columns_is_refused():
    kernel = NeuralTangentKernel(mlp())
    with pytest.raises(NotImplementedError, match="Add one kernel per input column"):
        kernel.forward(points(4), points(4), last_dim_is_batch=True)
