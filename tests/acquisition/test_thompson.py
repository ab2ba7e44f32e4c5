"""Thompson samples: exact draws of functions, and the maximum of each."""

import copy
import warnings

import pytest
import torch
from botorch.acquisition.objective import (
    LinearMCObjective,
    ScalarizedPosteriorTransform,
)
from botorch.exceptions.errors import InputDataError
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.approximate_gp import SingleTaskVariationalGP
from botorch.models.transforms import Normalize, Standardize
from gpytorch.kernels import MaternKernel, PeriodicKernel, ScaleKernel
from scipy.optimize import minimize
from torch import nn

from gpbridge import LinearizedGP, SampledGP
from gpbridge.acquisition import ThompsonDraw, draw_functions, thompson_sample
from gpbridge.acquisition.ascent import climb
from gpbridge.checks import ReliabilityWarning, ShapeError
from gpbridge.dnn import DeepEnsemble
from gpbridge.functional import FunctionalNet
from gpbridge.kernels import InfiniteWidthKernel
from gpbridge.surrogates import WeightSpaceModel
from gpbridge.testing import assert_module_unchanged
from gpbridge.weights import GaussianWeights
from tests.surrogates.recipes import BOUNDS, data, each, quiet

BOX = torch.tensor([[-1.0, 0.0], [2.0, 5.0]], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inside(box, *shape, seed=0):
    u = torch.rand(*shape, box.shape[-1], generator=seeded(seed), dtype=torch.float64)
    return box[0] + (box[1] - box[0]) * u


def network(d=2, m=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, 6), nn.Tanh(), nn.Linear(6, m)).double()


def gaussian(d=2, m=1):
    net = FunctionalNet(network(d, m))
    p = net.num_params
    mean = torch.linspace(-1, 1, p).double()
    return GaussianWeights(net, mean, variance=torch.ones(p).double())


def matern(box, m=1, n=9):
    """A GP with transforms, whose hyperparameters are set."""
    X, d = inside(box, n), box.shape[-1]
    Y = torch.stack([100 + 10 * torch.sin(2 * X.sum(-1) + j) for j in range(m)], -1)
    model = SingleTaskGP(
        *(X, Y),
        covar_module=ScaleKernel(MaternKernel(2.5)) if m == 1 else None,
        input_transform=Normalize(d, bounds=box),
        outcome_transform=Standardize(m),
    )
    if m == 1:
        model.covar_module.base_kernel.lengthscale = 0.3
    model.likelihood.noise = 1e-3 * torch.ones_like(model.likelihood.noise)
    return model


def linearized(box):
    X = inside(box, 9)
    return LinearizedGP(
        *(network(box.shape[-1]), X, X.sum(-1, keepdim=True).sin()),
        input_transform=Normalize(box.shape[-1], bounds=box),
    )


def sampled(box):
    X = inside(box, 9)
    kernel = ScaleKernel(MaternKernel(2.5)).double()
    return SampledGP(X, X.sum(-1, keepdim=True).sin(), kernel, num_samples=8)


def weights(box):
    return gaussian(box.shape[-1])


def grid(box, size):
    axes = [torch.linspace(*b, size, dtype=torch.float64) for b in box.T.tolist()]
    return torch.cartesian_prod(*axes).reshape(-1, box.shape[-1])


# -- The draws -----------------------------------------------------------------------


def two_outputs(box):
    X, scaled = inside(box, 5), Normalize(2, bounds=box)
    return ModelListGP(matern(box), SingleTaskGP(X, X[:, :1], input_transform=scaled))


