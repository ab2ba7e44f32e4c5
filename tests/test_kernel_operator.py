import unittest

import pytest
import torch
from gpytorch.kernels import (
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    ScaleKernel,
)
from linear_operator import settings
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase

from gpbridge import kernel_tiles, partial_products, tile_products
from gpbridge.checks import ShapeError
from gpbridge.kernel_operator import (
    KernelMatrixOperator,
    covariance_operator,
    cross_products,
    solving_operator,
    working_dtype,
)
from gpbridge.kernels import FeatureKernel, NeuralTangentKernel
from tests.test_partial_products import INDICES, check_partial_products

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class TestKernelMatrixOperator(LinearOperatorTestCase, unittest.TestCase):
    seed = 0
    batch = ()

    def setUp(self):
        super().setUp()
        # Importing botorch switches CG and Lanczos off, which the suite looks for.
        self.enterContext(
            settings.fast_computations(
                covar_root_decomposition=True, log_prob=True, solves=True
            )
        )

    def create_linear_op(self):
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(*self.batch, 5, 2, generator=generator).requires_grad_()
        noise = torch.rand(*self.batch, 5, generator=generator) + 0.5
        kernel = RBFKernel().requires_grad_(False)
        return KernelMatrixOperator(X, noise.requires_grad_(), kernel=kernel)

    def evaluate_linear_op(self, linear_op):
        K = linear_op.kernel(linear_op.X).to_dense()
        return K + torch.diag_embed(linear_op.noise)


class TestKernelMatrixOperatorBatch(TestKernelMatrixOperator):
    batch = (2,)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def scaled(base):
    kernel = ScaleKernel(base).double()
    kernel.outputscale = 2.3
    if getattr(base, "ard_num_dims", None):
        base.lengthscale = torch.linspace(0.4, 3.0, base.ard_num_dims)
    return kernel


def network(width=1):
    return torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, width)
    ).double()


def square(x):
    return x.square()


def seen(kernel):
    """A kernel of the first and last input, with a factor unequal to one."""
    kernel = ScaleKernel(kernel).double()
    kernel.outputscale = 1.7
    return kernel


TWO = {"active_dims": [0, 2]}
FEATURES = {
    "tangent": NeuralTangentKernel(network(), **TWO),
    "scaled tangent": seen(NeuralTangentKernel(network(), **TWO)),
    "network": seen(FeatureKernel(network(5), **TWO)),
    "linear": seen(seen(LinearKernel(ard_num_dims=2, **TWO))),
    "sum of both": seen(FeatureKernel(network(5), **TWO) + seen(FeatureKernel(square))),
    "with a wave": seen(FeatureKernel(network(5), **TWO) + RBFKernel(**TWO)),
}


