r"""The Matérn-5/2 kernel with the lengthscale prior of botorch's ``SingleTaskGP``.

In: the extent of each input column, so that the prior means the same for any units.
Out: a gpytorch kernel whose lengthscales are searched on a log scale, which takes a
tenth of the steps. Next: ``selection`` puts it beside, or on top of, a network.
"""

from __future__ import annotations

import math

import torch
from botorch.utils.constraints import LogTransformedInterval
from gpytorch.kernels import MaternKernel
from gpytorch.priors import LogNormalPrior
from torch import Tensor

LENGTHSCALE_BOUNDS = (2.5e-2, 1e4)  # in units of the extent


def dimension_scaled_matern(extent: Tensor, num_inputs: int) -> MaternKernel:
    r"""Matérn-5/2 kernel, its lengthscales at the mode of their prior.

    .. math:: \log (\ell_i / e_i) \sim N(\sqrt 2 + \tfrac12 \log d, 3)

    Args:
        extent: Extent e of each column, ``d``, or of all columns, ``1``.
        num_inputs: The number d of columns.

    Returns:
        A kernel with one lengthscale for each entry of ``extent``.

    References:
        Hvarfner, Hellsten, Nardi, Vanilla Bayesian optimization performs great in high
        dimensions, ICML 2024.
    """
    location = math.sqrt(2) + math.log(num_inputs) / 2 + extent.log()
    prior = LogNormalPrior(location, torch.full_like(extent, math.sqrt(3)))
    lower, upper = LENGTHSCALE_BOUNDS
    kernel = MaternKernel(
        nu=2.5,
        ard_num_dims=num_inputs if len(extent) == num_inputs else None,
        lengthscale_prior=prior,
        lengthscale_constraint=LogTransformedInterval(lower * extent, upper * extent),
    ).to(extent)
    kernel.lengthscale = prior.mode
    return kernel
