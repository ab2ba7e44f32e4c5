"""Cyclical schedules of samplers, against the paper."""

import copy
import math

import pytest
import torch

from gpbridge.dnn.cyclical import CyclicalSchedule, first_sampling_step
from gpbridge.dnn.sgmcmc import SGHMC, SGLD


def weight():
    return torch.zeros(1, requires_grad=True)


def walk(optimizer, schedule, steps):
    rows = []
    for _ in range(steps):
        rows.append(
            [(group["lr"], group.get("noise")) for group in optimizer.param_groups]
        )
        optimizer.step()
        schedule.step()
    return rows


def test_rates_and_switches_are_those_of_the_paper():
    optimizer = SGLD(
        [{"params": [weight()]}, {"params": [weight()], "lr": 0.2}], 1.0, 9
    )
    schedule = CyclicalSchedule(optimizer, 10, 3, sampling_fraction=0.5)
    rows = walk(optimizer, schedule, 10)
    cycle = math.ceil(10 / 3)
    for k, row in enumerate(rows):
        t = (k % cycle) / cycle
        for (rate, noise), first in zip(row, (1.0, 0.2), strict=True):
            assert abs(rate - first / 2 * (math.cos(math.pi * t) + 1)) < 1e-12
            assert noise == (t >= 0.5)


def test_other_optimizers_have_a_rate_only():
    optimizer = torch.optim.SGD([weight()], 1.0)
    rows = walk(optimizer, CyclicalSchedule(optimizer, 4, 1), 4)
    assert all(noise is None for ((_, noise),) in rows)


def test_a_schedule_resumed_from_its_state_goes_on():
    whole = SGHMC([weight()], 1.0, 9)
    schedule = CyclicalSchedule(whole, 12, 3)
    walk(whole, schedule, 5)
    half = SGHMC([weight()], 0.3, 9)
    other = CyclicalSchedule(half, 100, 2)
    half.load_state_dict(copy.deepcopy(whole.state_dict()))
    other.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert walk(whole, schedule, 7) == walk(half, other, 7)


def test_the_last_step_of_a_cycle_samples():
    assert first_sampling_step(50, 0.1) == 45
    assert first_sampling_step(3, 0.01) == 2 and first_sampling_step(1, 1.0) == 0
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\], but is 1.5"):
        first_sampling_step(9, 1.5)
    with pytest.raises(ValueError, match="sampling_fraction must be positive"):
        first_sampling_step(9, 0.0)
    with pytest.raises(ValueError, match="num_cycles must be at most num_steps"):
        CyclicalSchedule(SGLD([weight()], 1.0, 9), 3, 4)
