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
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from botorch.exceptions.errors import InputDataError
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gpbridge.checks import ShapeError
from gpbridge.draws import JoinedDraws, WeightDraws
from gpbridge.probe import check_input_shape, explain_failure, warn_looped
from gpbridge.types import Params

_NORMS = nn.modules.batchnorm._BatchNorm  # of any dimension, also across processes

Draws = TypeVar("Draws", WeightDraws, JoinedDraws)


def norm_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers, by name, that normalise by batches."""
    return {n: m for n, m in network.named_modules() if isinstance(m, _NORMS)}


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a layer keeps statistics of activations."""
    return any(m.track_running_stats for m in norm_layers(network).values())


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
        TypeError: If some draws are not of the nonlinear network, or batches no
            batches of inputs.
        ShapeError: If inputs do not fit the network.
        InputDataError: If inputs are not finite; the draws stay as they were.
        ValueError: If there is no batch of at least two rows.
    """
    passes = [_Pass(part) for part in _parts(draws)]
    passes = [each for each in passes if each.layers]
    if not passes:
        return draws
    seen, usable = 0, []
    for X in inputs_of(batches):
        if len(X) < 2:  # nothing, or one row, which has no variance
            continue
        for each in passes:
            count = each.take(X, seen)
        seen += count
        usable.append(torch.isfinite(X).all())
    if not seen:
        raise ValueError(
            "batches must hold at least one batch of inputs with two rows or more, but "
            "have none. A generator that was used up has none left: pass a list or a "
            "loader."
        )
    bad = (~torch.stack(usable)).nonzero().flatten().tolist()  # once, at the end
    if bad:
        raise InputDataError(
            f"batches contain NaN or Inf in {len(bad)} of {len(usable)} batches, the "
            f"first at {bad[:5]}. Drop or impute these rows; there is no mask."
        )
    for each in passes:
        each.draws.statistics = {**each.draws.statistics, **each.statistics}
    return draws


def inputs_of(batches: Iterable[Tensor | Sequence[Tensor]]) -> Iterator[Tensor]:
    """The inputs of each batch: the batch itself, or what a tuple begins with.

    Yields:
        ``b x d``, or ``b x`` the shape of an input.

    Raises:
        TypeError: If a batch is neither.
        ShapeError: If inputs have no columns.
    """
    if isinstance(batches, Tensor):
        raise TypeError(
            "batches must be a list or a loader of batches, but is a Tensor, whose "
            "rows would be taken for batches. Wrap it: [X], or X.split(256)."
        )
    for batch in batches:
        is_pair = isinstance(batch, Sequence) and len(batch) > 0
        X = batch[0] if is_pair else batch
        if not isinstance(X, Tensor):
            raise TypeError(
                "Each batch must be a tensor of inputs, or a tuple that begins with "
                f"it, but one is {type(batch).__name__}. Pick the inputs: "
                "(batch['x'] for batch in loader)."
            )
        if X.dim() < 2:
            raise ShapeError(
                f"Each batch must be ``b x d``, but one has shape {tuple(X.shape)}. "
                "Pass a list of batches, [X]."
            )
        yield X


def is_stale(draws: nn.Module) -> bool:
    """Whether batch norm meets weights that its statistics are not of.

    So it does in draws of the nonlinear network without statistics of their own, if
    weights before the last of its layers are not those that were trained.

    Args:
        draws: Any frozen functions; others than those of weights are not stale.
    """
    if isinstance(draws, JoinedDraws):
        return any(is_stale(part) for part in draws.parts)
    if not isinstance(draws, WeightDraws) or not has_batch_norm(draws.net.network):
        return False
    own = [f".{kind}" for kind in ("running_mean", "running_var")]
    if any(f".{name}".endswith(tuple(own)) for name in draws.statistics):
        return False
    net, before = draws.net, set()
    seen: set[str] = set()
    layers = norm_layers(net.network)
    for name, module in net.network.named_modules():
        if name in layers and module.track_running_stats:
            before |= seen
        kinds = dict(module.named_parameters(recurse=False))
        seen |= {f"{name}.{kind}".lstrip(".") for kind in kinds}
    drawn = net.unflatten(draws.weights)
    return any(
        bool((drawn[name] != trained.to(draws.weights)).any())
        for name, trained in net.params.items()
        if name in before
    )


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
    elif hasattr(draws, "draw"):
        raise TypeError(
            f"draws must be functions, but {type(draws).__name__} is a posterior. Call "
            ".draw(num_samples) first, and keep the draws."
        )
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
            for name, module in norm_layers(self.work).items()
            if module.track_running_stats
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
        self.vectorized = net.vectorized

    def take(self, X: Tensor, seen: int) -> int:
        """Move the statistics by a batch after ``seen`` rows; returns its rows."""
        net = self.draws.net
        if net.input_shape is not None:
            check_input_shape(net.input_shape, X.flatten(1))
        rows = X.reshape(-1, *(net.input_shape or X.shape[-1:]))
        rows = rows.to(self.draws.weights.device, net.dtype)
        for module in self.layers.values():
            module.momentum = len(rows) / (seen + len(rows))
        before = {name: value.clone() for name, value in self.statistics.items()}
        try:
            self._move(rows)
        except Exception as error:
            explain_failure(net, X.flatten(1))
            if not self.vectorized or type(error) is not RuntimeError:
                raise
            warn_looped(error)
            self.vectorized, self.statistics = False, before
            self._move(rows)
        return len(rows)

    def _move(self, rows: Tensor) -> None:
        if self.vectorized:
            together = vmap(self._run, in_dims=(0, 0, None))
            together(self.params, self.statistics, rows)
            return
        for draw in range(len(self.draws.weights)):
            params, own = (
                {name: value[draw] for name, value in each.items()}
                for each in (self.params, self.statistics)
            )
            self._run(params, own, rows)  # moves rows of the statistics

    def _run(self, params: Params, statistics: Params, rows: Tensor) -> Tensor:
        params = self.draws.net.whole(params)
        return functional_call(self.work, {**params, **statistics}, (rows,))
