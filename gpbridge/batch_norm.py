r"""Batch-norm statistics of other weights than those that were trained.

Averaged or drawn weights have activations of their own. One pass over the data, in
which every layer normalises by its batch, gives the statistics of all draws at once;
with momentum :math:`b / (n + b)` after n points the running mean is that of the data.

In: draws of the nonlinear network, batches of inputs. Out: the same draws with their
statistics. Next: whoever evaluates them.

References:
    Izmailov et al., Averaging weights leads to wider optima and better generalization,
    UAI 2018, section 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gpbridge.draws import WeightDraws

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a layer keeps statistics of activations."""
    return any(
        isinstance(module, NORMS) and module.track_running_stats
        for module in network.modules()
    )


@torch.no_grad()
def refresh_batch_norm(draws: WeightDraws, batches: Iterable[Tensor]) -> WeightDraws:
    """Give every draw the batch-norm statistics of its own activations.

    Args:
        draws: Functions of the nonlinear network; changed in place.
        batches: Inputs ``b x d``, those of training; a loader of tensors, or of tuples
            that begin with them.

    Returns:
        The draws. Without batch norm in the network they are as they were.

    Raises:
        ValueError: If there is no batch.
    """
    net = draws.net
    work = copy.deepcopy(net.network).eval()
    layers = {
        name: module
        for name, module in work.named_modules()
        if isinstance(module, NORMS) and module.track_running_stats
    }
    if not layers:
        return draws
    s = len(draws.weights)
    statistics = {}
    for name, module in layers.items():
        module.train()
        for kind, value in module.named_buffers():
            start = torch.ones_like(value) if kind == "running_var" else value * 0
            statistics[f"{name}.{kind}"] = start.expand(s, *value.shape).clone()
    params = net.unflatten(draws.weights.to(net.dtype))

    def run(params: dict, statistics: dict, rows: Tensor) -> Tensor:
        return functional_call(work, {**params, **statistics}, (rows,))

    seen = 0
    for batch in batches:
        X = batch if isinstance(batch, Tensor) else batch[0]
        rows = X.reshape(-1, *(net.input_shape or X.shape[-1:])).to(net.dtype)
        for module in layers.values():
            module.momentum = len(rows) / (seen + len(rows))
        vmap(run, in_dims=(0, 0, None))(params, statistics, rows)
        seen += len(rows)
    if not seen:
        raise ValueError(
            "batches must hold at least one batch of inputs, but are empty. A "
            "generator that was used up has none left: pass a list or a loader."
        )
    draws.statistics = statistics
    return draws
