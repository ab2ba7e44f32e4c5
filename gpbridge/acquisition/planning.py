r"""Actions for a system whose dynamics are functions drawn from a posterior.

.. math:: x_{t+1} = x_t + f_i(e(x_t), u_t)

Each particle i follows one frozen function for the whole horizon. It is a possible
system, and what it does at one time tells what it does at another; noise drawn anew at
each step would average out along the way, and leave a plan more certain than the model
is. In: draws, a value of trajectories, a state. Out: the actions of largest expected
value. The first is applied, then one plans anew (model predictive control).

References:
    Chua, Calandra, McAllister, Levine, Deep reinforcement learning in a handful of
    trials using probabilistic dynamics models, NeurIPS 2018, section 5. Rubinstein,
    Kroese, The Cross-Entropy Method, Springer 2004, algorithm 5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from gpbridge.checks import ShapeError, check_count, check_finite, check_tensor
from gpbridge.function_draws import evaluate, evaluate_each
from gpbridge.randomness import fresh, standard_normal
from gpbridge.types import FunctionDraws

Encoding = Callable[[Tensor], Tensor]
Value = Callable[[Tensor, Tensor], Tensor]


class Plan(NamedTuple):
    """Actions and what they are expected to be worth.

    Attributes:
        actions: ``T x a``.
        value: Mean over the functions, a scalar.
    """

    actions: Tensor
    value: Tensor


def trajectories(
    draws: FunctionDraws,
    state: Tensor,
    actions: Tensor,
    encode: Encoding | None = None,
) -> Tensor:
    """States that each function passes through under each sequence of actions.

    Args:
        draws: s functions of inputs ``(encoded state, action)``, whose ``d`` outputs
            are changes of the state in one step.
        state: The first state, ``d``.
        actions: Sequences of actions, ``c x T x a``.
        encode: Maps states ``... x d`` to inputs, such as angles to sines and cosines;
            default as they are.

    Returns:
        States ``s x c x (T + 1) x d``, with the first one. Costs T evaluations at c
        points for each function.

    Raises:
        ShapeError: If the draws have other outputs than the state has entries.
    """
    states = state.expand(len(actions), -1)
    path = []
    for t in range(actions.shape[1]):
        inputs = states if encode is None else encode(states)
        action = actions[:, t].expand(*states.shape[:-1], -1)
        inputs = torch.cat([inputs, action], -1)
        change = evaluate_each(draws, inputs) if path else evaluate(draws, inputs)
        if change.shape[-1] != len(state):
            raise ShapeError(
                f"draws must have one output for each of the {len(state)} entries of "
                f"the state, but have {change.shape[-1]}."
            )
        states = states + change
        path.append(states)
    first = state.expand(*path[0].shape[:-1], -1)
    return torch.stack([first, *path], -2)


@torch.no_grad()
def plan_actions(
    draws: FunctionDraws,
    value: Value,
    state: Tensor,
    horizon: int,
    bounds: Tensor,
    *,
    encode: Encoding | None = None,
    start: Tensor | None = None,
    candidates: int = 64,
    elites: int = 8,
    rounds: int = 4,
    spread: float = 0.5,
    smoothness: float = 0.3,
    generator: Generator | None = None,
) -> Plan:
    r"""Actions of large expected value, by the cross-entropy method.

    Candidates are drawn from a normal, which is fitted to the best of them, and so on.
    Because the functions are frozen, values are exact and comparable, and the best
    candidate of all rounds is returned. Deviations of an action are correlated in time
    by :math:`\rho^{|t - t'|}`: uncorrelated ones hardly move a system with inertia, and
    strongly correlated ones find no plan whose actions alternate.

    Args:
        draws: As for :func:`trajectories`. The mean of a posterior, as one function,
            gives a planner that knows no uncertainty.
        value: Maps states ``s x c x (T + 1) x d`` and actions ``c x T x a`` to returns
            ``s x c``, which are averaged over the s functions.
        state: Where the system is, ``d``.
        horizon: The number T of steps.
        bounds: Smallest and largest actions, ``2 x a``.
        encode: As for :func:`trajectories`.
        start: Actions to start from, ``T x a``, such as those of the last plan moved by
            one step; default the middle.
        candidates: The number c of sequences of a round.
        elites: How many of them the normal is fitted to.
        rounds: How often.
        spread: First standard deviation, as a share of the half range of the actions.
        smoothness: Correlation :math:`\rho` of successive deviations, from 0 to 1.
        generator: Source of the candidates. Without one they are fresh on each call;
            the global random state is left alone in either case.

    Returns:
        The plan.

    Raises:
        ShapeError: If shapes disagree.
        ValueError: If a number is out of range, or no candidate has a finite value.

    Example:
        >>> def draws(X):  # two systems of one state, pushed by the action
        ...     return torch.tensor([0.9, 1.1])[:, None, None] * X[..., 1:]
        >>> def value(states, actions):  # ends near 1
        ...     return -(states[:, :, -1, 0] - 1).square()
        >>> bounds = torch.tensor([[-1.0], [1.0]])
        >>> plan = plan_actions(draws, value, torch.zeros(1), 3, bounds)
        >>> bool((plan.actions.sum() - 1).abs() < 0.1)
        True
    """
    check_count(horizon=horizon, candidates=candidates, elites=elites, rounds=rounds)
    _check_plan(state, horizon, bounds, start)
    if elites > candidates:
        raise ValueError(
            f"elites must be at most the {candidates} candidates, but is {elites}."
        )
    if not (spread > 0 and 0 <= smoothness < 1):
        raise ValueError(
            "spread must be positive and smoothness from 0 to below 1, but they are "
            f"{spread:g} and {smoothness:g}."
        )
    generator = fresh(generator, state.device)
    lower, upper = bounds.to(state)
    half = (upper - lower) / 2
    middle = (lower + half).expand(horizon, -1)
    mean = middle if start is None else start.to(state)
    std = (spread * half).expand(horizon, -1)
    best, best_values = mean[None], state.new_full((1,), -torch.inf)
    for number in range(rounds):
        shape = (candidates, horizon, bounds.shape[-1])
        noise = _smooth(standard_normal(shape, generator, state), smoothness)
        tried = (mean + std * noise).clamp(lower, upper)
        tried[0] = mean  # the centre, which is the last plan in the first round
        values = value(trajectories(draws, state, tried, encode), tried)
        if values.dim() != 2 or values.shape[-1] != candidates:
            raise ShapeError(
                f"value must return ``s x {candidates}`` numbers, one for each "
                "function and sequence of actions, but returned shape "
                f"{tuple(values.shape)}."
            )
        values = values.mean(0).to(state)
        values = values.where(values.isfinite(), -torch.inf)
        # The elites of before stay in: the best value never falls.
        known, known_values = torch.cat([best, tried]), torch.cat([best_values, values])
        best_values, order = known_values.topk(elites)
        best = known[order]
        if number < rounds - 1:
            mean, std = best.mean(0), best.std(0, correction=0)
    if bool(best_values[0].isneginf()):
        raise ValueError(
            f"No sequence of actions has a finite value from state {state.tolist()}: "
            "the model's trajectories diverge, or the value is undefined there. Try a "
            "shorter horizon or a bounded value."
        )
    return Plan(best[0], best_values[0])


def _smooth(noise: Tensor, smoothness: float) -> Tensor:
    """Standard normals ``c x T x a``, correlated along T."""
    rows = [noise[:, 0]]
    fresh_share = (1 - smoothness**2) ** 0.5
    for t in range(1, noise.shape[1]):
        rows.append(smoothness * rows[-1] + fresh_share * noise[:, t])
    return torch.stack(rows, 1)


def _check_plan(
    state: Tensor, horizon: int, bounds: Tensor, start: Tensor | None
) -> None:
    check_tensor(state=state, bounds=bounds)
    if state.dim() != 1:
        raise ShapeError(f"state must be ``d``, but has shape {tuple(state.shape)}.")
    check_finite(state=state[:, None])
    if bounds.dim() != 2 or len(bounds) != 2 or not bool((bounds[0] < bounds[1]).all()):
        raise ValueError(
            "bounds must be ``2 x a``, smallest actions above largest ones, but are "
            f"{bounds.tolist()}."
        )
    shape = (horizon, bounds.shape[-1])
    if start is not None and tuple(start.shape) != shape:
        raise ShapeError(
            f"start must be ``{shape[0]} x {shape[1]}``, one action per step, but has "
            f"shape {tuple(start.shape)}."
        )
