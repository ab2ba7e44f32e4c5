"""Averages over patches under a budget: what they need is known before it is taken."""

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel

from gpbridge.kernels import ConvolutionalKernel, orbit_sums, patch_sums
from tests.kernels.orbit_problems import dense, points
from tests.peak_memory import peak_bytes

LOCATIONS = {"plain": None, "located": RBFKernel, "other": MaternKernel}
CALLS = {
    "matrix": lambda k, Z, x: dense(k, x[:40]),
    "two sides": lambda k, Z, x: dense(k, x[:30], x[30:70]),
    "diagonal": lambda k, Z, x: k(x, diag=True),
    "cross covariance": lambda k, Z, x: k.base_cross(Z, x),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("name", CALLS)
def test_an_estimate_is_what_is_taken(name, location, gradients, monkeypatch):
    estimates = []
    monkeypatch.setattr(
        orbit_sums, "check_memory", lambda what, needed, *_: estimates.append(needed)
    )
    monkeypatch.setattr("gpbridge.kernels.orbit_blocks.CPU_ENTRIES", 2**20)
    monkeypatch.setattr("gpbridge.kernels.orbit_exponentials._CACHED", 2**14)
    place = LOCATIONS[location] and LOCATIONS[location]()
    kernel = ConvolutionalKernel(RBFKernel(), (10, 10), (5, 5), location_kernel=place)
    x, Z = points(600, 100).float(), points(20, 27 if place else 25).float()
    parameters = list(kernel.parameters())

    def run():
        values = CALLS[name](kernel, Z, x)
        if gradients:
            torch.autograd.grad(values.sum(), parameters)
        return values

    with torch.set_grad_enabled(gradients):
        taken = peak_bytes(run)
    assert taken / 1.25 < estimates[-1] < 1.7 * taken


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["diagonal", "cross covariance"])
def test_exponentials_of_one_large_image_are_made_in_parts(
    name, gradients, monkeypatch
):
    """2500 places: 6.25 million pairs, twelve times what is made at a time."""
    estimates = []
    monkeypatch.setattr(
        orbit_sums, "check_memory", lambda what, needed, *_: estimates.append(needed)
    )
    kernel = ConvolutionalKernel(RBFKernel(), (52, 52), (3, 3))
    x, Z = points(1, 52 * 52).float(), points(2000, 9).float()
    parameters = list(kernel.parameters())

    def run():
        values = CALLS[name](kernel, Z, x)
        if gradients:
            torch.autograd.grad(values.sum(), parameters)
        return values

    with torch.set_grad_enabled(gradients):
        taken = peak_bytes(run)
    assert taken / 1.25 < estimates[-1] < 1.7 * taken


def test_the_memory_of_a_cross_covariance_does_not_grow_with_the_images(monkeypatch):
    monkeypatch.setattr(patch_sums, "PATCH_ENTRIES", 2**18)
    kernel = ConvolutionalKernel(RBFKernel(), (10, 10), (5, 5), memory_budget=1e7)
    Z, x = points(10, 25).float(), points(4000, 100).float()
    with torch.no_grad():  # all patches: 4000 * 36 * 25 * 4 bytes
        assert peak_bytes(lambda: kernel.base_cross(Z, x)) < 4e6 < 14.4e6
        assert peak_bytes(lambda: kernel(x, diag=True)) < 1e7 < 14.4e6


def test_a_result_beyond_the_budget_is_refused_with_what_to_try():
    kernel = ConvolutionalKernel(RBFKernel(), (10, 10), (5, 5), memory_budget=1e3)
    x = points(4, 100).float()
    with pytest.raises(MemoryError, match="orbits of 36 and 36 .* 4 and 4 .*base_cros"):
        dense(kernel, x)
    with pytest.raises(MemoryError, match="orbits of 36 and 36 .* 4 points.*chunk_siz"):
        kernel(x, diag=True)
    with pytest.raises(MemoryError, match="orbits of 1 and 36 .* fewer induc") as error:
        kernel.base_cross(x[:, :25], x)
    assert "base_cross" not in str(error.value)
