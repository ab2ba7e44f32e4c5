"""One eigendecomposition against dense determinants and densities."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from gpbridge.spectral import (
    decompose,
    gaussian_spectrum,
    gaussian_spectrum_of_weights,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}
PAIRS = [(1e-3, 0.5), (1.0, 0.1), (50.0, 1e-4)]


def features(n, p, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, p, generator=generator, dtype=torch.float64)


def of_weights(J, y):
    return gaussian_spectrum_of_weights(
        J.T @ J,
        lambda v: J @ v,
        lambda u: J.T @ u.reshape(-1),
        y,
    )


@pytest.mark.parametrize("s", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("n, p", [(8, 5), (5, 8)])
def test_determinant_and_dimension_are_dense_ones(n, p, s):
    J = features(n, p)
    spectrum = decompose(J @ J.T)
    A = torch.eye(n).double() + s * J @ J.T
    s = torch.tensor(s).double()
    torch.testing.assert_close(spectrum.logdet(s), torch.logdet(A), **EXACT)
    expected = n - torch.linalg.inv(A).trace()
    got = spectrum.effective_dimension(s)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    other = decompose(J.T @ J)  # the same spectrum up to zeros
    torch.testing.assert_close(other.logdet(s), spectrum.logdet(s), **EXACT)


@pytest.mark.parametrize("s, noise", PAIRS)
@pytest.mark.parametrize("n, p", [(8, 5), (5, 8), (1, 3), (4, 1)])
def test_the_evidence_is_the_log_density(n, p, s, noise):
    J, y = features(n, p), features(n, 1, seed=1)[:, 0]
    C = s * J @ J.T + noise * torch.eye(n).double()
    expected = MultivariateNormal(torch.zeros(n).double(), C).log_prob(y)
    s, noise = torch.tensor([s, noise], dtype=torch.float64)
    for spectrum in (gaussian_spectrum(J @ J.T, y), of_weights(J, y)):
        got = spectrum.log_evidence(s, noise)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
        K = s * J @ J.T
        dimension = torch.linalg.solve(K + noise * torch.eye(n).double(), K).trace()
        got = spectrum.effective_dimension(s, noise)
        torch.testing.assert_close(got, dimension, rtol=1e-7, atol=1e-9)


def test_duplicated_and_dead_features_cost_nothing():
    J = features(8, 3)
    J = torch.cat([J, J, torch.zeros(8, 2).double()], -1)
    y = features(8, 1, seed=1)[:, 0]
    s, noise = torch.tensor([0.7, 0.1], dtype=torch.float64)
    C = s * J @ J.T + noise * torch.eye(8).double()
    expected = MultivariateNormal(torch.zeros(8).double(), C).log_prob(y)
    spectrum = of_weights(J, y)
    assert len(spectrum.eigenvalues) == 3
    torch.testing.assert_close(spectrum.log_evidence(s, noise), expected, **EXACT)


def test_a_fit_without_residual_keeps_its_digits():
    # The rest is the norm of a residual: a difference of norms would be noise here.
    J = features(30, 4)
    w = features(4, 1, seed=2)[:, 0]
    off = torch.linalg.svd(J, full_matrices=True)[0][:, -1]
    spectrum = of_weights(J, J @ w + 1e-9 * off)
    assert spectrum.rest.item() == pytest.approx(1e-18, rel=1e-4)


def test_gradients_are_those_of_the_density():
    J, y = features(6, 9), features(6, 1, seed=1)[:, 0]
    spectrum = gaussian_spectrum(J @ J.T, y)
    logs = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v: spectrum.log_evidence(v[0].exp(), v[1].exp()), logs
    )


def test_round_off_leaves_no_negative_eigenvalue():
    J = 1e6 * features(20, 2)
    spectrum = decompose(J @ J.T)
    assert (spectrum.eigenvalues >= 0).all()
    assert torch.isfinite(spectrum.logdet(torch.tensor(1e6).double()))


def test_float32_matrices_are_decomposed_in_float64():
    J = features(6, 3).float()
    spectrum = decompose(J @ J.T)
    assert spectrum.eigenvalues.dtype == torch.float64
    rebuilt = (spectrum.vectors * spectrum.eigenvalues) @ spectrum.vectors.T
    torch.testing.assert_close(rebuilt, (J @ J.T).double(), rtol=1e-5, atol=1e-5)


def test_without_signal_the_evidence_is_that_of_noise():
    y = features(5, 1)[:, 0]
    spectrum = gaussian_spectrum(torch.zeros(5, 5).double(), y)
    got = spectrum.log_evidence(torch.tensor(1.0), torch.tensor(0.5).double())
    expected = -0.5 * ((y**2).sum() / 0.5 + 5 * math.log(2 * math.pi * 0.5))
    torch.testing.assert_close(got, expected, **EXACT)
