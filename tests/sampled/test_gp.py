"""A model of samples is the exact GP up to its solver and its number of samples."""

import copy
import pickle
import unittest

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from botorch.models.transforms import Normalize, Standardize, Warp
from botorch.models.transforms.outcome import StratifiedStandardize
from botorch.utils.datasets import SupervisedDataset
from gpytorch.kernels import MaternKernel, RBFKernel, RQKernel, ScaleKernel
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
)
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import nn

from gpbridge import SampledGP
from gpbridge.checks import ShapeError
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.representers import right_hand_sides
from gpbridge.solvers import (
    ConjugateGradients,
    SketchAndProject,
)
from gpbridge.testing import (
    ModelContractTestCase,
    assert_gradients_match_finite_differences,
)
from tests import oracles_sampling as oracles

EXACT = {"rtol": 1e-7, "atol": 1e-9}
CG = ConjugateGradients(tolerance=1e-12)


def matern(dtype=torch.float64):
    kernel = ScaleKernel(MaternKernel(1.5)).to(dtype)
    kernel.outputscale, kernel.base_kernel.lengthscale = 0.75, 0.5  # exact in binary
    return kernel


def gaussian(dtype=torch.float64):
    likelihood = GaussianLikelihood().to(dtype)
    likelihood.noise = 0.03125
    return likelihood


class Contract(ModelContractTestCase):
    solver = None
    pathwise_tolerance = 0.4  # four standard errors of a variance of 256 samples

    def create_model(self, dtype, num_outputs=1, **options):
        return SampledGP(
            covar_module=matern(dtype),
            likelihood=gaussian(dtype),
            solver=self.solver,
            num_samples=256,
            num_features=32,
            **options,
        )


class TestFactorised(Contract, unittest.TestCase):
    pass


@pytest.mark.slow
class TestIterated(Contract, unittest.TestCase):
    solver = CG


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(*shape, seed=1):
    return torch.rand(*shape, 2, dtype=torch.float64, generator=seeded(seed))


def targets(X, m=1):
    return torch.sin(5 * X.sum(-1, keepdim=True) + torch.arange(m).to(X))


def build(n=20, m=1, **options):
    X = points(n)
    options = {"covar_module": matern(), "likelihood": gaussian()} | options
    model = SampledGP(X, targets(X, m), **options)
    nn.init.constant_(model.mean_module.raw_constant, 0.25)
    return model


def exact(X, Y, Z, noise=0.03125):
    K = [oracles.matern(a, b, 0.5, 1.5, 0.75) for a, b in ((X, X), (Z, X), (Z, Z))]
    mean, covariance = oracles.gp_posterior(*K, noise, Y - 0.25)
    return mean + 0.25, covariance


@pytest.mark.parametrize("solver", [None, CG])
@pytest.mark.parametrize("n", [1, 20])
def test_the_moments_are_those_of_the_exact_gp(n, solver):
    model, Z = build(n, m=2, solver=solver, num_samples=2000), points(5, seed=2)
    X = points(n)
    mean, covariance = exact(X, targets(X, 2), Z)
    posterior = model.posterior(Z)
    torch.testing.assert_close(posterior.mean, mean, **EXACT)
    joint = posterior.distribution.covariance_matrix.unflatten(0, (5, 2))
    joint = joint.unflatten(-1, (5, 2))
    variance = covariance.diagonal()
    spread = (variance[:, None] * variance + covariance**2).sqrt() / 2000**0.5
    for i in range(2):
        error = (joint[:, i, :, i] - covariance) / spread
        assert error.abs().max() < 5
    assert not joint[:, 0, :, 1].any()


