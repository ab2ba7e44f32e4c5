"""Slice sampling on known densities."""

import math

import pytest
import torch
from botorch.exceptions.errors import InputDataError

from gpbridge.checks import ShapeError
from gpbridge.dnn.slice_sampling import elliptical_slice_sampling
from tests.dnn.chain_problems import moments_on_a_grid, ring

QUIET = {"progress": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def test_the_law_of_the_chains_is_the_posterior():
    run = elliptical_slice_sampling(
        ring, zeros(1000, 2), 1.5, 10, burn_in=8, generator=seeded(), **QUIET
    )
    z = run.samples.flatten(0, 1)
    absolute, second = moments_on_a_grid(ring, 1.5)
    torch.testing.assert_close(z.abs().mean(0), absolute, atol=0.02, rtol=0)
    torch.testing.assert_close(z.mT @ z / len(z), second, atol=0.03, rtol=0)
    torch.testing.assert_close(run.log_likelihoods, ring(run.samples))
    assert run.samples.shape == (1000, 10, 2) and run.num_stuck == 0


def test_without_data_every_draw_is_a_draw_of_the_prior():
    std = torch.tensor([0.5, 3.0]).double()
    run = elliptical_slice_sampling(
        lambda z: zeros(len(z)), zeros(500, 2), std, 8, generator=seeded(), **QUIET
    )
    assert run.num_calls == 9  # one at the start, one per step: the first is accepted
    found = run.samples[:, 4:].flatten(0, 1).std(0)
    torch.testing.assert_close(found, std, rtol=0.05, atol=0)


def test_a_chain_is_what_it_is_alone_and_may_have_its_own_target():
    centres = torch.tensor([-1.0, 0.0, 2.0]).double()

    def each(z):
        return -0.5 * (z[:, 0] - centres).square() / 0.1

    run = elliptical_slice_sampling(
        each, zeros(3, 1), 3.0, 250, burn_in=5, generator=seeded(), **QUIET
    )
    torch.testing.assert_close(run.samples.mean((1, 2)), centres, atol=0.1, rtol=0)
    std = torch.full((3,), 0.1**0.5).double()
    torch.testing.assert_close(run.samples.std((1, 2)), std, atol=0.06, rtol=0)


def test_a_run_in_two_parts_is_the_run_in_one():
    whole = elliptical_slice_sampling(
        ring, zeros(3, 2), 1.0, 12, thinning=2, generator=seeded(), **QUIET
    )
    generator, parts, start = seeded(), [], zeros(3, 2)
    for count in (5, 7):
        part = elliptical_slice_sampling(
            ring, start, 1.0, count, thinning=2, generator=generator, **QUIET
        )
        parts.append(part.samples)
        start = part.samples[:, -1]
    assert torch.equal(torch.cat(parts, 1), whole.samples)
    burnt = elliptical_slice_sampling(
        ring, zeros(3, 2), 1.0, 3, thinning=2, burn_in=18, generator=seeded(), **QUIET
    )
    assert torch.equal(burnt.samples, whole.samples[:, 9:])
    other = elliptical_slice_sampling(
        ring, zeros(3, 2), 1.0, 12, generator=seeded(1), **QUIET
    )
    assert not torch.equal(other.samples, whole.samples)


def test_neither_the_start_nor_the_global_random_state_is_changed():
    start, before = zeros(2, 2), torch.get_rng_state()
    elliptical_slice_sampling(ring, start, num_samples=3, **QUIET)
    assert torch.equal(torch.get_rng_state(), before) and not start.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_where_the_likelihood_is_not_finite_nothing_is_accepted(bad):
    def half(z):
        value = -0.5 * z[:, 0].square()
        return torch.where(z[:, 0] >= 0, value, torch.full_like(value, bad))

    run = elliptical_slice_sampling(
        half, zeros(200, 1) + 0.1, 1.0, 30, burn_in=10, generator=seeded(), **QUIET
    )
    assert bool((run.samples >= 0).all())
    # A half normal of variance 1/2: mean (1/2)^(1/2) (2/pi)^(1/2).
    assert run.samples.mean().item() == pytest.approx(math.pi**-0.5, abs=0.02)


def test_large_float32_log_likelihoods_are_compared_in_double():
    def sharp(z):
        return -1e6 - 0.5 * (z.double() - 0.3).square().sum(-1) / 1e-2

    run = elliptical_slice_sampling(
        sharp, torch.zeros(50, 1), 1.0, 40, burn_in=20, generator=seeded(), **QUIET
    )
    assert run.samples.dtype == torch.float32
    assert run.log_likelihoods.dtype == torch.float64
    assert run.samples.std().item() == pytest.approx(0.1, rel=0.1)


def falling(chains_that_fall):
    """A log likelihood that is lower at each call, so that no height is reached."""
    calls = []

    def log_likelihood(z):
        calls.append(len(z))
        return torch.where(torch.arange(len(z)) < chains_that_fall, -1e3, 0.0) * len(
            calls
        )

    return log_likelihood


def test_a_chain_at_the_cap_stays_and_is_reported():
    with pytest.warns(UserWarning, match="In 4 of 12 steps a chain found no point"):
        run = elliptical_slice_sampling(
            *(falling(1), zeros(3, 2), 1.0, 4), max_shrinks=5, **QUIET
        )
    assert run.num_stuck == 4 and not run.samples[0].any()
    assert bool(run.samples[1:].all())
    # Waiting for the chain that is stuck costs the others calls, not draws.
    assert run.num_calls == 1 + 4 * 5


def test_chains_that_are_all_at_the_cap_are_an_error():
    with pytest.raises(RuntimeError, match="All 2 chains found no point .* in 7 calls"):
        elliptical_slice_sampling(falling(2), zeros(2, 1), max_shrinks=7, **QUIET)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"initial": torch.zeros(3)}, ShapeError, r"shape \(3,\).*initial\[None\]"),
        ({"initial": zeros(1, 2) / 0}, InputDataError, "initial contains NaN"),
        ({"initial": torch.zeros(1, 2).int()}, TypeError, "initial must be float32"),
        ({"prior_std": 0.0}, ValueError, "prior_std must be positive"),
        ({"num_samples": 0}, ValueError, "num_samples must be a whole number"),
        ({"thinning": 0.5}, ValueError, "thinning must be a whole number"),
        ({"burn_in": -1}, ValueError, "burn_in must be a whole number of steps"),
        ({"max_shrinks": 0}, ValueError, "max_shrinks must be a whole number"),
        (
            {"log_likelihood": lambda z: z.sum()},
            ShapeError,
            r"one value per chain, ``2``, but returned shape \(\)",
        ),
        (
            {"log_likelihood": lambda z: 0 * z[:, 0] / 0},
            ValueError,
            "not finite at the start of 2 of 2 chains, as nan in chain 0",
        ),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    given = {"log_likelihood": ring, "initial": zeros(2, 2), **change}
    with pytest.raises(error, match=message):
        elliptical_slice_sampling(**given, **QUIET)
