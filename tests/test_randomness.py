"""Explicit randomness: reproducible with a generator, fresh without one."""

import torch

from gpbridge.randomness import fresh, standard_normal


def test_draws_follow_the_generator_and_the_tensor_they_are_like():
    like = torch.zeros(1, dtype=torch.float64)
    first, second = (
        standard_normal((1000, 2), torch.Generator().manual_seed(3), like)
        for _ in range(2)
    )
    assert torch.equal(first, second) and first.dtype == torch.float64
    assert first.mean().abs() < 4 / 2000**0.5
    assert (first.var() - 1).abs() < 4 * (2 / 2000) ** 0.5


def test_without_a_generator_they_are_fresh_and_the_global_state_stays():
    before = torch.get_rng_state()
    like = torch.zeros(1)
    one, other = (standard_normal((4,), None, like) for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_is_used_as_it_is():
    generator = torch.Generator()
    assert fresh(generator) is generator
