"""Averages over orbits under a budget: what they need is known before it is taken."""

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel

from gpbridge.augmentation import AffineAugmentation2d, FiniteOrbit, Rotation2d
from gpbridge.kernels import InvariantKernel, orbit_sums
from tests.kernels.orbit_problems import dense, points, rbf
from tests.peak_memory import peak_bytes


def turns():
    return FiniteOrbit.quarter_turns((14, 14))


def warps():
    return AffineAugmentation2d((14, 14), num_samples=8)


def rotations():
    return Rotation2d(4, sampling="qmc")


# Which part of the memory is the largest differs.
CALLS = {
    "the result": (lambda: Rotation2d(1, sampling="qmc"), 900, 2, dense),
    "blocks": (rotations, 350, 2, dense),
    "two sides": (rotations, 500, 2, lambda k, x: dense(k, x[:200], x[200:])),
    "orbits of a matrix": (warps, 60, 196, dense),
    "orbits of a diagonal": (warps, 600, 196, lambda k, x: k(x, diag=True)),
    "blocks of a diagonal": (
        lambda: Rotation2d(16, sampling="qmc"),
        2000,
        2,
        lambda k, x: k(x, diag=True),
    ),
    "orbits of a cross covariance": (turns, 600, 196, lambda k, x: k.base_cross(x, x)),
    "values of a cross covariance": (
        rotations,
        900,
        2,
        lambda k, x: k.base_cross(x[:200], x),
    ),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("base", [RBFKernel, MaternKernel])
@pytest.mark.parametrize("name", CALLS)
def test_an_estimate_is_what_is_taken(name, base, gradients, monkeypatch):
    estimates = []
    monkeypatch.setattr(
        orbit_sums, "check_memory", lambda what, needed, *_: estimates.append(needed)
    )
    build, n, d, call = CALLS[name]
    kernel, x = InvariantKernel(base(), build(), "double"), points(n, d).float()
    kernel.base_kernel.lengthscale = 5.0
    parameters = list(kernel.parameters())

    def run():
        values = call(kernel, x)
        if gradients:
            torch.autograd.grad(values.sum(), parameters)
        return values

    with torch.set_grad_enabled(gradients):
        taken = peak_bytes(run)
    assert taken / 1.25 < estimates[-1] < 1.7 * taken


def test_a_result_beyond_the_budget_is_refused_before_it_is_formed():
    augmentation = Rotation2d(64, sampling="qmc")
    kernel = InvariantKernel(rbf(), augmentation, memory_budget=1e5).double()
    x = points(1).expand(100, 2)
    message = "orbits of 64 and 64 elements, for 100 and 100 points.*base_cross"
    with pytest.raises(MemoryError, match=message):
        dense(kernel, x)
    with pytest.raises(MemoryError, match="orbits of 64 and 64 elements, for 100 poi"):
        kernel(x, diag=True)
    with pytest.raises(MemoryError, match="orbits of 1 and 64 .* 100 and 100.*") as e:
        kernel.base_cross(x, x)
    assert "base_cross" not in str(e.value) and "chunk_size" in str(e.value)


def test_smaller_chunks_of_a_diagonal_fit_where_larger_ones_do_not():
    x = points(200, 196).float()
    kernel = InvariantKernel(RBFKernel(), warps(), memory_budget=2e6)
    with torch.no_grad():
        with pytest.raises(MemoryError, match="a smaller chunk_size"):
            kernel(x, diag=True)
        kernel.chunk_size = 20
        assert peak_bytes(lambda: kernel(x, diag=True)) < 2e6


def test_orbits_of_wide_inputs_count_when_blocks_are_chosen(monkeypatch):
    monkeypatch.setattr("gpbridge.kernels.orbit_blocks.CPU_ENTRIES", 2**16)
    kernel, x = InvariantKernel(RBFKernel(), warps(), "double"), points(400, 196)
    x = x.float()
    orbit_bytes = 4 * 8 * 196 * len(x)
    with torch.no_grad():
        assert peak_bytes(lambda: kernel(x, diag=True)) < orbit_bytes
        # One column: few values of the kernel for each row.
        assert peak_bytes(lambda: dense(kernel, x, x[:1] + 1)) < orbit_bytes
