"""Every recipe: a BoTorch model in the units of the data, and its updates."""

import copy
import pickle
from dataclasses import fields, replace

import pytest
import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.models import ModelListGP
from botorch.models.model import Model
from botorch.optim import optimize_acqf
from botorch.sampling.normal import SobolQMCNormalSampler

import gpbridge.surrogates as surrogates
from gpbridge.checks import ReliabilityWarning
from gpbridge.dnn import DivergedError
from gpbridge.surrogates import (
    DeepKernelSurrogate,
    InfiniteWidthSurrogate,
    LastLayerSurrogate,
    MaternTangentSurrogate,
    SGHMCSurrogate,
    SubspaceSurrogate,
    kernels,
)
from gpbridge.testing import assert_module_unchanged
from tests.surrogates.recipes import (
    BOUNDS,
    ENSEMBLE,
    GAUSSIAN,
    KERNELS,
    LINEARIZED,
    OF,
    RECIPES,
    data,
    each,
    fitted,
    moments,
    quiet,
    small,
    updated,
)

# A fit of these takes a second, of the others a tenth of it.
LONG = (*KERNELS, LastLayerSurrogate, SubspaceSurrogate, SGHMCSurrogate)


def test_the_list_has_every_recipe_that_there_is():
    public = {name for name in surrogates.__all__ if name.endswith("Surrogate")}
    assert {type(recipe).__name__ for recipe in RECIPES} == public


@each(slow=(MaternTangentSurrogate, InfiniteWidthSurrogate))
def test_fit_and_update_give_models_in_the_units_of_the_data(recipe):
    check_fit_and_update(type(recipe), 1)


@each(slow=LONG)
def test_several_outputs_are_fitted_and_updated(recipe):
    check_fit_and_update(type(recipe), 2)


def check_fit_and_update(kind, m):
    X, _ = data(m=m)
    state = torch.get_rng_state()
    model, following = fitted(kind, m), updated(kind, m)
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(model, Model) and model.num_outputs == m and not model.training
    before, after = moments(model, X), moments(following, X)
    assert after.shape == (2, 24, m) and after.isfinite().all()
    assert (after[1] > -1e-9).all() and 60 < float(after[0].mean()) < 160
    assert (after - before).abs().max() > 1e-6


@each(slow=LONG)
def test_an_update_leaves_the_model_from_before_as_it_was(recipe):
    X, Y = data()
    model = copy.deepcopy(fitted(type(recipe)))
    before = moments(model, X)
    with assert_module_unchanged(model):
        quiet(recipe.update, model, X, Y)
    assert torch.equal(moments(model, X), before)


@each(slow=LONG)
def test_the_same_seed_gives_the_same_model_and_another_another(recipe):
    X, Y = data()
    first = moments(fitted(type(recipe)), X)
    again, other = (
        moments(quiet(recipe.with_seed(s).fit, X[:20], Y[:20]), X) for s in (0, 1)
    )
    assert torch.equal(first, again)
    if not isinstance(recipe, InfiniteWidthSurrogate):  # of no random weights
        assert not torch.equal(first, other)


@each(slow=LONG)
def test_copies_and_pickles_are_updated_alike(recipe):
    X, Y = data()
    model, expected = fitted(type(recipe)), moments(updated(type(recipe)), X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = moments(quiet(recipe.update, twin, X, Y), X)
        assert torch.equal(found, expected)


@each()
def test_acquisition_values_do_not_depend_on_the_batch(recipe):
    model = fitted(type(recipe))
    acquisition = qLogExpectedImprovement(model, best_f=data()[1].max() - 5)
    candidates = data(5, seed=1)[0].unsqueeze(-2)
    together = acquisition(candidates)
    apart = torch.cat([acquisition(x[None]) for x in candidates])
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)
    turned = acquisition(candidates.flip(0)).flip(0)
    torch.testing.assert_close(together, turned, rtol=1e-6, atol=1e-6)


@each()
def test_candidates_are_optimised_within_the_bounds(recipe):
    acquisition = qLogExpectedImprovement(
        fitted(type(recipe)), best_f=data()[1].max(), X_pending=BOUNDS.mean(0)[None]
    )
    options = {"maxiter": 2}
    candidates, value = quiet(
        lambda: optimize_acqf(acquisition, BOUNDS, 2, 1, 2, options=options)
    )
    assert candidates.shape == (2, 2) and value.isfinite()
    assert (candidates >= BOUNDS[0]).all() and (candidates <= BOUNDS[1]).all()


