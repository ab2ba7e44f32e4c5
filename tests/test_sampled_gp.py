"""A model of samples is the exact GP up to its solver and its number of samples."""

import unittest

import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean

from gpbridge.sampled_gp import SampledGP
from gpbridge.testing import ModelContractTestCase


class TestContract(ModelContractTestCase, unittest.TestCase):
    def create_model(self, dtype, num_outputs=1, **options):
        kernel = ScaleKernel(MaternKernel(2.5)).to(dtype)
        kernel.base_kernel.lengthscale = 0.5
        likelihood = GaussianLikelihood().to(dtype)
        likelihood.noise = 0.02
        return SampledGP(
            covar_module=kernel,
            likelihood=likelihood,
            num_samples=256,
            num_features=32,
            **options,
        )
