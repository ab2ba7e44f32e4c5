"""Matrices of a pairwise function in tiles: loops, gradients, half if symmetric."""

import pytest
import torch

from gpbridge.kernels.tiled_gram import CACHED, LARGEST, tile_rows, tiled_gram
from tests.kernels.orbit_problems import EXACT, points


def block(rows1, rows2, values):
    """Not symmetric in its steps, but in its value where both sets are one."""
    (x, q), (z, p) = rows1, rows2
    return torch.sin(values[0] * (x @ z.mT)) * q.exp() * p.exp().mT


def problem(n=7):
    x, scale = points(n).requires_grad_(), torch.tensor(0.7, dtype=torch.float64)
    return x, (x * x).sum(-1, keepdim=True) / 5, scale.requires_grad_()


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_tiles_join_to_the_matrix_and_to_its_gradients(rows):
    x, q, scale = problem()
    z, p, _ = problem(4)
    expected = block((x, q), (z, p), [scale])
    found = tiled_gram(block, (x, q), (z, p), [scale], None, rows)
    torch.testing.assert_close(found, expected, **EXACT)
    weights = points(7, 4, 1)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), [x, z, scale], retain_graph=True),
        torch.autograd.grad((expected * weights).sum(), [x, z, scale]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("rows", [1, 3, 6, 7])
def test_of_a_symmetric_matrix_half_is_computed_and_the_diagonal_is_given(rows):
    x, q, scale = problem()
    tiles = []

    def watched(rows1, rows2, values):
        tiles.append((len(rows1[0]), len(rows2[0])))
        return block(rows1, rows2, values)

    own = (3 * x[:, 0]).sin()
    found = tiled_gram(watched, (x, q), (x, q), [scale], own, rows)
    count = -(-7 // rows)
    assert len(tiles) == count * (count + 1) // 2
    expected = torch.diagonal_scatter(block((x, q), (x, q), [scale]), own)
    torch.testing.assert_close(found, expected, **EXACT)
    weights = points(7, 7, 1)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), [x, scale], retain_graph=True),
        torch.autograd.grad((expected * weights).sum(), [x, scale]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **EXACT)


def test_tiles_fill_the_cache_until_a_pair_takes_most_of_it():
    assert tile_rows(1) ** 2 <= CACHED < (tile_rows(1) + 1) ** 2
    assert tile_rows(CACHED // 64) == 8
    assert tile_rows(CACHED) == min(8, int((LARGEST / CACHED) ** 0.5))
    assert tile_rows(10 * LARGEST) == 1
