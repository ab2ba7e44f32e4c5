"""The whole contract of a BoTorch model, on what recipes return."""

import unittest
from dataclasses import replace

import pytest
import torch

from gpbridge.surrogates import (
    DeepKernelSurrogate,
    InfiniteWidthSurrogate,
    LastLayerSurrogate,
    LinearizedSurrogate,
    MaternTangentSurrogate,
    Recipe,
    TangentSurrogate,
)
from gpbridge.testing import ModelContractTestCase
from tests.surrogates.recipes import OF, quiet


class RecipeContract(ModelContractTestCase):
    """Upstream's and our contract on what a recipe returns."""

    recipe: Recipe
    conditioning_equals_refit = False  # hyperparameters move
    supports_transforms = False  # it has its own
    supports_construct_inputs = False
    supports_pathwise = False
    gradient_step = 1e-6  # errors of central differences fell with its square

    def create_model(self, dtype, num_outputs=1, **options):
        bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=dtype)
        recipe = replace(self.recipe, bounds=bounds, epochs=200)
        return quiet(recipe.fit, options["train_X"], options["train_Y"])

    def test_observation_noise_adds_to_the_variance_only(self):
        model, X = self.build(), self.inputs(3, 4)
        plain = model.posterior(X)
        noisy = model.posterior(X, observation_noise=True)
        self._close(noisy.mean, plain.mean)
        noise = model.likelihood.noise * model.outcome_transform.stdvs.square()
        self._close(noisy.variance - plain.variance, noise.expand(3, 4, 1))


@pytest.mark.slow
class TestLinearizedContract(RecipeContract, unittest.TestCase):
    recipe = OF[LinearizedSurrogate]


@pytest.mark.slow
class TestLastLayerContract(RecipeContract, unittest.TestCase):
    recipe = OF[LastLayerSurrogate]


class KernelContract(RecipeContract):
    outputs = (1,)  # upstream's lists of models cannot be conditioned
    supports_subset_output = False  # upstream's, for kernels of one's own


@pytest.mark.slow
class TestMaternTangentContract(KernelContract, unittest.TestCase):
    recipe = OF[MaternTangentSurrogate]


@pytest.mark.slow
class TestTangentContract(KernelContract, unittest.TestCase):
    recipe = OF[TangentSurrogate]


@pytest.mark.slow
class TestInfiniteWidthContract(KernelContract, unittest.TestCase):
    recipe = OF[InfiniteWidthSurrogate]


@pytest.mark.slow
class TestDeepKernelContract(KernelContract, unittest.TestCase):
    recipe = OF[DeepKernelSurrogate]
