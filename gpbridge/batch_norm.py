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
import math
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gpbridge.draws import JoinedDraws, WeightDraws
from gpbridge.types import Params

NORMS = nn.modules.batchnorm._BatchNorm  # of any dimension, also across processes

Draws = TypeVar("Draws", WeightDraws, JoinedDraws)


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a layer keeps statistics of activations."""
    return any(
        isinstance(module, NORMS) and module.track_running_stats
        for module in network.modules()
    )


@torch.no_grad()
def refresh_batch_norm(draws: Draws, batches: Iterable[Tensor]) -> Draws:
    """Give every draw the batch-norm statistics of its own activations.

    The batches are passed over once, whatever the number of draws.

    Args:
        draws: Functions of the nonlinear network, of one or, as those of a mixture, of
            several; changed in place.
        batches: Inputs ``b x d``, those of training; a loader of tensors, or of tuples
            that begin with them.

    Returns:
        The draws. Without batch norm in the network they are as they were.

    Raises:
        TypeError: If some draws are not of the nonlinear network.
        ValueError: If there is no batch.
    """
    passes = [_Pass(part) for part in _parts(draws)]
    passes = [each for each in passes if each.layers]
    if not passes:
        return draws
    seen = 0
    for batch in batches:
        X = batch if isinstance(batch, Tensor) else batch[0]
        if not len(X):
            continue
        for each in passes:
            count = each.take(X, seen)
        seen += count
    if not seen:
        raise ValueError(
            "batches must hold at least one batch of inputs, but are empty. A "
            "generator that was used up has none left: pass a list or a loader."
        )
    for each in passes:
        each.draws.statistics = {**each.draws.statistics, **each.statistics}
    return draws


def even_batches(X: Tensor, num_rows: int) -> tuple[Tensor, ...]:
    """Batches of at most so many rows and of equal size, up to one.

    None is left with a single row, of which there are no statistics.
    """
    return X.tensor_split(math.ceil(len(X) / num_rows))


def _parts(draws: nn.Module) -> Iterator[WeightDraws]:
    if isinstance(draws, JoinedDraws):
        for part in draws.parts:
            yield from _parts(part)
    elif isinstance(draws, WeightDraws):
        yield draws
    else:
        raise TypeError(
            "draws must be of weights of the nonlinear network, but are "
            f"{type(draws).__name__}, whose batch norm keeps the statistics of the "
            "trained network."
        )


class _Pass:
    """The statistics of the draws of one network, while data pass."""

    def __init__(self, draws: WeightDraws) -> None:
        self.draws, net = draws, draws.net
        self.work = copy.deepcopy(net.network).eval()
        self.layers = {
            name: module
            for name, module in self.work.named_modules()
            if isinstance(module, NORMS) and module.track_running_stats
        }
        s = len(draws.weights)
        self.statistics: Params = {}
        for name, module in self.layers.items():
            module.train()
            for kind, value in module.named_buffers():
                first = 1 if kind == "running_var" else 0
                own = value.new_full((s, *value.shape), first)
                self.statistics[f"{name}.{kind}"] = own
        self.params = net.unflatten(draws.weights.to(net.dtype))
        for name, value in draws.statistics.items():
            if name not in self.statistics:  # frozen weights and the like
                self.params[name] = value

    def take(self, X: Tensor, seen: int) -> int:
        """Move the statistics by a batch after ``seen`` rows; returns its rows."""
        net = self.draws.net
        rows = X.reshape(-1, *(net.input_shape or X.shape[-1:]))
        rows = rows.to(self.draws.weights.device, net.dtype)
        for module in self.layers.values():
            module.momentum = len(rows) / (seen + len(rows))
        vmap(self._run, in_dims=(0, 0, None))(self.params, self.statistics, rows)
        return len(rows)

    def _run(self, params: Params, statistics: Params, rows: Tensor) -> Tensor:
        return functional_call(self.work, {**params, **statistics}, (rows,))
