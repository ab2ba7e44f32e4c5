"""Convolutional kernels against loops over patches, and their inducing patches."""

import copy
import pickle
import unittest

import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase

from gpbridge.augmentation import PatchAugmentation
from gpbridge.checks import ShapeError
from gpbridge.kernels import ConvolutionalKernel, InvariantKernel
from tests import oracles_architecture as oracles

SHAPE, WINDOW = (2, 5, 4), (3, 2)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def dense(kernel, *args):
    return kernel(*args).to_dense()


class ConvolutionalContract(BaseKernelTestCase):
    """Upstream's contract, with data that are images."""

    def create_data_no_batch(self):
        return torch.randn(6, 24)

    def create_data_single_batch(self):
        return torch.randn(2, 3, 12)

    def create_data_double_batch(self):
        return torch.randn(3, 2, 5, 12)

    # Which columns are seen decides on the size of the image.
    def test_active_dims_list(self):
        self.check_active_dims([0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22])

    def test_active_dims_range(self):
        self.check_active_dims(list(range(6, 18)))

    def check_active_dims(self, active_dims):
        kernel = self.create_kernel_no_ard(active_dims=active_dims)
        x = self.create_data_no_batch()
        expected = dense(self.create_kernel_no_ard(), x[:, active_dims])
        self.assertAllClose(dense(kernel, x), expected, rtol=1e-4, atol=1e-6)


class TestFastContract(ConvolutionalContract, unittest.TestCase):
    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        base = RBFKernel(batch_shape=batch_shape or torch.Size())
        return ConvolutionalKernel(base, (4, 3), (2, 2), **kwargs)

    def create_kernel_ard(self, num_dims, batch_shape=None, **kwargs):
        base = RBFKernel(ard_num_dims=4, batch_shape=batch_shape or torch.Size())
        return ConvolutionalKernel(base, (4, 3), (2, 2), **kwargs)


class TestLocatedContract(ConvolutionalContract, unittest.TestCase):
    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        batch_shape = batch_shape or torch.Size()
        return ConvolutionalKernel(
            MaternKernel(batch_shape=batch_shape),
            (4, 3),
            (2, 2),
            location_kernel=RBFKernel(batch_shape=batch_shape),
            **kwargs,
        )


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def X(generator):
    return torch.rand(4, 40, dtype=torch.float64, generator=generator)


@pytest.fixture
def X2(generator):
    return torch.rand(3, 40, dtype=torch.float64, generator=generator)


def rbf(**options):
    kernel = RBFKernel(**options).double()
    kernel.lengthscale = torch.tensor(0.8, dtype=torch.float64)
    return kernel


def convolutional(base=None, **options):
    """With weights that differ, so that no order of patches goes unnoticed."""
    kernel = ConvolutionalKernel(base or rbf(), SHAPE, WINDOW, **options).double()
    weights = kernel.augmentation.patch_weights
    if weights is not None:
        generator = torch.Generator().manual_seed(1)
        weights.data += torch.randn(weights.shape, generator=generator).double()
    return kernel


def slow(kernel):
    """The same kernel by its definition: patches as any other orbit."""
    return InvariantKernel(kernel.base_kernel, kernel.augmentation, "double").double()


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_a_matrix_is_the_loop_over_patches(X, X2, weights, chunk_size):
    kernel = convolutional(weights=weights, chunk_size=chunk_size)
    w = kernel.augmentation.weights
    w = torch.ones(9).double() if w is None else w.detach()
    images, images2 = X.reshape(4, *SHAPE), X2.reshape(3, *SHAPE)
    expected = oracles.convolutional_kernel(images, images2, WINDOW, w, 0.8)
    torch.testing.assert_close(dense(kernel, X, X2), expected, **EXACT)
    own = oracles.convolutional_kernel(images, images, WINDOW, w, 0.8)
    torch.testing.assert_close(dense(kernel, X), own, **EXACT)
    torch.testing.assert_close(kernel(X, diag=True), own.diagonal(), **EXACT)
    assert torch.linalg.eigvalsh(dense(kernel, X)).min() > -1e-12


CASES = {
    "plain": dict(),
    "per pixel": dict(base=rbf(ard_num_dims=12)),
    "located": dict(location_kernel=rbf()),
    "strided": dict(stride=2),
    "blocks": dict(chunk_size=2),
    "located Matern": dict(base=MaternKernel(), location_kernel=MaternKernel()),
    "scaled": dict(base=ScaleKernel(RBFKernel())),
}


@pytest.mark.parametrize("name", CASES)
def test_direct_products_agree_with_patches_as_an_orbit(X, X2, name, generator):
    options = copy.deepcopy(CASES[name])
    if name == "per pixel":
        scales = 0.5 + torch.rand(1, 12, dtype=torch.float64, generator=generator)
        options["base"].lengthscale = scales
    kernel = convolutional(**options)
    reference = slow(kernel)
    for args in ((X,), (X, X2)):
        torch.testing.assert_close(
            dense(kernel, *args), dense(reference, *args), **EXACT
        )
    Z = kernel.augmentation(X2)[:, 1]
    found = kernel.base_cross(Z, X)
    torch.testing.assert_close(found, reference.base_cross(Z, X), **EXACT)
    P = kernel.augmentation.num_samples
    assert found.shape == (3, 4) and P == (9 if name != "strided" else 4)
    patches = kernel.augmentation(X)
    coefficients = kernel.augmentation.coefficients(X)
    one_by_one = [
        c * dense(kernel.base_kernel, Z, patches[:, p])
        for p, c in enumerate(coefficients)
    ]
    torch.testing.assert_close(found, sum(one_by_one), **EXACT)


