r"""What is maximised: functions of known, or closely known, maximum.

All are maximised and observed without noise. ``smooth`` says whether a problem is what
a stationary prior of one length scale per input expects: not so Ackley's function and
DTLZ1, which are bowls under ripples, and pest control, whose inputs are categories.

Branin, Hartmann-6, Ackley, Branin-Currin and DTLZ1 are botorch's. Pest control follows
the published description (Oh, Tomczak, Gavves and Welling, "Combinatorial Bayesian
optimization using the graph Cartesian product", 2019, section 5.1.3 and the constants
of their experiments); its random numbers are drawn once, so that it is deterministic.
Functions drawn from networks are in the spirit of Li, Rudner and Wilson (2024), with
weights scaled by the fan-in: theirs, standard normal at any width, are close to steps.
The polynomial and the curve of quickest descent are our own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from botorch.test_functions import DTLZ1, Ackley, Branin, BraninCurrin, Hartmann
from botorch.utils.multi_objective.pareto import is_non_dominated
from torch import Tensor, nn

from gpbridge.surrogates import tanh_network

DOUBLE = {"dtype": torch.float64}

FOUND = {  # the best of long searches with the true function; a slow test repeats them
    "network10": 5.993329426481394,
    "network50": 12.486722135345339,
    "network400": 21.19579442566187,
    "curve64": -0.5666386738998519,
    "pest": -12.0116,
}


@dataclass(frozen=True)
class Problem:
    """A function to maximise, and what a run on it may spend.

    Attributes:
        evaluate: Inputs ``n x d`` to outcomes ``n x m``.
        bounds: ``2 x d``.
        optimum: The largest value, or hypervolume.
        smooth: See above.
        num_iterations: After the initial design.
        batch_size: Experiments of an iteration.
        ref_point: For two outcomes, of the hypervolume.
        categories: The number of categories of each column, if it holds some.
        network: What the surrogates build.
        exact: Whether the optimum is known, or the best of a long search by gradients.
    """

    name: str
    title: str
    evaluate: Callable[[Tensor], Tensor] = field(repr=False)
    bounds: Tensor = field(repr=False)
    optimum: float
    smooth: bool
    num_iterations: int
    batch_size: int = 1
    ref_point: tuple[float, ...] | None = None
    categories: Mapping[int, int] | None = None
    network: Callable[[int, int], nn.Module] = tanh_network
    exact: bool = True

    @property
    def dim(self) -> int:
        return self.bounds.shape[-1]

    @property
    def num_initial(self) -> int:
        """Points of the initial design: 2 (d + 1), at least 10 and at most 30."""
        return min(max(10, 2 * (self.dim + 1)), 30)

    def to_inputs(self, U: Tensor) -> Tensor:
        """From the unit cube to inputs, categories by equal parts of an edge."""
        low, high = self.bounds
        X = low + (high - low) * U
        for column, count in (self.categories or {}).items():
            X[..., column] = (U[..., column] * count).floor().clamp_max(count - 1)
        return X

    def leaders(self, Y: Tensor) -> Tensor:
        """Rows of the best outcome, or of those that none dominates."""
        if self.ref_point is None:
            return Y[:, 0].argmax()[None]
        return is_non_dominated(Y).nonzero()[:, 0]

    def score(self, Y: Tensor) -> Tensor:
        """The best value, or the hypervolume, of the first 1, 2, ... outcomes."""
        if self.ref_point is None:
            return Y[:, 0].cummax(0).values
        return torch.tensor(
            [area(Y[: i + 1], self.ref_point) for i in range(len(Y))], **DOUBLE
        )


def area(Y: Tensor, ref_point: tuple[float, ...]) -> float:
    """The hypervolume that two outcomes ``n x 2`` dominate, above a point."""
    Y = (Y - torch.tensor(ref_point, **DOUBLE)).clamp_min(0)
    Y = Y[Y[:, 0].argsort(descending=True)]
    highest = Y[:, 1].cummax(0).values
    steps = Y[:, 0] - torch.cat([Y[1:, 0], Y.new_zeros(1)])
    return float((steps * highest).sum())


def unit_cube(d: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.tensor([[low] * d, [high] * d], **DOUBLE)


def _botorch(function) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    def evaluate(X: Tensor) -> Tensor:
        Y = function.evaluate_true(X)
        Y = Y[..., None] if Y.dim() == 1 else Y
        return -Y

    return evaluate, function.bounds.to(**DOUBLE)


def branin() -> Problem:
    return Problem(
        "branin", "Branin", *_botorch(Branin()), -0.39788735772973816, True, 30
    )


def hartmann6() -> Problem:
    return Problem(
        "hartmann6", "Hartmann-6", *_botorch(Hartmann(6)), 3.32236801141551, True, 40
    )


def ackley10() -> Problem:
    function = Ackley(10, bounds=[(-32.768, 32.768)] * 10)
    return Problem("ackley10", "Ackley-10", *_botorch(function), 0.0, False, 30)


def branin_currin() -> Problem:
    function = BraninCurrin()
    return Problem(
        *("branincurrin", "Branin-Currin", *_botorch(function)),
        function.max_hv,
        *(True, 20),
        ref_point=(-18.0, -6.0),
        exact=False,
    )


def dtlz1() -> Problem:
    """The front is the line f_1 + f_2 = 1/2: a triangle of area 1/8 is missing."""
    return Problem(
        *("dtlz1", "DTLZ1 (5)", *_botorch(DTLZ1(5, 2))),
        400.0**2 - 0.125,
        *(False, 20),
        ref_point=(-400.0, -400.0),
    )


# Pest control: of nothing (0) and four pesticides
PRICE = (0.0, 1.0, 0.8, 0.7, 0.5)
DISCOUNT = (0.0, 0.2, 0.3, 0.3, 0.0)  # at most, if all stages use the same
EFFECT = (1.0, 2 / 7, 3 / 7, 3 / 7, 5 / 7)  # b of the Beta(1, b) of what is killed
TOLERANCE = (0.0, 1 / 7, 2.5 / 7, 2 / 7, 0.5 / 7)  # growth of b by each use, all stages
THRESHOLD, SIMULATIONS, STAGES = 0.1, 100, 25


@cache
def _pest_noise(stages: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shares infested at first, rates of spread, and uniforms of what is killed."""
    generator = torch.Generator().manual_seed(0)
    U = torch.rand(2 * stages + 1, SIMULATIONS, generator=generator, **DOUBLE)
    first = 1 - U[0].pow(1 / 30)  # Beta(1, b) by its inverse distribution function
    spread = 1 - U[1 : stages + 1].pow(3 / 17)
    return first, spread, U[stages + 1 :]


