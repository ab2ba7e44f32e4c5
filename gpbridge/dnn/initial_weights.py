"""Networks of one architecture with first weights of their own.

In: a module, or several of one architecture. Out: copies to start from. Next: the
members of an ensemble, chains, anything that is run more than once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gpbridge.dnn.training import isolated_randomness
from gpbridge.frozen import copy_without_hooks


def first_members(
    network: nn.Module,
    num_members: int,
    initial: Sequence[nn.Module] | None,
    generator: torch.Generator,
) -> list[nn.Module]:
    """Modules that the members of an ensemble start from, in eval mode.

    Args:
        network: The architecture, copied.
        num_members: How many.
        initial: Modules to copy instead, one for each member.
        generator: Source of the weights.

    Returns:
        The modules.

    Raises:
        ValueError: If ``initial`` has another length, or several architectures.
    """
    if initial is None:
        return [fresh_copy(network, generator) for _ in range(num_members)]
    initial = list(initial)
    if len(initial) != num_members:
        raise ValueError(
            f"initial must have one module for each of the {num_members} members, but "
            f"has {len(initial)}."
        )
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in initial]
    different = [r for r, each in enumerate(shapes) if each != shapes[0]]
    if different:
        raise ValueError(
            "initial must hold modules of one architecture, but the weights of "
            f"{different} have other names or shapes than those of 0. Fit each by "
            "fit_map, and pass the networks to DeepEnsemble."
        )
    return [copy_without_hooks(module) for module in initial]


def fresh_copy(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy whose layers have drawn their weights anew; frozen ones are kept.

    Args:
        network: The module.
        generator: Source of the weights.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: If a layer has weights and no ``reset_parameters``.
    """
    own = copy_without_hooks(network)
    frozen = {n: p.clone() for n, p in own.named_parameters() if not p.requires_grad}
    device = next(own.parameters()).device
    with isolated_randomness(generator, device), torch.no_grad():
        # A layer may set what its parts have drawn: those come first.
        for name, module in reversed(list(own.named_modules())):
            if not any(p.requires_grad for p in module.parameters(recurse=False)):
                continue
            reset = getattr(module, "reset_parameters", None)
            reset = reset or getattr(module, "_reset_parameters", None)
            if reset is None:
                raise ValueError(
                    f"{name or 'network'} ({type(module).__name__}) has weights and no "
                    "reset_parameters(), so members cannot start anew. Pass "
                    "initial=[...], one freshly built module for each member."
                )
            reset()
        for name, p in own.named_parameters():
            if name in frozen:
                p.copy_(frozen[name])
    return own
