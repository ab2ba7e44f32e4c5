"""Blocks of averages over orbits: loops, exact diagonals, half of a matrix."""

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel

from gpbridge.augmentation import Rotation2d
from gpbridge.kernels import ConvolutionalKernel, InvariantKernel, NeuralTangentKernel
from gpbridge.kernels.orbit_blocks import (
    block_sizes,
    distance_exponents,
    exponentials,
    in_blocks,
    orbit_diagonal,
    orbit_mean,
    symmetric_in_blocks,
)
from tests.kernels.orbit_problems import EXACT, dense, network, points, rbf
from tests.peak_memory import peak_bytes

CPU = torch.device("cpu")


def orbits(n, s, seed):
    return points(n * s, 2, seed).view(n, s, 2)


@pytest.mark.parametrize("base", [rbf, MaternKernel, "tangent"])
def test_means_over_orbits_are_loops(base):
    m = 1 if base != "tangent" else 3
    kernel = (NeuralTangentKernel(network(3)) if m == 3 else base()).double()
    rows, columns = orbits(3, 2, 0), orbits(3, 4, 1)
    v, w = points(1, 2, 2)[0], points(1, 4, 3)[0]
    found = orbit_mean(kernel, rows, columns, v, w, m)
    assert found.shape == (3 * m, 3 * m)
    for i in range(3):
        for j in range(3):
            expected = sum(
                v[a] * w[b] * dense(kernel, rows[i, a][None], columns[j, b][None])
                for a in range(2)
                for b in range(4)
            )
            block = found[i * m : (i + 1) * m, j * m : (j + 1) * m]
            torch.testing.assert_close(block, expected, **EXACT)
    diagonal = orbit_diagonal(kernel, rows, columns, v, w, m)
    torch.testing.assert_close(diagonal, found.diagonal(), **EXACT)


def test_exponents_are_half_of_the_squared_distances():
    left, right = points(4, 3), points(5, 3, 1)
    expected = -0.5 * torch.cdist(left, right).square()
    torch.testing.assert_close(distance_exponents(left, right.mT), expected, **EXACT)


def test_rounding_leaves_no_correlation_above_one():
    x = 1e3 * points(40, 3).float()
    values = distance_exponents(x, x.mT)
    assert (values > 0).any()
    assert (exponentials(values) <= 1).all()


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_in_single_precision_a_point_has_distance_zero_from_itself(chunk_size):
    x = 1 + points(9).float()
    kernels = [
        InvariantKernel(RBFKernel(), Rotation2d(2, init=1.0), "double"),
        ConvolutionalKernel(RBFKernel(), (1, 2), (1, 1)),
    ]
    for kernel in kernels:
        kernel.chunk_size = chunk_size
        kernel.base_kernel.lengthscale = 0.003
        expected = kernel.double()(x.double(), diag=True)
        kernel = kernel.float()
        torch.testing.assert_close(
            dense(kernel, x).diagonal().double(), expected, rtol=3e-6, atol=0
        )
    diagonal = kernels[0].float()(x, diag=True)
    assert (diagonal.double() - 0.5).abs().max() < 3e-4


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("m", [1, 2])
def test_half_of_a_symmetric_matrix_is_enough(size, m):
    K = points(10 * m, 10 * m)
    K = K + K.mT
    asked = []

    def rows(start, stop):
        asked.append((start, stop))
        return K[start * m : stop * m, start * m :]

    found = symmetric_in_blocks(rows, 10, size, m)
    assert torch.equal(found, K)
    assert asked[0][0] == 0 and asked[-1][1] == 10 and len(asked) >= 5
    leaf = K.clone().requires_grad_()
    found = symmetric_in_blocks(lambda a, b: leaf[a * m : b * m, a * m :], 10, size, m)
    weights = points(10 * m, 10 * m, 1)
    (grad,) = torch.autograd.grad((found * weights).sum(), leaf)
    both = weights + weights.mT - torch.diag(weights.diagonal())
    torch.testing.assert_close(grad, both.triu(), **EXACT)


def test_no_more_than_two_matrices_exist_at_once():
    K = points(400, 400)
    taken = peak_bytes(lambda: symmetric_in_blocks(lambda a, b: K[a:b, a:], 400, 9, 1))
    assert taken < 2.1 * 400 * 400 * 8


def test_blocks_join_to_the_whole_and_are_computed_again_for_gradients():
    x = points(7).requires_grad_()
    calls = []

    def squares(rows):
        calls.append(len(rows))
        return rows.square().sum(-1)

    found = in_blocks(squares, (x,), 3, dim=-1)
    torch.testing.assert_close(found, x.square().sum(-1))
    (grad,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(grad, 2 * x)
    assert calls[:3] == [3, 3, 1] and sorted(calls[3:]) == [1, 3, 3]
    with torch.no_grad():
        in_blocks(squares, (x,), 7, dim=-1)
    assert calls[6:] == [7]


def test_sizes_of_blocks_fit_the_entries(monkeypatch):
    monkeypatch.setattr("gpbridge.kernels.orbit_blocks.CPU_ENTRIES", 1000)
    assert block_sizes(4, 10, None, CPU) == (25, 10)
    assert block_sizes(4, 10, None, CPU, entries_per_row=100) == (10, 10)
    assert block_sizes(4, 10_000, None, CPU) == (1, 250)
    assert block_sizes(4, 10_000, 5, CPU) == (5, 50)
    assert block_sizes(10**6, 10, None, CPU) == (1, 1)
    assert block_sizes(4, 0, None, CPU) == (250, 1)