def pest_cost(x: Tensor) -> Tensor:
    """Price of all stages, and the number of stages with too many pests, ``n``."""
    x = x.round().long()
    stages = x.shape[-1]
    first, spread, uniforms = _pest_noise(stages)
    b = torch.tensor(EFFECT, **DOUBLE).expand(len(x), -1).clone()
    price, discount, grows = (
        torch.tensor(v, **DOUBLE) for v in (PRICE, DISCOUNT, TOLERANCE)
    )
    count = torch.zeros(len(x), 5, **DOUBLE).scatter_add_(
        1, x, torch.ones(x.shape, **DOUBLE)
    )
    share, cost = first.expand(len(x), -1), torch.zeros(len(x), **DOUBLE)
    for stage in range(stages):
        used = x[:, stage : stage + 1]
        killed = 1 - uniforms[stage].pow(1 / b.gather(1, used))
        treated = (1 - killed) * share
        untreated = share + spread[stage] * (1 - share)
        cost += (share > THRESHOLD).double().mean(-1)
        share = torch.where(used > 0, treated, untreated)
        b.scatter_add_(1, used, grows[used] / stages)
        used = used[:, 0]
        part = count.gather(1, used[:, None])[:, 0] / stages
        cost += price[used] * (1 - discount[used] * part)
    return cost


def pest() -> Problem:
    """Its optimum is the best of 60 descents that change up to two stages at a time."""
    return Problem(
        *("pest", "Pest control (25 of 5)"),
        lambda X: -pest_cost(X)[:, None],
        unit_cube(STAGES, 0.0, 4.0),
        FOUND["pest"],
        *(False, 30),
        categories=dict.fromkeys(range(STAGES), 5),
        exact=False,
    )


def polynomial(d: int = 200) -> Problem:
    r"""Minus the mean of :math:`c_i (z_i + 2 z_{j(i)} z_{k(i)})^2`, z = x - centre."""
    generator = torch.Generator().manual_seed(d)
    centre = 0.2 + 0.6 * torch.rand(d, generator=generator, **DOUBLE)
    pairs = torch.stack([torch.randperm(d, generator=generator) for _ in range(2)])
    sizes = torch.logspace(0, -1, d, **DOUBLE)

    def evaluate(X: Tensor) -> Tensor:
        z = X - centre
        terms = z + 2 * z[:, pairs[0]] * z[:, pairs[1]]
        return -(sizes * terms.square()).mean(-1, keepdim=True) / sizes.mean()

    return Problem(
        *(f"poly{d}", f"Polynomial ({d})", evaluate, unit_cube(d), 0.0, True, 12),
        batch_size=4,
    )


