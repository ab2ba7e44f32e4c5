"""What is expected of a posterior: shapes, batches, moments, noise, gradients.

In: a :class:`~gpbridge.testing.case.ModelCase`. Out: tests.
Next: ``model`` joins them with the others.
"""

# ruff: noqa: D102 -- the tests are named by the sentences that they prove

from __future__ import annotations

import torch
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.models.model import Model
from torch import Tensor

from gpbridge.testing.case import ModelCase
from gpbridge.testing.gradients import assert_gradients_match_finite_differences

_BATCH_SHAPES = ((), (3,), (2, 3))


class PosteriorContract(ModelCase):
    """Tests of ``model.posterior``."""

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
                assert_gradients_match_finite_differences(
                    moments, self.inputs(2, 2), rtol=self.gradient_rtol
                )