@each()
def test_a_pending_point_need_not_be_observed_once_more(recipe):
    model, pending = fitted(type(recipe)), data(1, seed=5)[0]
    best = data()[1].min()
    alone = qLogExpectedImprovement(model, best_f=best)(pending[None])
    acquisition = qLogExpectedImprovement(model, best_f=best, X_pending=pending)
    elsewhere = acquisition(data(6, seed=1)[0].unsqueeze(-2))
    # Nearby, as two equal points have no joint factor. Nothing is gained there beyond
    # what is pending, and something elsewhere.
    nearby = acquisition(pending[None] + 1e-2)
    torch.testing.assert_close(nearby, alone, rtol=0.0, atol=0.05)
    assert (elsewhere > nearby - 0.05).all() and elsewhere.max() > nearby


@each()
def test_gaussian_posteriors_fantasise_and_others_say_what_does(recipe):
    model, X = fitted(type(recipe)), data(3, seed=1)[0]
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
    if not isinstance(recipe, GAUSSIAN):
        with pytest.raises(NotImplementedError, match="Train again on all data, or"):
            model.fantasize(X, sampler)
        return
    model = copy.deepcopy(model)
    before = moments(model, X)
    fantasies = quiet(model.fantasize, X[:1], sampler)
    assert fantasies.posterior(X).mean.shape == (4, 3, 1)
    given = quiet(model.condition_on_observations, X[:1], before[0, :1] + 50.0)
    there = moments(given, X[:1])
    assert there[0].item() > before[0, 0].item() and there[1] < before[1, 0]


@pytest.mark.slow
@each()
def test_several_outputs_fantasise(recipe):
    model, X = fitted(type(recipe), 2), data(3, seed=1)[0]
    if isinstance(model, ModelListGP) or not isinstance(recipe, GAUSSIAN):
        return  # upstream's own, and refused
    fantasies = model.fantasize(X, SobolQMCNormalSampler(torch.Size([4]), seed=0))
    assert fantasies.posterior(X).mean.shape == (4, 3, 2)


@each(slow=LONG)
def test_single_precision_stays(recipe):
    X, Y = data(dtype=torch.float32)
    recipe = replace(recipe, bounds=BOUNDS.float())
    model = quiet(recipe.fit, X, Y)
    found = quiet(moments, model, X)
    assert found.dtype == torch.float32 and found.isfinite().all()


@each(slow=LONG)
def test_an_update_starts_where_the_last_fit_ended(recipe, monkeypatch):
    X, Y = data()
    model = fitted(type(recipe))
    weights = model.surrogate_fit.weights
    assert weights
    if isinstance(recipe, KERNELS) and not isinstance(recipe, DeepKernelSurrogate):
        # The evidence is ascended from the last hyperparameters first.
        seen = []
        for name in ("multi_start", "fit_matern_plus_kernel"):
            inner = getattr(kernels, name)

            def watched(*args, inner=inner, **options):
                seen.extend(options.get("starts", args[-1]))
                return inner(*args, **options)

            monkeypatch.setattr(kernels, name, watched)
        quiet(recipe.update, model, X, Y)
        learnt = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert learnt and seen[0].keys() == learnt.keys()
        assert all(torch.equal(seen[0][name], p) for name, p in learnt.items())
        return
    # Without further training it is the same network.
    frozen = replace(recipe, update_epochs=2, learning_rate=1e-12)
    again = quiet(frozen.update, model, X, Y).surrogate_fit.weights
    for old, new in zip(weights, again, strict=True):
        for name, value in old.items():
            torch.testing.assert_close(new[name], value, rtol=1e-6, atol=1e-6)


def test_a_recipe_says_what_it_was():
    model = fitted(type(LINEARIZED))
    assert model.surrogate_fit.recipe is LINEARIZED
    with pytest.raises(TypeError, match="what EnsembleSurrogate.fit or .update retu"):
        ENSEMBLE.update(model, *data())


@pytest.mark.parametrize("recipe", [LINEARIZED, ENSEMBLE])
def test_a_network_that_diverges_keeps_the_previous_surrogate_and_says_so(recipe):
    X, Y = data()
    model = fitted(type(recipe))
    hot = replace(recipe, learning_rate=1e200, update_epochs=30)
    with pytest.warns(ReliabilityWarning, match="could not be fitted to 24 rows.*kept"):
        assert hot.update(model, X, Y) is model
    with pytest.raises(DivergedError):
        quiet(hot.fit, X, Y)


def test_every_option_is_documented():
    for recipe in RECIPES:
        text = "".join(cls.__doc__ or "" for cls in type(recipe).__mro__)
        for field in fields(recipe):
            assert f"{field.name}:" in text, (type(recipe).__name__, field.name)


def test_infinitely_wide_networks_are_of_relu_by_default_and_others_of_tanh():
    layers = {str(InfiniteWidthSurrogate().network(2, 1)[1])}
    layers.add(str(type(LINEARIZED)().network(2, 1)[1]))
    assert layers == {"ReLU()", "Tanh()"}
    assert OF[type(LINEARIZED)].network is small