@cache
def network_function(d: int, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A network of two layers of 256 tanh at random weights, as a function."""
    generator = torch.Generator().manual_seed(1000 * d + seed)
    widths, layers = (d, 256, 256, 1), []
    for fan_in, width in itertools.pairwise(widths):
        weight = torch.randn(width, fan_in, generator=generator, **DOUBLE)
        bias = torch.randn(width, generator=generator, **DOUBLE)
        layers.append((2.0 * weight / fan_in**0.5, 0.5 * bias))

    def evaluate(X: Tensor) -> Tensor:
        Z = math.sqrt(12) * (X - 0.5)
        for weight, bias in layers[:-1]:
            Z = torch.tanh(Z @ weight.mT + bias)
        return Z @ layers[-1][0].mT

    return evaluate


def ascend(evaluate, X: Tensor, bounds: Tensor, steps: int = 300) -> float:
    """The best value of projected gradient ascent from many points, by Adam."""
    X = X.clone().requires_grad_()
    rate = 0.03 * (bounds[1] - bounds[0]).max()
    optimizer = torch.optim.Adam([X], lr=float(rate))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-evaluate(X).sum()).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            X.copy_(torch.minimum(torch.maximum(X, bounds[0]), bounds[1]))
    with torch.no_grad():
        return float(evaluate(X).max())


def network_draw(d: int, num_iterations: int, batch_size: int) -> Problem:
    """The optimum is the best of 200 ascents from random inputs."""
    name = f"network{d}"
    return Problem(
        *(name, f"Network draw ({d})", network_function(d), unit_cube(d), FOUND[name]),
        *(True, num_iterations, batch_size),
        exact=False,
    )


# Quickest descent: from (0, 1), at rest, without friction, to (1, END)
END, POINTS, GRAVITY = 0.35, 64, 9.81


def descent_time(heights: Tensor) -> Tensor:
    """Seconds along straight pieces between heights ``n x k`` at equal steps, ``n``."""
    ends = heights.new_ones(len(heights), 1)
    y = torch.cat([ends, heights, END * ends], -1)
    speed = (2 * GRAVITY * (1 - y)).clamp_min(0).sqrt()
    width = 1 / (y.shape[-1] - 1)
    length = (width**2 + y.diff(dim=-1).square()).sqrt()
    return (2 * length / (speed[:, 1:] + speed[:, :-1])).sum(-1)


def cycloid_time() -> float:
    """Of the curve of quickest descent itself: a lower bound for all pieces."""
    drop, low, high = 1 - END, 1e-6, 2 * math.pi - 1e-6
    for _ in range(200):  # the angle at the end, by bisection
        angle = (low + high) / 2
        ratio = (1 - math.cos(angle)) / (angle - math.sin(angle))
        low, high = (angle, high) if ratio > drop else (low, angle)
    return angle * math.sqrt(drop / (1 - math.cos(angle)) / GRAVITY)


def curve_network(num_inputs: int, num_outputs: int) -> nn.Module:
    """Two convolutions along a curve, means over its quarters, and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(-1, (1, num_inputs)),
        *(nn.Conv1d(1, 16, 5, padding=2), nn.Tanh()),
        *(nn.Conv1d(16, 16, 5, padding=2), nn.Tanh()),
        *(nn.AvgPool1d(num_inputs // 4), nn.Flatten()),
        nn.Linear(64, num_outputs),
    )


def curve() -> Problem:
    """The optimum is of 64 heights; the cycloid itself is faster by a thousandth."""
    return Problem(
        *("curve64", "Curve of quickest descent (64)"),
        lambda X: -descent_time(X)[:, None],
        unit_cube(POINTS, 0.0, 0.95),
        FOUND["curve64"],
        *(True, 12),
        batch_size=4,
        network=curve_network,
        exact=False,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "branin": branin,
    "hartmann6": hartmann6,
    "network10": lambda: network_draw(10, 36, 1),
    "ackley10": ackley10,
    "branincurrin": branin_currin,
    "dtlz1": dtlz1,
    "network50": lambda: network_draw(50, 12, 4),
    "curve64": curve,
    "poly200": lambda: polynomial(200),
    "network400": lambda: network_draw(400, 12, 4),
    "pest": pest,
}


@cache
def problem(name: str) -> Problem:
    if name not in PROBLEMS:
        raise ValueError(
            f"problem must be one of {', '.join(PROBLEMS)}, but is {name!r}."
        )
    return PROBLEMS[name]()
