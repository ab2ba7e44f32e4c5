"""What kernels of orbits share: columns, batches, frozen orbits, inducing points."""

import copy
import math
import pickle

import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import (
    LinearKernel,
    PeriodicKernel,
    RBFKernel,
    RFFKernel,
)
from torch import nn

from gpbridge.augmentation import (
    AffineAugmentation2d,
    PatchAugmentation,
    Rotation2d,
)
from gpbridge.checks import ShapeError
from gpbridge.kernels import (
    InvariantKernel,
)
from tests.kernels.orbit_problems import EXACT, dense, rbf


@pytest.mark.parametrize("mode", ["double", "difference", "features"])
def test_no_point_and_one_point_have_matrices_too(mode, X, X2):
    base = LinearKernel().double() if mode == "features" else rbf()
    kernel = InvariantKernel(base, Rotation2d(3), mode).double()
    assert dense(kernel, X[:0]).shape == (0, 0)
    assert dense(kernel, X[:0], X2).shape == (0, 4)
    assert kernel(X[:0], diag=True).shape == (0,)
    torch.testing.assert_close(dense(kernel, X[:1]), dense(kernel, X)[:1, :1], **EXACT)


def test_the_cross_covariance_is_the_single_sum(X, X2):
    turns = Rotation2d(4, init=1.0).double()
    for chunk_size in (None, 2):
        kernel = InvariantKernel(rbf(), turns, chunk_size=chunk_size).double()
        expected = torch.stack(
            [dense(rbf(), X2, turns(X)[:, a]) for a in range(4)]
        ).mean(0)
        found = kernel.base_cross(X2, X)
        torch.testing.assert_close(found, expected, **EXACT)
    # Averaged over the orbit of Z, it is the kernel.
    orbits = [kernel.base_cross(turns(X2)[:, a], X) for a in range(4)]
    torch.testing.assert_close(
        torch.stack(orbits).mean(0), dense(kernel, X2, X), **EXACT
    )


def test_batches_of_kernels_and_inputs_are_loops(X, generator):
    base = RBFKernel(batch_shape=torch.Size([2])).double()
    base.lengthscale = torch.tensor([[[0.5]], [[1.5]]]).double()
    turns = Rotation2d(3, init=1.0).double()
    inputs = torch.randn(2, 5, 2, dtype=torch.float64, generator=generator)
    Z = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    for mode in ("double", "difference"):
        kernel = InvariantKernel(base, turns, mode).double()
        for b, lengthscale in enumerate((0.5, 1.5)):
            alone = InvariantKernel(rbf(lengthscale), turns, mode).double()
            for x in (X, inputs):
                mine = x if x.dim() == 2 else x[b]
                torch.testing.assert_close(
                    dense(kernel, x)[b], dense(alone, mine), **EXACT
                )
                torch.testing.assert_close(
                    kernel(x, diag=True)[b], alone(mine, diag=True), **EXACT
                )
                torch.testing.assert_close(
                    kernel.base_cross(Z, x)[b], alone.base_cross(Z, mine), **EXACT
                )


def test_columns_are_selected_before_the_transformation(X):
    wide = torch.cat([X[:, :1], X], -1)
    kernel = InvariantKernel(
        rbf(), Rotation2d(3, init=1.0), active_dims=[1, 2]
    ).double()
    plain = InvariantKernel(rbf(), Rotation2d(3, init=1.0)).double()
    torch.testing.assert_close(dense(kernel, wide), dense(plain, X), **EXACT)
    torch.testing.assert_close(
        kernel.base_cross(X, wide), plain.base_cross(X, X), **EXACT
    )


def annulus(generator, n=60):
    radius = 0.3 + 1.2 * torch.rand(n, dtype=torch.float64, generator=generator)
    angle = 2 * math.pi * torch.rand(n, dtype=torch.float64, generator=generator)
    X = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    noise = torch.randn(n, dtype=torch.float64, generator=generator)
    return X, ((3 * radius).sin() + 0.05 * noise)[:, None]


@pytest.mark.parametrize("sampling", ["grid", "qmc", "fixed"])
def test_predictive_variances_are_never_negative_with_fixed_draws(sampling, generator):
    X, Y = annulus(generator, 40)
    turns = Rotation2d(6, init=1.5, sampling=sampling)
    kernel = InvariantKernel(RBFKernel(), turns)
    model = SingleTaskGP(X, Y, covar_module=kernel, outcome_transform=None)
    model.likelihood.noise = 1e-4
    for _ in range(3):
        model.eval()
        with torch.no_grad():
            variance = model.posterior(X + 0.01).variance
        assert variance.min() > 0
        model.train()
        turns.resample(torch.Generator().manual_seed(turns.redraws))


