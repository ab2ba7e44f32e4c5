"""The study of learnt control: its systems, its planner, and how it is resumed."""

import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # as its scripts see each other

from control_systems import CartPole, Pendulum, TrueDynamics, advance

from gpbridge.acquisition import plan_actions

SCRIPT = ROOT / "benchmarks" / "quality_control.py"
NO_ACTION = torch.zeros(1, dtype=torch.float64)


def drift(system, state, substeps):
    """Largest change of the energy in two seconds, by Runge-Kutta steps."""
    system = type(system)(friction=0.0, substeps=substeps)
    start, largest = system.energy(state), 0.0
    for _ in range(20):
        state = advance(system, state, NO_ACTION)
        largest = max(largest, (system.energy(state) - start).abs().item())
    return largest


STATES = [
    (Pendulum(), torch.tensor([2.0, 1.0], dtype=torch.float64)),
    (CartPole(), torch.tensor([0.1, -0.5, 2.0, 1.0], dtype=torch.float64)),
]


@pytest.mark.parametrize("system, state", STATES, ids=["pendulum", "cart-pole"])
def test_energy_is_conserved_to_fourth_order_without_friction(system, state):
    coarse, fine = drift(system, state, 8), drift(system, state, 16)
    assert fine < 1e-5
    assert 12 < coarse / fine < 70  # 2^4 at least; the energy can do better


@pytest.mark.parametrize("system, state", STATES, ids=["pendulum", "cart-pole"])
def test_an_action_adds_its_work_and_friction_takes_it(system, state):
    speed = state[1]  # of what the action pushes
    energy = torch.func.grad(system.energy)(state)
    force = torch.ones(1, dtype=torch.float64)
    frictionless = type(system)(friction=0.0)
    power = energy @ frictionless.derivative(state, force)
    torch.testing.assert_close(power, speed)
    loss = energy @ type(system)(friction=0.3).derivative(state, NO_ACTION)
    torch.testing.assert_close(loss, -0.3 * speed.square())


def test_the_actions_are_too_weak_to_lift_the_pendulum():
    system, state = Pendulum(), Pendulum().start
    for _ in range(100):
        state = advance(system, state, torch.tensor([system.limit]).double())
    assert state[0].cos() < 0


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_planner_swings_the_pendulum_up_with_the_true_dynamics(seed):
    system, start = Pendulum(), None
    generator = torch.Generator().manual_seed(seed)
    state, states = system.start, []
    bounds = torch.tensor([[-system.limit], [system.limit]], dtype=torch.float64)
    for _ in range(system.episode):
        plan = plan_actions(
            TrueDynamics(system),
            lambda states, actions: system.reward(states[..., 1:, :]).sum(-1),
            *(state, system.horizon, bounds),
            start=start,
            rounds=2,
            smoothness=0.3,
            generator=generator,
        )
        start = torch.cat([plan.actions[1:], 0 * plan.actions[-1:]])
        state = advance(system, state, plan.actions[0])
        states.append(state)
    assert system.reward(torch.stack(states[-10:])).min() > 0.9


def records(path):
    """Results without their times."""
    lines = map(json.loads, path.read_text().splitlines())
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in lines]


def run(*arguments):
    subprocess.run([sys.executable, SCRIPT, "--smoke", *arguments], check=True)


@pytest.mark.slow
def test_a_resumed_study_equals_an_uninterrupted_one(tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    run("--results", whole, "--seeds", "2")
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 2 * 8  # seeds, systems, ways
    resumed.write_text("".join(lines[:27]) + lines[27][:20])  # cut off in a line
    run("--results", resumed, "--seeds", "2")
    kept = resumed.read_text().splitlines(keepends=True)
    resumed.write_text("".join(kept[:27] + kept[28:]))  # without the torn line
    assert records(resumed) == records(whole)
    before = resumed.read_text()
    run("--results", resumed, "--seeds", "2")
    assert resumed.read_text() == before  # nothing left to do
    run("--results", whole, "--report", "--figures", tmp_path)
    assert (tmp_path / "quality_control.png").stat().st_size > 10_000
