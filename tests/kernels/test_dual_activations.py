"""Dual functions of activations, against quadrature in two dimensions."""

import math

import pytest
import torch

from gpbridge.kernels import dual_activations
from tests.oracles_architecture import arc_cosine, dual_by_quadrature


def erf_derivative(x):
    return 2 / math.sqrt(math.pi) * torch.exp(-x * x)


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu(x):
    return x * normal_cdf(x)


def gelu_derivative(x):
    return normal_cdf(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def tanh_derivative(x):
    return 1 / torch.cosh(x) ** 2


SMOOTH = {
    "erf": (torch.erf, erf_derivative),
    "gelu": (gelu, gelu_derivative),
    "tanh": (torch.tanh, tanh_derivative),
}
PAIRS = [(0.3, 0.8, 1.1), (-0.6, 1.0, 0.7), (0.0, 0.5, 2.0), (0.89, 0.9, 0.9)]
ALL = ["relu", "leaky_relu", "erf", "gelu", "tanh"]


def evaluate(name, pair, dtype=torch.float64):
    values = [torch.tensor([v], dtype=dtype) for v in pair]
    return getattr(dual_activations, name)(*values)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_duals_are_expectations(name, pair):
    tolerance = 5e-7 if name == "tanh" else 1e-12  # a mixture of six
    for value, phi in zip(evaluate(name, pair), SMOOTH[name], strict=True):
        expected = dual_by_quadrature(phi, *pair)
        assert float(value) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("pair", PAIRS)
def test_relu_is_the_arc_cosine_kernel(pair):
    value, derivative = evaluate("relu", pair)
    expected = arc_cosine(*pair)
    assert float(value) == pytest.approx(expected[0], abs=1e-14)
    assert float(derivative) == pytest.approx(expected[1], abs=1e-14)


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_leaky_relu_is_between_relu_and_the_identity(slope):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    k, q1, q2 = 0.4, 1.3, 0.7
    root = torch.linalg.cholesky(torch.tensor([[q1, k], [k, q2]], dtype=torch.float64))
    u, v = root @ z
    phi = [torch.nn.functional.leaky_relu(t, slope) for t in (u, v)]
    slopes = [torch.where(t > 0, 1.0, slope) for t in (u, v)]
    values = [torch.tensor(t, dtype=torch.float64) for t in (k, q1, q2)]
    found = dual_activations.leaky_relu(*values, negative_slope=slope)
    for value, draws in zip(
        found, (phi[0] * phi[1], slopes[0] * slopes[1]), strict=True
    ):
        error = draws.std() / draws.numel() ** 0.5
        assert abs(value - draws.mean()) <= 3 * error + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_of_the_variance_passes_a_relu(dtype):
    q = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    value, derivative = dual_activations.relu(q, q, q)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(value, q / 2, rtol=2 * eps, atol=0)
    assert torch.equal(derivative, torch.full_like(q, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_gradients_are_finite_at_identical_zero_and_parallel_inputs(name, dtype):
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 4.0], [-1.0, -2.0], [0, 0], [1, 0]])
    x = x.to(dtype).requires_grad_()
    q = x.square().sum(-1)
    values = getattr(dual_activations, name)(x @ x.mT, q[:, None], q[None])
    for value in values:
        (grad,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_first_and_second_derivatives_match_finite_differences(name):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    q = x.square().mean(-1)
    inputs = ((x @ x.mT / 4)[:1, 1:], q[:1, None], q[None, 1:])
    inputs = [t.clone().requires_grad_() for t in inputs]
    dual = getattr(dual_activations, name)
    assert torch.autograd.gradcheck(dual, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(dual, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_the_derivative_in_the_covariance_is_the_second_function(name):
    k = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    q1, q2 = k.new_tensor([1.2]), k.new_tensor([0.6])
    value, derivative = getattr(dual_activations, name)(k, q1, q2)
    (grad,) = torch.autograd.grad(value, k)
    assert torch.allclose(grad, derivative, rtol=1e-9, atol=0)  # Price's theorem


def test_single_and_double_precision_agree():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    q = x.square().mean(-1)
    triple = (x @ x.mT / 5, q[:, None], q[None])
    for name in ALL:
        dual = getattr(dual_activations, name)
        double = dual(*triple)
        single = dual(*(t.float() for t in triple))
        # The angle of a cosine near one is known to the root of its rounding error.
        for a, b, tolerance in zip(single, double, (2e-6, 5e-4), strict=True):
            assert a.dtype == torch.float32
            assert (a - b).abs().max() <= tolerance * b.abs().max()


def silu_derivative(x):
    return torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x)))


