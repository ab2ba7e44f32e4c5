"""Recipes by the convention of model classes."""

import copy
import pickle

import pytest
import torch
from botorch.acquisition.logei import (
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
)
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.model import ModelList
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.containers import SliceContainer
from botorch.utils.datasets import (
    MultiTaskDataset,
    RankingDataset,
    SupervisedDataset,
)

from gpbridge.surrogates import RecipeModel
from tests.surrogates.recipes import (
    ENSEMBLE,
    LINEARIZED,
    data,
    fitted,
    moments,
    quiet,
    updated,
)

NAMES = {"feature_names": ["a", "b"], "outcome_names": ["y"]}


def dataset(n=20, **options):
    X, Y = data()
    return SupervisedDataset(X[:n], Y[:n], **NAMES, **options)


def build(recipe, n=20, **options):
    inputs = RecipeModel.construct_inputs(dataset(n), recipe, **options)
    return quiet(RecipeModel, **inputs)


@pytest.mark.parametrize("recipe", [LINEARIZED, ENSEMBLE])
def test_the_class_gives_what_the_recipe_gives(recipe):
    X, _ = data()
    model = build(recipe)
    assert torch.equal(moments(model, X), moments(fitted(type(recipe)), X))
    assert model.num_outputs == 1 and model.batch_shape == () and not model.training
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(moments(twin, X), moments(model, X))
    chosen = model.subset_output([0])
    assert torch.equal(moments(chosen, X), moments(model, X))


def test_options_of_a_constructor_are_the_whole_of_it():
    X, Y = data()
    inputs = RecipeModel.construct_inputs(dataset(), recipe=ENSEMBLE)
    assert set(inputs) == {"train_X", "train_Y", "recipe", "previous"}
    assert torch.equal(inputs["train_X"], X[:20])
    assert torch.equal(inputs["train_Y"], Y[:20])


@pytest.mark.parametrize("wrapped", [True, False])
def test_training_goes_on_from_a_previous_model(wrapped):
    X, Y = data()
    previous = build(ENSEMBLE) if wrapped else fitted(type(ENSEMBLE))
    model = build(ENSEMBLE, 24, previous=previous)
    assert torch.equal(moments(model, X), moments(updated(type(ENSEMBLE)), X))
    if wrapped:  # a recipe updates it, too
        again = quiet(ENSEMBLE.update, previous, X, Y)
        assert torch.equal(moments(model, X), moments(again, X))


@pytest.mark.parametrize("recipe", [LINEARIZED, ENSEMBLE])
def test_acquisition_functions_take_it_as_they_take_the_model(recipe):
    X, Y = data()
    model, plain = build(recipe), fitted(type(recipe))
    torch.manual_seed(0)
    values = qLogExpectedImprovement(model, Y.max())(X[:4, None])
    torch.manual_seed(0)
    expected = qLogExpectedImprovement(plain, Y.max())(X[:4, None])
    torch.testing.assert_close(values, expected)
    noisy = quiet(qLogNoisyExpectedImprovement, model, X[:20])
    assert noisy(X[20:, None]).isfinite().all()


def test_it_conditions_and_fantasises_where_its_model_does():
    X, Y = data()
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
    model = build(LINEARIZED)
    assert model.fantasize(X[:1], sampler).posterior(X).mean.shape == (4, 24, 1)
    given = model.condition_on_observations(X[20:], Y[20:])
    assert (moments(given, X[20:])[1] < moments(model, X[20:])[1]).all()
    for method in ("fantasize", "condition_on_observations"):
        with pytest.raises(NotImplementedError, match=f"{method} does not exist"):
            getattr(build(ENSEMBLE), method)(X[:1], Y[:1])


def test_it_stands_in_a_list_of_models():
    X, Y = data()
    both = ModelList(build(LINEARIZED), quiet(SingleTaskGP, X, Y))
    assert not isinstance(both, ModelListGP)
    assert both.posterior(X[:3]).mean.shape == (3, 2)


def test_other_kinds_of_data_are_refused_by_name():
    X, Y = data()
    tasks = MultiTaskDataset([dataset()], "y")
    with pytest.raises(NotImplementedError, match="is a MultiTaskDataset.*MultiTaskGP"):
        RecipeModel.construct_inputs(tasks, ENSEMBLE)
    rows = torch.tensor([[0, 1], [2, 3]])
    pairs = SliceContainer(values=X, indices=rows, event_shape=torch.Size([4]))
    ranks = RankingDataset(X=pairs, Y=torch.tensor([[0, 1], [0, 1]]), **NAMES)
    with pytest.raises(NotImplementedError, match="is a RankingDataset"):
        RecipeModel.construct_inputs(ranks, ENSEMBLE)
    with pytest.raises(TypeError, match="SupervisedDataset"):
        RecipeModel.construct_inputs((X, Y), ENSEMBLE)
    with pytest.raises(TypeError, match="recipe must be a recipe.*is None.*model_opti"):
        RecipeModel.construct_inputs(dataset())
    with pytest.raises(TypeError, match="recipe must be a recipe.*EnsembleSurrogate"):
        RecipeModel(X, Y, type(ENSEMBLE))
    with pytest.raises(TypeError, match="fit or .update returned"):
        RecipeModel(X, Y, LINEARIZED, fitted(type(ENSEMBLE)))


def test_known_noise_is_said_to_be_left_out():
    noisy = dataset(Yvar=torch.ones(20, 1).double())
    with pytest.warns(UserWarning, match="noise variances.*are not used"):
        inputs = RecipeModel.construct_inputs(noisy, ENSEMBLE)
    assert "train_Yvar" not in inputs
