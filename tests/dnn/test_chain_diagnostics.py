"""Diagnostics of chains against autoregressions, whose values are known."""

import math

import pytest
import torch

from gpbridge.checks import ShapeError
from gpbridge.dnn.chain_diagnostics import effective_sample_size, split_r_hat
from tests import oracles_weight_space as oracles


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def autoregressive(correlation, chains, length, seed=0):
    noise = torch.randn(chains, length, generator=seeded(seed), dtype=torch.float64)
    values = [noise[:, 0]]
    for t in range(1, length):
        values.append(
            correlation * values[-1] + (1 - correlation**2) ** 0.5 * noise[:, t]
        )
    return torch.stack(values, 1)[..., None]


def test_r_hat_is_that_of_the_book_and_sees_chains_that_disagree():
    samples = autoregressive(0.5, 3, 21)
    found = split_r_hat(samples).item()
    assert found == pytest.approx(oracles.split_r_hat(samples[..., 0]), rel=1e-12)
    assert split_r_hat(autoregressive(0.0, 4, 1000)).item() < 1.01
    shifted = autoregressive(0.0, 2, 100) + torch.tensor([0.0, 3.0])[:, None, None]
    assert split_r_hat(shifted).item() > 1.5
    drift = autoregressive(0.0, 1, 100) + torch.linspace(0, 6, 100)[:, None]
    assert split_r_hat(drift).item() > 1.5  # one chain whose halves disagree
    assert split_r_hat(zeros(2, 8, 1)).item() == math.inf


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_effective_sample_size_of_an_autoregression_is_known(correlation):
    samples = autoregressive(correlation, 4, 4000)
    exact = 16000 * (1 - correlation) / (1 + correlation)
    assert effective_sample_size(samples).item() == pytest.approx(exact, rel=0.15)


def test_effective_sample_sizes_stay_within_bounds():
    alternating = torch.tensor([1.0, -1.0]).repeat(50)[None, :, None]
    noisy = alternating + 1e-3 * autoregressive(0.0, 1, 100)
    assert effective_sample_size(noisy).item() <= 100 * math.log10(100) + 1e-6
    assert effective_sample_size(zeros(2, 8, 1)).item() == 1
    with pytest.raises(
        ShapeError, match=r"at least 4 draws, but has shape \(1, 3, 2\)"
    ):
        effective_sample_size(zeros(1, 3, 2))