@pytest.mark.parametrize(
    "solver",
    [
        SketchAndProject(tolerance=1e-6, block_size=16),
        ConjugateGradients(tolerance=1e-6),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_any_solver_does(solver):
    model, exact_model, Z = build(50, solver=solver), build(50), points(5, seed=2)
    got, expected = model.posterior(Z), exact_model.posterior(Z)
    assert model.solution.converged and model.solution.passes > 1
    torch.testing.assert_close(got.mean, expected.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.variance, expected.variance, rtol=1e-3, atol=0)


def test_draws_are_the_samples_of_the_model():
    model, Z = build(m=2, num_samples=300), points(4, seed=2)
    values = model.draw()(Z)
    assert values.shape == (300, 4, 2)
    posterior = model.posterior(Z)
    deviations = values - posterior.mean
    variance = deviations.square().mean(0)
    torch.testing.assert_close(variance, posterior.variance, **EXACT)
    some = model.draw(5, generator=seeded())(Z)
    distance = (some[:, None] - values).abs().flatten(2).amax(-1)  # 5 x 300
    assert distance.amin(-1).max() < 1e-9
    assert len({tuple(one.flatten().tolist()) for one in some}) == 5
    assert torch.equal(some, model.draw(5, generator=seeded())(Z))


def test_more_draws_than_samples_are_solved_for():
    model, Z = build(num_samples=8), points(4, seed=2)
    X = points(20)
    mean, covariance = exact(X, targets(X), Z)
    values = model.draw(2000, generator=seeded())(Z)[..., 0]
    errors = oracles.covariance_errors(values - mean[:, 0], covariance)
    assert errors.abs().max() < 5


def test_variances_of_few_samples_scatter_as_stated():
    X, Z = points(20), points(30, seed=2)
    _, covariance = exact(X, targets(X), Z)
    ratios = []
    for seed in range(12):
        model = build(num_samples=16, generator=seeded(seed))
        ratios.append(model.posterior(Z).variance[:, 0] / covariance.diagonal())
    spread = torch.stack(ratios).std()
    assert 0.7 < spread / (2 / 16) ** 0.5 < 1.5


def test_samples_interpolate_at_tiny_noise():
    model = build(mean_module=None)
    model.likelihood = GaussianLikelihood().double()
    model.likelihood.noise_covar.raw_noise_constraint.lower_bound.fill_(1e-9)
    model.likelihood.noise = 1e-8
    X = points(20)
    draws = model.draw()(X)
    assert (draws - targets(X)).abs().max() < 1e-2
    assert model.posterior(X).variance.max() < 1e-6


def test_noise_is_a_variance_and_is_added_once():
    model, Z = build(num_samples=16), points(4, seed=2)
    latent = model.posterior(Z)
    noisy = model.posterior(Z, observation_noise=True)
    noise = torch.full_like(noisy.variance, 0.03125)
    torch.testing.assert_close(noisy.variance - latent.variance, noise, **EXACT)
    joint, clean = (p.distribution.covariance_matrix for p in (noisy, latent))
    added = joint - clean
    torch.testing.assert_close(added, 0.03125 * torch.eye(4).double(), **EXACT)
    got = model.predict(Z).variance - model.marginals(Z)[1]
    torch.testing.assert_close(got, noise, **EXACT)
    own = torch.tensor([[0.1], [0.2], [0.3], [0.4]]).double()
    given = model.posterior(Z, observation_noise=own).variance
    torch.testing.assert_close(given - latent.variance, own, **EXACT)
    # Draws are of the function: no noise, though samples met noise at the data.
    spread = model.draw()(Z) - latent.mean
    torch.testing.assert_close(spread.square().mean(0), latent.variance, **EXACT)
    # What the samples met at the data is this noise once, not its root, and once.
    system = model._solve()
    met = right_hand_sides(system.prior, system.mean, system.data, system.seed)[:, 1:]
    met = met - system.prior(system.data.X)[..., 0].mT
    share = met.square().mean() / 0.03125
    assert abs(share - 1) < 4 * (2 / met.numel()) ** 0.5


def test_more_points_than_samples_have_a_singular_posterior_to_sample_from():
    for m in (1, 2):
        model, Z = build(m=m, num_samples=8), points(3, 12, seed=2)
        posterior = model.posterior(Z)
        assert posterior.rsample(torch.Size([4])).shape == (4, 3, 12, m)
        shape = (4, *posterior.base_sample_shape)
        base = torch.randn(shape, generator=seeded()).double()
        samples = posterior.rsample_from_base_samples(torch.Size([4]), base)
        assert samples.shape == (4, 3, 12, m)
        # As in the joint of few points, whose covariance has full rank.
        some = model.posterior(Z[..., :3, :]).distribution.covariance_matrix
        joint = posterior.distribution.covariance_matrix[..., : 3 * m, : 3 * m]
        torch.testing.assert_close(joint, some, **EXACT)


def test_marginals_and_predictions_of_many_points(monkeypatch):
    monkeypatch.setattr("gpbridge.sampled.gp._ROWS", 5)
    options = {"outcome_transform": Standardize(2), "input_transform": Normalize(2)}
    for m, given in ((1, {}), (2, options)):
        model, Z = build(m=m, num_samples=16, **given), points(3, 4, seed=2)
        noisy = model.posterior(Z, observation_noise=True)
        predicted = model.predict(Z)
        torch.testing.assert_close(predicted.mean, noisy.mean, **EXACT)
        torch.testing.assert_close(predicted.variance, noisy.variance, **EXACT)
        mean, variance = model.marginals(Z)
        if not given:
            latent = model.posterior(Z)
            torch.testing.assert_close(mean, latent.mean, **EXACT)
            torch.testing.assert_close(variance, latent.variance, **EXACT)
        assert variance.shape == (3, 4, m)


def test_a_transform_of_targets_sees_transformed_inputs():
    task = torch.tensor([0.0, 2.0]).double().repeat(10)[:, None]
    X = torch.cat([points(20)[:, :1], task], -1)
    Y = 5 + 20 * task + X[:, :1].sin()
    tasks = torch.tensor([0.0, 1.0]).double()  # of the transformed inputs, as upstream
    model = SampledGP(
        X, Y, matern(), solver=CG, num_samples=4, input_transform=Normalize(2),
        outcome_transform=StratifiedStandardize(1, tasks),
    )  # fmt: skip
    for k in (0, 1):
        mean = model.outcome_transform.means[k].squeeze()
        torch.testing.assert_close(mean, Y[task == 2 * k].mean())


def test_networks_are_sampled_in_weight_space():
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    kernel = NeuralTangentKernel(net).double()
    model, Z = build(covar_module=kernel, num_samples=1000), points(3, seed=2)
    K = [
        kernel(a, b).to_dense().detach()
        for a, b in ((points(20),) * 2, (Z, points(20)), (Z, Z))
    ]
    _, covariance = oracles.gp_posterior(*K, 0.03125, torch.zeros(20, 1).double())
    values = model.draw()(Z)[..., 0] - model.posterior(Z).mean[:, 0]
    assert oracles.covariance_errors(values, covariance).abs().max() < 5


# -- what is kept, and for how long ----------------------------------------------------


def counted(solver, calls):
    def solve(operator, rhs, initial=None):
        solution = solver(operator, rhs, initial)
        calls.append((rhs.shape, solution.iterations))
        return solution

    return solve


def test_the_system_is_solved_when_needed_and_again_after_changes():
    calls = []
    model, Z = build(solver=counted(CG, calls), num_samples=8), points(3)
    assert not calls and model.solution is None and "not solved yet" in repr(model)
    before = model.posterior(Z).mean
    model.posterior(Z), model.draw(2)
    assert [shape for shape, _ in calls] == [(20, 9)]
    assert "converged, relative residual" in repr(model)
    model.covar_module.base_kernel.lengthscale = 0.4
    assert not torch.allclose(model.posterior(Z).mean, before)
    assert len(calls) == 2
    model.covar_module.base_kernel.lengthscale = 0.5
    torch.testing.assert_close(model.posterior(Z).mean, before, **EXACT)


def test_warm_starts_save_iterations():
    solver = ConjugateGradients(tolerance=1e-2, preconditioner_rank=0)
    calls = []
    model = build(60, solver=counted(solver, calls), num_samples=4)
    model.posterior(points(1))
    model.covar_module.outputscale = 0.7501
    model.posterior(points(1))
    new = points(1, seed=5)
    model.condition_on_observations(new, targets(new)).posterior(points(1))
    assert [shape for shape, _ in calls] == [(60, 5), (60, 5), (61, 5)]
    assert calls[1][1] < 0.7 * calls[0][1]
    assert calls[2][1] < calls[0][1]


def test_an_unfinished_solve_says_so():
    with pytest.warns(RuntimeWarning, match="relative residual"):
        model = build(solver=ConjugateGradients(1e-8, 1, preconditioner_rank=0))
        model.posterior(points(1))
    assert "NOT converged" in repr(model) and not model.solution.converged


def test_copies_carry_the_solution_and_states_the_seed():
    calls = []
    model, Z = build(generator=seeded(4)), points(3)
    moments = model.posterior(Z)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.solution is not None
        assert torch.equal(twin.posterior(Z).variance, moments.variance)
    other = build(solver=counted(CG, calls))
    assert not torch.equal(other.posterior(Z).variance, moments.variance)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.posterior(Z).variance, moments.variance, **EXACT)


def test_a_state_carries_further_data_outputs_and_fixed_noise():
    Z, X, Y = points(3), points(2, seed=8), targets(points(2, seed=8), 2)
    model = build(m=2).condition_on_observations(X.expand(4, 2, 2), Y.expand(4, 2, 2))
    other = build(m=2, generator=seeded(4))
    other.load_state_dict(model.state_dict())
    assert other.batch_shape == (4,)
    torch.testing.assert_close(
        other.posterior(Z).mean, model.posterior(Z).mean, **EXACT
    )
    other.load_state_dict(build(m=2).state_dict())
    assert other.batch_shape == ()
    subset, twin = build(m=2).subset_output([1]), build(m=2)
    twin.load_state_dict(subset.state_dict())
    assert twin.num_outputs == 1
    assert torch.equal(twin.posterior(Z).mean, subset.posterior(Z).mean)
    noise = torch.linspace(0.01, 0.5, 20, dtype=torch.float64)[:, None]
    known = build(likelihood=None, train_Yvar=noise)
    other = build(likelihood=None, train_Yvar=torch.ones_like(noise))
    other.load_state_dict(known.state_dict())
    assert torch.equal(other.posterior(Z).variance, known.posterior(Z).variance)


def test_options_that_change_are_obeyed():
    Z = points(3)
    with pytest.warns(RuntimeWarning, match="relative residual"):
        model = build(solver=ConjugateGradients(1e-8, 1, preconditioner_rank=0))
        model.posterior(Z)
    model.solver = None
    exact = build().posterior(Z).mean
    torch.testing.assert_close(model.posterior(Z).mean, exact, **EXACT)
    model.num_samples = 5
    assert model.draw()(Z).shape == (5, 3, 1)
    model.covar_module.outputscale = 0.5
    assert model.draw()(Z).shape == (5, 3, 1)


def test_a_draw_is_its_own():
    model, Z = build(), points(3)
    before = model.posterior(Z).mean
    model.draw(2).float()
    model.draw(2).to("meta")
    assert torch.equal(model.posterior(Z).mean, before)


def test_a_second_noise_is_counted_once():
    noise = torch.full((20,), 0.01, dtype=torch.float64)
    models = []
    for value in (0.5, 2.0):
        likelihood = FixedNoiseGaussianLikelihood(noise, learn_additional_noise=True)
        likelihood.double().second_noise = value
        models.append(build(likelihood=likelihood))
    model, other = models
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.noise_variance, model.noise_variance)
    new = points(2, seed=4)
    grown = model.condition_on_observations(
        new, targets(new), torch.full((2, 1), 0.02, dtype=torch.float64)
    )
    expected = torch.cat([noise, noise[:2] + 0.01]) + 0.5
    torch.testing.assert_close(grown.noise_variance, expected)
    assert len(list(grown.likelihood.parameters())) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"covar_module": RQKernel().double()}, NotImplementedError, "RQKernel"),
        (
            {"covar_module": MaternKernel(1.5, ard_num_dims=3).double()},
            ShapeError,
            "does not take inputs of 2 columns.*ard_num_dims",
        ),
        (
            {"covar_module": MaternKernel(1.5, active_dims=[5]).double()},
            ShapeError,
            "does not take inputs of 2 columns.*active_dims",
        ),
        ({"solver": "cg"}, TypeError, "object of gpbridge.solvers.*'cg'"),
        ({"solver": SketchAndProject}, TypeError, "object of gpbridge.solvers"),
        ({"num_samples": 2.5}, ValueError, "whole number above zero, but is 2.5"),
        ({"num_samples": True}, ValueError, "num_samples must be a whole number"),
        (
            {"likelihood": GaussianLikelihood(batch_shape=torch.Size([2])).double()},
            ShapeError,
            "one noise variance",
        ),
    ],
)
def test_parts_that_do_not_fit_are_found_at_the_door(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


def test_inference_mode_does_not_spoil_later_gradients():
    model, Z = build(), points(3)
    with torch.inference_mode():
        model.posterior(points(3)).mean, model.draw(2)(points(3))
    Z.requires_grad_()
    assert torch.autograd.grad(model.posterior(Z).variance.sum(), Z)[0].any()


# -- further data ----------------------------------------------------------------------


def test_fantasies_have_gradients_in_their_inputs():
    model = build(num_samples=16)
    Z, Y = points(3, seed=3), targets(points(2, 2, seed=6))

    def moments(X):
        posterior = model.condition_on_observations(X, Y).posterior(Z)
        return torch.stack([posterior.mean, posterior.variance])

    assert_gradients_match_finite_differences(moments, points(2, 2, seed=4))
    alone = points(2, seed=4)
    grown = model.condition_on_observations(alone, Y[0])
    tracked = model.condition_on_observations(alone.clone().requires_grad_(), Y[0])
    got, expected = tracked.posterior(Z), grown.posterior(Z)
    torch.testing.assert_close(got.mean, expected.mean, **EXACT)
    torch.testing.assert_close(got.variance, expected.variance, **EXACT)
    torch.testing.assert_close(tracked.draw()(Z), grown.draw()(Z), **EXACT)
    twin = copy.deepcopy(tracked)
    torch.testing.assert_close(twin.posterior(Z).mean, expected.mean, **EXACT)


def test_observations_move_with_the_model():
    X, Z = points(3, 2, seed=4), points(4, seed=2)
    model = build(num_samples=16).condition_on_observations(X, targets(X))
    expected = model.posterior(Z)
    model.float()
    assert {tensor.dtype for tensor in model._new} == {torch.float32}
    got = model.posterior(Z.float())
    assert got.mean.dtype == torch.float32
    torch.testing.assert_close(got.mean, expected.mean.float(), rtol=0, atol=1e-3)


def test_an_inexact_solver_leaves_a_positive_correction():
    solver = ConjugateGradients(tolerance=0.3, preconditioner_rank=0)
    model = build(40, solver=solver, num_samples=8)
    model.likelihood.noise = 1e-3
    X = points(40)[:4].expand(3, 4, 2)  # again at the data, where c is smallest
    conditioned = model.condition_on_observations(X, targets(X))
    assert bool((conditioned.posterior(points(3)).variance > 0).all())


def test_fixed_noise_grows_with_the_data():
    noise = torch.linspace(0.01, 0.5, 20).double()
    X, Y, Z = points(20), targets(points(20)), points(4, seed=2)
    model = build(likelihood=None, train_Yvar=noise[:, None], num_samples=16)
    mean, _ = exact(X, Y, Z, noise)
    torch.testing.assert_close(model.posterior(Z).mean, mean, **EXACT)
    new = points(2, seed=3)
    both = torch.cat([noise, torch.tensor([0.02, 0.7]).double()])
    mean, _ = exact(torch.cat([X, new]), torch.cat([Y, targets(new)]), Z, both)
    for shape in ((2, 2), (1, 2, 2)):
        conditioned = model.condition_on_observations(
            new.reshape(shape), targets(new).reshape(*shape[:-1], 1), both[20:, None]
        )
        got = conditioned.posterior(Z).mean.reshape(4, 1)
        torch.testing.assert_close(got, mean, **EXACT)
    assert len(model.likelihood.noise) == 20
    with pytest.raises(ShapeError, match=r"noise must be ``2 x m`` for X of sha"):
        model.condition_on_observations(new, targets(new), both[20:])
    with pytest.raises(ValueError, match="noise must be given: FixedNoise"):
        model.condition_on_observations(new, targets(new))


def test_subsets_can_be_conditioned():
    model, Z = build(m=3, num_samples=16), points(4, seed=2)
    new = points(2, seed=3)
    whole = model.condition_on_observations(new, targets(new, 3)).posterior(Z)
    subset = model.subset_output([2, 0])
    part = subset.condition_on_observations(new, targets(new, 3)[:, [2, 0]])
    torch.testing.assert_close(part.posterior(Z).mean, whole.mean[:, [2, 0]], **EXACT)
    variance = whole.variance[:, [2, 0]]
    torch.testing.assert_close(part.posterior(Z).variance, variance, **EXACT)
    draws = part.draw()(Z)
    assert draws.shape == (16, 4, 2)
    one = model.subset_output([1]).draw(20, generator=seeded())(Z)
    assert one.shape == (20, 4, 1)


def test_the_prior_in_train_mode_serves_gpytorchs_objective():
    model, X = build(), points(20)
    mll = ExactMarginalLogLikelihood(model.likelihood, model.train())
    value = 20 * mll(model(X), model.train_targets)
    K = oracles.matern(X, X, 0.5, 1.5, 0.75)
    expected = oracles.log_evidence(K, 0.03125, targets(X) - 0.25)
    torch.testing.assert_close(value, expected, **EXACT)
    assert build(m=2).train()(points(3, 4)).mean.shape == (3, 4, 2)


def test_defaults_and_known_noise_from_a_dataset():
    X, Y = points(20), targets(points(20))
    options = {
        "input_transform": Normalize(2),
        "outcome_transform": Standardize(1),
    }
    data = SupervisedDataset(
        X, Y, Yvar=0.1 + Y**2, feature_names=["a", "b"], outcome_names=["y"]
    )
    inputs = SampledGP.construct_inputs(data)
    model = SampledGP(**inputs, covar_module=matern(), **options)
    expected = (0.1 + Y**2) / Y.var()
    torch.testing.assert_close(model.likelihood.noise, expected[:, 0], **EXACT)
    assert model.num_samples == 64 and model.posterior(X).mean.shape == (20, 1)
    before = torch.get_rng_state()
    plain = SampledGP(X.float(), Y.float(), RBFKernel(), num_samples=4)
    plain.draw(2)
    assert plain.posterior(X.float()).mean.dtype == torch.float32
    assert torch.equal(before, torch.get_rng_state())


class TestRefusals:
    def test_shapes(self):
        with pytest.raises(
            ShapeError, match=r"shapes \(9, 2\) and \(9,\). For one out"
        ):
            SampledGP(points(9), targets(points(9))[:, 0], matern())
        with pytest.raises(ShapeError, match="rows must agree"):
            SampledGP(points(9), targets(points(8)), matern())
        with pytest.raises(InputDataError, match="train_X has no rows"):
            SampledGP(points(0), targets(points(0)), matern())
        with pytest.raises(ShapeError, match=r"Y must be ``... x 2 x 1`` for X"):
            build().condition_on_observations(points(2), targets(points(2), 2))
        with pytest.raises(ShapeError, match="X must have 2 columns"):
            build().posterior(points(3)[:, :1])

    def test_bad_values(self):
        with pytest.raises(ValueError, match="train_Yvar must be positive and finite"):
            build(likelihood=None, train_Yvar=torch.zeros(20, 1).double())
        with pytest.raises(InputDataError, match="train_Y contains NaN"):
            SampledGP(points(9), targets(points(9)) * torch.nan, matern())
        with pytest.raises(ValueError, match="num_samples must be a whole number"):
            build(num_samples=0)
        with pytest.raises(TypeError, match="train_Y must be torch.float64"):
            SampledGP(points(9), targets(points(9)).float(), matern())
        with pytest.raises(TypeError, match="a gpytorch Kernel, but is str"):
            SampledGP(points(9), targets(points(9)), "matern")

    def test_likelihoods(self):
        with pytest.raises(TypeError, match="but is BernoulliLikelihood"):
            build(likelihood=BernoulliLikelihood())
        noise = torch.ones(20).double()
        with pytest.raises(ShapeError, match="Fixed noise must be ``n`` variances"):
            build(m=2, likelihood=FixedNoiseGaussianLikelihood(noise))
        with pytest.raises(ValueError, match="train_Yvar or a likelihood, not both"):
            build(train_Yvar=noise[:, None])
        with pytest.raises(ShapeError, match="train_Yvar must be ``n x 1`` with one"):
            build(m=2, likelihood=None, train_Yvar=noise[:, None])

    def test_kernels(self):
        batch = torch.Size([2])
        with pytest.raises(
            ShapeError, match=r"covar_module must have no batch, but ha"
        ):
            build(covar_module=RBFKernel(batch_shape=batch).double())
        with pytest.raises(NotImplementedError, match="RQKernel has no feature map"):
            build(covar_module=RQKernel().double()).posterior(points(1))

    def test_learnable_transforms(self):
        warp = Warp(2, [0, 1])
        with pytest.raises(ValueError, match="Warp has learnable parameters"):
            build(input_transform=warp)

    def test_batches_of_fantasies(self):
        X = points(3, 2, seed=3)
        fantasies = build().condition_on_observations(X, targets(X))
        with pytest.raises(NotImplementedError, match="Draw from the model that was"):
            fantasies.draw(2)
        with pytest.raises(NotImplementedError, match="posterior.X. for joint moments"):
            fantasies.marginals(points(1))
        with pytest.raises(NotImplementedError, match="Subset the outputs before"):
            fantasies.subset_output([0])
        with pytest.raises(ValueError, match=r"idcs must name outputs in 0 .. 0"):
            build().subset_output([1])

    def test_noise_that_differs_between_outputs(self):
        model, X = build(m=2), points(3, 2, seed=3)
        noise = torch.tensor([0.1, 0.2]).double().expand(3, 2, 2)
        with pytest.raises(ValueError, match="noise must be the same for all outputs"):
            model.condition_on_observations(X, targets(X, 2), noise)
