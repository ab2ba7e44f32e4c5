r"""Lower bounds of the evidence by training speed.

The evidence is a sum of sequential predictions. With k draws of the weights from the
posterior of the data before, in place of the average over all weights, it becomes by
Jensen's inequality

.. math::
    L_k = \sum_i \mathbb{E}_{w_1 \dots w_k \mid y_{<i}}
          \log \frac1k \sum_j p(y_i \mid w_j)
        \;\le\; \sum_i \log \mathbb{E}_{w \mid y_{<i}} p(y_i \mid w) = \log p(y),

and rises to the evidence with k. :math:`-L_1` is the sum of the losses of a learner
that draws its weights from the posterior of what it has seen: the faster it learns, the
higher the bound.

In: a model with Gaussian noise. Out: a :class:`SpeedBound` in total nats. Next:
``training_speed`` takes the sum over losses of networks, where it is no bound.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from gpbridge.checks import (
    check_count,
    check_generator,
)
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.inference import Sampled
from gpbridge.randomness import fresh, standard_normal
from gpbridge.selection.orders import permutations
from gpbridge.selection.prefix_draws import arriving_log_densities
from gpbridge.selection.prefix_posteriors import (
    LinearModel,
    Model,
    Predictions,
    check_model,
    predict_in_order,
    whiten_data,
)
from gpbridge.types import Solver

_JITTER = 1e-10  # of the variance of f in a draw, relative to that of y


class SpeedBound(NamedTuple):
    """A bound of the evidence in total nats, float64.

    Attributes:
        value: Mean over orders and repeats of the sum of the terms after the burn-in.
        std_error: Of ``value``: over the orders if several were drawn, else over the
            repeats, given the orders; zero where nothing was drawn.
        terms: Nats of each datum, or block of data, in the order of its arrival,
            ``orders x n``; burn-in included.
        orders: Row numbers in the order of arrival, ``orders x n``.
    """

    value: Tensor
    std_error: Tensor
    terms: Tensor
    orders: Tensor

    def __repr__(self) -> str:
        """Its value and size, not its numbers."""
        orders, n = self.orders.shape
        value, error = float(self.value), float(self.std_error)
        return (
            f"{type(self).__name__}(value={value:.6g}, std_error={error:.3g}, "
            f"orders={orders}, n={n})"
        )


def training_speed_bound(
    model: Model,
    num_samples: int | float = 1,
    *,
    burn_in: int = 0,
    orders: int | Tensor | None = None,
    num_repeats: int = 16,
    solver: Solver | None = None,
    block_size: int = 1,
    generator: Generator | None = None,
    progress: bool = True,
) -> SpeedBound:
    r"""Bound the log evidence from below by how fast a model learns its data.

    With one draw inside the logarithm the expectation is in closed form, with
    infinitely many it is the evidence itself; in between it is estimated by draws of
    the values at each datum, ``num_repeats`` times. The terms of the first data, which
    are predicted by the prior, dominate :math:`L_1`: :math:`L_k` with k = 64 is often
    within a few nats of the evidence, and a burn-in leaves them out, which bounds the
    conditional evidence :math:`\log p(y_{>b} \mid y_{\le b})` instead. Every order of
    the data gives a bound, and so does their average.

    Cost: one Cholesky factorisation per order, see
    :func:`~gpbridge.selection.prefix_posteriors.predict_in_order`; differentiable in
    hyperparameters then. With ``solver``, sample-then-optimise: k ``num_repeats``
    chains of weights, optimised further whenever a block of data arrives, without any
    matrix of the data; the terms are those of whole blocks, still a bound.

    Args:
        model: A :class:`~gpbridge.LinearizedGP` or gpytorch ExactGP with Gaussian
            noise, or a :class:`LinearModel`. Not changed.
        num_samples: The number k of draws inside the logarithm, or ``math.inf``.
        burn_in: The number b of first data that are not scored.
        orders: Permutations of the data, ``orders x n``; a number of random ones; or
            None for the order of the data.
        num_repeats: Estimates of every term, for the standard error.
        solver: Of the linear systems of sample-then-optimise, such as
            ``ConjugateGradients()``. None is by factors, and for a model with
            ``Sampled`` inference its own solver.
        block_size: Data that arrive together, with a solver. Blocks cost one solve each
            and loosen the bound.
        generator: Source of all randomness. Without one, random orders are those of
            seed 0, the same for every model, and draws are fresh on each call; the
            global random state is left alone in either case.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        The bound, its standard error, its terms and the orders.

    Raises:
        NotImplementedError: If the noise is not Gaussian, or a solver is given for a GP
            without weights.
        ShapeError: If the model is a batch, or orders have the wrong shape.
        TypeError: If the model is another.
        ValueError: If an option is out of range, or orders are no permutations.

    Example:
        >>> X = torch.linspace(-1, 1, 20).double()
        >>> line = LinearModel(torch.stack([X**0, X], -1), 2 * X, 0.01)
        >>> [round(float(training_speed_bound(line, k).value)) for k in (1, math.inf)]
        [-281, 19]

    References:
        Lyle, Schut, Ru, Gal, van der Wilk, A Bayesian perspective on training speed and
        model selection, NeurIPS 2020, eqs. (3) to (6).
    """
    check_model(model)
    _check_options(model, num_samples, num_repeats, solver, block_size)
    n, device = _size(model)
    _check_burn_in(burn_in, n, block_size)
    if generator is not None:
        check_generator(generator, device)
    random = isinstance(orders, int)
    orders = permutations(orders, n, generator).to(device)
    generator = fresh(generator, device)
    if solver is None and isinstance(getattr(model, "inference", None), Sampled):
        solver = model.inference.solver
        _check_options(model, num_samples, num_repeats, solver, block_size)

    found = []  # blocks x repeats, for each order
    if solver is None:
        data = whiten_data(model)
        for order in orders:
            predictions = predict_in_order(data, order)
            found.append(_terms(predictions, num_samples, num_repeats, generator))
    else:
        k, chains = num_samples, num_samples * num_repeats
        for order in orders:
            densities = arriving_log_densities(
                model, order, chains, block_size, solver, generator, progress
            )
            groups = densities.unflatten(-1, (num_repeats, k))
            found.append(groups.logsumexp(-1) - math.log(k))
    terms = torch.stack(found)
    totals = terms[:, burn_in // block_size :].sum(1)  # orders x repeats
    std_error = _std_error(totals.detach(), random)
    return SpeedBound(totals.mean(), std_error, terms.mean(-1), orders)


def _terms(
    given: Predictions, num_samples: float, num_repeats: int, generator: Generator
) -> Tensor:
    """Expected log of the average density, ``n x repeats``; one repeat if exact."""
    L, m = given.factor, given.factor.shape[-1]
    constant = given.log_scale - 0.5 * m * math.log(2 * math.pi)
    if num_samples == math.inf:
        log_det = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (constant - log_det - 0.5 * given.innovation.square().sum(-1))[:, None]
    trace = (L.square().sum((-2, -1)) - m).clamp_min(0.0)  # of the variance of f
    if num_samples == 1:
        return (constant - 0.5 * (given.residual.square().sum(-1) + trace))[:, None]
    # The variance of f is that of y less the noise, which is the identity here.
    eye = torch.eye(m).to(L)
    size = L.square().sum((-2, -1))[:, None, None]
    root = torch.linalg.cholesky(L @ L.mT - eye + _JITTER * size * eye)
    repeats = []
    for _ in range(num_repeats):
        normal = standard_normal((num_samples, *L.shape[:2], 1), generator, L)
        off = given.residual - (root @ normal)[..., 0]
        repeats.append((-0.5 * off.square().sum(-1)).logsumexp(0))
    return torch.stack(repeats, -1) + (constant - math.log(num_samples))[:, None]


def _std_error(totals: Tensor, random: bool) -> Tensor:
    num_orders, num_repeats = totals.shape
    if random and num_orders > 1:
        return totals.mean(-1).std() / num_orders**0.5
    if num_repeats == 1:
        return torch.zeros_like(totals[0, 0])
    variance = totals.var(-1).sum() / num_repeats
    return variance.sqrt() / num_orders


def _size(model: Model) -> tuple[int, torch.device]:
    if isinstance(model, LinearModel):
        return len(model.features), model.features.device
    X = model.train_inputs[0]
    return X.shape[-2], X.device


def _check_options(
    model: Model,
    num_samples: int | float,
    num_repeats: int,
    solver: Solver | None,
    block_size: int,
) -> None:
    if num_samples != math.inf:
        check_count(num_samples=num_samples)
    check_count(num_repeats=num_repeats, block_size=block_size)
    if solver is None:
        sampled = isinstance(getattr(model, "inference", None), Sampled)
        if block_size > 1 and not sampled:
            raise ValueError(
                f"block_size={block_size} needs a solver: by factors, data arrive one "
                "by one at no extra cost. Leave it out, or pass solver=."
            )
        return
    if num_samples == math.inf:
        raise ValueError(
            "num_samples=inf is the evidence itself, which chains of weights cannot "
            "give. Pass a whole number, or a model and no solver, by factors."
        )
    if not isinstance(model, LinearizedGP | LinearModel):
        raise NotImplementedError(
            "Sample-then-optimise draws weights, which a "
            f"{type(model).__name__} has none of. Leave solver= out; or pass a "
            "LinearModel of the kernel's features."
        )


def _check_burn_in(burn_in: int, n: int, block_size: int) -> None:
    whole = isinstance(burn_in, int) and not isinstance(burn_in, bool)
    if not whole or not 0 <= burn_in < n:
        raise ValueError(
            f"burn_in must be a whole number from 0 to n - 1 = {n - 1}, but is "
            f"{burn_in!r}."
        )
    if burn_in % block_size:
        raise ValueError(
            f"burn_in must be a multiple of block_size={block_size}, but is {burn_in}. "
            f"Try {burn_in // block_size * block_size}."
        )
