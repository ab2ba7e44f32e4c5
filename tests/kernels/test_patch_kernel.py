"""A kernel of patches and their places is the product of two."""

import unittest

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase

from gpbridge.kernels.patch_kernel import PatchKernel
from tests.kernels.orbit_problems import EXACT, dense, rbf


class TestContract(BaseKernelTestCase, unittest.TestCase):
    """Upstream's contract; two columns of the data are places."""

    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        batch_shape = batch_shape or torch.Size()
        parts = (k(batch_shape=batch_shape) for k in (MaternKernel, RBFKernel))
        return PatchKernel(*parts, **kwargs)

    def create_data_no_batch(self):
        return torch.randn(50, 10)

    def create_data_single_batch(self):
        return torch.randn(2, 50, 4)

    def create_data_double_batch(self):
        return torch.randn(3, 2, 50, 4)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_a_location_kernel_multiplies_the_kernel_of_patches(generator):
    Z = torch.randn(5, 14, dtype=torch.float64, generator=generator)
    kernel = PatchKernel(rbf(), rbf()).double()
    expected = dense(rbf(), Z[:, :12]) * dense(rbf(), Z[:, 12:])
    torch.testing.assert_close(dense(kernel, Z), expected, **EXACT)
    torch.testing.assert_close(kernel(Z, diag=True), expected.diagonal(), **EXACT)


def test_a_batch_of_kernels_can_be_indexed(generator):
    base = RBFKernel(batch_shape=torch.Size([2])).double()
    base.lengthscale = torch.tensor([[[0.5]], [[1.5]]]).double()
    kernel = PatchKernel(base, rbf()).double()
    Z = torch.randn(5, 6, dtype=torch.float64, generator=generator)
    assert kernel.batch_shape == (2,) and kernel[1].batch_shape == ()
    torch.testing.assert_close(dense(kernel[1], Z), dense(kernel, Z)[1], **EXACT)
