"""The default Matérn kernel: botorch's prior, in the units of the inputs."""

import math

import pytest
import torch
from botorch.models.utils.gpytorch_modules import (
    get_covar_module_with_dim_scaled_prior,
)

from gpbridge.kernels.matern import LENGTHSCALE_BOUNDS, dimension_scaled_matern

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def test_on_the_unit_cube_it_is_botorchs():
    upstream = get_covar_module_with_dim_scaled_prior(3, use_rbf_kernel=False).double()
    kernel = dimension_scaled_matern(torch.ones(3, dtype=torch.float64), 3)
    X = torch.rand(
        5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    upstream.lengthscale = kernel.lengthscale
    torch.testing.assert_close(kernel(X).to_dense(), upstream(X).to_dense(), **EXACT)
    got, expected = kernel.lengthscale_prior, upstream.lengthscale_prior
    at = torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(got.log_prob(at), expected.log_prob(at))


@pytest.mark.parametrize("extent", [[1.0, 20.0], [0.1]])
def test_lengthscales_are_in_units_of_the_extent(extent):
    extent = torch.tensor(extent, dtype=torch.float64)
    kernel = dimension_scaled_matern(extent, 2)
    mode = math.exp(math.sqrt(2) + math.log(2) / 2 - 3)
    expected = (mode * extent)[None]
    torch.testing.assert_close(kernel.lengthscale, expected, rtol=1e-6, atol=0)
    constraint = kernel.raw_lengthscale_constraint
    low = LENGTHSCALE_BOUNDS[0] * extent
    torch.testing.assert_close(constraint.lower_bound, low, rtol=1e-6, atol=0)
    X = torch.zeros(3, 2, dtype=torch.float64)
    assert kernel(X).to_dense().shape == (3, 3)
