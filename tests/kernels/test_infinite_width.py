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

from gpbridge.kernels import InfiniteWidthKernel, wide_network
from gpbridge.kernels.wide_convolutions import AvgPool, Conv, GlobalAvgPool
from gpbridge.kernels.wide_layers import (
    GELU,
    Dense,
    Erf,
    Flatten,
    LayerNorm,
    LeakyReLU,
    ReLU,
    Residual,
    Smooth,
    Tanh,
    every_layer,
)
from gpbridge.testing import assert_module_unchanged
from tests.oracles_architecture import monte_carlo_kernels

DEEP = [Dense(1.5, 0.2), ReLU(), Dense(1.8, 0.1), ReLU(), Dense(0.9, 0.3)]
KINDS = ["nngp", "ntk"]
ACTIVATIONS = [ReLU(), LeakyReLU(0.2), Erf(), GELU(), Tanh()]


def inputs(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def build(layers=DEEP, kind="nngp", dtype=torch.float64, **options):
    """A kernel whose hyperparameters are the layers' in the dtype asked for."""
    kernel = InfiniteWidthKernel(layers, kind, **options).to(dtype)
    initial = [layer.initial() for layer in every_layer(kernel.network.layers)]
    for group in {name for found in initial for name in found}:
        values = [found[group] for found in initial if group in found]
        setattr(kernel, group, torch.tensor(values, dtype=dtype))
    return kernel


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


CASES = {
    "relu": ([Dense(), ReLU(), Dense()], [torch.relu]),
    "gelu": ([Dense(), GELU(), Dense()], [torch.nn.functional.gelu]),
    "tanh, normalised": (
        [Dense(), LayerNorm(), Tanh(), Dense()],
        [("norm",), torch.tanh],
    ),
    "residual": (
        [Dense(), Residual([ReLU(), Dense(1.0, 0.1)]), ReLU(), Dense()],
        [("residual", [torch.relu, ("dense", 1.0, 0.1)]), torch.relu],
    ),
}


def agree(layers, middle, x, width, num_networks, input_shape=None):
    """Both kernels within three standard errors of finite networks."""
    first = layers[0]
    dense = ("dense", 2.0, 0.01)
    start = dense if isinstance(first, Dense) else ("conv", 3, 2.0, 0.01)
    generator = torch.Generator().manual_seed(1)
    found = monte_carlo_kernels(
        [start, *middle, dense], x, width, num_networks, generator
    )
    for kind, (mean, error) in zip(KINDS, found, strict=True):
        kernel = build(layers, kind, input_shape=input_shape)
        exact = kernel(x.flatten(1)).to_dense()
        assert (error < 0.06 * exact.diagonal().max()).all()  # it can fail
        assert ((mean - exact).abs() <= 3 * error).all(), kind


@pytest.mark.parametrize("name", CASES)
def test_wide_networks_have_these_kernels(name):
    agree(*CASES[name], inputs(3, 5), width=200, num_networks=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_very_wide_networks_have_these_kernels(name):
    agree(*CASES[name], inputs(4, 5, seed=3), width=1024, num_networks=100)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_gradients_match_finite_differences(activation):
    branch = Residual([LayerNorm(), activation, Dense()])
    kernel = build([Dense(), branch, activation, Dense()], "ntk")
    x, z = inputs(3, 2).requires_grad_(), inputs(2, 2, seed=1).requires_grad_()
    raw = [kernel.raw_weight_variance, kernel.raw_bias_variance]

    def total(x, z, *_):
        return kernel(x, z).to_dense().sum() + (kernel(x).to_dense() ** 2).sum()

    assert torch.autograd.gradcheck(total, (x, z, *raw), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_change_neither_values_nor_gradients(kind, monkeypatch):
    kernel = build(kind=kind, batch_shape=torch.Size([2]))
    kernel.weight_variance = inputs(2, 3).exp()
    x, z = inputs(11, 3).requires_grad_(), inputs(2, 7, 3, seed=1).requires_grad_()
    results = []
    for rows in (20, 4):
        monkeypatch.setattr(wide_network, "tile_rows", lambda _, rows=rows: rows)
        K, C = kernel(x).to_dense(), kernel(x, z).to_dense()
        scalar = (K.sin() * inputs(*K.shape, seed=2)).sum() + C.sin().sum()
        leaves = [x, z, kernel.raw_weight_variance, kernel.raw_bias_variance]
        results.append([K, C, *torch.autograd.grad(scalar, leaves)])
        assert torch.allclose(K, K.mT, rtol=1e-14)
    for whole, tiled in zip(*results, strict=True):
        assert torch.allclose(whole, tiled, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("same", [True, False])
def test_second_derivatives_do_not_depend_on_tiles(same, monkeypatch):
    kernel, x = build(kind="ntk"), inputs(6, 2).requires_grad_()
    leaves = [x, kernel.raw_weight_variance]
    found = []
    for rows in (20, 4):
        monkeypatch.setattr(wide_network, "tile_rows", lambda _, rows=rows: rows)
        K = kernel(x, None if same else x[:3].detach() + 0.1).to_dense()
        grads = torch.autograd.grad(K.sin().sum(), leaves, create_graph=True)
        total = sum(grad.square().sum() for grad in grads)
        found += [*grads, *torch.autograd.grad(total, leaves)]
    for one, other in zip(found[:4], found[4:], strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


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
def test_the_diagonal_is_that_of_the_matrix_and_of_matched_pairs(kind):
    kernel = build(kind=kind)
    x, z = inputs(5, 3), inputs(5, 3, seed=1)
    assert torch.equal(kernel(x, diag=True), kernel(x).to_dense().diagonal())
    matched = kernel(x, z, diag=True)
    assert torch.allclose(matched, kernel(x, z).to_dense().diagonal(), rtol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_the_diagonal_needs_no_matrix(kind):
    x = inputs(200_000, 2)  # a matrix would take 300 GB
    assert build(kind=kind)(x, diag=True).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_inputs_permute_the_matrix_and_it_is_positive(kind):
    kernel, x = build(kind=kind), inputs(30, 3)
    K, order = kernel(x).to_dense(), torch.arange(29, -1, -1)
    permuted = kernel(x[order]).to_dense()
    assert torch.allclose(permuted, K[order][:, order], rtol=1e-13)
    assert torch.linalg.eigvalsh(K).min() > -1e-12 * K.diagonal().max()


def test_the_tangent_kernel_of_a_linear_network_counts_its_layers():
    x = inputs(4, 3)
    layers = [Dense(2.0, 0.0), Dense(3.0, 0.0), Dense(0.5, 0.0)]
    expected = build(layers, "nngp")(x).to_dense() * 3
    assert torch.allclose(build(layers, "ntk")(x).to_dense(), expected, rtol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_agrees_with_double(kind):
    x = inputs(60, 5)
    single = build(kind=kind, dtype=torch.float32)(x.float()).to_dense()
    double = build(kind=kind)(x).to_dense()
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 1e-5 * double.abs().max()


def test_smooth_takes_any_activation():
    given = Smooth(torch.sin, torch.cos)
    kernel = build([Dense(1.0, 0.0), given, Dense(1.0, 0.0)])
    x, z = inputs(3, 4), inputs(2, 4, seed=1)
    q1, q2 = x.square().mean(-1)[:, None], z.square().mean(-1)
    k = x @ z.mT / 4
    expected = (torch.exp(-(q1 + q2) / 2 + k) - torch.exp(-(q1 + q2) / 2 - k)) / 2
    assert torch.allclose(kernel(x, z).to_dense(), expected, rtol=1e-10)


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


NESTED = nn.Sequential(
    nn.Linear(5, 8),
    nn.Sequential(nn.GELU(), nn.Linear(8, 8, bias=False), nn.Identity()),
    nn.Tanh(),
    nn.Linear(8, 1),
)


def test_a_module_gives_its_layers_and_stays_as_it_was():
    with assert_module_unchanged(NESTED):
        kernel = InfiniteWidthKernel.from_module(NESTED, "ntk", weight_variance=1.5)
    dense, free = Dense(1.5, 0.01), Dense(1.5, 0.0)
    assert kernel.network.layers == (dense, GELU(), free, Tanh(), dense)
    assert kernel.bias_variance.shape == (2,)


def test_a_convolutional_module_gives_its_layers():
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, stride=2, padding="valid"),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 1),
    )
    kernel = InfiniteWidthKernel.from_module(module, input_shape=(1, 8, 8))
    conv, pool, second = (kernel.network.layers[i] for i in (0, 2, 3))
    assert (conv.kernel_size, conv.zeros, second.zeros, second.stride) == (3, 1, 0, 2)
    assert pool == AvgPool(2, 2)
    assert kernel.network.layers[5:] == (GlobalAvgPool(), Flatten(), Dense())
    assert kernel(torch.zeros(2, 64)).shape == (2, 2)


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "'1' .BatchNorm1d. has no"),
        (
            nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.MaxPool2d(2))),
            "Module '0.1' .MaxPool2d.",
        ),
        (nn.Sequential(nn.GELU(approximate="tanh")), "approximate='tanh', not 'none'"),
        (nn.Sequential(nn.Conv2d(1, 1, (3, 5))), r"kernel_size=\(3, 5\).*not square"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), "groups=2, not 1"),
        (nn.Bilinear(2, 2, 1), "The module .Bilinear. has no limit"),
        (nn.Sequential(nn.LayerNorm((2, 3))), "normalises over more than the units"),
    ],
)
def test_a_module_without_a_limit_is_named(module, message):
    with pytest.raises(ValueError, match=message):
        InfiniteWidthKernel.from_module(module)


