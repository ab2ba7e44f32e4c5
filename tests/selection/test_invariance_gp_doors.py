"""What learning the law of a GP refuses: models, options, data."""

import math

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from botorch.models import SingleTaskGP
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood, VariationalELBO
from gpytorch.models import ApproximateGP

from gpbridge.augmentation import FiniteOrbit, PatchAugmentation
from gpbridge.checks import ShapeError
from gpbridge.selection import invariance_gp, learn_kernel_invariance
from tests.selection.invariant_gp_problems import (
    DOUBLE,
    QUIET,
    exact,
    points,
    radial,
    sparse,
)

# The plane is no unit cube, and float32 is what one test is about.
pytestmark = pytest.mark.filterwarnings(
    "ignore::botorch.exceptions.warnings.InputDataWarning",
    "ignore::gpytorch.utils.warnings.GPInputWarning",
)


def no_law(X, Y):
    return SingleTaskGP(X, Y, outcome_transform=None)


def finite(X, Y):
    return exact(X, Y, FiniteOrbit([lambda x: x, lambda x: -x]))


def held(X, Y):
    model = exact(X, Y)
    model.covar_module.base_kernel.augmentation.requires_grad_(False)
    return model


def stranger(X, Y):
    return torch.nn.Linear(2, 1)


def with_objective(X, Y):
    model = exact(X, Y)
    return ExactMarginalLogLikelihood(model.likelihood, model)


def sparse_model(X, Y):
    return sparse(X)


@pytest.mark.parametrize(
    "build, options, error, message",
    [
        (no_law, {}, ValueError, "averages over no orbits"),
        (finite, {}, ValueError, "nothing to learn"),
        (held, {}, ValueError, "nothing to learn"),
        (stranger, {}, TypeError, "model must be an exact GP"),
        (with_objective, {}, TypeError, "Pass the SingleTaskGP itself"),
        (exact, {"data": (1, 2)}, TypeError, "data are for a sparse GP"),
        (exact, {"epochs": 3}, TypeError, "epochs: options of a sparse GP"),
        (exact, {"starts": []}, ValueError, "at least one value"),
        (exact, {"starts": 0.5}, TypeError, r"starts must be a seq.*=\[0.5\]"),
        (exact, {"starts": [0.5, 4.0]}, ValueError, "Start 1 cannot be"),
        (exact, {"starts": [0.0]}, ValueError, "bound must lie above zero"),
        (exact, {"starts": [math.nan]}, ValueError, "bound must lie above zero"),
        (exact, {"starts": [{"width": 1.0}]}, ValueError, "names 'width'"),
        (exact, {"num_points": 0}, ValueError, "num_points must be a whole number"),
        (exact, {"polish": -1}, ValueError, "polish must be a whole number"),
        (sparse_model, {}, TypeError, r"pass data=\(X, Y\)"),
        (
            sparse_model,
            {"data": (points(4), torch.zeros(3))},
            ShapeError,
            "Y has 3",
        ),
        (
            sparse_model,
            {"data": (points(4), torch.zeros(4)), "resume": {}},
            TypeError,
            "of one fit",
        ),
    ],
)
def test_bad_input_is_refused(build, options, error, message):
    X = points(6)
    with pytest.raises(error, match=message):
        learn_kernel_invariance(build(X, radial(X)), **options)


def test_a_law_without_one_number_must_be_started_by_name():
    X = torch.rand(6, 9, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    law = PatchAugmentation((3, 3), (2, 2), weights=True)
    model = exact(X, X.sum(-1, keepdim=True), law)
    with pytest.raises(ValueError, match="has no half-width"):
        learn_kernel_invariance(model)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"Y": torch.zeros(6, 2)}, ShapeError, r"train_Y must be ``6``.*\(6, 2\)"),
        ({"Y": torch.full((6,), math.nan)}, InputDataError, "train_Y contains NaN"),
        ({"num_data": 5}, ValueError, "num_data=5, but there are 6 rows"),
        ({"epochs": 0}, ValueError, "epochs must be a whole number"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be positive"),
    ],
)
def test_data_that_no_start_can_take_are_refused_before_the_first(
    change, error, message, monkeypatch
):
    X, options = points(6), dict(change)
    model, Y = sparse(X), options.pop("Y", radial(X)[:, 0]).to(X)
    elbo = VariationalELBO(model.likelihood, model, options.pop("num_data", 6))
    monkeypatch.setattr(invariance_gp, "multi_start", None)  # no start is taken
    with pytest.raises(error, match=message):
        learn_kernel_invariance(elbo, (X, Y), starts=[1.0], **options, **QUIET)


def test_a_column_of_targets_is_the_vector():
    X = points(12)
    Y = radial(X)
    options = {"starts": [1.0], "epochs": 1} | QUIET
    fits = [learn_kernel_invariance(sparse(X), (X, y), **options) for y in (Y, Y[:, 0])]
    assert fits[0].evidence == fits[1].evidence


class Bare(ApproximateGP):
    """A sparse GP of gpytorch's, without its likelihood."""

    def __init__(self, inner):
        super().__init__(inner.variational_strategy)
        self.covar_module = inner.covar_module
        self.forward = inner.forward


def test_a_likelihood_outside_of_the_model_is_refused():
    X = points(10)
    model = Bare(sparse(X))
    elbo = VariationalELBO(GaussianLikelihood().double(), model, num_data=10)
    with pytest.raises(ValueError, match="must be a part of the model"):
        learn_kernel_invariance(elbo, (X, radial(X)[:, 0]), starts=[1.0])
