"""What is expected of conditioning: new data, fantasies, some of the outputs.

In: a :class:`~gpbridge.testing.case.ModelCase`. Out: tests.
Next: ``model`` joins them with the others.
"""

# ruff: noqa: D102 -- the tests are named by the sentences that they prove

from __future__ import annotations

import copy

import torch
from botorch.sampling.normal import SobolQMCNormalSampler

from gpbridge.testing.case import ModelCase
from gpbridge.testing.modules import identical


class ConditioningContract(ModelCase):
    """Tests of models that are made of other models."""

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
                    self.assertTrue(identical(value, state[name]), name)
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
