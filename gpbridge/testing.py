"""Contract tests for models of your own, with assertions on modules and gradients.

In: a ``unittest.TestCase`` that says how to build a model. Out: what BoTorch expects of
a surrogate, test by test: shapes, transforms, conditioning, fantasies, acquisition.
Every model of this library passes it; run your own through it before you trust it.
"""

# ruff: noqa: D102 -- the tests are named by the sentences that they prove

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.acquisition.knowledge_gradient import qKnowledgeGradient
from botorch.acquisition.logei import (
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
)
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.exceptions.warnings import InputDataWarning
from botorch.models import ModelListGP
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import Model
from botorch.models.transforms import Normalize, Standardize
from botorch.optim import optimize_acqf
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.sampling.pathwise import get_matheron_path_model
from botorch.utils.datasets import SupervisedDataset
from torch import Tensor, nn

_BATCH_SHAPES = ((), (3,), (2, 3))


@contextmanager
def assert_module_unchanged(module: nn.Module) -> Iterator[None]:
    """Require that a block leaves a module bit for bit as it was, also if it raises.

    Compared are the submodules and their types, attributes, modes and hooks, and for
    every parameter and buffer its identity, bits, dtype, device, ``requires_grad`` and
    gradient.

    Args:
        module: The module to watch.

    Yields:
        Nothing.

    Raises:
        AssertionError: If anything differs; the message says what and where.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> with assert_module_unchanged(network):
        ...     _ = network(torch.ones(3, 2))
    """
    before = _snapshot(module)
    try:
        yield
    finally:
        _check_unchanged(before, _snapshot(module))


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
    with torch.no_grad():
        if not torch.equal(value, total(X)):
            raise AssertionError(
                "The function returned two values for the same inputs. Fix its base "
                "samples or its generator."
            )
        moves = step * torch.eye(X.numel()).to(X).reshape(-1, *X.shape)
        differences = [(total(X + e) - total(X - e)) / (2 * step) for e in moves]
    expected = torch.stack(differences).reshape(X.shape)
    atol = max(atol, rtol * expected.abs().max().item())
    torch.testing.assert_close(gradient, expected, rtol=0.0, atol=atol)


