"""The operator of features: the upstream contract, sums, products and noise."""

import unittest

import pytest
import torch
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel
from linear_operator import settings
from linear_operator.operators import (
    DenseLinearOperator,
    LowRankRootAddedDiagLinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
)
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase

from gpbridge.kernels.feature import FeatureKernel
from gpbridge.kernels.feature_gram import FeatureGramOperator, feature_gram

EXACT = {"rtol": 1e-9, "atol": 1e-12}


class TestWide(LinearOperatorTestCase, unittest.TestCase):
    seed = 0
    should_call_lanczos = False
    should_call_lanczos_diagonalization = True

    def setUp(self):
        super().setUp()
        # Importing botorch turns these off everywhere; the contract expects them on.
        self.enterContext(settings.fast_computations(True, True, True))

    def create_linear_op(self):
        return FeatureGramOperator(torch.randn(5, 7).requires_grad_())

    def evaluate_linear_op(self, operator):
        return operator.root.tensor @ operator.root.tensor.mT


class TestBatch(TestWide):
    def create_linear_op(self):
        return FeatureGramOperator(torch.randn(3, 5, 7).requires_grad_())


@pytest.fixture
def X():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(12, 3, dtype=torch.float64, generator=generator)


def features(f):
    generator = torch.Generator().manual_seed(f)
    weight = torch.randn(3, f, dtype=torch.float64, generator=generator)
    return FeatureKernel(lambda x: (x @ weight).sin()).double()


def test_gram_keeps_its_factor_and_cross_keeps_both(X):
    kernel = features(4)
    assert isinstance(kernel(X).evaluate_kernel(), FeatureGramOperator)
    assert isinstance(kernel(X, X[:3]).evaluate_kernel(), MatmulLinearOperator)
    assert isinstance(feature_gram(X, X[:2]), MatmulLinearOperator)


@pytest.mark.parametrize("f", [4, 40])
def test_noise_is_added_in_low_rank_form_if_that_is_cheaper(X, f):
    gram = features(f)(X).evaluate_kernel()
    for diagonal in (torch.tensor(0.1), torch.tensor([0.1]), torch.full((12,), 0.1)):
        noisy = gram.add_diagonal(diagonal.double())
        assert isinstance(noisy, LowRankRootAddedDiagLinearOperator) is (f < 12)
        expected = gram.to_dense() + 0.1 * torch.eye(12)
        torch.testing.assert_close(noisy.to_dense(), expected, rtol=1e-7, atol=1e-7)
        value = torch.logdet(expected)
        torch.testing.assert_close(noisy.logdet(), value, rtol=1e-6, atol=1e-6)


PARTNERS = {
    "own": lambda: features(3),
    "linear": LinearKernel,
    "rbf": RBFKernel,
    "matern": lambda: MaternKernel(1.5),
    "sum": lambda: RBFKernel() + features(2),
    "scaled product": lambda: RBFKernel() * features(2),
}


@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("f", [2, 40])
def test_sums_and_products_are_those_of_the_matrices(X, partner, first, f):
    own, other = features(f), PARTNERS[partner]().double()
    # Warnings are errors: upstream's sum would add jitter to a singular matrix.
    total = own + other if first else other + own
    product = own * other if first else other * own
    a, b = own(X).to_dense(), other(X).to_dense()
    torch.testing.assert_close(total(X).to_dense(), a + b, **EXACT)
    torch.testing.assert_close(product(X).to_dense(), a * b, rtol=1e-9, atol=1e-9)
    noise = 0.1 * torch.eye(12).to(X)
    for kernel, dense in ((total, a + b), (product, a * b)):
        noisy = kernel(X).add_jitter(0.1)
        rhs = X[:, :1]
        quad, logdet = noisy.inv_quad_logdet(rhs, logdet=True)
        solved = rhs.mT @ torch.linalg.solve(dense + noise, rhs)
        torch.testing.assert_close(quad, solved.squeeze(), rtol=1e-6, atol=1e-8)
        expected = torch.logdet(dense + noise)
        torch.testing.assert_close(logdet, expected, rtol=1e-6, atol=1e-8)


def test_sums_of_features_join_and_products_cross(X):
    two, three = features(2)(X).evaluate_kernel(), features(3)(X).evaluate_kernel()
    assert (two + three).root.shape == (12, 5)
    assert (two * three).root.shape == (12, 6)
    assert isinstance(two * features(6)(X).evaluate_kernel(), DenseLinearOperator)


def test_constants_scale_the_factor(X):
    gram = features(2)(X).evaluate_kernel()
    assert isinstance(gram * torch.tensor(0.5), FeatureGramOperator)
    negative = gram * torch.tensor(-0.5)
    torch.testing.assert_close(negative.to_dense(), -0.5 * gram.to_dense(), **EXACT)


def test_matrix_free_factors_stay_matrix_free(X):
    root = MatmulLinearOperator(X, torch.eye(3).to(X))
    gram = FeatureGramOperator(root)
    total = gram + FeatureGramOperator(X)
    torch.testing.assert_close(total.to_dense(), 2 * X @ X.mT, **EXACT)
    torch.testing.assert_close(gram @ X, X @ (X.mT @ X), **EXACT)


def test_samples_come_from_the_factor(X):
    gram = features(2)(X).evaluate_kernel()
    assert isinstance(gram.root_decomposition(), RootLinearOperator)
    assert gram.root_decomposition().root.shape == (12, 2)