def test_orbits_redrawn_at_each_call_would_have_negative_variances(generator):
    class Restless(Rotation2d):
        def transform(self, x):
            self._redraw(generator)
            return super().transform(x)

    (X, _), (X2, _) = annulus(generator, 40), annulus(generator, 40)

    def least_variance(turns):
        kernel = InvariantKernel(rbf(), turns, "double").double()
        K, cross = dense(kernel, X), dense(kernel, X2, X)
        own = dense(kernel, X2)
        solved = torch.linalg.solve(K + 1e-4 * torch.eye(40), cross.mT)
        return (own - cross @ solved).diagonal().min().item()

    options = {"num_samples": 4, "init": 1.5, "sampling": "fixed"}
    assert least_variance(Restless(**options)) < -0.1
    assert least_variance(Rotation2d(**options)) > 0


def test_an_orbit_redrawn_behind_a_prediction_is_refused(generator):
    X, Y = annulus(generator, 20)
    turns = Rotation2d(6, sampling="fixed")
    model = SingleTaskGP(
        X, Y, covar_module=InvariantKernel(RBFKernel(), turns), outcome_transform=None
    )
    model.posterior(X)
    with pytest.raises(RuntimeError, match="cannot be redrawn in eval mode"):
        turns.resample()
    turns.train().resample()
    with pytest.raises(RuntimeError, match="redrawn while this kernel"):
        model.posterior(X + 1)
    with pytest.raises(RuntimeError, match="redrawn while this kernel"):
        model.covar_module.base_cross(X, X)
    model.train()
    assert model.posterior(X).variance.min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_follow_the_inputs(dtype, generator):
    X = torch.randn(5, 36, dtype=dtype, generator=generator)
    augmentation = AffineAugmentation2d((6, 6), num_samples=3)
    kernel = InvariantKernel(RBFKernel(), augmentation).to(dtype)
    assert dense(kernel, X).dtype == dtype
    assert kernel.base_cross(X, X).dtype == dtype


def test_state_pickle_and_copy_keep_the_kernel(X):
    kernel = InvariantKernel(rbf(), Rotation2d(5, init=1.0, sampling="fixed")).double()
    kernel.augmentation.resample(torch.Generator().manual_seed(3))
    expected = dense(kernel, X)
    other = InvariantKernel(rbf(0.1), Rotation2d(5, sampling="fixed")).double()
    other.load_state_dict(kernel.state_dict())
    for same in (other, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        assert torch.equal(dense(same, X), expected)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: InvariantKernel(nn.Linear(2, 1), Rotation2d()), TypeError, "Linear"),
        (lambda: InvariantKernel(RBFKernel(), nn.Tanh()), TypeError, "is Tanh"),
        (
            lambda: InvariantKernel(RBFKernel(), Rotation2d(), "single"),
            ValueError,
            "mode must be one of",
        ),
        (
            lambda: InvariantKernel(RBFKernel(), Rotation2d(), "features"),
            ValueError,
            "RBFKernel has no exact features",
        ),
        (
            lambda: InvariantKernel(
                RBFKernel(), Rotation2d(sampling="qmc"), "difference"
            ),
            ValueError,
            "Rotation2d has no law of differences",
        ),
        (
            lambda: InvariantKernel(
                RBFKernel(), AffineAugmentation2d((4, 4), ["rotation"]), "difference"
            ),
            ValueError,
            "AffineAugmentation2d has no law of differences",
        ),
        (
            lambda: InvariantKernel(PeriodicKernel(), Rotation2d(), "difference"),
            ValueError,
            "of the distance only.*PeriodicKernel",
        ),
        (
            lambda: InvariantKernel(
                RBFKernel(ard_num_dims=2), Rotation2d(), "difference"
            ),
            ValueError,
            "without ARD",
        ),
        (
            lambda: InvariantKernel(
                RBFKernel(), Rotation2d(), batch_shape=torch.Size([2])
            ),
            ValueError,
            "Pass it to base_kernel",
        ),
        (
            lambda: InvariantKernel(RBFKernel(), Rotation2d(), chunk_size=0),
            ValueError,
            "chunk_size must be a whole number",
        ),
        (
            lambda: InvariantKernel(
                RBFKernel(), PatchAugmentation((4, 4), (2, 2))
            ).base_cross(torch.zeros(3, 5), torch.zeros(2, 16)),
            ShapeError,
            r"Z must be ``... x u x 4``.*\(3, 5\)",
        ),
        (
            lambda: InvariantKernel(RFFKernel(8), Rotation2d())(
                torch.zeros(3, 2)
            ).to_dense(),
            ValueError,
            "Pass num_dims",
        ),
        (
            lambda: InvariantKernel(RBFKernel(), Rotation2d()).forward(
                torch.zeros(3, 2), torch.zeros(3, 2), last_dim_is_batch=True
            ),
            NotImplementedError,
            "last_dim_is_batch",
        ),
    ],
)
def test_bad_input_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
