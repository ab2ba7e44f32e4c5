"""The case that the contract tests share: how a model is built, on which data.

In: what a user's test class defines. Out: models, their data and inputs, comparisons of
posteriors, and skips of what a model is declared not to support.
Next: ``posterior``, ``state``, ``conditioning`` and ``acquisition`` hold the tests.
"""

from __future__ import annotations

import warnings

import torch
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.exceptions.warnings import InputDataWarning
from botorch.models.model import Model
from botorch.sampling.base import MCSampler
from botorch.sampling.normal import SobolQMCNormalSampler
from torch import Tensor, nn

from gpbridge.testing.modules import check_unchanged, snapshot


class ModelCase:
    """How to build a model; ``ModelContractTestCase`` documents the options."""

    outputs: tuple[int, ...] = (1, 2)
    num_inputs = 2
    num_train = 12
    classification = False
    conditioning_equals_refit = True
    supports_conditioning = True
    supports_fantasies = True
    supports_subset_output = True
    supports_noise_tensor = True
    supports_transforms = True
    supports_construct_inputs = True
    supports_pathwise = True
    rtol = 1e-6
    atol = 1e-8
    gradient_rtol = 1e-5
    gradient_step = 1e-5
    pathwise_tolerance = 0.2

    def create_model(
        self, dtype: torch.dtype, num_outputs: int = 1, **options: object
    ) -> Model:
        """Build the model under test, in the same way each time.

        Args:
            dtype: Of the data, and hence of the model.
            num_outputs: The number m of outputs.
            **options: Keyword arguments for the constructor: always ``train_X`` and
                ``train_Y``, in some tests the two transforms. Hyperparameters and
                random weights must not depend on them.

        Returns:
            The model. Its constructor must not depend on the global random state.

        Raises:
            NotImplementedError: Until a subclass defines it.
        """
        raise NotImplementedError("Define create_model(dtype, num_outputs, **options).")

    def refit(self, model: Model, X: Tensor, Y: Tensor) -> Model:
        """Build anew, on its data and (``X``, ``Y``), a model like ``model``.

        Args:
            model: What ``create_model`` returned, single output or several.
            X: New inputs, ``q x d``.
            Y: New targets, ``q x m``, or ``q`` labels.

        Returns:
            A model with the same hyperparameters that has seen all data.
        """
        m = model.num_outputs
        train_X, train_Y = self.train_data(X.dtype, m)
        return self.build(
            X.dtype, m, train_X=torch.cat([train_X, X]), train_Y=torch.cat([train_Y, Y])
        )

    def sampler(self, num_samples: int) -> MCSampler:
        """The sampler of acquisition functions, for posteriors of another kind.

        Args:
            num_samples: How many samples to take, where the kind of sampler asks.

        Returns:
            A sampler with fixed base samples; default for normal posteriors.
        """
        return SobolQMCNormalSampler(torch.Size([num_samples]), seed=0)

    def train_data(self, dtype: torch.dtype, num_outputs: int) -> tuple[Tensor, Tensor]:
        """Inputs ``n x d`` and smooth targets ``n x m``, or labels."""
        X = self.inputs(self.num_train, seed=1)
        return X.to(dtype), self._targets(X, num_outputs, dtype)

    def inputs(self, *shape: int, seed: int = 2) -> Tensor:
        """Uniform inputs ``*shape x d`` in float64, from a seed of their own."""
        generator = torch.Generator().manual_seed(seed)
        size = (*shape, self.num_inputs)
        return torch.rand(size, dtype=torch.float64, generator=generator)

    def watch(self, module: nn.Module) -> nn.Module:
        """Return a user's module, and check at the end that nothing changed it."""
        before = snapshot(module)
        self.addCleanup(lambda: check_unchanged(before, snapshot(module)))
        return module

    def build(
        self,
        dtype: torch.dtype = torch.float64,
        num_outputs: int = 1,
        **options: object,
    ) -> Model:
        """Call ``create_model`` with data, without botorch's advice on scaling."""
        X, Y = self.train_data(dtype, num_outputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputDataWarning)
            return self.create_model(
                dtype, num_outputs, **({"train_X": X, "train_Y": Y} | options)
            )

    def setUp(self) -> None:
        """Seed the global random state, which botorch's samplers use."""
        super().setUp()
        state = torch.get_rng_state()
        self.addCleanup(lambda: torch.set_rng_state(state))
        torch.manual_seed(0)

    def _targets(self, X: Tensor, m: int, dtype: torch.dtype) -> Tensor:
        phases = torch.arange(m, dtype=X.dtype)
        waves = torch.sin(5 * X.sum(-1, keepdim=True) + phases) + X[..., :1]
        if not self.classification:
            return waves.to(dtype)
        return (waves > 0.5).to(dtype) if m == 1 else waves.argmax(-1)

    def _new_data(self, m: int) -> tuple[Tensor, Tensor]:
        X = self.inputs(3, seed=3)
        return X, self._targets(X, m, X.dtype)

    def _ready(self, m: int) -> Model:
        """A model with its caches filled, as GPyTorch asks before conditioning."""
        model = self.build(num_outputs=m)
        model.posterior(self.inputs(4))
        return model

    def _moments(self, model: Model, X: Tensor) -> Tensor:
        with torch.no_grad():
            posterior = model.posterior(X)
            return torch.stack([posterior.mean, posterior.variance])

    def _same_posterior(self, model: Model, other: Model, X: Tensor) -> None:
        self._close(self._moments(model, X), self._moments(other, X))

    def _close(self, actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=self.rtol, atol=self.atol)

    def _scalar(self, m: int) -> tuple[Model, ScalarizedPosteriorTransform | None]:
        transform = None
        if m > 1:
            transform = ScalarizedPosteriorTransform(torch.ones(m, dtype=torch.float64))
        return self.build(num_outputs=m), transform

    def _need_regression(self) -> None:
        if self.classification:
            self.skipTest("needs real targets")

    def _need_conditioning(self) -> None:
        if not self.supports_conditioning:
            self.skipTest("condition_on_observations is declared unsupported")

    def _need_fantasies(self) -> None:
        self._need_regression()
        if not self.supports_fantasies:
            self.skipTest("fantasize is declared unsupported")