def test_gradients_agree_with_patches_as_an_orbit(X, X2):
    target = torch.outer(X[:, 0], X2[:, 1])
    base = rbf(ard_num_dims=12)
    kernel = convolutional(base, location_kernel=rbf())
    blocks = ConvolutionalKernel(
        base, SHAPE, WINDOW, location_kernel=rbf(), chunk_size=1
    )
    blocks.augmentation, blocks.base_kernel = kernel.augmentation, kernel.base_kernel
    Z = kernel.augmentation(X2)[:, 1].detach()
    found = []
    for same in (kernel, slow(kernel), blocks.double()):
        inputs, inducing = X.clone().requires_grad_(), Z.clone().requires_grad_()
        loss = (dense(same, inputs, X2) * target).sum()
        loss = loss + same.base_cross(inducing, inputs).square().sum()
        wanted = [inputs, inducing, *kernel.parameters()]
        found.append(torch.autograd.grad(loss, wanted))
    assert len(found[0]) == 5
    for others in found[1:]:
        for mine, theirs in zip(found[0], others, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)
    assert all(g.abs().max() > 1e-6 for g in found[0])


def test_without_locations_a_shift_of_the_content_changes_nothing():
    kernel = ConvolutionalKernel(rbf(), (8, 8), (3, 3), weights=False).double()
    located = ConvolutionalKernel(
        rbf(), (8, 8), (3, 3), weights=False, location_kernel=rbf()
    ).double()
    image = torch.zeros(8, 8).double()
    image[2:4, 2:5] = torch.tensor([[1.0, 2, 3], [3, 1, 2]])
    moved = image.roll((2, 1), (0, 1))
    pair = torch.stack([image.flatten(), moved.flatten()])
    K = dense(kernel, pair)
    torch.testing.assert_close(K[0, 0], K[0, 1], **EXACT)
    K = dense(located, pair)
    assert K[0, 1] < K[0, 0] - 1e-3


def test_features_of_patches_are_averaged(X, X2):
    kernel = convolutional(LinearKernel())
    assert kernel.resolved_mode(X) == "features"
    torch.testing.assert_close(
        dense(kernel, X, X2), dense(slow(kernel), X, X2), **EXACT
    )


def test_an_exact_gp_of_images_predicts(X, X2):
    Y = X.sum(-1, keepdim=True)
    covariance = ScaleKernel(ConvolutionalKernel(RBFKernel(), SHAPE, WINDOW))
    model = SingleTaskGP(X, Y, covar_module=covariance, outcome_transform=None)
    posterior = model.posterior(X2)
    assert posterior.mean.shape == (3, 1) and posterior.variance.min() > 0


def test_large_values_leave_distances_as_they_are(X):
    # Squares of 1e4 and products of about 1e8 would leave 1e-8 of the distances.
    kernel = convolutional()
    torch.testing.assert_close(
        dense(kernel, X + 1e4), dense(kernel, X), rtol=1e-8, atol=0
    )


def test_state_pickle_and_copy_keep_the_kernel(X):
    kernel = convolutional(location_kernel=rbf())
    expected = dense(kernel, X)
    other = ConvolutionalKernel(RBFKernel(), SHAPE, WINDOW, location_kernel=RBFKernel())
    other = other.double()
    other.load_state_dict(kernel.state_dict())
    for same in (other, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        assert torch.equal(dense(same, X), expected)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (
            lambda: ConvolutionalKernel(RBFKernel(active_dims=[0]), SHAPE, WINDOW),
            ValueError,
            r"base_kernel must see all its columns, but has active_dims \[0\]",
        ),
        (
            lambda: ConvolutionalKernel(RBFKernel(), SHAPE, (6, 2)),
            ShapeError,
            r"whose sides are \(5, 4\), but is \(6, 2\)",
        ),
        (
            lambda: convolutional().base_cross(
                torch.zeros(2, 10).double(), torch.zeros(3, 40).double()
            ),
            ShapeError,
            r"Z must be ``... x u x 12``.*\(2, 10\)",
        ),
        (
            lambda: convolutional(location_kernel=rbf()).base_cross(
                torch.zeros(2, 12).double(), torch.zeros(3, 40).double()
            ),
            ShapeError,
            "Z must be ``... x u x 14``",
        ),
        (
            lambda: dense(convolutional(), torch.zeros(3, 41).double()),
            ShapeError,
            r"shape \(2, 5, 4\) have 40 columns, but x has 41",
        ),
    ],
)
def test_bad_input_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_the_orbit_of_a_convolutional_kernel_is_its_patches(X):
    kernel = convolutional()
    assert isinstance(kernel.augmentation, PatchAugmentation)
    assert kernel.num_outputs_per_input(X, X) == 1
