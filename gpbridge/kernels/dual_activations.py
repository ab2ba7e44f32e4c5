r"""Dual functions of activations: what a wide layer does to covariances.

In: covariances of two Gaussian preactivations (u, v), that is k = E uv, q1 = E u², q2 =
E v². Out: :math:`F = E\,\phi(u)\phi(v)` and :math:`\dot F = E\,\phi'(u)\phi'(v)`.
Next: ``wide_layers`` composes them into the kernels of whole networks.

All functions take tensors that broadcast, with :math:`k^2 \le q_1 q_2`, and have finite
gradients also at k = q1 = q2, at zero variances and for parallel inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gpbridge.kernels.error_mixtures import erf_mixture

Dual = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# b and c of tanh, by least squares on both the function and its derivative.
_SCALES = (
    0.3942544561694258,
    0.5396711842688025,
    0.7302884297509753,
    0.9813979250567157,
    1.3090683952881434,
    1.7535213930353168,
)
_SHARES = (
    0.013653308393225571,
    0.1354055965037488,
    0.33953917183448995,
    0.35320006585908353,
    0.14452120203799293,
    0.013680655371459058,
)


def relu(k: Tensor, q1: Tensor, q2: Tensor) -> tuple[Tensor, Tensor]:
    r"""The arc-cosine functions of degree one and zero.

    .. math::
        F = \frac{s + (\pi - t) k}{2 \pi}, \quad \dot F = \frac{\pi - t}{2 \pi}, \quad
        s = \sqrt{q_1 q_2 - k^2}, \quad t = \operatorname{atan2}(s, k).

    The derivative of t is infinite at s = 0, where F' has a kink in the inputs; there
    the gradient of :math:`\dot F` is zero, as it is along k = q1 = q2.

    Args:
        k: Covariance of the two preactivations.
        q1: Variance of the first.
        q2: Variance of the second.

    Returns:
        F and its derivative :math:`\dot F`.

    Example:
        >>> relu(*torch.ones(3, 1))  # half of the variance passes
        (tensor([0.5000]), tensor([0.5000]))

    References:
        Cho, Saul, Kernel methods for deep learning, NeurIPS 2009, eqs. (6) and (7).
    """
    value, derivative, _ = _ArcCosine.apply(k, q1, q2)
    return value, derivative


def leaky_relu(
    k: Tensor, q1: Tensor, q2: Tensor, negative_slope: float = 0.01
) -> tuple[Tensor, Tensor]:
    r"""Of :math:`\max(x, 0) + a \min(x, 0)`: the functions of ReLU, and a linear part.

    .. math:: F = (1 - a)^2 F_\text{relu} + a k
    """
    value, derivative = relu(k, q1, q2)
    a = negative_slope
    return (1 - a) ** 2 * value + a * k, (1 - a) ** 2 * derivative + a


def erf(k: Tensor, q1: Tensor, q2: Tensor) -> tuple[Tensor, Tensor]:
    r"""Of the error function.

    .. math::
        F = \frac{2}{\pi} \arcsin \frac{2k}{\sqrt{A}}, \quad
        \dot F = \frac{4}{\pi \sqrt{A - 4 k^2}}, \quad A = (1 + 2 q_1)(1 + 2 q_2).

    References:
        Williams, Computing with infinite networks, NeurIPS 1996, eq. (11).
    """
    # A - 4 k² is at least 1 + 2 q1 + 2 q2: no gradient of a root is infinite.
    root = ((1 + 2 * q1) * (1 + 2 * q2) - 4 * k * k).sqrt()
    return 2 / math.pi * torch.atan2(2 * k, root), 4 / math.pi / root


def gelu(k: Tensor, q1: Tensor, q2: Tensor) -> tuple[Tensor, Tensor]:
    r"""Of :math:`x \Phi(x)`, in closed form.

    .. math::
        2 \pi F = \frac{k^2 / \Delta + q_1 q_2 \Delta}{A}
            + k \left( \frac{\pi}{2} + \arctan \frac{k}{\Delta} \right), \quad
        A = (1 + q_1)(1 + q_2), \quad \Delta = \sqrt{A - k^2},

    and :math:`\dot F = \partial F / \partial k`, by Price's theorem.

    References:
        Tsuchida, Pearce, van der Heide, Roosta, Gallagher, Avoiding kernel fixed
        points: computing with ELU and GELU infinite networks, AAAI 2021.
    """
    scale, product = (1 + q1) * (1 + q2), q1 * q2
    root = (scale - k * k).sqrt()  # at least sqrt(1 + q1 + q2)
    slope = k / root
    angle = math.pi / 2 + torch.atan2(k, root)
    value = (k * slope + product * root) / scale + k * angle
    derivative = angle + slope * (1 + (2 - product + slope * slope) / scale)
    return value / (2 * math.pi), derivative / (2 * math.pi)


def hermite_dual(
    k: Tensor,
    q1: Tensor,
    q2: Tensor,
    function: Callable[[Tensor], Tensor],
    derivative: Callable[[Tensor], Tensor],
    num_terms: int = 48,
    num_nodes: int = 401,
) -> tuple[Tensor, Tensor]:
    r"""Of any smooth activation, by its expansion in Hermite polynomials.

    .. math::
        F = \sum_{j \le J + 1} a_j(q_1) a_j(q_2) \rho^j, \quad
        \rho = k / \sqrt{q_1 q_2}, \quad
        a_j(q) = E_{z \sim N(0, 1)}\, \phi(\sqrt q z) \mathrm{He}_j(z) / \sqrt{j!},

    with coefficients by the trapezoidal rule. The last two hold what J terms leave
    of the even and of the odd part of the function, so that variances are exact, and
    matrices stay positive semi-definite. Coefficients belong to single inputs: a pair
    costs J products instead of the nodes² evaluations of a quadrature in two
    dimensions.

    The series converges slowly for large variances, where an activation looks as if it
    had a kink. Largest errors of F and F' with 48 terms, relative to their values at
    ρ = 1: 4e-8 and 2e-6 for SiLU at variance 10, 3e-6 and 2e-4 at 30, 3e-5 and 3e-3
    at 100; less for softplus. Steeper functions need smaller variances: with tanh
    they are 6e-5 and 3e-3 at 10, and 3e-2 of F' at 30, so that :func:`tanh` takes
    another way. Keep the variances of preactivations below 30, by scaled inputs and by
    a constraint of the weights' variances.

    Args:
        k: Covariance of the two preactivations.
        q1: Variance of the first.
        q2: Variance of the second.
        function: The activation, elementwise.
        derivative: Its derivative, elementwise.
        num_terms: The number J of terms.
        num_nodes: Nodes of the quadrature of each coefficient.
    """
    nodes, weights, projection = (
        t.to(q1) for t in _hermite_projection(num_terms, num_nodes)
    )
    cosine = (k * inverse_root(q1) * inverse_root(q2)).clamp(-1, 1)
    sums = []
    for phi in (function, derivative):
        first, second = (
            _coefficients(phi(_root(q)[..., None] * nodes), weights, projection)
            for q in (q1, q2)
        )
        total = first[..., -1] * second[..., -1]
        for j in range(num_terms, -1, -1):
            total = total * cosine + first[..., j] * second[..., j]
        sums.append(total.expand(cosine.shape))
    return sums[0], sums[1]


def tanh(k: Tensor, q1: Tensor, q2: Tensor) -> tuple[Tensor, Tensor]:
    r"""Of tanh, a mixture of error functions.

    .. math::
        \tanh x \approx \sum_i c_i \operatorname{erf}(b_i x), \qquad
        F = \frac{2}{\pi} \sum_{i, j} c_i c_j \arcsin(2 k a_{1i} a_{2j}), \quad
        a_i = \frac{b_i}{\sqrt{1 + 2 b_i^2 q}}.

    The logistic distribution is a normal one of random scale; six scales leave an error
    of 5e-7 of tanh and 9e-7 of its derivative. F and F' are those of the mixture,
    exactly, so that matrices are positive semi-definite; their relative errors are
    below 3e-6 at all variances. A pair costs 36 arc tangents.

    References:
        Stefanski, A normal scale mixture representation of the logistic distribution,
        Statistics and Probability Letters 1991. Williams 1996, as for :func:`erf`.
    """
    return erf_mixture(k, q1, q2, _SCALES, _SHARES)


def _coefficients(values: Tensor, weights: Tensor, projection: Tensor) -> Tensor:
    """Hermite coefficients, and two more that hold what the series leaves out.

    Of the even and of the odd part of a function, the root of the energy beyond J.
    """
    series = values @ projection
    num_terms = series.shape[-1]
    mirrored = values.flip(-1)  # nodes are symmetric
    rest = []
    for j in (num_terms, num_terms + 1):
        part = (values + mirrored if j % 2 == 0 else values - mirrored) / 2
        energy = (part * part) @ weights
        left = energy - series[..., j % 2 :: 2].square().sum(-1)
        known = left > 64 * torch.finfo(left.dtype).eps * energy
        rest.append(_root(torch.where(known, left, 0)))
    return torch.cat([series, torch.stack(rest, -1)], -1)


def _hermite_projection(
    num_terms: int, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, weights, and the matrix ``nodes x terms`` to Hermite coefficients."""
    # Equal steps resolve large variances better than Gauss-Hermite nodes, and a sum of
    # a function that vanishes at both ends converges exponentially too.
    end = 2 * math.sqrt(num_terms) + 6
    nodes = torch.linspace(-end, end, num_nodes, dtype=torch.float64)
    weights = torch.exp(-nodes * nodes / 2) / math.sqrt(2 * math.pi)
    weights = weights * (nodes[1] - nodes[0])
    polynomials = [torch.ones_like(nodes), nodes]  # of norm one
    for j in range(1, num_terms - 1):
        before, last = polynomials[-2:]
        polynomials.append((nodes * last - math.sqrt(j) * before) / math.sqrt(j + 1))
    projection = weights[:, None] * torch.stack(polynomials[:num_terms], -1)
    return nodes, weights, projection


