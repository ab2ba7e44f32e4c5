"""Quadratic forms and their gradients are those of the dense matrix."""

import pickle

import pytest
import torch

from gpbridge import kernel_tiles
from gpbridge.kernel_gradients import quadratic_form
from gpbridge.kernels import FeatureKernel
from tests.test_kernel_operator import EXACT, KERNELS, random


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setitem(kernel_tiles.TILE_BYTES, "cpu", 8 * 20 * 20)


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "varying diagonal"])
def test_the_quadratic_form_and_its_gradients(name):
    kernel = pickle.loads(pickle.dumps(KERNELS[name]))
    X, L, R = random(50, 3), random(50, 2, seed=1), random(50, 2, seed=2)
    noise = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    leaves = [noise, *(p for p in kernel.parameters() if p.requires_grad)]
    H = kernel(X).to_dense() + noise * torch.eye(50).double()
    exact = (L * (H @ R)).sum()
    expected = torch.autograd.grad(exact, leaves)
    got = quadratic_form(kernel, X, noise, L, R)
    torch.testing.assert_close(got, exact, **EXACT)
    for a, b in zip(torch.autograd.grad(got, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_one_noise_variance_per_point_in_the_quadratic_form():
    X, V = random(30, 3), random(30, 2, seed=1)
    noise = random(30, seed=2).abs().requires_grad_()
    form = quadratic_form(KERNELS["gaussian"], X, noise, V, V)
    (grad,) = torch.autograd.grad(form, noise)
    torch.testing.assert_close(grad, V.square().sum(-1), **EXACT)


@pytest.mark.parametrize("learnt", [True, False])
def test_features_are_evaluated_twice_per_point_and_in_blocks(learnt, monkeypatch):
    monkeypatch.setattr(kernel_tiles, "FEATURE_BYTES", 8 * 6 * 10)
    rows = []

    def features(x):
        rows.append(len(x))
        return torch.cat([x, x.square()], -1)

    kernel = FeatureKernel(features).double().requires_grad_(learnt)
    X, L, R = random(50, 3), random(50, 2, seed=1), random(50, 2, seed=2)
    got = quadratic_form(kernel, X, torch.tensor(0.3), L, R)
    assert sum(rows) <= (100 if learnt else 50) + 2 and max(rows) <= 10
    with torch.no_grad():
        exact = (L * (kernel(X).to_dense() @ R + 0.3 * R)).sum()
    torch.testing.assert_close(got.detach(), exact, rtol=1e-6, atol=1e-6)
