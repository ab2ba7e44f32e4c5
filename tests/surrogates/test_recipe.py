"""Every recipe: a BoTorch model in the units of the data, and its updates."""

import copy
import pickle
import unittest
import warnings
from dataclasses import fields, replace

import pytest
import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.models.model import Model
from botorch.optim import optimize_acqf
from torch import nn

import gpbridge.surrogates as surrogates
from gpbridge.checks import ReliabilityWarning, ShapeError
from gpbridge.dnn import DivergedError
from gpbridge.surrogates import (
    DeepKernelSurrogate,
    DropoutSurrogate,
    EnsembleSurrogate,
    InfiniteWidthSurrogate,
    LastLayerSurrogate,
    LinearizedSurrogate,
    MaternTangentSurrogate,
    Recipe,
    SGHMCSurrogate,
    SubspaceSurrogate,
    SWAGSurrogate,
    TangentSurrogate,
)
from gpbridge.testing import ModelContractTestCase

BOUNDS = torch.tensor([[-3.0, 10.0], [5.0, 30.0]], dtype=torch.float64)


def small(d, m):
    """A network that trains in no time."""
    return nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, m))


def relu(d, m):
    return nn.Sequential(nn.Linear(d, 8), nn.ReLU(), nn.Linear(8, m))


COMMON = {"network": small, "bounds": BOUNDS, "epochs": 20, "update_epochs": 5}
RECIPES = [
    LinearizedSurrogate(**COMMON),
    LastLayerSurrogate(**COMMON),
    MaternTangentSurrogate(**COMMON),
    TangentSurrogate(**COMMON),
    InfiniteWidthSurrogate(**COMMON | {"network": relu}),
    DeepKernelSurrogate(**COMMON),
    EnsembleSurrogate(num_members=3, **COMMON),
    DropoutSurrogate(num_samples=8, **COMMON),
    SWAGSurrogate(num_samples=8, **COMMON),
    SubspaceSurrogate(num_samples=8, dim=2, **COMMON),
    SGHMCSurrogate(
        num_chains=2, num_cycles=1, steps_per_cycle=20, samples_per_cycle=4, **COMMON
    ),
]
EACH = pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: type(r).__name__)


def data(n=24, m=1, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    Z = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    X = BOUNDS[0] + (BOUNDS[1] - BOUNDS[0]) * Z
    Y = torch.stack([torch.sin(3 * Z[:, 0] + j) + Z[:, 1] for j in range(m)], -1)
    return X.to(dtype), (100 + 20 * Y).to(dtype)


def quiet(call, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args)


def moments(model, X):
    with torch.no_grad():
        posterior = model.posterior(X)
        return torch.stack([posterior.mean, posterior.variance])


def test_the_list_has_every_recipe_that_there_is():
    public = {name for name in surrogates.__all__ if name.endswith("Surrogate")}
    assert {type(recipe).__name__ for recipe in RECIPES} == public


@EACH
@pytest.mark.parametrize("m", [1, 2])
def test_fit_and_update_give_models_in_the_units_of_the_data(recipe, m):
    X, Y = data(m=m)
    state = torch.get_rng_state()
    model = quiet(recipe.fit, X[:20], Y[:20])
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(model, Model) and model.num_outputs == m and not model.training
    before = moments(model, X)
    nextone = quiet(recipe.update, model, X, Y)
    after = moments(nextone, X)
    assert after.shape == (2, 24, m) and after.isfinite().all()
    assert (after[1] > -1e-9).all() and 60 < float(after[0].mean()) < 160
    assert (after - before).abs().max() > 1e-6
    torch.testing.assert_close(moments(model, X), before)  # it was not changed


@EACH
def test_the_same_seed_gives_the_same_model_and_another_another(recipe):
    X, Y = data()
    models = [quiet(recipe.with_seed(s).fit, X, Y) for s in (0, 0, 1)]
    first, again, other = (moments(model, X + 0.1) for model in models)
    assert torch.equal(first, again)
    if not isinstance(recipe, InfiniteWidthSurrogate):  # of no random weights
        assert not torch.equal(first, other)


@EACH
def test_copies_and_pickles_are_updated_alike(recipe):
    X, Y = data()
    model = quiet(recipe.fit, X[:20], Y[:20])
    twins = model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    found = [moments(quiet(recipe.update, twin, X, Y), X) for twin in twins]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@EACH
def test_acquisition_values_do_not_depend_on_the_batch(recipe):
    X, Y = data()
    model = quiet(recipe.fit, X, Y)
    acquisition = qLogExpectedImprovement(model, best_f=Y.max() - 5)
    candidates = data(5, seed=1)[0].unsqueeze(-2)
    together = acquisition(candidates)
    apart = torch.cat([acquisition(x[None]) for x in candidates])
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)
    turned = acquisition(candidates.flip(0)).flip(0)
    torch.testing.assert_close(together, turned, rtol=1e-6, atol=1e-6)


