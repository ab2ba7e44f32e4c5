"""Weights whose scale a normalisation removes, so that no prior of theirs is learnt.

In: a network, some inputs, groups of weights. Out: the groups that can be rescaled
without a change of the outputs. Next: ``online_training`` warns about them.

References:
    Antorán, Janz, Allingham, Daxberger, Barbano, Nalisnick, Hernández-Lobato, Adapting
    the linearised Laplace model evidence for modern deep learning, ICML 2022.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gpbridge.batch_norm import norm_layers
from gpbridge.frozen import copy_without_hooks


def scale_free_groups(
    network: nn.Module, X: Tensor, groups: list[list[str]]
) -> Iterator[list[str]]:
    """Groups of weights of which a common factor leaves the network as it is.

    Args:
        network: The network; it is not touched.
        X: Some inputs, in its shape.
        groups: Names of weights.

    Yields:
        Names of one group.
    """
    own = copy_without_hooks(network)
    for layer in norm_layers(own).values():
        layer.train(len(X) > 1)  # it normalises by the batch
    params = {name: p.detach() for name, p in own.named_parameters()}
    with torch.no_grad():
        before = own(X)
        for names in groups:
            if not any(bool(params[name].any()) for name in names):
                continue
            moved = {name: 2 * params[name] for name in names}
            after = functional_call(own, moved, (X,))
            if (after - before).abs().max() <= 1e-3 * before.abs().max():
                yield names
