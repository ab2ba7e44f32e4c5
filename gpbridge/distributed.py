r"""Rows over processes: the only file that speaks to ``torch.distributed``.

In: row counts and tensors. Out: which rows this process owns, sums over processes, and
gathered rows. Every function is the identity without a process group, so an algorithm
is written once and runs on one process or on many: split the rows with ``rank_rows``,
reduce with ``all_sum``, assemble with ``all_rows``.

Three rules for callers. All processes must take the same branches, or a collective
waits for its timeout; check input before the first collective. Always pass
``timeout=`` to ``init_process_group``. Nothing here is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from gpbridge.checks import ShapeError


def world() -> tuple[int, int]:
    """Rank of this process and number of processes, ``(0, 1)`` without a group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def rank_rows(num_rows: int) -> slice:
    r"""Rows of this process in a split of ``num_rows`` rows.

    With :math:`W` processes each owns :math:`c = \lceil n / W \rceil` consecutive rows,
    the last ones fewer or none: the split of ``DTensor``'s ``Shard(0)``, so that
    sharded state can be saved and loaded by it.

    Args:
        num_rows: Number of rows n over all processes.

    Returns:
        A slice of ``range(num_rows)``; it can be empty.
    """
    rank, size = world()
    chunk = _rows_per_process(num_rows, size)
    return slice(min(num_rows, chunk * rank), min(num_rows, chunk * (rank + 1)))


def all_sum(x: Tensor) -> Tensor:
    """Sum over processes, in place.

    The order of the sum depends on the number of processes: results agree to round-off,
    not bit for bit, between runs on different numbers.

    Args:
        x: This process's part, of the same shape and dtype everywhere; overwritten.

    Returns:
        ``x`` itself, now equal on all processes.

    Raises:
        ValueError: If ``x`` requires a gradient, which would silently be wrong.
    """
    _check_no_gradient(x)
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


def all_rows(local: Tensor, num_rows: int) -> Tensor:
    """Concatenate the rows of all processes.

    Shards are uneven where the number of processes does not divide the rows: each is
    padded to the largest one, gathered, and the padding cut. Traffic and memory are
    those of the whole result.

    Args:
        local: The rows of this process, ``len(rank_rows(n)) x ...``.
        num_rows: Number of rows n over all processes.

    Returns:
        All rows in order, ``n x ...``; ``local`` itself on one process.

    Raises:
        ShapeError: If ``local`` does not have the rows that ``rank_rows`` gives.
        ValueError: If ``local`` requires a gradient, which would silently be wrong.
    """
    _check_no_gradient(local)
    rows = rank_rows(num_rows)
    if len(local) != rows.stop - rows.start:
        raise ShapeError(
            f"local must hold rows {rows.start} to {rows.stop} of {num_rows} on "
            f"process {world()[0]}, but has {len(local)} rows. Index with "
            f"rank_rows({num_rows})."
        )
    size = world()[1]
    if size == 1:
        return local
    padded = local.new_zeros(_rows_per_process(num_rows, size), *local.shape[1:])
    padded[: len(local)] = local
    shards = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(shards, padded)
    # Only trailing shards are short, so all padding is at the end.
    return torch.cat(shards)[:num_rows]


def _rows_per_process(num_rows: int, size: int) -> int:
    return -(-num_rows // size)


def _check_no_gradient(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "A reduction over processes is not differentiable, but got a tensor of "
            f"shape {tuple(x.shape)} that requires a gradient. Try torch.no_grad(), or "
            "reduce the gradients instead."
        )