@EACH
def test_candidates_are_optimised_within_the_bounds(recipe):
    X, Y = data()
    model = quiet(recipe.fit, X, Y)
    acquisition = qLogExpectedImprovement(model, best_f=Y.max())
    options = {"maxiter": 3}
    candidates, value = quiet(
        lambda: optimize_acqf(acquisition, BOUNDS, 2, 1, 4, options=options)
    )
    assert candidates.shape == (2, 2) and value.isfinite()
    assert (candidates >= BOUNDS[0]).all() and (candidates <= BOUNDS[1]).all()


@EACH
def test_single_precision_stays(recipe):
    X, Y = data(dtype=torch.float32)
    recipe = replace(recipe, bounds=BOUNDS.float())
    model = quiet(recipe.fit, X, Y)
    assert quiet(model.posterior, X).mean.dtype == torch.float32


@EACH
def test_an_update_starts_where_the_last_fit_ended(recipe):
    X, Y = data()
    model = quiet(recipe.fit, X, Y)
    weights = model.surrogate_fit.weights
    if isinstance(recipe, (MaternTangentSurrogate, TangentSurrogate)) or not weights:
        assert weights == []
        return
    # Without further training it is the same network.
    frozen = replace(recipe, update_epochs=2, learning_rate=1e-12)
    again = quiet(frozen.update, model, X, Y).surrogate_fit.weights
    for old, new in zip(weights, again, strict=True):
        for name, value in old.items():
            torch.testing.assert_close(new[name], value, rtol=1e-6, atol=1e-6)


def test_a_recipe_says_what_it_was():
    X, Y = data()
    model = quiet(RECIPES[0].fit, X, Y)
    assert model.surrogate_fit.recipe is RECIPES[0]
    with pytest.raises(TypeError, match="what EnsembleSurrogate.fit or .update retu"):
        RECIPES[6].update(model, X, Y)


def diverging(d, m):
    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(d, m)

        def forward(self, x):
            return self.layer(x) if len(x) < 23 else self.layer(x) * torch.inf

    return Exploding()


@pytest.mark.parametrize("index", [0, 6])
def test_a_network_that_diverges_keeps_the_previous_surrogate_and_says_so(index):
    X, Y = data()
    recipe = replace(RECIPES[index], network=small)
    model = quiet(recipe.fit, X[:20], Y[:20])
    hot = replace(recipe, learning_rate=1e200, update_epochs=30)
    with pytest.warns(ReliabilityWarning, match="could not be fitted to 24 rows.*kept"):
        assert hot.update(model, X, Y) is model
    with pytest.raises(DivergedError):
        quiet(hot.fit, X, Y)


def test_constant_outcomes_are_said():
    X, Y = data()
    for recipe in RECIPES[:1] + RECIPES[2:4] + RECIPES[6:7]:
        with pytest.warns(ReliabilityWarning, match="All 24 values of outcome 0 are 7"):
            model = recipe.fit(X, torch.full_like(Y, 7.0))
        found = moments(model, X)
        assert found.isfinite().all()
        assert (found[0] - 7).abs().max() < 1


def test_duplicated_points_are_fine():
    X, Y = data(10)
    X, Y = torch.cat([X, X, X[:1]]), torch.cat([Y, Y, Y[:1] + 1])
    for recipe in RECIPES:
        assert moments(quiet(recipe.fit, X, Y), X).isfinite().all()


def test_bad_data_are_refused():
    X, Y = data()
    recipe = RECIPES[0]
    with pytest.raises(ValueError, match="at least 2 observations, but there are 1"):
        recipe.fit(X[:1], Y[:1])
    with pytest.raises(ShapeError, match="train_Y ``n x m``, but they have shapes"):
        recipe.fit(X[None], Y[None])
    with pytest.raises(ShapeError):
        recipe.fit(X, Y[:-1])
    with pytest.raises(ValueError, match="column 0 goes from 5 to -3.* wrong order"):
        replace(recipe, bounds=BOUNDS.flip(0)).fit(X, Y)
    with pytest.raises(ShapeError, match="bounds are of 2 columns, but train_X has 3"):
        recipe.fit(torch.cat([X, X[:, :1]], -1), Y)


def test_every_option_is_documented():
    for recipe in RECIPES:
        text = "".join(cls.__doc__ or "" for cls in type(recipe).__mro__)
        for field in fields(recipe):
            assert f"{field.name}:" in text, (type(recipe).__name__, field.name)


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
    recipe = RECIPES[0]


@pytest.mark.slow
class TestLastLayerContract(RecipeContract, unittest.TestCase):
    recipe = RECIPES[1]


class KernelContract(RecipeContract):
    outputs = (1,)  # upstream's lists of models cannot be conditioned
    supports_subset_output = False  # upstream's, for kernels of one's own


@pytest.mark.slow
class TestMaternTangentContract(KernelContract, unittest.TestCase):
    recipe = RECIPES[2]


@pytest.mark.slow
class TestTangentContract(KernelContract, unittest.TestCase):
    recipe = RECIPES[3]


@pytest.mark.slow
class TestInfiniteWidthContract(KernelContract, unittest.TestCase):
    recipe = RECIPES[4]


@pytest.mark.slow
class TestDeepKernelContract(KernelContract, unittest.TestCase):
    recipe = RECIPES[5]