SERIES = {
    "silu": (torch.nn.functional.silu, silu_derivative),
    "softplus": (torch.nn.functional.softplus, torch.sigmoid),
    "tanh": SMOOTH["tanh"],
}
COSINES = (-1.0, -0.7, 0.0, 0.7, 0.95, 0.99, 1.0)
# As the docstrings say: relative to the values at cosine one.
STATED = {
    ("silu", 10.0): (4e-8, 2e-6),
    ("silu", 30.0): (3e-6, 2e-4),
    ("silu", 100.0): (3e-5, 3e-3),
    ("softplus", 30.0): (3e-6, 2e-4),
    ("tanh", 10.0): (6e-5, 3e-3),
}


def relative_errors(dual, functions, variance):
    largest = []
    for i, phi in enumerate(functions):
        exact = [
            dual_by_quadrature(phi, cosine * variance, variance, variance, 601)
            for cosine in COSINES
        ]
        found = [
            float(dual(*(torch.tensor([v], dtype=torch.float64) for v in triple))[i])
            for triple in [
                (cosine * variance, variance, variance) for cosine in COSINES
            ]
        ]
        errors = [abs(a - b) for a, b in zip(found, exact, strict=True)]
        largest.append(max(errors) / exact[-1])
        assert errors[0] <= 1e-5 * exact[-1] and errors[-1] <= 1e-5 * exact[-1]
    return largest


@pytest.mark.parametrize("name, variance", STATED)
def test_the_series_has_the_errors_that_are_stated(name, variance):
    def dual(*triple):
        return dual_activations.hermite_dual(*triple, *SERIES[name])

    for error, stated in zip(
        relative_errors(dual, SERIES[name], variance),
        STATED[name, variance],
        strict=True,
    ):
        assert error < stated


@pytest.mark.parametrize("variance", [0.01, 1.0, 30.0, 100.0])
def test_tanh_has_one_error_at_all_variances(variance):
    found = relative_errors(dual_activations.tanh, SMOOTH["tanh"], variance)
    assert max(found) < 3e-6


@pytest.mark.parametrize("variance", [1.0, 30.0, 3000.0])
def test_matrices_of_smooth_activations_are_positive(variance):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    x = x * variance**0.5 * (1 + torch.arange(60)[:, None] / 20)
    q = x.square().mean(-1)
    triple = x @ x.mT / 3, q[:, None], q[None]
    duals = [dual_activations.tanh(*triple)]
    duals += [dual_activations.hermite_dual(*triple, *SERIES[n]) for n in SERIES]
    for K in (K for pair in duals for K in pair):
        assert torch.linalg.eigvalsh(K).min() > -1e-12 * K.diagonal().max() * 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_variance_leaves_tanh_finite_and_its_kernel_an_arc_sine(dtype):
    q = torch.full((1,), 1e8, dtype=dtype)
    for cosine in (-1.0, 0.5, 1.0):
        k = (cosine * q).requires_grad_()
        value, derivative = dual_activations.tanh(k, q, q)
        (grad,) = torch.autograd.grad(derivative.sum(), k)
        assert grad.isfinite().all() and derivative.item() > 0
        expected = 2 / math.pi * math.asin(cosine)  # tanh is a sign here
        assert value.item() == pytest.approx(expected, abs=3e-4)


def test_hermite_series_converges_as_it_says():
    pair = (0.95, 1.0, 1.0)
    exact = dual_by_quadrature(torch.tanh, *pair)
    values = [torch.tensor(v, dtype=torch.float64) for v in pair]
    phi = torch.tanh, tanh_derivative
    errors = [
        abs(float(dual_activations.hermite_dual(*values, *phi, num_terms=j)[0]) - exact)
        for j in (4, 12, 48)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 2e-9
