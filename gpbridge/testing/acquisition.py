"""What is expected inside an acquisition function, and of function draws.

In: a :class:`~gpbridge.testing.case.ModelCase`. Out: tests.
Next: ``model`` joins them with the others.
"""

# ruff: noqa: D102 -- the tests are named by the sentences that they prove

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.acquisition.knowledge_gradient import qKnowledgeGradient
from botorch.acquisition.logei import (
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
)
from botorch.optim import optimize_acqf
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.sampling.pathwise import get_matheron_path_model
from torch import Tensor

from gpbridge.testing.case import ModelCase
from gpbridge.testing.gradients import assert_gradients_match_finite_differences


class AcquisitionContract(ModelCase):
    """Tests of acquisition functions and of pathwise draws."""

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
                assert_gradients_match_finite_differences(
                    *(function, X),
                    step=self.gradient_step,
                    rtol=10 * self.gradient_rtol,
                )

    def test_optimize_acqf_returns_candidates_inside_the_bounds(self) -> None:
        self._need_regression()
        m = self.outputs[0]
        model, transform = self._scalar(m)
        before = self._moments(model, self.inputs(4))
        best = self.train_data(torch.float64, m)[1].sum(-1).max()
        sampler = self.sampler(16)
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
        ratio = values.var(0) / posterior.variance
        self.assertLess(ratio.log().abs().max().item(), self.pathwise_tolerance)

    def _acquisitions(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        self._need_regression()
        for m in self.outputs:
            model, transform = self._scalar(m)
            X, Y = self.train_data(torch.float64, m)
            best = Y.sum(-1).max()
            sampler = self.sampler(16)
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