@pytest.mark.parametrize("make", [matern, linearized, two_outputs])
def test_draws_have_the_mean_and_covariance_of_the_posterior(make):
    model, X, s = make(BOX), grid(BOX, 3), 2000
    with torch.no_grad():
        posterior = model.posterior(X)
        values = draw_functions(model, s, seeded())(X)
    m = values.shape[-1]
    mean, covariance = posterior.mean, posterior.distribution.covariance_matrix
    # Of a list of models output by output, zeros between them.
    deviations = (values - mean).mT.flatten(1) if m > 1 else (values - mean)[..., 0]
    scatter = deviations.std(0) / s**0.5
    assert bool((deviations.mean(0).abs() < 5 * scatter).all())
    # The standard error of each entry, from the products themselves.
    products = deviations[:, :, None] * deviations[:, None, :]
    error = (products.mean(0) - covariance).abs() / (products.std(0) / s**0.5)
    assert float(error.max()) < 5


def test_the_chance_of_a_choice_is_that_of_being_the_best():
    model, choices, q = matern(BOX), grid(BOX, 2)[:2], 1500
    sample = thompson_sample(model, choices=choices, q=q, generator=seeded())
    with torch.no_grad():
        posterior = model.posterior(choices)
    K, mean = posterior.distribution.covariance_matrix, posterior.mean[:, 0]
    std = (K[0, 0] + K[1, 1] - 2 * K[0, 1]).sqrt()
    chance = torch.distributions.Normal(0.0, 1.0).cdf((mean[0] - mean[1]) / std)
    assert 0.1 < float(chance) < 0.9
    found = (sample.candidates == choices[0]).all(-1).double().mean()
    assert float((found - chance).abs()) < 4 * float(chance * (1 - chance) / q) ** 0.5


def test_a_kernel_without_features_is_drawn_at_anchors_and_says_what_is_missing():
    X = inside(BOX, 8)
    kernel = InfiniteWidthKernel.from_module(
        nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    )
    model = SingleTaskGP(X, X.prod(-1, keepdim=True), covar_module=kernel)
    model.likelihood.noise = 1e-2
    anchors, new = inside(BOX, 300, seed=1), inside(BOX, 5, seed=2)
    with torch.no_grad():
        values = draw_functions(model, 3000, seeded(), anchors=anchors)(new)
        posterior = model.posterior(new)
    error = (values.mean(0) - posterior.mean).abs() / posterior.variance.sqrt()
    assert float(error.max()) < 5 / 3000**0.5
    ratio = values.var(0) / posterior.variance
    assert float((ratio - 1).abs().max()) < 5 * (2 / 3000) ** 0.5 + 0.01
    rough = SingleTaskGP(X, X[:, :1], covar_module=PeriodicKernel())
    rough.covar_module.lengthscale, rough.covar_module.period_length = 0.01, 0.1
    with pytest.warns(ReliabilityWarning, match="PeriodicKernel has no feature map"):
        draw_functions(rough, 2, seeded(), anchors=anchors[:20])
    with pytest.raises(TypeError, match="SingleTaskGP, of which no functions"):
        draw_functions(rough, 2, seeded())


def test_models_and_draws_are_left_alone():
    X, state = inside(BOX, 6), torch.get_rng_state()
    model = quiet(lambda: SingleTaskGP(X, X.sum(-1, keepdim=True))).eval()
    with assert_module_unchanged(model):
        thompson_sample(model, BOX, 2, raw_samples=32, generator=seeded())
        thompson_sample(model, BOX, 2, raw_samples=32)
    assert torch.equal(torch.get_rng_state(), state)


# -- The maxima ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [matern, linearized, sampled, weights])
@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("maximize", [True, False])
def test_no_point_of_a_dense_grid_is_better(make, d, maximize):
    box = BOX[:, :d]
    sample = thompson_sample(
        make(box), box, 6, maximize=maximize, raw_samples=256, generator=seeded()
    )
    with torch.no_grad():
        dense = sample.draws(grid(box, 2001 if d == 1 else 81))[..., 0]
        own = sample.draws(sample.candidates)[..., 0].diagonal()
    torch.testing.assert_close(own, sample.values)
    assert sample.candidates.shape == (6, d) and sample.values.shape == (6,)
    best = dense.amax(-1) if maximize else dense.amin(-1)
    gain = sample.values - best if maximize else best - sample.values
    assert bool((gain > -1e-6).all())


