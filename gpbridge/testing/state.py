"""What is expected of a model's state: files, copies, modes, transforms, lists.

In: a :class:`~gpbridge.testing.case.ModelCase`. Out: tests.
Next: ``model`` joins them with the others.
"""

# ruff: noqa: D102 -- the tests are named by the sentences that they prove

from __future__ import annotations

import copy
import pickle

import torch
from botorch.models import ModelListGP
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import Model
from botorch.models.transforms import Normalize, Standardize
from botorch.utils.datasets import SupervisedDataset
from torch import Tensor, nn

from gpbridge.testing.case import ModelCase


class StateContract(ModelCase):
    """Tests of what a model carries with it."""

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
        alone = model.posterior(X)
        posterior = ModelListGP(model, copy.deepcopy(model)).posterior(X)
        self._close(posterior.mean, alone.mean.repeat(1, 1, 2))
        self._close(posterior.variance, alone.variance.repeat(1, 1, 2))

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


def _perturb(model: nn.Module) -> None:
    """Move every hyperparameter a little, so that a stale one shows."""
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1)
