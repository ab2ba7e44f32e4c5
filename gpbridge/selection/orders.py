"""Orders in which data arrive: given ones, or random ones that two models share.

In: permutations, how many to draw, or None. Out: row numbers. Next: ``held_out``
conditions on the first of them, ``speed_bound`` predicts each from those before.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gpbridge.checks import (
    ShapeError,
    check_count,
    check_not_empty,
    check_tensor,
)


def permutations(
    orders: int | Tensor | None, n: int, generator: Generator | None
) -> Tensor:
    """Permutations of n data, ``orders x n``.

    Args:
        orders: The permutations; a number of random ones; or None for the order of the
            data.
        n: The number of data.
        generator: Of random ones; None is one with seed 0, so that two models see the
            same.

    Returns:
        Row numbers, where they were given or drawn.

    Raises:
        TypeError: If orders are none of these.
        ShapeError: If permutations have another shape.
        ValueError: If they are none, or their number is not above zero.
        InputDataError: If there are none.
    """  # noqa: DOC502
    if orders is None:
        return torch.arange(n)[None]
    if isinstance(orders, int):
        check_count(orders=orders)
        generator = Generator().manual_seed(0) if generator is None else generator
        device = generator.device
        drawn = [
            torch.randperm(n, generator=generator, device=device) for _ in range(orders)
        ]
        return torch.stack(drawn)
    check_tensor(orders=orders)
    check_not_empty(orders=orders)
    if orders.dim() != 2 or orders.shape[1] != n:
        raise ShapeError(
            f"orders must be ``orders x {n}`` row numbers, but has shape "
            f"{tuple(orders.shape)}. For one order try orders[None]."
        )
    every = torch.arange(n, device=orders.device)
    bad = (orders.sort(-1).values != every).any(-1)
    if bool(bad.any()):
        raise ValueError(
            f"Each row of orders must be a permutation of 0 .. {n - 1}, but row "
            f"{int(torch.nonzero(bad)[0])} is not. Try torch.randperm({n})."
        )
    return orders.long()
