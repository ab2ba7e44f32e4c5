"""Bad experiments, bad declarations and infeasible candidates are named."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.exceptions.errors import InputDataError
from botorch.optim import optimize_acqf_mixed

from gpbridge.checks import ReliabilityWarning, ShapeError
from gpbridge.surrogates import (
    DeepKernelSurrogate,
    InfiniteWidthSurrogate,
    LastLayerSurrogate,
    SGHMCSurrogate,
    SubspaceSurrogate,
    TangentSurrogate,
)
from gpbridge.surrogates.encoding import input_encoding
from tests.surrogates.recipes import (
    BOUNDS,
    ENSEMBLE,
    KERNELS,
    LINEARIZED,
    OF,
    data,
    each,
    fitted,
    moments,
    quiet,
)

LONG = (*KERNELS, LastLayerSurrogate, SubspaceSurrogate, SGHMCSurrogate)


def mixed_data(n=30):
    """Two numbers and a column of three categories, of which 1 is the best."""
    X, _ = data(n)
    kind = torch.arange(n) % 3
    Y = X[:, :1] + 10.0 * (kind == 1)[:, None] - 10.0 * (kind == 2)[:, None]
    return torch.cat([X, kind[:, None].to(X)], -1), Y


MIXED_BOUNDS = torch.cat([BOUNDS, torch.tensor([[0.0], [2.0]]).double()], -1)
MIXED = {"bounds": MIXED_BOUNDS, "categories": {2: 3}}


# -- experiments -------------------------------------------------------------------


@each(slow=LONG)
def test_constant_outcomes_are_said_and_predicted(recipe):
    X, Y = data()
    with warnings.catch_warnings(record=True) as caught:  # of the network, too
        warnings.simplefilter("always")
        model = recipe.fit(X, torch.full_like(Y, 7.0))
    said = [str(w.message) for w in caught if w.category is ReliabilityWarning]
    assert "All 24 values of outcome 0 are 7" in said[0]
    found = moments(model, X)
    assert found.isfinite().all()
    assert (found[0] - 7).abs().max() < 3


def test_outcomes_too_small_to_be_standardised_are_refused():
    X, Y = data()
    with pytest.raises(ValueError, match="Outcome 0 has standard.*smaller units"):
        LINEARIZED.fit(X, Y * 1e-10)


@each(slow=LONG)
def test_duplicated_points_are_fine(recipe):
    X, Y = data(10)
    X, Y = torch.cat([X, X, X[:1]]), torch.cat([Y, Y, Y[:1] + 1])
    assert moments(quiet(recipe.fit, X, Y), X).isfinite().all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda X, Y: (X[:1], Y[:1]), ValueError, "at least 2 observations.* are 1"),
        (lambda X, Y: (X[None], Y[None]), ShapeError, "they have shapes"),
        (lambda X, Y: (X, Y[:-1]), ShapeError, "24.*23"),
        (
            lambda X, Y: (X, Y[:, 0]),
            ShapeError,
            r"train_Y must be ``n x m``.*outcome try train_Y\[:, None\]",
        ),
        (lambda X, Y: (X, Y * torch.nan), InputDataError, "train_Y contains NaN"),
        (lambda X, Y: (X / 0, Y), InputDataError, "train_X contains NaN or Inf"),
        (lambda X, Y: (X, Y.long()), TypeError, r"train_Y must be float32.*double\(\)"),
        (lambda X, Y: (X > 0, Y), TypeError, "train_X must be float32.*torch.bool"),
        (lambda X, Y: (X.numpy(), Y), TypeError, "train_X must be a torch.Tensor"),
        (lambda X, Y: (X[:, :1], Y), ShapeError, "bounds are of 2 columns.* has 1"),
    ],
)
def test_bad_experiments_are_refused(change, error, message):
    last, (X, Y) = fitted(type(LINEARIZED)), data()
    for call in (LINEARIZED.fit, partial(LINEARIZED.update, last)):
        with pytest.raises(error, match=message):
            call(*change(X, Y))


@pytest.mark.parametrize(
    "bounds, error, message",
    [
        (BOUNDS.flip(0), ValueError, "column 0 goes from 5 to -3.* wrong order"),
        (BOUNDS.mT[:1], ShapeError, "the lower bounds and then the upper ones"),
        (BOUNDS * torch.inf, InputDataError, "bounds contains NaN or Inf"),
        ([(-3, 5), (10, 30)], TypeError, "bounds must be a torch.Tensor"),
    ],
)
def test_bad_bounds_are_refused(bounds, error, message):
    with pytest.raises(error, match=message):
        replace(LINEARIZED, bounds=bounds).fit(*data())


@pytest.mark.parametrize(
    "categories, error, message",
    [
        ({2: 2}, ValueError, "column 2 is declared.* 0 to 1, but holds 2"),
        ({0: 3}, ValueError, "Column 0 is declared.*Number the categories from zero"),
        ({5: 3}, ValueError, "names column 5, but the inputs have columns 0 to 2"),
        ({2: 1}, ValueError, "at least 2, but says 1"),
        ({2: True}, TypeError, "True for a number of categories.*False has 2"),
        ({2: 3.0}, TypeError, "has 3.0 for a number of categories"),
        ({"c": 3}, TypeError, "has 'c' for a column"),
        ([2], TypeError, r"as \{0: 3\}, but is a list"),
    ],
)
def test_bad_categories_are_refused(categories, error, message):
    recipe = replace(LINEARIZED, bounds=MIXED_BOUNDS, categories=categories)
    with pytest.raises(error, match=f"(?i){message}"):
        recipe.fit(*mixed_data())


# -- candidates --------------------------------------------------------------------


@each()
def test_infeasible_pending_points_are_named(recipe):
    model = fitted(type(recipe))
    acquisition = qLogExpectedImprovement(model, best_f=100.0)
    candidate = data(1, seed=1)[0]
    acquisition.set_X_pending(candidate * torch.nan)
    with pytest.raises(InputDataError, match="X .*contains NaN or Inf"):
        acquisition(candidate[None])
    acquisition.set_X_pending(candidate + 100.0)
    with pytest.warns(ReliabilityWarning, match=r"X_pending\) leaves the bounds"):
        assert acquisition(candidate[None]).isfinite().all()
    with pytest.raises(ShapeError, match="X .*must have 2 columns"):
        model.posterior(candidate[:, :1])


def test_categories_that_do_not_exist_are_named_and_fractions_are_rounded():
    X, Y = mixed_data()
    model = quiet(replace(ENSEMBLE, **MIXED).fit, X, Y)
    for wrong in (3.0, -1.0):
        Z = X.clone()
        Z[4, 2] = wrong
        with pytest.raises(ValueError, match=f"in column 2, but holds {wrong:g}"):
            model.posterior(Z)
    nearly = X.clone()
    nearly[:, 2] += 0.3
    assert torch.equal(moments(model, nearly), moments(model, X))


def test_candidates_at_the_bounds_are_feasible():
    model = fitted(type(ENSEMBLE))
    assert moments(model, BOUNDS + 1e-9).isfinite().all()  # warnings are errors here


def test_numbers_are_scaled_by_the_bounds_and_categories_are_indicators():
    X, _ = mixed_data(3000)
    encode = input_encoding(X, MIXED_BOUNDS, {2: 3})
    Z = encode(X)
    assert Z.shape == (3000, 5)
    torch.testing.assert_close(
        Z[:, :2].mean(0), torch.zeros(2).double(), atol=0.1, rtol=0
    )
    torch.testing.assert_close(
        Z[:, :2].var(0), torch.ones(2).double(), atol=0.1, rtol=0
    )
    assert torch.equal(Z[:, 2:], torch.eye(3).double()[X[:, 2].long()])


@pytest.mark.slow
def test_how_categories_are_numbered_does_not_matter():
    X, Y = mixed_data()
    renamed = X.clone()
    renamed[:, 2] = (X[:, 2] + 1) % 3
    recipe = replace(OF[InfiniteWidthSurrogate], **MIXED)
    first, second = (moments(quiet(recipe.fit, Z, Y), Z) for Z in (X, renamed))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@each()
def test_mixed_problems_are_optimised_end_to_end(recipe):
    X, Y = mixed_data()
    rows = X[:, 2] != 1  # the best category was seen in the worst half only
    rows |= X[:, 0] < 1
    options = MIXED | {"epochs": 300}
    if isinstance(recipe, DeepKernelSurrogate | TangentSurrogate):
        options["network"] = type(recipe)().network
    model = quiet(replace(recipe, **options).fit, X[rows], Y[rows])
    candidate, value = quiet(
        optimize_acqf_mixed,
        qLogExpectedImprovement(model, best_f=Y[rows].max()),
        MIXED_BOUNDS,
        q=1,
        num_restarts=2,
        raw_samples=16,
        fixed_features_list=[{2: float(k)} for k in range(3)],
        options={"maxiter": 20},
    )
    assert value.isfinite()
    assert candidate[0, 2] == 1 and candidate[0, 0] > 1
