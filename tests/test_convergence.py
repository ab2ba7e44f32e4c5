"""Whether an objective still rose: trends found, noise and plateaus left alone."""

import math
import warnings

import pytest
import torch

from gpbridge.checks import NotConvergedWarning
from gpbridge.convergence import rise_at_the_end, still_rises, warn_if_rising


def noise(n, correlation=0.0, std=1.0, seed=0):
    """Draws of a stationary autoregression."""
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(n, generator=generator, dtype=torch.float64)
    values = [e[0]]
    for step in e[1:]:
        values.append(correlation * values[-1] + (1 - correlation**2) ** 0.5 * step)
    return std * torch.stack(values)


def saturating(n, time):
    """Two nats below its limit at the start."""
    return -2 * torch.exp(-torch.arange(n, dtype=torch.float64) / time)


@pytest.mark.parametrize("std", [0.0, 0.01])
@pytest.mark.parametrize("time", [80, 200, 400])
def test_what_rises_is_seen_through_noise(time, std):
    found = [
        still_rises((saturating(200, time) + noise(200, 0.3, std, seed)).tolist())
        for seed in range(20)
    ]
    # One time constant of 80: .015 nats in the last window, at a noise of .01.
    assert sum(found) >= (20 if time > 80 or not std else 12)


@pytest.mark.parametrize("std", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("time", [1, 10, 25])
def test_what_has_converged_is_left_alone(time, std):
    for seed in range(20):
        values = saturating(200, time) + noise(200, 0.3, std, seed)
        assert not still_rises((values - 7.0).tolist())


def test_noise_that_wanders_seldom_counts_as_a_trend():
    found = [still_rises(noise(200, 0.9, 0.1, seed).tolist()) for seed in range(200)]
    assert sum(found) <= 6


def test_the_height_is_that_of_a_straight_line():
    line = [0.5 * i for i in range(120)]  # windows of ten of the last thirty
    rise = rise_at_the_end(line)
    assert (rise.height, rise.window, rise.steady) == (pytest.approx(5.0), 10, True)
    assert rise.error < 1e-9
    falling = rise_at_the_end([-value for value in line])
    assert falling.height == pytest.approx(-5.0) and not falling.steady
    assert not still_rises([-value for value in line])


def test_a_rise_below_what_counts_is_none():
    line = [1e-4 * i for i in range(120)]
    assert not still_rises(line) and still_rises(line, least=1e-4)


@pytest.mark.parametrize("values", [[], [1.0], list(range(23)), [3.0] * 50])
def test_short_runs_and_constants_are_left_alone(values):
    assert not still_rises([float(value) for value in values])


def test_the_warning_says_by_how_much_and_what_to_try():
    message = "fit ended after 120 epochs.*last 10 is 5 nats per datum.*10 before. Try"
    with pytest.warns(NotConvergedWarning, match=message) as caught:
        warn_if_rising([0.5 * i for i in range(120)], "fit", "Try more.")
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_rising([-math.exp(-i) for i in range(120)], "fit", "Try more.")
