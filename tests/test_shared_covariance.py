"""One covariance for a batch: dense equality, products, gradients, one evaluation."""

import torch
from gpytorch.kernels import RBFKernel
from linear_operator import to_linear_operator
from torch import Size

from gpbridge.shared_covariance import SharedCovarianceOperator


class Counting(RBFKernel):
    """Counts rows that it is evaluated at."""

    rows = 0

    def forward(self, x1, x2, **params):
        Counting.rows += x1.shape[:-1].numel()
        return super().forward(x1, x2, **params)


def test_products_diagonals_and_parts_are_those_of_the_repeated_matrix():
    base = torch.rand(4, 4, dtype=torch.float64)
    base = (base @ base.mT).requires_grad_()
    operator = SharedCovarianceOperator(to_linear_operator(base), Size([2, 3]))
    dense = base.expand(2, 3, 4, 4)
    assert operator.shape == dense.shape
    assert torch.equal(operator.to_dense(), dense)
    assert torch.equal(operator.diagonal(dim1=-2, dim2=-1), dense.diagonal(0, -2, -1))
    right = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    assert torch.allclose(operator @ right, dense @ right)
    assert torch.allclose(operator @ right[0, 0, :, 0], dense @ right[0, 0, :, 0])
    assert torch.allclose(operator[1, 2].to_dense(), base)
    assert operator[0].shape == (3, 4, 4)
    assert torch.allclose(operator[1, 2, 3, 0], base[3, 0])
    assert torch.allclose(operator[..., :2, 1:].to_dense(), dense[..., :2, 1:])
    assert torch.equal(operator.mT.to_dense(), dense.mT)
    assert operator.expand(5, 2, 3, 4, 4).shape == (5, 2, 3, 4, 4)
    (gradient,) = torch.autograd.grad((operator @ right).sum(), base)
    (expected,) = torch.autograd.grad((dense @ right).sum(), base)
    assert torch.allclose(gradient, expected)


def test_a_lazy_kernel_is_evaluated_once_for_all_outputs():
    x = torch.rand(7, 2)
    operator = SharedCovarianceOperator(Counting()(x), Size([10]))
    Counting.rows = 0
    assert operator.diagonal(dim1=-2, dim2=-1).shape == (10, 7)
    assert Counting.rows == 7
