"""Hamiltonian Monte Carlo on known densities."""

import math

import pytest
import torch

from gpbridge.checks import ShapeError
from gpbridge.dnn.hamiltonian import hamiltonian_monte_carlo
from tests.dnn.chain_problems import moments_on_a_grid, ring

QUIET = {"progress": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def ring_posterior(z):
    """The ring under a prior of standard deviation 1.5, with its gradient."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = ring(z) - 0.5 * z.square().sum(-1) / 1.5**2
        (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient


@pytest.mark.parametrize("num_steps", [1, 7])
def test_the_law_of_gradient_chains_is_the_posterior(num_steps):
    run = hamiltonian_monte_carlo(
        ring_posterior,
        torch.randn(300, 2, generator=seeded(3), dtype=torch.float64),
        100 if num_steps == 1 else 40,
        warm_up=60,
        num_steps=num_steps,
        generator=seeded(),
        **QUIET,
    )
    z = run.samples.flatten(0, 1)
    absolute, second = moments_on_a_grid(ring, 1.5)
    torch.testing.assert_close(z.abs().mean(0), absolute, atol=0.02, rtol=0)
    torch.testing.assert_close(z.mT @ z / len(z), second, atol=0.04, rtol=0)
    assert 0.65 < run.acceptance < 0.96
    assert run.num_calls == 1 + num_steps * (60 + run.samples.shape[1])


def test_the_warm_up_finds_scales_that_differ_by_orders_of_magnitude():
    std = torch.tensor([1e-2, 1.0, 10.0]).double()
    run = hamiltonian_monte_carlo(
        lambda z: (-0.5 * (z / std).square().sum(-1), -z / std.square()),
        zeros(20, 3),
        200,
        warm_up=200,
        generator=seeded(),
        **QUIET,
    )
    found = run.samples.flatten(0, 1).std(0)
    torch.testing.assert_close(found / std, torch.ones(3).double(), atol=0.1, rtol=0)
    ratio = run.scale / std
    assert 0.3 < ratio.min() and ratio.max() < 3


def test_a_step_size_far_too_large_is_told():
    def wall(z):
        value = -0.5 * z.square().sum(-1)
        return torch.where(z[:, 0].abs() < 1, value, torch.nan), -z

    with pytest.warns(UserWarning, match="Only 0.0% of the steps were accepted"):
        run = hamiltonian_monte_carlo(
            wall, zeros(2, 1), 5, warm_up=0, step_size=1e3, **QUIET
        )
    assert not run.samples.any()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"initial": torch.zeros(3)}, ShapeError, r"shape \(3,\).*initial\[None\]"),
        ({"step_size": -1.0}, ValueError, "step_size must be positive"),
        ({"num_steps": 0}, ValueError, "num_steps must be a whole number"),
        ({"warm_up": -3}, ValueError, "warm_up must be a whole number"),
        ({"target_acceptance": 1.5}, ValueError, "target_acceptance must be below 1"),
        (
            {"value_and_gradient": lambda z: (z[:, 0] * math.nan, z)},
            ValueError,
            "is not finite at the start",
        ),
    ],
)
def test_bad_arguments_of_gradient_chains_are_refused(change, error, message):
    given = {"value_and_gradient": ring_posterior, "initial": zeros(2, 2), **change}
    with pytest.raises(error, match=message):
        hamiltonian_monte_carlo(**given, **QUIET)
