"""The loss of each of many copies of a network.

In: a loss of one copy, or of a stack. Out: a function of outputs ``k x b x m`` that
gives ``k`` losses. Next: ``stacked_training`` descends them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.func import vmap

from gpbridge.checks import ShapeError
from gpbridge.dnn.training import isolated_randomness
from gpbridge.frozen import first_line
from gpbridge.functional import FunctionalNet
from gpbridge.probe import check_outputs, run_or_explain

Loss = Callable[[Tensor, Tensor], Tensor]


def stack_loss(
    loss: Loss,
    net: FunctionalNet,
    forward: Callable[[Tensor], Tensor],
    X: Tensor,
    Y: Tensor,
) -> Loss:
    """The loss of each copy: as it is if it takes a stack already, or vmapped.

    Which of the two is found out on the first rows, where the values are compared.

    Args:
        loss: Maps outputs ``b x m`` and targets of one copy to a scalar, or those of k
            copies to ``k``.
        net: The network, to explain what does not fit it.
        forward: The copies' outputs at ``k x b x d`` inputs.
        X: Inputs ``k x n x d``.
        Y: Targets ``k x n x ...``.

    Returns:
        The function.

    Raises:
        ShapeError: If the network does not take the inputs, or the loss of a copy is
            no scalar.
        ValueError: If the copies cannot be vmapped.
    """
    mapped = vmap(loss, randomness="different")
    # Not as many rows as copies: a loss that mistakes one for the other must show.
    count = 3 if len(X) == 2 else 2
    X, Y = X[:, :count], Y[:, :count]
    generator = Generator().manual_seed(0)
    with isolated_randomness(generator, X.device), torch.no_grad():
        rows = X[0].reshape(-1, *(net.input_shape or X.shape[2:]))
        check_outputs(run_or_explain(net.network, rows, net.input_shape), rows)
        try:
            outputs = forward(X)
            losses = mapped(outputs, Y)
        except RuntimeError as error:
            raise ValueError(
                "torch.func.vmap cannot evaluate the copies side by side: "
                f"{first_line(error)} Train them one by one with fit_map, or replace "
                "the operation."
            ) from error
        if losses.shape != (len(X),):
            raise ShapeError(
                "loss must map outputs ``b x m`` and targets of one copy to a scalar, "
                f"but gave shape {tuple(losses.shape[1:])}. Take the mean over the "
                "rows."
            )
        if X.shape[1] == len(X) or not losses.all():
            return mapped  # where nothing could be told apart
        try:
            direct = loss(outputs, Y)
        except (RuntimeError, ValueError, IndexError):
            return mapped
    fits = isinstance(direct, Tensor) and direct.shape == losses.shape
    return loss if fits and torch.allclose(direct, losses, equal_nan=True) else mapped