KERNELS = {
    "gaussian": scaled(RBFKernel(ard_num_dims=3)),
    "no amplitude": RBFKernel().double(),
    "matern12": scaled(MaternKernel(0.5, ard_num_dims=3)),
    "matern32": scaled(MaternKernel(1.5)),
    "matern52": scaled(MaternKernel(2.5, ard_num_dims=3)),
    "two amplitudes": ScaleKernel(scaled(MaternKernel(1.5))).double(),
    "two of the inputs": scaled(MaternKernel(2.5, active_dims=[0, 2])),
    "upstream": scaled(PeriodicKernel()),
    "varying diagonal": scaled(PolynomialKernel(2)),
    "sum": (RBFKernel() + ScaleKernel(MaternKernel(0.5))).double(),
    "scaled sum": scaled(
        MaternKernel(0.5, active_dims=[1]) + seen(RBFKernel(**TWO)) + PeriodicKernel()
    ),
    **FEATURES,
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def problem(kernel, n=70, seed=0):
    """An operator, and the dense matrix by gpytorch."""
    X = 5 + random(n, 3, seed=seed)  # far from the origin
    noise = random(n, seed=seed + 1).abs()
    with torch.no_grad():
        dense = kernel(X).to_dense() + noise.diag()
    return KernelMatrixOperator(X, noise, kernel=kernel), dense


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setitem(kernel_tiles.TILE_BYTES, "cpu", 8 * 20 * 20)


@every_kernel
def test_products_equal_those_of_the_dense_matrix(kernel):
    H, dense = problem(kernel)
    V = random(70, 4, seed=5)
    torch.testing.assert_close(H._matmul(V), dense @ V, **EXACT)
    torch.testing.assert_close(H._matmul(V[:, 0]), dense @ V[:, 0], **EXACT)
    torch.testing.assert_close(H.diagonal(), dense.diagonal(), **EXACT)
    torch.testing.assert_close(H.to_dense(), dense, **EXACT)


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@every_kernel
def test_rows_columns_and_blocks_of_a_kernel_matrix(kernel, index):
    check_partial_products(*problem(kernel), index)


@every_kernel
def test_products_with_a_cross_covariance(kernel):
    X, Z, V = random(50, 3), random(30, 3, seed=1), random(50, 4, seed=2)
    with torch.no_grad():
        exact = kernel(Z, X).to_dense() @ V
    torch.testing.assert_close(cross_products(kernel, Z, X, V), exact, **EXACT)


def test_repeated_points_have_distance_zero_in_single_precision():
    kernel = scaled(MaternKernel(0.5))
    X = random(1, 3).expand(60, 3) * 100
    H = KernelMatrixOperator(X, 0.0, kernel=kernel, compute_dtype=torch.float32)
    V = random(60, 2)
    exact = 2.3 * V.sum(0).expand(60, 2)
    torch.testing.assert_close(H._matmul(V), exact, rtol=1e-5, atol=1e-5)


@every_kernel
def test_single_precision_tiles_and_exact_products(kernel):
    H, dense = problem(kernel)
    low = covariance_operator(kernel, H.X, H.noise, torch.float32)
    V = random(70, 3)
    got = low._matmul(V)
    assert got.dtype == torch.float64
    error = (got - dense @ V).norm() / (dense @ V).norm()
    assert 0 < error < 1e-5
    torch.testing.assert_close(partial_products.exact_products(low, V), dense @ V)
    assert partial_products.precision(low) > 1e-8 > partial_products.precision(H)
    cross = cross_products(kernel, H.X, H.X, V, torch.float32)
    exact = dense @ V - H.noise[:, None] * V
    assert (cross - exact).norm() < 1e-5 * exact.norm()


def test_the_precision_of_tiles_follows_the_noise():
    X, noise = random(5, 2), torch.full((5,), 0.01, dtype=torch.float64)
    kernel = scaled(MaternKernel(1.5))
    kernel.outputscale = 99.0
    assert solving_operator(kernel, X, noise).compute_dtype == torch.float32
    assert working_dtype(kernel, noise, torch.float64) == torch.float64
    kernel.outputscale = 101.0
    assert solving_operator(kernel, X, noise).compute_dtype is None
    assert working_dtype(kernel, noise, torch.float32) == torch.float32
    noise[0] = 0.0
    assert working_dtype(kernel, noise) is None
    assert working_dtype(RBFKernel() + RBFKernel(), noise + 1) is None


def test_distances_are_as_precise_as_the_noise_is_low():
    kernel = MaternKernel(1.5).double().requires_grad_(False)
    kernel.lengthscale = 1.0
    X = torch.cat([9 * torch.nn.functional.normalize(random(20, 3)) for _ in "ab"])
    X[20:] = X[:20] + 1e-2 * random(20, 3)  # close pairs far from the centre
    exact = kernel(X).to_dense()

    def error(noise):
        H = KernelMatrixOperator(X, noise, kernel=kernel, compute_dtype=torch.float32)
        K = H._matmul(torch.eye(40).double()) - noise * torch.eye(40)
        return (K - exact).abs().max()

    assert error(1e-4) < 2e-7 < 1e-6 < error(1.0)


def test_float32_data():
    kernel = ScaleKernel(RBFKernel())
    X, V = random(40, 2).float(), random(40, 2).float()
    H = KernelMatrixOperator(X, 0.1, kernel=kernel)
    with torch.no_grad():
        dense = kernel(X).to_dense() + 0.1 * torch.eye(40)
    assert H._matmul(V).dtype == torch.float32
    torch.testing.assert_close(H._matmul(V), dense @ V)


def test_changed_hyperparameters_are_seen():
    kernel = scaled(RBFKernel())
    H, _ = problem(kernel)
    V = random(70, 1)

    def check():
        with torch.no_grad():
            exact = kernel(H.X).to_dense() @ V + H.noise[:, None] * V
        torch.testing.assert_close(H._matmul(V), exact, **EXACT)

    check()
    with torch.no_grad():
        kernel.base_kernel.raw_lengthscale.add_(1.0)
    check()
    kernel.outputscale = 0.3  # upstream's setter
    check()


def test_the_operator_does_not_convert_the_kernel_of_the_caller():
    kernel = scaled(RBFKernel())
    H, _ = problem(kernel)
    low = H.to(torch.float32)
    assert low.dtype == torch.float32
    assert kernel.raw_outputscale.dtype == torch.float64


def test_one_point_and_no_points():
    kernel = KERNELS["gaussian"]
    H = KernelMatrixOperator(random(1, 3), 0.5, kernel=kernel)
    torch.testing.assert_close(H.to_dense(), torch.tensor([[2.8]]).double())
    H = KernelMatrixOperator(random(0, 3), 0.5, kernel=kernel)
    assert H._matmul(random(0, 2)).shape == (0, 2)


@pytest.mark.parametrize("budget", [2**28, 8 * 5 * 10])
@pytest.mark.parametrize("kernel", FEATURES.values(), ids=FEATURES)
def test_features_are_held_or_formed_in_blocks(kernel, budget, monkeypatch):
    monkeypatch.setattr(kernel_tiles, "FEATURE_BYTES", budget)
    H, dense = problem(kernel)
    for index in INDICES.values():
        check_partial_products(H, dense, index)
    V = random(70, 2)
    torch.testing.assert_close(H._matmul(V), dense @ V, **EXACT)
    low = covariance_operator(kernel, H.X, H.noise, torch.float32)
    error = (low._matmul(V) - dense @ V).norm() / (dense @ V).norm()
    assert 0 < error < 1e-5
    Z = random(30, 3, seed=3)
    with torch.no_grad():
        cross = kernel(Z, H.X).to_dense() @ V
    torch.testing.assert_close(cross_products(kernel, Z, H.X, V), cross, **EXACT)


@pytest.mark.parametrize("held", [True, False])
def test_a_network_is_evaluated_once_per_point_and_not_per_tile(held, monkeypatch):
    if not held:
        monkeypatch.setattr(kernel_tiles, "FEATURE_BYTES", 8 * 5 * 10)
    seen_rows = []

    def features(x):
        if not torch.is_grad_enabled():
            seen_rows.append(len(x))
        return torch.cat([x, x.square()], -1)

    kernel = FeatureKernel(features).double()
    H = KernelMatrixOperator(random(70, 3), 0.1, kernel=kernel)
    V = random(70, 2)
    seen_rows.clear()
    for _ in range(3):
        H._matmul(V)
    assert sum(seen_rows) < (75 if held else 3 * 2 * 75)
    kernel.variance = 2.0  # what is held follows
    exact = 2 * features(H.X) @ (features(H.X).mT @ V) + 0.1 * V
    torch.testing.assert_close(H._matmul(V), exact, **EXACT)


def test_more_features_than_points_are_left_to_the_kernel(monkeypatch):
    kernel = NeuralTangentKernel(network())
    X = random(kernel.functional.num_params - 1, 2)
    assert kernel_tiles.prepare(kernel, X).features is None
    X = random(kernel.functional.num_params, 2)
    assert kernel_tiles.prepare(kernel, X).features is not None


def test_a_range_of_rows_meets_its_columns_without_a_look_at_numbers():
    for index in (slice(0, 70), slice(13, 55), slice(69, 70), slice(5, 5)):
        rows = torch.arange(70)[index]
        found, expected = (
            tile_products._meetings(i, 70, 9, 20, rows.device) for i in (index, rows)
        )
        for a, b in zip(found, expected, strict=True):
            for one, other in zip(a, b, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    pairs = [torch.stack(places).mT.tolist() for places in (one, other)]
                    assert sorted(pairs[0]) == sorted(pairs[1])


@every_kernel
def test_differentiable_products_are_tiles_in_both_directions(kernel, monkeypatch):
    shapes, call = [], type(kernel).forward

    def forward(self, x1, x2, **options):
        shapes.append((x1.shape[-2], x2.shape[-2]))
        return call(self, x1, x2, **options)

    X, V = random(70, 3).requires_grad_(), random(70, 2, seed=1)
    expected = torch.autograd.grad((kernel(X).to_dense() @ V).cos().sum(), X)[0]
    H = KernelMatrixOperator(X, 0.0, kernel=kernel)
    monkeypatch.setattr(type(kernel), "forward", forward)
    (gradient,) = torch.autograd.grad(H._matmul(V).cos().sum(), X)
    # Upstream's roots of rounded distances at equal points.
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    assert max(map(max, shapes)) <= 20


def test_differentiable_products_have_second_derivatives():
    X, V = random(30, 3).requires_grad_(), random(30, 2, seed=1).requires_grad_()
    kernel = KERNELS["gaussian"]

    def second(product):
        (first,) = torch.autograd.grad(product.cos().sum(), X, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (X, V))

    got = second(KernelMatrixOperator(X, 0.1, kernel=kernel)._matmul(V))
    for a, b in zip(got, second(kernel(X).to_dense() @ V + 0.1 * V), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_what_is_refused():
    X = random(4, 3)
    kernel = RBFKernel().double()
    with pytest.raises(ShapeError, match="one variance per row"):
        KernelMatrixOperator(X, torch.ones(3), kernel=kernel)
    with pytest.raises(ValueError, match="at least zero, but is as low as -0.5"):
        KernelMatrixOperator(X, -0.5, kernel=kernel)
    with pytest.raises(ValueError, match="compute_dtype must be one of"):
        covariance_operator(kernel, X, 0.1, torch.float16)
    with pytest.raises(ShapeError, match="no batch shape, but has"):
        batched = RBFKernel(batch_shape=torch.Size([2]))
        KernelMatrixOperator(X, 0.1, kernel=batched)
    with pytest.raises(ShapeError, match="X_test must have 3 columns"):
        cross_products(kernel, random(2, 2), X, random(4, 1))