class ModelContractTestCase:
    r"""What a BoTorch model must do, as a mixin for ``unittest.TestCase``.

    Supply :meth:`create_model`, switch off what does not apply, and inherit the tests.
    Models are small (12 points, 2 inputs), so a run takes seconds. The global random
    state is seeded before and restored after each test. Networks passed through
    :meth:`watch` must be bit for bit unchanged at the end of each test.

    Attributes:
        outputs: The numbers of outputs that the model is tested with.
        num_inputs: The number d of inputs, all in the unit interval.
        num_train: The number n of training points.
        classification: Targets are labels, posteriors are over latent functions, and
            tests that need real targets are skipped.
        conditioning_equals_refit: Conditioning gives the posterior of a model that
            :meth:`refit` builds from all data.
        supports_conditioning: ``condition_on_observations`` exists.
        supports_fantasies: ``fantasize`` and the knowledge gradient work.
        supports_subset_output: ``subset_output`` exists.
        supports_noise_tensor: ``observation_noise`` may be a tensor.
        supports_transforms: ``input_transform`` and ``outcome_transform`` are options.
        supports_construct_inputs: ``construct_inputs`` gives constructor arguments.
        supports_pathwise: botorch's pathwise samplers know the model.
        rtol: Relative tolerance of identities in float64.
        atol: Absolute tolerance of identities in float64.

    Example:
        The stock surrogate, as a class in a test file::

            class TestSingleTaskGP(ModelContractTestCase, unittest.TestCase):
                def create_model(self, dtype, num_outputs=1, **options):
                    return SingleTaskGP(**{"outcome_transform": None, **options})
    """

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
        before = _snapshot(module)
        self.addCleanup(lambda: _check_unchanged(before, _snapshot(module)))
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

    # Posterior

    def test_posterior_and_samples_have_the_shape_of_the_test_batch(self) -> None:
        for dtype in (torch.float32, torch.float64):
            for m in self.outputs:
                model = self.build(dtype, m)
                self.assertEqual(model.num_outputs, m)
                self.assertEqual(model.batch_shape, torch.Size())
                for batch_shape in _BATCH_SHAPES:
                    with self.subTest(dtype=dtype, m=m, batch_shape=batch_shape):
                        X = self.inputs(*batch_shape, 4).to(dtype)
                        posterior = model.posterior(X)
                        shape = torch.Size((*batch_shape, 4, m))
                        self.assertEqual(posterior.mean.shape, shape)
                        self.assertEqual(posterior.variance.shape, shape)
                        self.assertEqual(posterior.mean.dtype, dtype)
                        self.assertTrue(bool(posterior.mean.isfinite().all()))
                        self.assertTrue(bool((posterior.variance > 0).all()))
                        samples = posterior.rsample(torch.Size([5]))
                        self.assertEqual(samples.shape, torch.Size((5, *shape)))
                        self.assertTrue(bool(samples.isfinite().all()))

    def test_batch_equals_loop(self) -> None:
        for m in self.outputs:
            model = self.build(num_outputs=m)
            X = self.inputs(2, 3, 4)
            whole = model.posterior(X)
            for i, j in ((0, 0), (1, 2)):
                with self.subTest(m=m, batch=(i, j)):
                    part = model.posterior(X[i, j])
                    self._close(whole.mean[i, j], part.mean)
                    self._close(whole.variance[i, j], part.variance)

    def test_samples_have_the_moments_of_the_posterior(self) -> None:
        for m in self.outputs:
            with self.subTest(m=m), torch.no_grad():
                posterior = self.build(num_outputs=m).posterior(self.inputs(3))
                samples = posterior.rsample(torch.Size([4096]))
                error = (samples.mean(0) - posterior.mean).abs()
                std = posterior.variance.sqrt()
                # Five standard errors: there are few entries, and the seed is fixed.
                self.assertLess((error / std).max().item(), 5 / 64)
                ratio = samples.var(0) / posterior.variance
                self.assertLess((ratio - 1).abs().max().item(), 5 * (2 / 4096) ** 0.5)

    def test_observation_noise_adds_to_the_variance_only(self) -> None:
        self._need_regression()
        for m in self.outputs:
            with self.subTest(m=m):
                model, X = self.build(num_outputs=m), self.inputs(3, 4)
                latent = model.posterior(X)
                noisy = model.posterior(X, observation_noise=True)
                self._close(noisy.mean, latent.mean)
                self.assertTrue(bool((noisy.variance > latent.variance).all()))
                if self.supports_noise_tensor:
                    noise = 0.1 + self.inputs(3, 4, seed=5)[..., :1].expand(3, 4, m)
                    given = model.posterior(X, observation_noise=noise)
                    self._close(given.mean, latent.mean)
                    self._close(given.variance, latent.variance + noise)

    def test_posterior_transform_scalarises_the_outputs(self) -> None:
        for m in self.outputs:
            with self.subTest(m=m):
                model, X = self.build(num_outputs=m), self.inputs(3, 1)
                weights = 2 + torch.arange(m, dtype=torch.float64)
                transform = ScalarizedPosteriorTransform(weights, offset=0.5)
                got = model.posterior(X, posterior_transform=transform)
                posterior = model.posterior(X)
                covariance = posterior.distribution.covariance_matrix  # 3 x m x m
                self._close(got.mean[..., 0], posterior.mean @ weights + 0.5)
                variance = (weights @ covariance @ weights)[..., None]
                self._close(got.variance[..., 0], variance)

    def test_posterior_leaves_the_global_random_state_alone(self) -> None:
        for m in self.outputs:
            before = torch.get_rng_state()
            posterior = self.build(num_outputs=m).posterior(self.inputs(4))
            _ = posterior.mean, posterior.variance
            self.assertTrue(torch.equal(before, torch.get_rng_state()))

    def test_posterior_gradients_match_finite_differences(self) -> None:
        for m in self.outputs:
            model = self.build(num_outputs=m)

            def moments(X: Tensor, model: Model = model) -> Tensor:
                posterior = model.posterior(X)
                return torch.stack([posterior.mean, posterior.variance])

            with self.subTest(m=m):
                assert_gradients_match_finite_differences(moments, self.inputs(2, 2))

    # State

    def test_state_dict_restores_the_posterior(self) -> None:
        for m in self.outputs:
            with self.subTest(m=m):
                model, X = self.build(num_outputs=m), self.inputs(4)
                _perturb(model)
                state = copy.deepcopy(model.state_dict())
                other = self.build(num_outputs=m)
                other.load_state_dict(state)
                self._same_posterior(other, model, X)

    def test_deepcopy_and_pickle_keep_the_posterior(self) -> None:
        for m in self.outputs:
            model, X = self.build(num_outputs=m), self.inputs(4)
            for cached in (False, True):
                with self.subTest(m=m, cached=cached):
                    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
                    for twin in twins:
                        self._same_posterior(twin, model, X)
            before = self._moments(model, X)
            _perturb(copy.deepcopy(model))
            self._close(self._moments(model, X), before)

    def test_train_and_eval_do_not_change_the_posterior(self) -> None:
        model, X = self.build(num_outputs=self.outputs[-1]), self.inputs(4)
        before = self._moments(model, X)
        model.train()
        model.eval()
        self._close(self._moments(model, X), before)

    def test_construct_inputs_gives_constructor_arguments(self) -> None:
        self._need_regression()
        if not self.supports_construct_inputs:
            self.skipTest("construct_inputs is declared unsupported")
        for m in self.outputs:
            with self.subTest(m=m):
                model, X = self.build(num_outputs=m), self.inputs(4)
                data = SupervisedDataset(
                    *self.train_data(torch.float64, m),
                    feature_names=[f"x{i}" for i in range(self.num_inputs)],
                    outcome_names=[f"y{i}" for i in range(m)],
                )
                options = type(model).construct_inputs(data)
                self._same_posterior(self.build(num_outputs=m, **options), model, X)

    def test_transforms_act_on_inputs_and_outcomes(self) -> None:
        self._need_regression()
        if not self.supports_transforms:
            self.skipTest("transforms are declared unsupported")
        for m in self.outputs:
            with self.subTest(m=m):
                plain, model, normalize, standardize = self._transformed(m)
                X, new = self.inputs(3, 4), self.inputs(2, seed=3)
                self._untransformed_equal(plain, model, X, normalize, standardize)
                if self.supports_conditioning:
                    Y = self._targets(new, m, torch.float64)
                    model = model.condition_on_observations(new, Y)
                    plain = plain.condition_on_observations(
                        normalize(new), standardize(Y)[0]
                    )
                    self._untransformed_equal(plain, model, X, normalize, standardize)

    def test_model_list_stacks_the_outputs(self) -> None:
        model, X = self.build(num_outputs=self.outputs[0]), self.inputs(3, 4)
        if not isinstance(model, GPyTorchModel):
            self.skipTest("ModelListGP holds GPyTorchModels")
        m = model.num_outputs
        posterior = ModelListGP(model, copy.deepcopy(model)).posterior(X)
        self._close(posterior.mean, model.posterior(X).mean.repeat(1, 1, 2))
        self.assertEqual(posterior.variance.shape, torch.Size([3, 4, 2 * m]))

    # Conditioning and fantasies

    def test_conditioning_equals_refit(self) -> None:
        self._need_conditioning()
        if not self.conditioning_equals_refit:
            self.skipTest("conditioning is declared to differ from a refit")
        for m in self.outputs:
            with self.subTest(m=m):
                model, X = self._ready(m), self.inputs(3, 4)
                new, Y = self._new_data(m)
                conditioned = model.condition_on_observations(new, Y)
                self._same_posterior(conditioned, self.refit(model, new, Y), X)

    def test_conditioning_twice_equals_conditioning_once(self) -> None:
        self._need_conditioning()
        for m in self.outputs:
            with self.subTest(m=m):
                model, X = self._ready(m), self.inputs(4)
                new, Y = self._new_data(m)
                once = model.condition_on_observations(new, Y)
                first = model.condition_on_observations(new[:1], Y[:1])
                first.posterior(X)
                twice = first.condition_on_observations(new[1:], Y[1:])
                self._same_posterior(twice, once, X)

    def test_conditioning_does_not_change_the_model_or_its_arguments(self) -> None:
        self._need_conditioning()
        for m in self.outputs:
            with self.subTest(m=m):
                model, X = self._ready(m), self.inputs(4)
                before = self._moments(model, X)
                state = copy.deepcopy(model.state_dict())
                new, Y = self._new_data(m)
                kept = new.clone(), Y.clone()
                conditioned = model.condition_on_observations(new, Y)
                self.assertIsNot(conditioned, model)
                changed = (self._moments(conditioned, X) - before).abs().max()
                self.assertGreater(changed.item(), 1e-6)
                self._close(self._moments(model, X), before)
                self.assertEqual(set(state), set(model.state_dict()))
                for name, value in model.state_dict().items():
                    self.assertTrue(_identical(value, state[name]), name)
                self.assertTrue(torch.equal(new, kept[0]) and torch.equal(Y, kept[1]))

    def test_conditioning_on_a_batch_equals_a_loop(self) -> None:
        self._need_conditioning()
        self._need_regression()
        for m in self.outputs:
            with self.subTest(m=m):
                model, X = self._ready(m), self.inputs(4)
                new = self.inputs(3, 2, seed=3)
                Y = self._targets(new, m, torch.float64)
                batched = model.condition_on_observations(new, Y)
                moments = self._moments(batched, X)  # 2 x 3 x 4 x m
                for i in range(3):
                    one = model.condition_on_observations(new[i], Y[i])
                    self._close(moments[:, i], self._moments(one, X))

    def test_fantasies_broadcast_over_test_batches(self) -> None:
        self._need_fantasies()
        for m in self.outputs:
            with self.subTest(m=m):
                model = self._ready(m)
                before = self._moments(model, self.inputs(4))
                sampler = SobolQMCNormalSampler(torch.Size([5]), seed=0)
                plain = model.fantasize(self.inputs(2, seed=3), sampler)
                X = self.inputs(4)
                self.assertEqual(plain.posterior(X).mean.shape, torch.Size([5, 4, m]))
                batched = model.fantasize(self.inputs(3, 2, seed=3), sampler)
                X = self.inputs(3, 4)
                without = batched.posterior(X)
                self.assertEqual(without.mean.shape, torch.Size([5, 3, 4, m]))
                self.assertEqual(without.variance.shape, torch.Size([5, 3, 4, m]))
                for shape in ((1, 3), (5, 3)):
                    given = batched.posterior(X.expand(*shape, *X.shape[-2:]))
                    self._close(given.mean, without.mean)
                    self._close(given.variance, without.variance)
                self._close(self._moments(model, self.inputs(4)), before)

    def test_fantasies_are_conditioned_models(self) -> None:
        self._need_fantasies()
        self._need_conditioning()
        for m in self.outputs:
            with self.subTest(m=m):
                model, X = self._ready(m), self.inputs(4)
                new = self.inputs(2, seed=3)
                sampler = SobolQMCNormalSampler(torch.Size([3]), seed=0)
                fantasies = sampler(model.posterior(new, observation_noise=True))
                moments = self._moments(model.fantasize(new, sampler), X)
                for i, Y in enumerate(fantasies.detach()):
                    one = model.condition_on_observations(new, Y)
                    self._close(moments[:, i], self._moments(one, X))

    def test_subset_output_selects_columns(self) -> None:
        if not self.supports_subset_output:
            self.skipTest("subset_output is declared unsupported")
        for m in self.outputs:
            model, X = self.build(num_outputs=m), self.inputs(3, 4)
            before = self._moments(model, X)
            for columns in ([m - 1], list(range(m))):
                with self.subTest(m=m, columns=columns):
                    subset = model.subset_output(columns)
                    self.assertEqual(subset.num_outputs, len(columns))
                    self._close(self._moments(subset, X), before[..., columns])
            self._close(self._moments(model, X), before)

    # Acquisition

    def test_acquisition_ignores_position_in_and_size_of_the_batch(self) -> None:
        for name, function in self._acquisitions():
            with self.subTest(acquisition=name):
                X = self.inputs(5, 1 if name == "LogEI" else 2)
                values = function(X)
                self.assertEqual(values.shape, torch.Size([5]))
                self.assertTrue(bool(values.isfinite().all()))
                self._close(function(X.flip(0)).flip(0), values)
                self._close(function(X[3:4]), values[3:4])
                self._close(function(X.unflatten(0, (5, 1))), values[:, None])

    def test_acquisition_gradients_match_finite_differences(self) -> None:
        for name, function in self._acquisitions():
            with self.subTest(acquisition=name):
                X = self.inputs(1, 1 if name == "LogEI" else 2)
                assert_gradients_match_finite_differences(function, X, rtol=1e-4)

    def test_optimize_acqf_returns_candidates_inside_the_bounds(self) -> None:
        self._need_regression()
        m = self.outputs[0]
        model, transform = self._scalar(m)
        before = self._moments(model, self.inputs(4))
        best = self.train_data(torch.float64, m)[1].sum(-1).max()
        sampler = SobolQMCNormalSampler(torch.Size([16]), seed=0)
        function = qLogExpectedImprovement(
            model, best, sampler=sampler, posterior_transform=transform
        )
        self._optimize(function, q=2)
        self._close(self._moments(model, self.inputs(4)), before)

    def test_knowledge_gradient_optimises_end_to_end(self) -> None:
        self._need_fantasies()
        model, transform = self._scalar(self.outputs[0])
        sampler = SobolQMCNormalSampler(torch.Size([2]), seed=0)
        function = qKnowledgeGradient(
            model, num_fantasies=2, sampler=sampler, posterior_transform=transform
        )
        X = self.inputs(3, 1 + 2)
        values = function(X)
        self.assertEqual(values.shape, torch.Size([3]))
        self._close(function(X[1:2]), values[1:2])
        self._optimize(function, q=1)

    # Pathwise

    def test_pathwise_draws_are_functions_with_the_posterior_moments(self) -> None:
        self._need_regression()
        if not self.supports_pathwise:
            self.skipTest("pathwise sampling is declared unsupported")
        model, X = self.build(num_outputs=self.outputs[0]), self.inputs(4)
        paths = get_matheron_path_model(model, sample_shape=torch.Size([1024]))
        with torch.no_grad():
            values = paths.posterior(X.expand(1024, -1, -1)).mean  # 1024 x 4 x m
            again = paths.posterior(X.expand(1024, -1, -1)).mean
            posterior = model.posterior(X)
        self.assertTrue(torch.equal(values, again))
        error = (values.mean(0) - posterior.mean).abs() / posterior.variance.sqrt()
        self.assertLess(error.max().item(), 5 / 32)
        # Random Fourier features of stock kernels only approximate the variance.
        ratio = values.var(0) / posterior.variance
        self.assertLess(ratio.log().abs().max().item(), 0.5)

    # Helpers

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

    def _transformed(self, m: int) -> tuple[Model, Model, Normalize, Standardize]:
        """The model on data transformed by hand, and with the transforms inside."""
        X, Y = self.train_data(torch.float64, m)
        bounds = torch.stack([-torch.ones_like(X[0]), 2 * torch.ones_like(X[0])])
        normalize = Normalize(self.num_inputs, bounds=bounds)
        standardize = Standardize(m)
        train_Y, _ = standardize(Y)
        standardize.eval()
        plain = self.build(num_outputs=m, train_X=normalize(X), train_Y=train_Y)
        model = self.build(
            num_outputs=m,
            input_transform=Normalize(self.num_inputs, bounds=bounds),
            outcome_transform=Standardize(m),
        )
        return plain, model, normalize, standardize

    def _untransformed_equal(
        self,
        plain: Model,
        model: Model,
        X: Tensor,
        normalize: Normalize,
        standardize: Standardize,
    ) -> None:
        with torch.no_grad():
            got, posterior = model.posterior(X), plain.posterior(normalize(X))
            mean, _ = standardize.untransform(posterior.mean)
        self._close(got.mean, mean)
        self._close(got.variance, posterior.variance * standardize.stdvs.square())

    def _scalar(self, m: int) -> tuple[Model, ScalarizedPosteriorTransform | None]:
        transform = None
        if m > 1:
            transform = ScalarizedPosteriorTransform(torch.ones(m, dtype=torch.float64))
        return self.build(num_outputs=m), transform

    def _acquisitions(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        self._need_regression()
        for m in self.outputs:
            model, transform = self._scalar(m)
            X, Y = self.train_data(torch.float64, m)
            best = Y.sum(-1).max()
            sampler = SobolQMCNormalSampler(torch.Size([16]), seed=0)
            shared = {"sampler": sampler, "posterior_transform": transform}
            yield (
                "LogEI",
                LogExpectedImprovement(model, best, posterior_transform=transform),
            )
            yield "qLogEI", qLogExpectedImprovement(model, best, **shared)
            yield "qLogNEI", qLogNoisyExpectedImprovement(model, X, **shared)

    def _optimize(self, function: Callable[[Tensor], Tensor], q: int) -> None:
        bounds = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        candidates, value = optimize_acqf(
            function,
            bounds.expand(2, self.num_inputs),
            q=q,
            num_restarts=2,
            raw_samples=4,
            options={"maxiter": 5},
        )
        self.assertEqual(candidates.shape, torch.Size([q, self.num_inputs]))
        self.assertTrue(bool(((candidates >= 0) & (candidates <= 1)).all()))
        self.assertTrue(bool(value.isfinite().all()))

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


def _perturb(model: nn.Module) -> None:
    """Move every hyperparameter a little, so that a stale one shows."""
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1)


