r"""The dual functions of a mixture of error functions.

In: covariances of two Gaussian preactivations, and the mixture :math:`\sum_i c_i
\operatorname{erf}(b_i x)`. Out: F and its derivative in the covariance, in closed form.
Next: ``dual_activations`` has tanh as such a mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def erf_mixture(
    k: Tensor,
    q1: Tensor,
    q2: Tensor,
    scales: Sequence[float],
    shares: Sequence[float],
) -> tuple[Tensor, Tensor]:
    r"""F and its derivative.

    .. math::
        F = \frac{2}{\pi} \sum_{i, j} c_i c_j \arcsin(2 k a_{1i} a_{2j}), \qquad
        a_i = \frac{b_i}{\sqrt{1 + 2 b_i^2 q}}.

    Args:
        k: Covariance of the two preactivations.
        q1: Variance of the first.
        q2: Variance of the second.
        scales: The factors b.
        shares: The factors c.
    """
    return _ErfMixture.apply(k, q1, q2, tuple(scales), tuple(shares))


class _ErfMixture(torch.autograd.Function):
    """F and F' of a mixture of error functions; the gradient keeps the inputs only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(k, q1, q2, scales, shares) -> tuple[Tensor, Tensor]:
        value = derivative = 0.0
        for sine, cosine, slope, share, *_ in _pairs(k, q1, q2, scales, shares):
            value = value + share * torch.atan2(sine, cosine)
            derivative = derivative + slope
        return value, derivative

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.mixture = inputs[3:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, of_value, of_derivative):
        (k, q1, q2), (scales, shares) = ctx.saved_tensors, ctx.mixture
        if of_value is None and of_derivative is None:
            return None, None, None, None, None
        of_k = of_q1 = of_q2 = 0.0
        for _, cosine, slope, _, a1, a2 in _pairs(k, q1, q2, scales, shares):
            terms = [0.0, 0.0, 0.0]
            if of_value is not None:
                flow = of_value * slope
                terms = [flow, -k * flow * a1 * a1, -k * flow * a2 * a2]
            if of_derivative is not None:
                flow = of_derivative * slope / (cosine * cosine)
                first, second = flow * a1 * a1, flow * a2 * a2
                terms[0] = terms[0] + 4 * k * first * a2 * a2
                terms[1] = terms[1] - first
                terms[2] = terms[2] - second
            of_k, of_q1, of_q2 = of_k + terms[0], of_q1 + terms[1], of_q2 + terms[2]
        return (
            of_k.sum_to_size(k.shape),
            of_q1.sum_to_size(q1.shape),
            of_q2.sum_to_size(q2.shape),
            None,
            None,
        )


def _pairs(k, q1, q2, scales, shares) -> Iterator[tuple[Tensor, ...]]:
    """Of each pair of scales: sine, cosine, dF/dk, the share of F, a1 and a2."""
    for b1, c1 in zip(scales, shares, strict=True):
        rest1 = (1 + 2 * b1**2 * q1).reciprocal()
        a1 = b1 * rest1.sqrt()
        for b2, c2 in zip(scales, shares, strict=True):
            rest2 = (1 + 2 * b2**2 * q2).reciprocal()
            a2 = b2 * rest2.sqrt()
            sine = 2 * k * a1 * a2
            # At least what is left where k is the root of q1 q2, rounding or not.
            least = rest1 + rest2 - rest1 * rest2
            cosine = torch.maximum(1 - sine * sine, least).sqrt()
            share = 2 / math.pi * c1 * c2
            yield sine, cosine, 2 * share * a1 * a2 / cosine, share, a1, a2