@pytest.mark.parametrize(
    "layers, options, message",
    [
        ([], {}, "last layer is None"),
        ([Dense(), ReLU()], {}, "must end in flat Gaussian outputs"),
        ([ReLU(), Dense()], {}, r"ReLU at layers\[0\] needs Gaussian"),
        ([Dense(), ReLU(), GELU()], {}, r"GELU at layers\[2\] needs Gaussian"),
        ([Dense(), ReLU(), LayerNorm(), Dense()], {}, r"LayerNorm at layers\[2\]"),
        (
            [Dense(), Residual([Residual([Dense()])]), Dense()],
            {},
            "must end in new weights",
        ),
        (
            [Dense(), Residual([Dense(), ReLU()])],
            {},
            r"Residual at layers\[1\] must end in new",
        ),
        ([Conv(3), Flatten(), Dense()], {}, r"Conv at layers\[0\] needs images"),
        (
            [Conv(3), Dense()],
            {"input_shape": (1, 4, 4)},
            "4 x 4 pixels comes. Put Flatten",
        ),
        (
            [Conv(7, padding=0), Flatten(), Dense()],
            {"input_shape": (1, 4, 4)},
            r"windows of 7 x 7 pixels, but its input has 4 x 4",
        ),
        (
            [Residual([Conv(3, 2)]), Flatten(), Dense()],
            {"input_shape": (1, 4, 4)},
            "branch ends in 2 x 2 pixels and the shortcut in 4 x 4 pixels",
        ),
        ([Dense()], {"kind": "ntk2"}, "kind must be one of"),
        ([Dense()], {"input_shape": (8, 8)}, "must be .channels, height, width."),
        ([Dense()], {"input_shape": (1, 0, 8)}, "height must be a whole number"),
        ([Dense()], {"memory_budget": 0}, "memory_budget must be positive"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers, options, message):
    with pytest.raises(ValueError, match=message):
        InfiniteWidthKernel(layers, **options)


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


def test_an_activation_that_a_module_uses_twice_counts_twice():
    relu = nn.ReLU()
    body = [nn.Linear(3, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 1)]
    kernel = InfiniteWidthKernel.from_module(nn.Sequential(*body), "ntk")
    body[3] = nn.ReLU()
    expected = InfiniteWidthKernel.from_module(nn.Sequential(*body), "ntk")
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kernel(x).to_dense(), expected(x).to_dense())
