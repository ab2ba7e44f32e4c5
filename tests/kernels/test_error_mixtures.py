"""Mixtures of error functions: sums of their kernels, derivatives, one scale alone."""

import math

import torch

from gpbridge.kernels.dual_activations import erf
from gpbridge.kernels.error_mixtures import erf_mixture
from tests.oracles_architecture import dual_by_quadrature

TRIPLE = (0.6, 1.2, 0.8)


def tensors(*values):
    return [torch.tensor([v], dtype=torch.float64) for v in values]


def test_one_scale_of_one_is_the_error_function():
    for found, expected in zip(
        erf_mixture(*tensors(*TRIPLE), [1.0], [1.0]),
        erf(*tensors(*TRIPLE)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_a_mixture_has_the_expectations_of_its_function():
    scales, shares = [0.5, 2.0], [0.7, -0.4]

    def function(x):
        return sum(c * torch.erf(b * x) for b, c in zip(scales, shares, strict=True))

    def derivative(x):
        parts = zip(scales, shares, strict=True)
        return sum(
            2 * c * b / math.sqrt(math.pi) * torch.exp(-((b * x) ** 2))
            for b, c in parts
        )

    found = erf_mixture(*tensors(*TRIPLE), scales, shares)
    for value, phi in zip(found, (function, derivative), strict=True):
        assert abs(value.item() - dual_by_quadrature(phi, *TRIPLE)) < 1e-12


def test_derivatives_match_finite_differences_in_every_argument():
    arguments = [t.requires_grad_() for t in tensors(*TRIPLE)]

    def values(*arguments):
        return erf_mixture(*arguments, [0.5, 2.0], [0.7, 0.4])

    assert torch.autograd.gradcheck(values, arguments)
    assert torch.autograd.gradgradcheck(values, arguments)
    batched = [t.detach().expand(3).contiguous() for t in arguments]
    mapped = torch.func.vmap(lambda *t: values(*t)[0])(*batched)
    torch.testing.assert_close(mapped, values(*batched)[0])