def test_a_batch_is_what_its_functions_give_one_by_one():
    sample = thompson_sample(matern(BOX), BOX, 5, raw_samples=64, generator=seeded(3))
    for i in range(5):
        one = sample.draws.take(torch.tensor([i]))
        alone = thompson_sample(one, BOX, 1, raw_samples=64, generator=seeded(3))
        torch.testing.assert_close(
            alone.candidates[0], sample.candidates[i], rtol=0, atol=1e-6
        )
        torch.testing.assert_close(alone.values[0], sample.values[i])


@pytest.mark.parametrize("make", [matern, linearized, sampled, weights])
def test_a_generator_decides_everything(make):
    model = make(BOX)
    size = {"q": 3, "raw_samples": 32}
    first, again, other = (
        thompson_sample(model, BOX, **size, generator=seeded(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.candidates, again.candidates)
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, other.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_candidates_follow_the_bounds(dtype):
    box = BOX.to(dtype)
    sample = thompson_sample(gaussian(), box, 20, raw_samples=32, generator=seeded())
    assert sample.candidates.dtype == sample.values.dtype == dtype
    assert bool((sample.candidates >= box[0]).all())
    assert bool((sample.candidates <= box[1]).all())
    assert not sample.candidates.requires_grad and not sample.values.requires_grad


def test_held_columns_are_held():
    sample = thompson_sample(
        *(matern(BOX), BOX, 4), fixed_features={-1: 7.5}, raw_samples=64,
        generator=seeded(),
    )  # fmt: skip
    assert bool((sample.candidates[:, 1] == 7.5).all())
    line = torch.stack([torch.linspace(-1, 2, 801), torch.full((801,), 7.5)], -1)
    with torch.no_grad():
        dense = sample.draws(line.double())[..., 0].amax(-1)
    assert bool((sample.values > dense - 1e-6).all())


def test_starts_that_are_good_are_climbed_from():
    top = torch.tensor([[1.23456, 3.21]]).double()

    def needle(X):
        return torch.exp(-1e4 * (X - top).square().sum(-1, keepdim=True))[None]

    near = top + 0.01
    found = thompson_sample(needle, BOX, starts=near, raw_samples=8)
    torch.testing.assert_close(found.candidates, top, rtol=0, atol=1e-4)


def test_functions_in_closed_form_are_taken_as_they_are():
    tops = torch.tensor([[0.5, 1.0], [2.0, 4.0], [-1.0, 7.0]]).double()

    def bowls(X):
        centre = tops.reshape(3, *[1] * (X.dim() - 1), 2)
        return -(X - centre).square().sum(-1, keepdim=True)

    sample = thompson_sample(bowls, BOX, 3, raw_samples=16, generator=seeded())
    expected = torch.minimum(tops, BOX[1])  # the last one's lies outside
    torch.testing.assert_close(sample.candidates, expected, rtol=0, atol=1e-6)
    two = thompson_sample(bowls, BOX, 2, raw_samples=16, generator=seeded())
    distances = torch.cdist(two.candidates, expected)
    assert bool((distances.amin(-1) < 1e-5).all())
    assert len(distances.argmin(-1).unique()) == 2


# -- Objectives ----------------------------------------------------------------------


def test_one_value_is_made_of_several_outputs():
    model, w = matern(BOX, m=2), torch.tensor([1.0, -2.0]).double()
    kinds = [
        lambda Y: Y @ w,
        ScalarizedPosteriorTransform(w),
        LinearMCObjective(w),
    ]
    found = [
        thompson_sample(
            *(model, BOX, 3), objective=kind, raw_samples=64, generator=seeded()
        )
        for kind in kinds
    ]
    for other in found[1:]:
        torch.testing.assert_close(other.candidates, found[0].candidates)
    with torch.no_grad():
        dense = (found[0].draws(grid(BOX, 61)) @ w).amax(-1)
    assert bool((found[0].values > dense - 1e-6).all())


# -- Choices -------------------------------------------------------------------------


def test_each_function_takes_its_best_choice():
    choices = inside(BOX, 500, seed=5)  # more than are evaluated at a time
    sample = thompson_sample(matern(BOX), choices=choices, q=7, generator=seeded())
    with torch.no_grad():
        values = sample.draws(choices)[..., 0]
    assert torch.equal(sample.candidates, choices[values.argmax(-1)])
    torch.testing.assert_close(sample.values, values.amax(-1))
    low = thompson_sample(sample.draws, choices=choices, q=7, maximize=False)
    assert torch.equal(low.candidates, choices[values.argmin(-1)])


def test_without_repeats_a_choice_is_taken_once_and_the_best_left_is_taken():
    choices = inside(BOX, 12, seed=5)
    sample = thompson_sample(
        matern(BOX), choices=choices, q=10, repeats=False, generator=seeded()
    )
    with torch.no_grad():
        values = sample.draws(choices)[..., 0]
    taken = []
    for row in values:
        left = [j for j in row.argsort(descending=True).tolist() if j not in taken]
        taken.append(left[0])
    assert torch.equal(sample.candidates, choices[taken])
    torch.testing.assert_close(sample.values, values[torch.arange(10), taken])
    assert len(values.argmax(-1).unique()) < 10  # that they differ is no accident


# -- Finite posteriors ---------------------------------------------------------------


def test_members_come_evenly_and_each_with_its_own_maximum():
    torch.manual_seed(1)
    members = [
        nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        for _ in range(3)
    ]
    X = inside(BOX, 6)
    model = WeightSpaceModel(
        DeepEnsemble(members), X, 5 + X[:, :1], outcome_transform=Standardize(1)
    )
    sample = thompson_sample(model, BOX, 7, raw_samples=64, generator=seeded())
    with torch.no_grad():
        dense = model.posterior(grid(BOX, 61)).values[..., 0]  # 3 x n
        values = sample.draws(sample.candidates)[..., 0].diagonal()
    torch.testing.assert_close(values, sample.values)
    member = (sample.values[:, None] - dense.amax(-1)).abs().argmin(-1)
    assert bool((sample.values > dense.amax(-1)[member] - 1e-6).all())
    counts = torch.bincount(member, minlength=3)
    assert int(counts.min()) == 2 and int(counts.max()) == 3
    fewer = thompson_sample(model, BOX, 2, raw_samples=64, generator=seeded())
    assert not torch.equal(fewer.values[0], fewer.values[1])


@pytest.mark.parametrize("mode", ["ensemble", "gaussian", "linearized"])
def test_a_weight_space_model_draws_its_own_functions(mode):
    X = inside(BOX, 6)
    model = WeightSpaceModel(
        *(gaussian(m=2), X, 50 + 3 * X), num_samples=16, mode=mode,
        input_transform=Normalize(2), outcome_transform=Standardize(2),
    )  # fmt: skip
    draws, new = model.draw(), inside(BOX, 4, seed=3)
    values = draws(new)
    assert model.num_members == 16 and values.shape == (16, 4, 2)
    if mode == "ensemble":
        torch.testing.assert_close(values, model.posterior(new).values)
    some = model.draw(5, seeded())(new)
    matches = (some[:, None] - values).abs().amax((-2, -1)) < 1e-9
    assert bool((matches.sum(-1) == 1).all()) and bool((matches.sum(0) <= 1).all())
    assert len(model.draw(40, seeded())(new)) == 40
    one = model.subset_output([1]).draw()(new)
    torch.testing.assert_close(one, values[..., 1:])
    torch.testing.assert_close(copy.deepcopy(draws)(new), values)
    own = new.expand(16, 4, 2)
    torch.testing.assert_close(draws.each(own), values)


def test_a_single_draw_comes_from_a_stock_gp_too():
    model = matern(BOX)
    draw = ThompsonDraw(model, generator=seeded())
    X = inside(BOX, 5)
    torch.testing.assert_close(draw(X), draw_functions(model, 1, seeded())(X)[0])


# -- The ascent ----------------------------------------------------------------------


def bowl(A, centre):
    def function(X):  # b x d
        off = X - centre
        return -0.5 * torch.einsum("bi,bij,bj->b", off, A, off)

    return function


def test_quadratics_end_where_the_conditions_of_a_maximum_hold():
    b, d = 30, 5
    root = torch.randn(b, d, d, generator=seeded(), dtype=torch.float64)
    A = root @ root.mT + 0.1 * torch.eye(d).double()
    box = torch.stack([torch.full((d,), -1.0), torch.linspace(1, 50, d)]).double()
    centre = inside(torch.stack([box[0] - 1, box[1] + 1]), b)
    function = bowl(A, centre)
    first = inside(box, b, seed=1)
    x, values = climb(function, first, box, 500)
    assert bool((x <= box[0]).any()) and bool((x >= box[1]).any())
    assert bool((x >= box[0]).all()) and bool((x <= box[1]).all())
    torch.testing.assert_close(values, function(x))
    for i in range(b):
        best = minimize(
            lambda x, i=i: -float(bowl(A[i : i + 1], centre[i])(torch.tensor(x)[None])),
            centre[i].clamp(box[0], box[1]),
            jac=lambda x, i=i: (A[i] @ (torch.tensor(x) - centre[i])).numpy(),
            bounds=box.T.tolist(),
            options={"ftol": 1e-15, "gtol": 1e-10},
        )
        assert abs(best.fun + float(values[i])) < 1e-7 * float(
            function(first).abs().max()
        )


def test_problems_do_not_know_of_each_other():
    A = torch.diag_embed(torch.tensor([[1.0, 100.0], [3.0, 0.1]]).double())
    centre = torch.tensor([[0.1, 0.9], [5.0, 0.5]]).double()
    unit = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
    starts = inside(unit, 2)
    together, _ = climb(bowl(A, centre), starts, unit)
    for i in range(2):
        pair = [i, i]
        alone, _ = climb(bowl(A[pair], centre[pair]), starts[pair], unit)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    expected = torch.tensor([[0.1, 0.9], [1.0, 0.5]]).double()
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)


def test_values_never_fall_whatever_the_function():
    unit = torch.tensor([[0.0], [1.0]]).double()
    starts = inside(unit, 6, 1)

    def kink(X):
        return -(X[..., 0] - 0.3).abs()

    def cliff(X):  # undefined beyond a half, where it rises to
        x = X[..., 0]
        return torch.where(x < 0.5, x, torch.nan)

    for function, first in ((kink, starts), (cliff, 0.5 * starts)):
        x, values = climb(function, first, unit)
        assert bool((values >= function(first)).all())
        torch.testing.assert_close(values, function(x))
    flat, values = climb(lambda X: 0 * X[..., 0] + 3, starts, unit)
    torch.testing.assert_close(flat, starts)
    assert bool((values == 3).all())


# -- Recipes and bad input -----------------------------------------------------------


@pytest.mark.slow
@each()
@pytest.mark.parametrize("m", [1, 2])
def test_every_recipe_gives_thompson_samples(recipe, m):
    X, Y = data(m=m)
    model = quiet(recipe.fit, X, Y)
    objective = None if m == 1 else lambda Y: Y.sum(-1)
    sample = thompson_sample(
        model, BOUNDS, 5, objective=objective, raw_samples=256, generator=seeded()
    )
    with torch.no_grad():
        dense = sample.draws(grid(BOUNDS, 61)).sum(-1).amax(-1)
    assert bool((sample.values > dense - 1e-6 * dense.abs()).all())
    assert bool((sample.candidates >= BOUNDS[0]).all())
    assert bool((sample.candidates <= BOUNDS[1]).all())


def test_bad_input_says_what_to_try():
    model = gaussian()
    with pytest.raises(ValueError, match="bounds must have the lower row below"):
        thompson_sample(model, BOX.flip(0))
    with pytest.raises(ShapeError, match="bounds must be ``2 x d``"):
        thompson_sample(model, BOX[0])
    with pytest.raises(ValueError, match="Pass bounds, ``2 x d``, or choices"):
        thompson_sample(model)
    with pytest.raises(TypeError, match="bounds must be float32 or float64"):
        thompson_sample(model, BOX.long())
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="q must be a whole number above zero"):
            thompson_sample(model, BOX, wrong)
    with pytest.raises(ValueError, match="num_restarts must be a whole number"):
        thompson_sample(model, BOX, num_restarts=0)
    with pytest.raises(ValueError, match="fixed_features names column 2, but"):
        thompson_sample(model, BOX, fixed_features={2: 0.0})
    with pytest.raises(ShapeError, match=r"starts must be ``k x 2``.*\(3, 1\)"):
        thompson_sample(model, BOX, starts=inside(BOX, 3)[:, :1])
    with pytest.raises(InputDataError, match="starts contains NaN"):
        thompson_sample(model, BOX, starts=BOX / 0)
    with pytest.raises(TypeError, match=r"must have draw\(num_samples, generator\)"):
        thompson_sample(3.0, BOX)
    with pytest.raises(TypeError, match="Linear, one network"):
        thompson_sample(nn.Linear(2, 1), BOX)
    X = inside(BOX, 6)
    variational = quiet(lambda: SingleTaskVariationalGP(X, X[:, :1], inducing_points=3))
    with pytest.raises(TypeError, match="SingleTaskVariationalGP, of which no func"):
        thompson_sample(variational, BOX)
    with pytest.raises(ShapeError, match="2 outputs, of which there is no maximum"):
        thompson_sample(gaussian(m=2), BOX)
    with pytest.raises(ShapeError, match="objective must map values of shape"):
        thompson_sample(gaussian(m=2), BOX, objective=lambda Y: Y.sum())


