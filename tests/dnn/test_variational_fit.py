"""Fits of the bound: seeds, divergence, callbacks, defaults."""

import pytest
import torch
from torch import nn

from gpbridge.dnn.divergence import DivergedError
from gpbridge.dnn.variational import MeanFieldVI
from gpbridge.dnn.variational_fit import fit_mean_field, fit_variational
from tests.dnn.variational_problems import gaussian, mlp


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def test_seeds_decide_and_the_global_state_does_not():
    X, Y, network = random(12, 2), random(12, 1), mlp()
    before = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        vi = MeanFieldVI(network, gaussian(), 12)
        fit_variational(vi, X, Y, epochs=2, generator=seeded(seed), progress=False)
        found.append(vi.mean.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(before, torch.get_rng_state())


def test_a_fit_that_diverges_keeps_the_epoch_before():
    X, Y = random(12, 2), random(12, 1)
    vi = MeanFieldVI(mlp(), gaussian(), 12)
    kept = []

    def poison(epoch, vi, loss):
        kept.append(vi.mean.detach().clone())
        if epoch == 2:
            vi.likelihood.raw_noise.data.fill_(torch.nan)

    match = r"nan in epoch 3.*\.last_good.*learning_rate=0.001"
    with pytest.raises(DivergedError, match=match) as caught:
        fit_variational(vi, X, Y, epochs=9, progress=False, callback=poison)
    assert caught.value.last_good is vi
    with pytest.raises(DivergedError, match=r"try learning_rate=0.01 ") as caught:
        options = {"epochs": 9, "learning_rate": 1e200, "progress": False}
        fit_mean_field(mlp(), X, Y, gaussian(), **options)
    assert caught.value.last_good.draw(2)(X).isfinite().all()
    assert torch.equal(vi.mean, kept[1])


def test_a_callback_ends_the_fit():
    vi = MeanFieldVI(mlp(), gaussian(), 12)
    done = fit_variational(
        vi, random(12, 2), random(12, 1), progress=False, callback=lambda e, *_: e == 1
    )
    assert len(done) == 2


def test_float32_and_defaults():
    X = torch.linspace(-1, 1, 20)[:, None]
    vi = fit_mean_field(nn.Linear(1, 1), X, 3 * X, epochs=3, progress=False)
    assert vi.mean.dtype == torch.float32
    assert vi.draw(2)(X).shape == (2, 20, 1)
