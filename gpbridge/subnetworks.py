"""Which single weights of a network are random: masks for ``parameters=``.

In: a trained network and a number of weights. Out: a mask for each of its tensors.
Next: :class:`~gpbridge.functional.FunctionalNet` takes the masks as its random weights.
``linearized`` has the choice by posterior variance.

References:
    Daxberger, Nalisnick, Allingham, Antorán, Hernández-Lobato, Bayesian deep learning
    via subnetwork inference, ICML 2021, sections 3 and 5 (with the comparison of these
    choices: variance first, then magnitude, then random).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from gpbridge.checks import check_count
from gpbridge.functional import Parameters, random_names
from gpbridge.randomness import fresh
from gpbridge.types import Params


def largest_magnitude(
    network: nn.Module, count: int, within: Parameters = "all"
) -> Params:
    """The weights that are largest in absolute value.

    Args:
        network: The trained network.
        count: How many weights are random.
        within: Which they are chosen from: names, a predicate or a word, as for
            :class:`~gpbridge.functional.FunctionalNet`.

    Returns:
        A mask for each tensor that they are chosen from.

    Raises:
        ValueError: If there are fewer weights.

    Example:
        >>> network = nn.Linear(3, 1, bias=False)
        >>> _ = network.weight.data.copy_(torch.tensor([[0.1, -2.0, 1.0]]))
        >>> largest_magnitude(network, 2)
        {'weight': tensor([[False,  True,  True]])}
    """
    own = _candidates(network, within)
    return largest({name: p.detach().abs() for name, p in own.items()}, count)


def random_subset(
    network: nn.Module,
    count: int,
    generator: Generator | None = None,
    within: Parameters = "all",
) -> Params:
    """Weights drawn without replacement, every set of them equally likely.

    Args:
        network: The network.
        count: How many weights are random.
        generator: Source of randomness; None is a fresh one, and another set at every
            call.
        within: As for :func:`largest_magnitude`.

    Returns:
        A mask for each tensor that they are chosen from.

    Raises:
        ValueError: If there are fewer weights.
    """
    own = _candidates(network, within)
    device = next(iter(own.values())).device
    generator = fresh(generator, device)
    total = sum(p.numel() for p in own.values())
    _check_number(count, total)
    order = torch.randperm(total, generator=generator, device=generator.device)
    return _masks(own, order[:count].to(device))


def largest(scores: Params, count: int) -> Params:
    """Masks of the largest entries of some tensors, the earlier one of equals.

    Args:
        scores: Tensors by name.
        count: How many entries.

    Returns:
        The masks.

    Raises:
        ValueError: If there are fewer entries.
    """
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    _check_number(count, len(flat))
    order = flat.argsort(descending=True, stable=True)
    return _masks(scores, order[:count])


def _candidates(network: nn.Module, within: Parameters) -> Params:
    own = dict(network.named_parameters())
    return {name: own[name] for name in random_names(network, within)}


def _check_number(count: int, total: int) -> None:
    check_count(count=count)
    if count > total:
        raise ValueError(
            f"count must be at most the {total} weights to choose from, but is {count}."
        )


def _masks(like: Params, places: Tensor) -> Params:
    total = sum(p.numel() for p in like.values())
    flat = torch.zeros(total, dtype=torch.bool, device=places.device)
    flat[places] = True
    parts = flat.split([p.numel() for p in like.values()])
    return {
        name: part.reshape(p.shape)
        for (name, p), part in zip(like.items(), parts, strict=True)
    }