def test_bad_choices_are_refused():
    model, choices = gaussian(), inside(BOX, 4)
    with pytest.raises(InputDataError, match="choices has no rows"):
        thompson_sample(model, choices=choices[:0])
    with pytest.raises(ShapeError):  # in the words of what evaluates them
        thompson_sample(model, choices=torch.ones(4, 3).double())
    with pytest.raises(ShapeError, match="choices must be"):
        thompson_sample(model, choices=choices[0])
    with pytest.raises(ValueError, match="q = 5 functions need as many choices.*are 4"):
        thompson_sample(model, choices=choices, q=5, repeats=False)
    assert len(thompson_sample(model, choices=choices, q=5).candidates) == 5
    with pytest.raises(ValueError, match="stand in place of a box: leave out bounds"):
        thompson_sample(model, BOX, choices=choices)
    with pytest.raises(InputDataError, match="choices contains NaN or Inf"):
        thompson_sample(model, choices=choices / 0)


def test_functions_that_are_not_finite_are_named():
    def broken(X):
        values = X[..., :1].expand(3, *X.shape[:-1], 1).clone()
        values[1] = torch.where(X[..., :1] > 1, torch.nan, values[1])
        return values

    with pytest.raises(ValueError, match=r"Function 1 is nan at \[1\."):
        thompson_sample(broken, BOX, 3)


def test_functions_that_do_not_count_themselves_cannot_be_drawn_of_a_model():
    def lines(X):
        return torch.stack([X[..., :1], 2 * X[..., :1]])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = WeightSpaceModel(lines, num_outputs=1)
    assert model.num_members is None
    with pytest.raises(TypeError, match="do not say how many they are.*num_samples"):
        model.draw(2)
    assert model.draw()(BOX).shape == (2, 2, 1)
