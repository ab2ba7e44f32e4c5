"""Bounds of the evidence by training speed: limits, oracles, noise, bad input."""

import copy
import math

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from botorch.models import SingleTaskGP
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import (
    InducingPointKernel,
    MaternKernel,
    MultitaskKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
)
from gpytorch.means import ConstantMean
from gpytorch.models import ExactGP
from torch import nn

from gpbridge import Exact, LinearizedGP
from gpbridge.checks import ShapeError
from gpbridge.data_features import DataFeatures
from gpbridge.linearized import Sampled
from gpbridge.selection import (
    LinearModel,
    log_evidence,
    prefix_posteriors,
    training_speed_bound,
)
from gpbridge.selection.prefix_posteriors import (
    WhitenedData,
    predict_in_order,
    whiten_data,
)
from gpbridge.solvers import ConjugateGradients
from gpbridge.testing import assert_module_unchanged
from tests import oracles_linearized, oracles_selection
from tests.linearized.problems import (
    PRIOR_VARIANCE,
    PROBLEMS,
    N,
    both_spaces,
    build,
    gaussian_likelihoods,
    inputs,
    network,
    targets,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Process(ExactGP):
    """A Matérn process on 2 inputs."""

    def __init__(self, X, y, likelihood):
        super().__init__(X, y, likelihood)
        self.mean_module, self.covar_module = ConstantMean(), MaternKernel(1.5)

    def forward(self, X):
        return MultivariateNormal(self.mean_module(X), self.covar_module(X))


class TwoOutputs(ExactGP):
    """Two correlated outputs, in either order of the covariance."""

    def __init__(self, X, Y, likelihood, interleaved):
        super().__init__(X, Y, likelihood)
        self.covar_module = MultitaskKernel(MaternKernel(1.5), num_tasks=2, rank=1)
        self.interleaved = interleaved

    def forward(self, X):
        mean, covariance = X[..., :1].expand(-1, 2), self.covar_module(X)
        if self.interleaved:
            return MultitaskMultivariateNormal(mean, covariance)
        n = len(X)
        K = covariance.to_dense().reshape(n, 2, n, 2).permute(1, 0, 3, 2)
        K = K.reshape(2 * n, 2 * n)
        return MultitaskMultivariateNormal(mean, K, interleaved=False)


def process(n=N, likelihood=None):
    likelihood = GaussianLikelihood() if likelihood is None else likelihood
    X = inputs(n)
    model = Process(X, targets("gaussian", X)[:, 0], likelihood).double()
    if isinstance(likelihood, GaussianLikelihood):
        model.likelihood.noise = torch.tensor([0.05]).double()
    return model.eval()


def two_outputs(interleaved=True):
    X = inputs()
    likelihood = MultitaskGaussianLikelihood(num_tasks=2)
    return TwoOutputs(X, targets("multitask", X), likelihood, interleaved).double()


def linear(n=60, f=15, noise=0.1, seed=0):
    generator = seeded(seed)
    Phi = torch.randn(n, f, generator=generator).double()
    w = torch.randn(f, generator=generator).double()
    e = torch.randn(n, generator=generator).double()
    return LinearModel(Phi, Phi @ w + noise**0.5 * e, noise)


def moments(model):
    """Prior mean, covariance and noise of a linear model, dense."""
    Phi, y = model.features, model.targets
    n = len(y)
    K = model.prior_variance * Phi @ Phi.T
    return torch.zeros(n).double(), K, model.noise_variance * torch.eye(n).double(), y


def tangent_moments(name):
    problem, X = PROBLEMS[name], inputs()
    train = oracles_linearized.tangent(network(problem.m), X)
    Phi = train.features(PRIOR_VARIANCE)
    return train.mean(), Phi @ Phi.T, problem.noise(N), targets(name, X).reshape(-1)


def rows_of(order, m):
    return [[i * m + j for j in range(m)] for i in order]


MODELS = {
    "process": process,
    "fixed noise": lambda: process(
        likelihood=FixedNoiseGaussianLikelihood(torch.linspace(0.1, 0.3, N).double())
    ),
    "two outputs": two_outputs,
    "botorch": lambda: SingleTaskGP(inputs(), targets("gaussian", inputs())),
}


# -- the limits --------------------------------------------------------------------


@both_spaces
@gaussian_likelihoods
def test_infinitely_many_draws_give_the_evidence_of_a_network(name, space):
    model = build(name, space)
    found = training_speed_bound(model, math.inf, orders=3, generator=seeded())
    each = found.terms.sum(-1)
    expected = model.log_evidence().expand(3)
    torch.testing.assert_close(each, expected, rtol=0, atol=1e-8)
    assert found.value.item() == pytest.approx(each.mean().item(), abs=1e-10)
    # Order is no source of noise where the value does not depend on it.
    assert found.std_error < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_infinitely_many_draws_give_the_evidence_of_a_process(name):
    model = MODELS[name]().eval()
    found = training_speed_bound(model, math.inf, orders=2, generator=seeded())
    expected = log_evidence(model).detach().expand(2)
    torch.testing.assert_close(
        found.terms.detach().sum(-1), expected, atol=1e-8, rtol=0
    )
    assert not model.training


def test_the_order_of_the_rows_of_two_outputs_does_not_matter():
    # Not compared with upstream, whose log_prob of an output-major law differs from
    # the dense one.
    one, other = two_outputs(), two_outputs(False)
    other.load_state_dict(one.state_dict())
    for k in (1, math.inf):
        values = [training_speed_bound(model, k).value.item() for model in (one, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-9)


def test_infinitely_many_draws_give_the_gradient_of_the_evidence():
    gradients = []
    for value in (lambda m: training_speed_bound(m, math.inf).value, log_evidence):
        model = process().train()
        value(model).backward()
        gradients.append([p.grad for p in model.parameters()])
        assert model.training
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_the_evidence_after_a_burn_in_is_the_conditional_one():
    model = linear(20)
    zero, K, noise, y = moments(model)

    def log_density(n):
        law = torch.distributions.MultivariateNormal(zero[:n], (K + noise)[:n, :n])
        return law.log_prob(y[:n])

    found = training_speed_bound(model, math.inf, burn_in=7).value
    expected = log_density(20) - log_density(7)
    assert found.item() == pytest.approx(expected.item(), abs=1e-8)


# -- one draw: closed form ------------------------------------------------------------


@both_spaces
@gaussian_likelihoods
def test_one_draw_is_the_expected_log_density_of_each_datum(name, space):
    model = build(name, space)
    order = torch.randperm(N, generator=seeded(5))
    found = training_speed_bound(model, orders=order[None])
    blocks = rows_of(order.tolist(), PROBLEMS[name].m)
    expected = oracles_selection.one_draw_terms(*tangent_moments(name), blocks)
    torch.testing.assert_close(found.terms[0].detach(), expected, rtol=1e-8, atol=1e-8)
    assert found.std_error == 0
    assert torch.equal(found.orders, order[None])


def test_what_one_draw_misses_is_the_gap_of_the_closed_form():
    model = linear()
    one, evidence = (training_speed_bound(model, k).terms[0] for k in (1, math.inf))
    for i in (0, 1, 14, 40):
        prediction = oracles_selection.prefix_prediction(
            *moments(model), list(range(i)), [i]
        )
        r, v = (float(value) for value in prediction)
        gap = oracles_selection.gap_of_one_draw(r, v, model.noise_variance)
        assert (evidence - one)[i].item() == pytest.approx(gap, rel=1e-7)


def test_features_and_their_gram_matrix_give_the_same():
    # 700 data are three blocks of weight space.
    data = whiten_data(linear(700, 5))
    gram = data.rows[:, 0] @ data.rows[:, 0].T
    dense = WhitenedData(data.residual, data.log_scale, gram, None)
    order = torch.randperm(700, generator=seeded())
    for one, other in zip(
        predict_in_order(data, order), predict_in_order(dense, order), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_several_outputs_of_features_come_in_blocks_too():
    rows = torch.randn(300, 2, 7, generator=seeded()).double()
    residual = torch.randn(300, 2, generator=seeded(1)).double()
    flat = rows.flatten(0, 1)
    scale = torch.zeros(300).double()
    found = [
        predict_in_order(WhitenedData(residual, scale, *given), torch.arange(300))
        for given in ((None, rows), (flat @ flat.T, None))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


# -- draws inside the logarithm -----------------------------------------------------


def test_two_draws_agree_with_quadrature():
    model = linear(8, 3, noise=0.5)
    expected = oracles_selection.two_draw_terms(*moments(model)).sum().item()
    found = training_speed_bound(model, 2, num_repeats=2000, generator=seeded())
    assert 0 < found.std_error < 0.5
    assert abs(found.value.item() - expected) < 4 * found.std_error


def test_two_draws_of_two_outputs_lie_between_one_and_the_evidence():
    model = build("multitask_rank_1")
    values = [
        training_speed_bound(model, k, num_repeats=200, generator=seeded())
        for k in (1, 2, 64, math.inf)
    ]
    for low, high in zip(values[:-1], values[1:], strict=True):
        assert low.value < high.value


def test_the_bound_rises_with_the_number_of_draws_to_the_evidence():
    model = linear()
    found = [
        training_speed_bound(model, k, num_repeats=64, generator=seeded())
        for k in (1, 2, 4, 16, 64, 1024, math.inf)
    ]
    values = [each.value.item() for each in found]
    for low, high in zip(found[:-1], found[1:], strict=True):
        noise = (low.std_error**2 + high.std_error**2).sqrt()
        assert high.value - low.value > 3 * noise
    assert values[-1] - values[-2] < 0.02 * (values[-1] - values[0])


@pytest.mark.parametrize("orders", [None, 3])
def test_the_standard_error_is_that_of_the_value(orders):
    # Of a fixed order it is the noise of the draws, of random orders that of both.
    model = linear(10, 3, noise=1.0)
    found = [
        training_speed_bound(
            model, 4, orders=orders, num_repeats=6, generator=seeded(seed)
        )
        for seed in range(120)
    ]
    spread = torch.stack([each.value for each in found]).std()
    claimed = torch.stack([each.std_error**2 for each in found]).mean().sqrt()
    assert float(claimed / spread) == pytest.approx(1.0, abs=0.25)


def test_the_bound_is_differentiable_where_draws_are_frozen():
    noise = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def bound(noise_variance):
        model = linear(10, 3)._replace(noise_variance=noise_variance)
        return training_speed_bound(model, 4, generator=seeded()).value

    assert torch.autograd.gradcheck(bound, noise)


def test_the_same_seed_gives_the_same_and_none_a_fresh_one():
    model, before = linear(10, 3), torch.get_rng_state()
    options = {"num_samples": 4, "orders": 3}
    one, same = (
        training_speed_bound(model, generator=seeded(), **options) for _ in range(2)
    )
    for mine, yours in zip(one, same, strict=True):
        assert torch.equal(mine, yours)
    other = training_speed_bound(model, **options)
    assert torch.equal(one.orders, other.orders)  # the same for every model
    assert not torch.equal(one.terms, other.terms)
    moved = training_speed_bound(model, generator=seeded(1), **options)
    assert not torch.equal(one.orders, moved.orders)
    assert torch.equal(torch.get_rng_state(), before)


# -- orders ---------------------------------------------------------------------------


def test_the_bound_of_permuted_data_is_that_of_the_order():
    model, order = linear(20), torch.randperm(20, generator=seeded())
    moved = model._replace(features=model.features[order], targets=model.targets[order])
    found = training_speed_bound(model, orders=order[None]).terms
    torch.testing.assert_close(found[0], training_speed_bound(moved).terms[0])


def test_several_orders_are_averaged_and_say_how_much_they_differ():
    model = linear()
    found = training_speed_bound(model, orders=20, burn_in=5, generator=seeded())
    singly = [
        training_speed_bound(model, orders=order[None], burn_in=5).value
        for order in found.orders
    ]
    totals = torch.stack(singly)
    torch.testing.assert_close(found.value, totals.mean())
    torch.testing.assert_close(found.std_error, totals.std() / 20**0.5)
    assert found.terms.shape == (20, 60)


# -- sample-then-optimise -------------------------------------------------------------


def agrees(found, expected):
    assert 0 < found.std_error < 0.2 * abs(expected)
    assert abs(found.value.item() - expected) < 4 * found.std_error


@pytest.mark.parametrize("block_size", [1, 4, 5])
def test_optimised_chains_agree_with_the_closed_form(block_size):
    model = linear(12, 4, noise=0.5)
    solver = ConjugateGradients(preconditioner_rank=0)
    blocks = [rows.tolist() for rows in torch.arange(12).split(block_size)]
    expected = oracles_selection.one_draw_terms(*moments(model), blocks).sum()
    found = training_speed_bound(
        model,
        num_repeats=1000,
        solver=solver,
        block_size=block_size,
        generator=seeded(),
    )
    agrees(found, expected.item())
    assert found.terms.shape == (1, len(blocks))


def test_optimised_chains_with_several_draws_agree_with_the_factors():
    model = linear(12, 4, noise=0.5)
    solver = ConjugateGradients(preconditioner_rank=0)
    by_factors = training_speed_bound(
        model, 8, num_repeats=1000, burn_in=3, generator=seeded()
    )
    found = training_speed_bound(
        model, 8, num_repeats=200, burn_in=3, solver=solver, generator=seeded()
    )
    agrees(found, by_factors.value.item())


@pytest.mark.parametrize("name", ["gaussian", "multitask_rank_1"])
def test_optimised_chains_of_a_network_agree_with_the_closed_form(name):
    exact = training_speed_bound(build(name)).value.item()
    model = build(name, inference=Sampled(4, seed=3))
    found = training_speed_bound(
        model, num_repeats=600, generator=seeded(), progress=False
    )
    agrees(found, exact)


def test_features_are_formed_for_three_times_the_data_at_most(monkeypatch):
    formed, form = [], DataFeatures._form

    def counted(self, X):
        formed.append(len(X))
        return form(self, X)

    monkeypatch.setattr(DataFeatures, "_form", counted)
    model, solver = linear(40, 3), ConjugateGradients(preconditioner_rank=0)
    training_speed_bound(model, num_repeats=2, solver=solver, generator=seeded())
    probes = 2 * 7  # two points for each size of the features
    assert 40 <= sum(formed) - probes <= 120


# -- what it is for -------------------------------------------------------------------


def polynomial(order, seed=0):
    """40 points of a cubic, noise 0.1, in monomials with standard normal weights."""
    x = torch.linspace(-1, 1, 40).double()
    noise = torch.randn(40, generator=seeded(seed)).double()
    y = 0.5 - x - 0.5 * x**2 + 2 * x**3 + 0.1 * noise
    powers = x[:, None] ** torch.arange(order + 1)
    return LinearModel(powers, y, 0.01)


def test_evidence_and_one_draw_select_the_order_of_the_polynomial():
    orders = torch.stack([torch.randperm(40, generator=seeded(i)) for i in range(10)])
    for k in (1, 4, 64, math.inf):
        values = {
            order: training_speed_bound(
                polynomial(order), k, orders=orders, num_repeats=4, generator=seeded()
            ).value.item()
            for order in range(1, 7)
        }
        assert max(values, key=values.get) == 3


# -- a good citizen -------------------------------------------------------------------


class Nested(nn.Module):
    """Not only a Sequential."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"one": nn.Linear(2, 5), "two": nn.Linear(5, 1)})

    def forward(self, x):
        return self.body["two"](torch.tanh(self.body["one"](x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nested_network_of_either_precision_is_left_alone(dtype):
    net, X = Nested().to(dtype), inputs().to(dtype)
    with assert_module_unchanged(net):
        model = LinearizedGP(net, X, X.sum(-1, keepdim=True), noise=0.01)
        state = copy.deepcopy(model.state_dict())
        found = training_speed_bound(model, math.inf).value
        training_speed_bound(model, 4, generator=seeded())
    assert found.item() == pytest.approx(model.log_evidence().item(), abs=1e-8)
    assert found.dtype == torch.float64
    assert str(state) == str(model.state_dict())


def test_a_process_in_single_precision_is_scored_in_double():
    model = process().float()
    found = training_speed_bound(model, math.inf).value
    assert found.dtype == torch.float64
    expected = log_evidence(process()).item()
    assert found.item() == pytest.approx(expected, abs=1e-3)


def test_one_datum_has_the_prior_term_alone():
    model = linear(1, 2)
    found = training_speed_bound(model)
    v = model.features.square().sum().item()
    s2, y2 = model.noise_variance, model.targets.item() ** 2
    expected = -0.5 * (math.log(2 * math.pi * s2) + (y2 + v) / s2)
    assert found.value.item() == pytest.approx(expected)
    assert found.terms.shape == found.orders.shape == (1, 1)


def test_tensors_of_one_number_are_variances():
    model = linear(20)
    found = training_speed_bound(
        model._replace(
            noise_variance=torch.tensor([0.1]).double(), prior_variance=torch.ones(())
        )
    )
    expected = training_speed_bound(model).value.item()
    assert found.value.item() == pytest.approx(expected)


def test_a_variance_that_hardly_exists_makes_all_bounds_equal():
    model = linear(20)._replace(prior_variance=1e-14)
    one = training_speed_bound(model).value.item()
    for k in (4, math.inf):
        assert training_speed_bound(model, k).value.item() == pytest.approx(one)


# -- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "num_samples must be a whole number above zero"),
        ({"num_samples": 2.5}, "num_samples must be a whole number above zero"),
        ({"num_repeats": 0}, "num_repeats must be a whole number"),
        ({"burn_in": 20}, "from 0 to n - 1 = 19, but is 20"),
        ({"burn_in": -1}, "but is -1"),
        ({"burn_in": 0.5}, "but is 0.5"),
        ({"orders": 0}, "orders must be a whole number above zero"),
        ({"orders": torch.arange(20)}, r"orders\[None\]"),
        ({"orders": torch.zeros(2, 20)}, "row 0 is not. Try torch.randperm"),
        ({"orders": torch.arange(19)[None]}, "orders x 20"),
        ({"block_size": 2}, "needs a solver"),
        (
            {"solver": ConjugateGradients(), "num_samples": math.inf},
            "chains of weights cannot",
        ),
        (
            {"solver": ConjugateGradients(), "block_size": 3, "burn_in": 4},
            "multiple of block_size=3, but is 4. Try 3",
        ),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        training_speed_bound(linear(20), **options)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"features": torch.ones(20)}, ShapeError, "features must be"),
        ({"features": torch.ones(2, 20, 3)}, ShapeError, "features must be ``n x f``"),
        ({"targets": torch.ones(20, 1)}, ShapeError, "targets ``n``"),
        ({"targets": torch.ones(19)}, ShapeError, "numbers of rows must agree"),
        (
            {"features": torch.full((20, 2), torch.nan)},
            InputDataError,
            "features contains",
        ),
        (
            {"targets": torch.full((20,), torch.inf)},
            InputDataError,
            "targets contains NaN",
        ),
        ({"noise_variance": 0.0}, ValueError, "noise_variance must be positive"),
        ({"prior_variance": -1.0}, ValueError, "prior_variance must be positive"),
        ({"noise_variance": torch.ones(20)}, ShapeError, "must be one number"),
    ],
)
def test_a_linear_model_of_bad_data_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        training_speed_bound(linear(20)._replace(**change))


def test_labels_are_refused_with_what_to_use_instead():
    with pytest.raises(NotImplementedError, match="TrainingSpeed ranks training runs"):
        training_speed_bound(build("softmax"))


def test_a_kernel_with_inducing_points_is_refused():
    X = inputs()
    kernel = InducingPointKernel(MaternKernel(1.5), X[:4], GaussianLikelihood())
    model = SingleTaskGP(X, targets("gaussian", X), covar_module=kernel)
    with pytest.raises(NotImplementedError, match="The bound .* InducingPointKernel"):
        training_speed_bound(model)


def test_a_process_beyond_the_memory_budget_is_refused(monkeypatch):
    monkeypatch.setattr(prefix_posteriors, "MEMORY_BUDGET", 24 * N**2 - 1)
    with pytest.raises(MemoryError, match=f"prior covariance of {N} targets"):
        training_speed_bound(process())


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="LinearizedGP, a gpytorch ExactGP"):
        training_speed_bound(nn.Linear(2, 1))
    empty = Process(None, None, GaussianLikelihood())
    with pytest.raises(TypeError, match="must have training data"):
        training_speed_bound(empty)


def test_a_batch_of_processes_is_refused():
    X = inputs()
    kernel = ScaleKernel(MaternKernel(batch_shape=torch.Size([2])))
    model = SingleTaskGP(X, targets("multitask", X), covar_module=kernel)
    with pytest.raises(ShapeError, match="one by one"):
        training_speed_bound(model)


def test_a_process_has_no_weights_to_optimise():
    with pytest.raises(NotImplementedError, match="LinearModel of the kernel's"):
        training_speed_bound(process(), solver=ConjugateGradients())


def test_further_observations_are_not_ignored_in_silence():
    model = build("gaussian")
    X = inputs(2, seed=9)
    more = model.condition_on_observations(X, targets("gaussian", X))
    with pytest.raises(NotImplementedError, match="12 training points only"):
        training_speed_bound(more)


def test_a_jacobian_beyond_the_budget_is_refused_with_the_remedy():
    needed = 8 * N * 25
    model = build("gaussian", inference=Exact(space="weight", memory_budget=needed))
    with pytest.raises(MemoryError, match=r"or pass solver="):
        training_speed_bound(model)


def test_infinitely_many_draws_of_a_sampled_model_are_refused():
    model = build("gaussian", inference=Sampled(4))
    with pytest.raises(ValueError, match="num_samples=inf"):
        training_speed_bound(model, math.inf)
