"""Assertions on gradients: autograd against central differences.

In: a function and inputs. Out: nothing, or an error that names the largest difference.
Next: ``posterior`` and ``acquisition`` ask it of models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def assert_gradients_match_finite_differences(
    function: Callable[[Tensor], Tensor],
    X: Tensor,
    *,
    step: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 1e-7,
) -> None:
    r"""Compare autograd with central differences in every entry of the inputs.

    .. math:: \partial_i f \approx (f(x + h e_i) - f(x - h e_i)) / 2h

    All outputs count: they are summed with fixed weights that differ. Cost: two
    evaluations per entry of ``X``.

    Args:
        function: Deterministic map from inputs to a tensor of any shape.
        X: Inputs of any shape, float64; away from the kinks of the function.
        step: The step h; the truncation error is of order h squared.
        rtol: Tolerance relative to the largest entry of the gradient.
        atol: Absolute tolerance.

    Raises:
        AssertionError: If an entry differs, or the function draws fresh randomness.
        TypeError: If ``X`` is not float64: differences in float32 mean nothing.
    """
    if X.dtype != torch.float64:
        raise TypeError(f"X must be float64, but is {X.dtype}. Try X.double().")

    def total(X: Tensor) -> Tensor:
        values = function(X)
        weights = 1 + torch.arange(values.numel()).to(values) / values.numel()
        return (weights * values.reshape(-1)).sum()

    X = X.detach().clone().requires_grad_()
    value = total(X)
    (gradient,) = torch.autograd.grad(value, X)
    # With a gradient both times: without one torch may multiply in another order.
    if not torch.equal(value, total(X)):
        raise AssertionError(
            "The function returned two values for the same inputs. Fix its base "
            "samples or its generator."
        )
    with torch.no_grad():
        moves = step * torch.eye(X.numel()).to(X).reshape(-1, *X.shape)
        differences = [(total(X + e) - total(X - e)) / (2 * step) for e in moves]
    expected = torch.stack(differences).reshape(X.shape)
    atol = max(atol, rtol * expected.abs().max().item())
    torch.testing.assert_close(gradient, expected, rtol=0.0, atol=atol)
