"""Where inducing points start: distinct training patches, elements of orbits, rows."""

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.kernels import RBFKernel, ScaleKernel

from gpbridge.augmentation import FiniteOrbit
from gpbridge.centroids import centroids
from gpbridge.checks import ShapeError
from gpbridge.inducing_points import SPREAD, initial_inducing_points
from gpbridge.kernels import ConvolutionalKernel, InvariantKernel


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sparse_images(n=30):
    """Images that are empty but for one pixel: many patches are equal."""
    images = torch.zeros(n, 6, 6)
    rows = torch.arange(n)
    images[rows, rows % 6, (rows * 5) % 6] = 1 + rows / n
    return images.flatten(1)


KERNELS = {
    "patches": ScaleKernel(ConvolutionalKernel(RBFKernel(), (6, 6), (3, 3))),
    "turns": InvariantKernel(RBFKernel(), FiniteOrbit.quarter_turns((6, 6))),
    "sum": InvariantKernel(RBFKernel(), FiniteOrbit.flips((6, 6))) + RBFKernel(),
    "plain": ScaleKernel(RBFKernel()),
}


@pytest.mark.parametrize("name", ["patches", "turns", "sum"])
def test_points_are_distinct_elements_of_training_orbits(name):
    kernel, X = KERNELS[name], sparse_images()
    Z = initial_inducing_points(kernel, X, 20, generator())
    inner = kernel
    while not hasattr(inner, "augmentation") and hasattr(inner, "kernels"):
        inner = inner.kernels[0]
    if name == "patches":
        inner = kernel.base_kernel
    orbit = inner.augmentation(X).flatten(0, 1)
    assert Z.shape == (20, orbit.shape[-1])
    shift = Z[:, None] - orbit[None]  # from each element
    inside = ((shift >= 0) & (shift <= SPREAD)).all(-1)
    assert inside.any(-1).all()
    nearest = inside.float().argmax(-1)
    assert len(orbit[nearest].unique(dim=0)) == 20


def test_empty_patches_count_once():
    kernel, X = KERNELS["patches"], sparse_images()
    Z = initial_inducing_points(kernel, X, 20, generator())
    assert (Z.abs().amax(-1) <= SPREAD).sum() <= 1


def test_seeds_decide_and_nothing_else():
    kernel, X = KERNELS["patches"], sparse_images()
    state = torch.get_rng_state()
    first, second, third = (
        initial_inducing_points(kernel, X, 9, generator(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_dtype_is_that_of_the_inputs():
    kernel, X = KERNELS["patches"], sparse_images().double()
    assert initial_inducing_points(kernel, X, 9).dtype == torch.float64


def test_there_are_no_more_points_than_the_inputs_hold():
    empty = torch.zeros(30, 36)
    assert initial_inducing_points(KERNELS["patches"], empty, 5).shape == (1, 9)
    assert initial_inducing_points(KERNELS["turns"], empty, 5).shape == (1, 36)
    X = torch.rand(30, 36, generator=generator())
    twice = torch.cat([X, X])
    Z = initial_inducing_points(KERNELS["plain"], twice, 40, generator())
    assert torch.equal(Z, X.unique(dim=0))  # all of them


def test_kernels_without_orbits_have_centroids():
    X = torch.rand(30, 36, generator=generator())
    Z = initial_inducing_points(KERNELS["plain"], X, 7, generator(3))
    assert torch.equal(Z, centroids(X, 7, generator(3)))


def test_bad_input_is_refused():
    with pytest.raises(InputDataError, match="no rows"):
        initial_inducing_points(KERNELS["plain"], torch.zeros(0, 3), 5)
    with pytest.raises(ValueError, match="num_inducing must be a whole number"):
        initial_inducing_points(KERNELS["plain"], torch.rand(4, 3), 0)
    with pytest.raises(ShapeError, match="see 9, 36 columns"):
        kernel = KERNELS["patches"] + RBFKernel()
        initial_inducing_points(kernel, sparse_images(), 5)
