"""Kernels of infinitely wide dense networks."""

import copy
import pickle
import warnings
from unittest import TestCase

import pytest
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.kernels import InfiniteWidthBNNKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase
from torch import nn

from gpbridge.kernels import InfiniteWidthKernel
from gpbridge.kernels.wide_convolutions import Conv
from gpbridge.kernels.wide_layers import (
    Dense,
    Flatten,
    LayerNorm,
    ReLU,
    Residual,
)
from tests.kernels.wide_problems import ACTIVATIONS, DEEP, KINDS, build, inputs


class TestContract(TestCase, BaseKernelTestCase):
    def create_kernel_no_ard(self, **options):
        return InfiniteWidthKernel(DEEP, "ntk", **options)


def test_it_is_botorchs_kernel_where_both_exist():
    ours = build([Dense(), ReLU(), Dense(), ReLU(), Dense(), ReLU(), Dense()])
    theirs = InfiniteWidthBNNKernel(depth=3, acos_eps=1e-15).double()
    for kernel in (ours, theirs):
        name = "weight_var" if kernel is theirs else "weight_variance"
        setattr(kernel, name, torch.tensor(1.7, dtype=torch.float64))
        bias = torch.tensor(0.3, dtype=torch.float64)
        setattr(kernel, name.replace("weight", "bias"), bias)
    x, z = inputs(9, 4), inputs(7, 4, seed=1)
    assert torch.allclose(ours(x, z).to_dense(), theirs(x, z).to_dense(), rtol=1e-12)
    assert torch.allclose(ours(x, diag=True), theirs(x, diag=True), rtol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_gradients_match_finite_differences(activation):
    branch = Residual([LayerNorm(), activation, Dense()])
    kernel = build([Dense(), branch, activation, Dense()], "ntk")
    x, z = inputs(3, 2).requires_grad_(), inputs(2, 2, seed=1).requires_grad_()
    raw = [kernel.raw_weight_variance, kernel.raw_bias_variance]

    def total(x, z, *_):
        return kernel(x, z).to_dense().sum() + (kernel(x).to_dense() ** 2).sum()

    assert torch.autograd.gradcheck(total, (x, z, *raw), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_gradients_are_finite_at_identical_zero_and_parallel_inputs(kind, dtype, bias):
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 4.0], [-1, -2], [0, 0], [0, 0]])
    x = x.to(dtype).requires_grad_()
    for activation in ACTIVATIONS:
        block = [Dense(2.0, bias), activation]
        kernel = build([*block, *block, Dense()], kind, dtype)
        K = kernel(x).to_dense()
        grads = torch.autograd.grad(K.sum(), [x, kernel.raw_weight_variance])
        assert all(t.isfinite().all() for t in (K, *grads))


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_inputs_permute_the_matrix_and_it_is_positive(kind):
    kernel, x = build(kind=kind), inputs(30, 3)
    K, order = kernel(x).to_dense(), torch.arange(29, -1, -1)
    permuted = kernel(x[order]).to_dense()
    assert torch.allclose(permuted, K[order][:, order], rtol=1e-13)
    assert torch.linalg.eigvalsh(K).min() > -1e-12 * K.diagonal().max()


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_agrees_with_double(kind):
    x = inputs(60, 5)
    single = build(kind=kind, dtype=torch.float32)(x.float()).to_dense()
    double = build(kind=kind)(x).to_dense()
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 1e-5 * double.abs().max()


def test_a_gp_fits_and_learns_the_variances():
    x = torch.linspace(-1, 1, 25, dtype=torch.float64)[:, None]
    y = (4 * x).sin() + 0.05 * inputs(25, 1)
    model = SingleTaskGP(x, y, covar_module=build([*DEEP[:4], Dense(1.0, 0.01)]))
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    before = mll(model(*model.train_inputs), model.train_targets).item()
    start = model.covar_module.weight_variance.detach().clone()
    fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 30}})
    mll.train()
    after = mll(model(*model.train_inputs), model.train_targets).item()
    assert after > before + 0.1
    assert not torch.allclose(model.covar_module.weight_variance, start, rtol=0.1)
    posterior = model.eval().posterior(x)
    assert (posterior.mean - (4 * x).sin()).abs().mean() < 0.1
    assert (posterior.variance > 0).all()


def test_state_pickle_and_deepcopy_keep_the_kernel():
    kernel, x = build(kind="ntk", batch_shape=torch.Size([2])), inputs(2, 4, 3)
    kernel.weight_variance = inputs(2, 3).exp()
    kernel.bias_variance = 0.7
    fresh = build(kind="ntk", batch_shape=torch.Size([2]))
    fresh.load_state_dict(kernel.state_dict())
    expected = kernel(x).to_dense()
    for other in (fresh, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        assert torch.equal(other(x).to_dense(), expected)


def test_other_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"layers\[0\] must be a layer.*from_module"):
        InfiniteWidthKernel([nn.Linear(2, 1)])
    with pytest.raises(ValueError, match="weight_variance must be positive"):
        Dense(0.0)
    with pytest.raises(ValueError, match="bias_variance must be positive"):
        Dense(1.0, -0.1)
    with pytest.raises(ValueError, match="needs an odd kernel_size"):
        Conv(4)
    with pytest.raises(AttributeError, match="no bias_variance"):
        build([Dense(1.0, 0.0)]).bias_variance = 1.0
    with pytest.raises(ValueError, match=r"weight_variance must lie in \(1e-08"):
        build().weight_variance = 1e9
    with pytest.raises(ValueError, match="Images of input_shape .* have 16 columns"):
        layers = [Conv(3), Flatten(), Dense()]
        build(layers, input_shape=(1, 4, 4))(torch.zeros(2, 15).double()).to_dense()
    with pytest.raises(NotImplementedError, match="last_dim_is_batch is deprecated"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build()(torch.zeros(2, 3).double(), last_dim_is_batch=True).to_dense()