def _root(q: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero."""
    positive = q > 0
    return torch.where(positive, torch.where(positive, q, 1).sqrt(), 0)


def inverse_root(q: Tensor) -> Tensor:
    """One over the square root; zero, with gradient zero, at zero."""
    positive = q > 0
    return torch.where(positive, torch.where(positive, q, 1).rsqrt(), 0)


def _noise(dtype: torch.dtype) -> float:
    """Squared sines below this are rounding errors of a cosine of one."""
    return 16 * torch.finfo(dtype).eps


class _ArcCosine(torch.autograd.Function):
    """F and F' of ReLU, and S = s / 2 pi; gradients by formulas from D = F', S and k.

    The passes over memory are counted, since they cost as much as the arc tangent: all
    factors of the two inputs are small tensors, and gradients need no mask beyond the
    one that is in S.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(k: Tensor, q1: Tensor, q2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Of pi - t. A variance of zero is at right angles to all others.
        inverse1, inverse2 = (
            torch.nan_to_num(q.rsqrt(), nan=math.nan, posinf=0.0) for q in (q1, q2)
        )
        cosine = k * -inverse1 * inverse2
        sine = torch.addcmul(cosine.new_ones(()), cosine, cosine, value=-1)
        sine = torch.nn.functional.threshold(sine, _noise(k.dtype), 0.0).sqrt_()
        derivative = torch.atan2(sine, cosine).mul_(1 / (2 * math.pi))
        sine = sine.mul_(q1 * inverse1 / (2 * math.pi)).mul_(q2 * inverse2)
        return torch.addcmul(sine, derivative, k), derivative, sine

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, derivative, sine = output
        ctx.mark_non_differentiable(sine)
        ctx.save_for_backward(*inputs, derivative, sine)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, of_value, of_derivative, _):
        k, q1, q2, derivative, sine = ctx.saved_tensors
        if of_value is None and of_derivative is None:
            return None, None, None
        if torch.is_grad_enabled():  # second derivatives
            derivative, sine = _angle_and_sine(k, q1, q2)
        of_k = radial = 0.0
        if of_value is not None:
            of_k, radial = of_value * derivative, of_value * sine
        if of_derivative is not None:
            # 1 / (4 pi² S), and zero where S is
            tiny = sine.new_full((), torch.finfo(sine.dtype).tiny)
            square = torch.addcmul(tiny, sine, sine, value=4 * math.pi**2)
            slope = of_derivative * (sine / square)
            of_k = of_k + slope
            radial = torch.addcmul(torch.as_tensor(radial).to(k), slope, k, value=-1)
        # F is homogeneous: 2 q dF/dq = F - k dF/dk, and so is its derivative.
        of_q1, of_q2 = (
            radial.sum_to_size(q.shape) * inverse_root(q).square() / 2 for q in (q1, q2)
        )
        return of_k.sum_to_size(k.shape), of_q1, of_q2


def _angle_and_sine(k: Tensor, q1: Tensor, q2: Tensor) -> tuple[Tensor, Tensor]:
    """(pi - t) / 2 pi and s / 2 pi by differentiable operations."""
    cosine = k * inverse_root(q1) * inverse_root(q2)
    square = 1 - cosine * cosine
    inside = square > _noise(k.dtype)
    sine = torch.where(inside, torch.where(inside, square, 1).sqrt(), 0)
    angle = torch.atan2(sine, -torch.where(inside, cosine, cosine.detach()))
    return angle / (2 * math.pi), sine * _root(q1) * _root(q2) / (2 * math.pi)