def _snapshot(module: nn.Module) -> dict[str, object]:
    """Everything about a module that a user could notice, by readable names."""
    found: dict[str, object] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        place = path or "the module"
        found[f"type of {place}"] = type(part)
        found[f"training mode of {place}"] = part.training
        found[f"attributes of {place}"] = sorted(vars(part))
        for name, value in vars(part).items():
            if "hook" in name and isinstance(value, dict):
                found[f"{name} of {place}"] = list(value.items())
    for kind, tensors in (
        ("parameter", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
    ):
        for name, value in tensors:
            found[f"identity of {kind} {name}"] = id(value)
            found[f"{kind} {name}"] = value.detach().clone()
            found[f"requires_grad of {kind} {name}"] = value.requires_grad
            grad = value.grad if value.is_leaf else None
            found[f"gradient of {kind} {name}"] = None if grad is None else grad.clone()
    return found


def _check_unchanged(before: dict[str, object], after: dict[str, object]) -> None:
    different = [
        name
        for name in {**before, **after}
        if not (name in before and name in after)
        or not _identical(before[name], after[name])
    ]
    if different:
        shown = ", ".join(different[:6])
        raise AssertionError(
            f"The user's module was changed in {len(different)} places: {shown}. Work "
            "on a copy of it."
        )


def _identical(value: object, other: object) -> bool:
    if not (isinstance(value, Tensor) and isinstance(other, Tensor)):
        return not isinstance(value, Tensor) and value == other
    if (value.shape, value.dtype, value.device) != (
        other.shape,
        other.dtype,
        other.device,
    ):
        return False
    # As bytes: NaN equals itself, and -0.0 does not equal 0.0.
    bits = (tensor.reshape(-1).view(torch.uint8) for tensor in (value, other))
    return torch.equal(*bits)
