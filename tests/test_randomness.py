"""Explicit randomness: reproducible with a generator, fresh without one."""

import torch

from gpbridge.randomness import fresh, row_normals, standard_normal


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


def test_rows_keep_their_normals_when_rows_are_added():
    whole = row_normals(700, 3, seed=5)
    generator = torch.Generator().manual_seed(5)
    same_seed = torch.randn(2100, generator=generator, dtype=torch.float64)
    assert not torch.isin(whole, same_seed).any()
    for n in (0, 1, 15, 256, 300):
        assert torch.equal(row_normals(n, 3, seed=5), whole[:n])
    assert abs(whole.mean()) < 4 / 2100**0.5
    assert abs(whole.var() - 1) < 4 * (2 / 2100) ** 0.5


def test_rows_after_others_cost_their_own_blocks(monkeypatch):
    whole, calls = row_normals(2000, 3, seed=5), []
    randn = torch.randn

    def counted(*args, **options):
        calls.append(args)
        return randn(*args, **options)

    monkeypatch.setattr(torch, "randn", counted)
    for skip, n, blocks in ((1999, 1, 1), (1030, 2, 1), (250, 10, 2), (2000, 0, 0)):
        calls.clear()
        assert torch.equal(row_normals(n, 3, 5, skip), whole[skip : skip + n])
        assert len(calls) <= max(blocks, 1)


def test_blocks_and_seeds_are_independent():
    # Ten blocks of each of five seeds next to each other.
    rows = torch.stack([row_normals(2560, 40, seed) for seed in range(5)])
    blocks = rows.reshape(50, 256 * 40)
    correlation = blocks @ blocks.mT / blocks.shape[1]
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 4.5 / blocks.shape[1] ** 0.5
    far = row_normals(256, 3, seed=7, skip=256 * 2_000_000)
    assert far.isfinite().all() and not torch.equal(far, row_normals(256, 3, seed=7))
