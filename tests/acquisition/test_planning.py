"""Each particle follows one function, and the plan is the best that was tried."""

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from torch import nn

from gpbridge.acquisition import plan_actions, trajectories
from gpbridge.checks import ShapeError
from gpbridge.draws import WeightDraws
from gpbridge.functional import FunctionalNet

BOUNDS = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def networks(s=3, num_inputs=3, num_states=2):
    layers = nn.Linear(num_inputs, 5), nn.Tanh(), nn.Linear(5, num_states)
    net = FunctionalNet(nn.Sequential(*layers).double())
    return WeightDraws(net, 0.3 * normal(s, net.num_params))


def pushed(X):
    """Two systems of one state that react differently to the action."""
    return torch.tensor([0.5, 1.5], dtype=X.dtype)[:, None, None] * X[..., -1:]


def ends_near(target):
    return lambda states, actions: -(states[:, :, -1, 0] - target).square()


def quick(draws=pushed, value=None, horizon=3, **options):
    options = {"generator": seeded()} | options
    state = options.pop("state", torch.zeros(1, dtype=torch.float64))
    bounds = options.pop("bounds", BOUNDS)
    value = ends_near(1.0) if value is None else value
    return plan_actions(draws, value, state, horizon, bounds, **options)


@pytest.mark.parametrize("encode", [None, lambda x: torch.cat([x.sin(), x.cos()], -1)])
def test_a_particle_follows_one_function_for_the_whole_horizon(encode):
    draws = networks(num_inputs=3 if encode is None else 5)
    state, actions = normal(2, seed=1), normal(4, 6, 1, seed=2)
    states = trajectories(draws, state, actions, encode)
    assert states.shape == (3, 4, 7, 2)
    for i in range(3):
        for c in range(4):
            x = state
            for t in range(6):
                torch.testing.assert_close(states[i, c, t], x, **EXACT)
                seen = x if encode is None else encode(x)
                x = x + draws(torch.cat([seen, actions[c, t]])[None])[i, 0]
            torch.testing.assert_close(states[i, c, 6], x, **EXACT)


def test_trajectories_are_differentiable_in_the_actions():
    actions = normal(2, 3, 1).requires_grad_()
    states = trajectories(networks(), normal(2), actions)
    (gradient,) = torch.autograd.grad(states[:, 0, 2].sum(), actions)
    assert gradient[0, :2].abs().min() > 0
    assert gradient[0, 2:].abs().max() == gradient[1].abs().max() == 0


def test_the_plan_maximises_the_mean_over_the_functions():
    # With u the sum of the actions, the mean of (u/2 - 1)^2 and (3u/2 - 1)^2 is least
    # at u = (1/2 + 3/2) / (1/4 + 9/4) = 4/5, where it is 1/5.
    plan = quick(rounds=8)
    torch.testing.assert_close(plan.actions.sum().item(), 0.8, rtol=0, atol=0.02)
    torch.testing.assert_close(plan.value.item(), -0.2, rtol=0, atol=1e-3)


def test_its_value_is_that_of_its_actions():
    draws, state = networks(), normal(2, seed=1)
    plan = quick(draws, state=state)
    states = trajectories(draws, state, plan.actions[None])
    expected = ends_near(1.0)(states, None).mean()
    torch.testing.assert_close(plan.value, expected, **EXACT)


def test_actions_stay_within_bounds_and_reach_them():
    plan = quick(value=ends_near(100.0), spread=2.0)
    torch.testing.assert_close(plan.actions, BOUNDS[1:].expand(3, 1))
    plan = quick(value=ends_near(-100.0), spread=2.0)
    torch.testing.assert_close(plan.actions, BOUNDS[:1].expand(3, 1))


def test_more_rounds_never_lower_the_value():
    best = torch.tensor([1.5, -0.5, 0.2, 1.9, 0.0], dtype=torch.float64)[:, None]

    def value(states, actions):
        return -(actions - best).square().sum((-1, -2)).expand(len(states), -1)

    options = {"value": value, "horizon": 5, "smoothness": 0.0}
    values = [quick(rounds=rounds, **options).value.item() for rounds in (1, 2, 4, 12)]
    assert values == sorted(values)
    assert values[0] < -0.3 and values[-1] > -0.01


def test_a_plan_is_never_worse_than_its_start():
    start = torch.full((3, 1), 0.8 / 3, dtype=torch.float64)  # the optimum
    plan = quick(start=start, rounds=1, candidates=2, elites=1)
    assert plan.value.item() >= -0.2 - 1e-12


def test_smooth_candidates_move_together():
    tried = []

    def value(states, actions):
        tried.append(actions)
        return states[:, :, -1, 0]

    wide = torch.tensor([[-100.0], [100.0]], dtype=torch.float64)
    options = {"candidates": 4000, "elites": 2, "rounds": 1, "bounds": wide}
    quick(value=value, spread=0.1, smoothness=0.8, **options)
    u = tried[0][1:, :, 0]
    assert u.std(0).tolist() == pytest.approx([10.0] * 3, rel=0.05)
    lag = [torch.corrcoef(u[:, [0, t]].mT)[0, 1].item() for t in (1, 2)]
    assert lag == pytest.approx([0.8, 0.64], abs=0.03)


def test_plans_are_reproducible_and_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    first, again, other = quick(), quick(), quick(generator=seeded(1))
    assert torch.equal(first.actions, again.actions)
    assert not torch.equal(first.actions, other.actions)
    assert not torch.equal(quick(generator=None).actions, quick(generator=None).actions)
    assert torch.equal(before, torch.get_rng_state())


def test_the_dtype_is_that_of_the_state():
    plan = quick(state=torch.zeros(1))
    assert plan.actions.dtype == plan.value.dtype == torch.float32


def test_trajectories_that_diverge_are_passed_over():
    def value(states, actions):
        returns = ends_near(1.0)(states, actions)
        return returns.where(actions.sum((-1, -2)) < 0.5, torch.nan)

    plan = quick(value=value, rounds=6)
    torch.testing.assert_close(plan.actions.sum().item(), 0.5, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"horizon": 0}, "horizon must be"),
        ({"candidates": 4}, "elites must be at most the 4 candidates, but is 8"),
        ({"smoothness": 1.0}, "smoothness from 0 to below 1, but they are 0.5 and 1"),
        ({"spread": 0.0}, "spread must be positive"),
        ({"bounds": BOUNDS.flip(0)}, "bounds must be ``2 x a``"),
        ({"value": lambda x, u: x.sum() + torch.nan * u[None, :, 0, 0]}, "No sequence"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quick(**options)


def test_a_state_that_is_not_finite_is_refused():
    with pytest.raises(InputDataError, match="state contains NaN"):
        quick(state=torch.full((1,), torch.nan))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"state": torch.zeros(2, 1)}, "state must be ``d``"),
        ({"start": torch.zeros(2, 1)}, "start must be ``3 x 1``, one action"),
        ({"value": lambda x, u: x[0, :, -1, 0]}, "value must return ``s x 64``"),
        ({"state": torch.zeros(2)}, "one output for each of the 2 entries"),
    ],
)
def test_wrong_shapes_are_refused(options, message):
    with pytest.raises(ShapeError, match=message):
        quick(**options)
