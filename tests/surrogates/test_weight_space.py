"""Posteriors over weights as BoTorch models: the contract, ensembles as they are."""

import copy
import pickle
import unittest

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.acquisition.objective import GenericMCObjective
from botorch.exceptions.errors import InputDataError, UnsupportedError
from botorch.models import SingleTaskGP
from botorch.models.model import ModelList
from botorch.models.transforms import Normalize, Standardize
from botorch.models.transforms.outcome import Log, StratifiedStandardize
from botorch.optim import optimize_acqf
from botorch.sampling.list_sampler import ListSampler
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.datasets import SupervisedDataset
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from gpbridge.acquisition import DrawsPosterior, EnumeratingSampler
from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.checks import ReliabilityWarning, ShapeError
from gpbridge.dnn.dropout import MCDropout
from gpbridge.dnn.ensembles import DeepEnsemble
from gpbridge.functional import FunctionalNet
from gpbridge.heteroscedastic import HeteroscedasticGaussianLikelihood
from gpbridge.surrogates import WeightSpaceModel
from gpbridge.testing import ModelContractTestCase, assert_module_unchanged
from gpbridge.weights import EmpiricalWeights, GaussianWeights, MixtureWeights


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def network(m=1, dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, m)
    return nn.Sequential(*layers).to(dtype)


def gaussian_weights(module, std=0.3):
    net = FunctionalNet(module)
    mean = net.flatten(net.params).detach()
    variance = std**2 * (0.5 + normal(len(mean), seed=1).sigmoid()).to(mean)
    root = std * normal(len(mean), 2, seed=2).to(mean)
    return GaussianWeights(net, mean, variance, root)


def likelihood_for(m, dtype=torch.float64):
    if m == 1:
        return GaussianLikelihood().to(dtype)
    return MultitaskGaussianLikelihood(m, rank=0, has_global_noise=False).to(dtype)


class Contract(ModelContractTestCase):
    mode = "ensemble"
    supports_conditioning = False
    supports_fantasies = False
    supports_pathwise = False

    def create_model(self, dtype, num_outputs=1, **options):
        module = self.watch(network(num_outputs, dtype))
        return WeightSpaceModel(
            self.weights(module),
            mode=self.mode,
            likelihood=likelihood_for(num_outputs, dtype),
            generator=seeded(),
            num_samples=64,  # variances of samples and of members differ by a 64th
            **options,
        )

    def weights(self, module):
        return gaussian_weights(module)


class Ensemble(Contract):
    def sampler(self, num_samples):
        return EnumeratingSampler(torch.Size([64]))


class TestDrawsOfGaussianWeights(Ensemble, unittest.TestCase):
    pass


@pytest.mark.slow
class TestMembers(Ensemble, unittest.TestCase):
    def weights(self, module):
        parts = [
            EmpiricalWeights(w.net, w.sample_weights(8, seeded()))
            for w in (gaussian_weights(module), gaussian_weights(module, 0.6))
        ]
        return MixtureWeights(parts)


@pytest.mark.slow
class TestDropout(Ensemble, unittest.TestCase):
    def weights(self, module):
        return MCDropout(nn.Sequential(*module[:2], nn.Dropout(0.2), module[2]))


class TestMomentsOfDraws(Contract, unittest.TestCase):
    mode = "gaussian"


class TestTangentModel(Contract, unittest.TestCase):
    mode = "linearized"

    @pytest.mark.slow
    def test_acquisition_gradients_match_finite_differences(self):
        super().test_acquisition_gradients_match_finite_differences()


def build(m=1, mode="ensemble", outputs=None, **options):
    posterior = options.pop("posterior", None)
    if posterior is None:
        posterior = gaussian_weights(network(outputs or m))
    options = {"num_outputs": m, "likelihood": likelihood_for(m)} | options
    return WeightSpaceModel(posterior, mode=mode, **options)


def test_the_ensemble_is_the_draws_and_repeats_itself():
    weights, X = gaussian_weights(network(2)), normal(3, 4, 2)
    model = build(2, posterior=weights, num_samples=7, generator=seeded(3))
    posterior = model.posterior(X)
    assert isinstance(posterior, DrawsPosterior)
    expected = weights.draw(7, seeded(3))(X)
    torch.testing.assert_close(posterior.values, expected.movedim(0, -3))
    assert torch.equal(model.posterior(X).values, posterior.values)
    torch.testing.assert_close(posterior.mean, expected.mean(0))
    torch.testing.assert_close(posterior.variance, expected.var(0))


@pytest.mark.parametrize("m", [1, 2])
def test_the_normal_has_the_moments_of_the_ensemble(m):
    X = normal(3, 4, 2)
    ensemble = build(m).posterior(X)
    normal_posterior = build(m, "gaussian", jitter=0.0).posterior(X)
    torch.testing.assert_close(normal_posterior.mean, ensemble.mean)
    torch.testing.assert_close(normal_posterior.variance, ensemble.variance)
    torch.testing.assert_close(
        normal_posterior.distribution.covariance_matrix,
        ensemble.distribution.covariance_matrix,
    )


def test_log_ei_of_the_ensemble_is_that_of_the_matching_normal():
    X = normal(5, 1, 2)
    values = [
        LogExpectedImprovement(build(mode=mode, jitter=1e-10), 0.3)(X)
        for mode in ("ensemble", "gaussian")
    ]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
    # The tangent model is that normal without Monte Carlo error, for narrow weights.
    weights = gaussian_weights(network(), std=0.02)
    best = float(network()(X).max().detach())
    many = {"posterior": weights, "num_samples": 20000, "jitter": 0.0}
    values = [
        LogExpectedImprovement(build(mode=mode, **many), best)(X).exp()
        for mode in ("ensemble", "linearized")
    ]
    assert float((values[0] / values[1] - 1)[values[1] > 1e-4].abs().max()) < 0.1


def test_q_log_ei_of_the_ensemble_is_the_average_over_members():
    model, X, best = build(num_samples=9), normal(4, 3, 2), 0.2
    values = model.posterior(X).values.squeeze(-1)  # 4 x 9 x 3
    improvement = (values.amax(-1) - best).clamp_min(0).mean(-1)
    # Tight smoothing, so that it is the improvement itself.
    function = qLogExpectedImprovement(model, best, tau_max=1e-4, tau_relu=1e-8)
    torch.testing.assert_close(function(X).exp(), improvement, rtol=1e-3, atol=1e-6)
    assert isinstance(function.sampler, EnumeratingSampler)


def test_candidates_are_found_without_a_sampler_of_ones_own():
    model = build(num_samples=16)
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    torch.manual_seed(0)
    function = qLogExpectedImprovement(model, 0.1)
    start, _ = optimize_acqf(
        function, bounds, q=2, num_restarts=2, raw_samples=8, options={"maxiter": 20}
    )
    middle = function(torch.full((1, 2, 2), 0.5).double())
    assert float(function(start[None])) >= float(middle)


@pytest.mark.parametrize("mode", ["ensemble", "gaussian", "linearized"])
def test_predictions_have_mean_and_variance_of_the_model_plus_noise(mode):
    X = normal(3, 4, 2)
    for m in (1, 2):
        model = build(m, mode, jitter=0.0)
        prediction, latent = model.predict(X), model.posterior(X)
        noise = model.likelihood.noise if m == 1 else model.likelihood.task_noises
        # A mixture has the variance of its members, that of a sample divides by s - 1.
        share = 63 / 64 if mode == "ensemble" else 1.0
        torch.testing.assert_close(prediction.mean, latent.mean)
        expected = share * latent.variance + noise
        torch.testing.assert_close(prediction.variance, expected)
        noisy = model.posterior(X, observation_noise=True)
        torch.testing.assert_close(noisy.variance, latent.variance + noise)
        assert prediction.log_prob(prediction.mean).shape == (
            (3, 4, 1) if m == 1 else (3, 4)
        )
    if mode == "ensemble":
        assert isinstance(prediction, MixtureSameFamily)
    else:
        assert isinstance(prediction, Independent)
        assert isinstance(build(1, mode).predict(X), Normal)


def transforms(Y):
    standardize = Standardize(1)
    standardize(Y)
    bounds = torch.tensor([[-1.0, -1.0], [3.0, 3.0]], dtype=torch.float64)
    return {
        "input_transform": Normalize(2, bounds=bounds),
        "outcome_transform": standardize.eval(),
    }


@pytest.mark.parametrize("mode", ["ensemble", "gaussian", "linearized"])
def test_predictions_are_in_the_units_of_the_targets(mode):
    Y, X = 5 + 3 * normal(30, 1, seed=4), normal(6, 2)
    options = transforms(Y)
    plain, model = build(mode=mode), build(mode=mode, **options)
    Z = (X + 1) / 4
    got, want = model.predict(X), plain.predict(Z)
    torch.testing.assert_close(got.mean, Y.mean() + Y.std() * want.mean)
    torch.testing.assert_close(got.variance, Y.var() * want.variance)
    density = got.log_prob(Y[:6]) + Y.std().log()
    torch.testing.assert_close(density, want.log_prob((Y[:6] - Y.mean()) / Y.std()))
    parts, plain_parts = model.decompose(X), plain.decompose(Z)
    torch.testing.assert_close(parts.variance, Y.var() * plain_parts.variance)
    torch.testing.assert_close(parts.mean, got.mean)
    torch.testing.assert_close(parts.variance, got.variance)


def test_data_fit_the_transforms_and_tell_the_number_of_outputs():
    X, Y = normal(20, 2), 4 + 2 * normal(20, 3, seed=1)
    model = WeightSpaceModel(
        gaussian_weights(network(3)),
        X,
        Y,
        input_transform=Normalize(2),
        outcome_transform=Standardize(3),
    )
    assert model.num_outputs == 3
    torch.testing.assert_close(model.outcome_transform.means[0], Y.mean(0))
    low = model.transform_inputs(X).min(0).values
    torch.testing.assert_close(low, torch.zeros(2).double())


def test_parts_of_the_variance_are_those_of_the_prediction_under_any_transform():
    X, likelihood = normal(4, 2), HeteroscedasticGaussianLikelihood()
    options = {"outputs": 2, "likelihood": likelihood, "outcome_transform": Log()}
    model = build(**options)
    parts, prediction = model.decompose(X), model.predict(X)
    torch.testing.assert_close(parts.mean, prediction.mean)
    torch.testing.assert_close(parts.variance, prediction.variance)
    # To first order in the noise of each draw, as upstream.
    mean, raw = model.function_space.draws(X).split(1, -1)
    noise = torch.log1p(raw.exp()) + 1e-6
    torch.testing.assert_close(
        parts.epistemic_variance, mean.exp().var(0, correction=0)
    )
    each = noise * (2 * mean).exp()
    torch.testing.assert_close(parts.aleatoric_variance, each.mean(0))
    with pytest.raises(NotImplementedError, match="Log. Try mode='ensemble'"):
        build(mode="gaussian", **options).decompose(X)


def test_a_transform_of_targets_sees_the_inputs_of_the_network():
    task = torch.tensor([0.0, 2.0]).double().repeat(10)[:, None]
    X = torch.cat([normal(20, 1).sigmoid(), task], -1)
    Y = 5 + 20 * task + normal(20, 1, seed=1)
    model = WeightSpaceModel(
        gaussian_weights(network()),
        X,
        Y,
        input_transform=Normalize(2),
        outcome_transform=StratifiedStandardize(1, torch.tensor([0.0, 1.0]).double()),
    )
    plain = WeightSpaceModel(gaussian_weights(network()), num_outputs=1)
    Z = model.transform_inputs(X)
    for k in (0, 1):
        rows = Z[:, 1] == k
        expected = Y[rows].mean() + Y[rows].std() * plain.posterior(Z[rows]).mean
        torch.testing.assert_close(model.posterior(X[rows]).mean, expected)


@pytest.mark.parametrize("mode", ["ensemble", "gaussian", "linearized"])
def test_predicted_noise_is_the_noise_and_no_output(mode):
    X, likelihood = normal(4, 2), HeteroscedasticGaussianLikelihood(2)
    model = build(2, mode, outputs=4, likelihood=likelihood, jitter=0.0)
    outputs = model.function_space.draws(X)
    assert model.num_outputs == 2 and model.posterior(X).mean.shape == (4, 2)
    noise = torch.log1p(outputs[..., 2:].exp()).mean(0) + 1e-6
    noisy = model.posterior(X, observation_noise=True).variance
    torch.testing.assert_close(noisy - model.posterior(X).variance, noise)
    parts = model.decompose(X)
    torch.testing.assert_close(parts.aleatoric_variance, noise)
    spread = model.posterior(X).variance
    if mode == "ensemble":
        spread = outputs[..., :2].var(0, correction=0)
    torch.testing.assert_close(parts.epistemic_variance, spread)
    one = model.subset_output([1])
    torch.testing.assert_close(one.decompose(X).mean, parts.mean[:, 1:])
    torch.testing.assert_close(
        one.predict(X).variance, model.predict(X).variance[:, 1:]
    )


def test_correlated_noise_enters_the_joint_covariance():
    likelihood = MultitaskGaussianLikelihood(2, rank=1).double()
    X = normal(3, 2)
    for mode in ("ensemble", "gaussian"):
        model = build(2, mode, likelihood=likelihood, jitter=0.0)
        latent = model.posterior(X).distribution.covariance_matrix
        noisy = model.posterior(X, observation_noise=True)
        factor = likelihood.task_noise_covar_factor
        Sigma = factor @ factor.mT + likelihood.noise * torch.eye(2)
        expected = torch.block_diag(Sigma, Sigma, Sigma)
        added = noisy.distribution.covariance_matrix - latent
        torch.testing.assert_close(added, expected)
        one = model.subset_output([1])
        latent = one.posterior(X).variance
        added = one.posterior(X, observation_noise=True).variance - latent
        torch.testing.assert_close(added, Sigma[1, 1].expand(3, 1))
    whole = build(2, likelihood=likelihood)
    assert whole.predict(X).log_prob(torch.zeros(3, 2).double()).shape == (3,)
    with pytest.raises(NotImplementedError, match="Ask the whole model"):
        whole.subset_output([0]).predict(X)


@pytest.mark.parametrize("mode", ["ensemble", "linearized"])
def test_labels_are_predicted_by_the_average_probability(mode):
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    model, X = build(3, mode, likelihood=likelihood), normal(4, 2)
    prediction = model.predict(X)
    assert isinstance(prediction, Categorical)
    p = torch.softmax(model.function_space.draws(X), -1).mean(0)
    torch.testing.assert_close(prediction.probs, p)
    assert bool((model.decompose(X).mutual_information > 0).all())
    with pytest.raises(ValueError, match="SoftmaxLikelihood has labels.*Leave"):
        model.posterior(X, observation_noise=True)


def test_fixed_noise_of_other_points_must_be_given():
    noise = torch.full((5,), 0.2).double()
    model = build(likelihood=FixedNoiseGaussianLikelihood(noise))
    X = normal(3, 2)
    with pytest.raises(ShapeError, match="Pass noise="):
        model.posterior(X, observation_noise=True)
    given = torch.full((3, 1), 0.2).double()
    noisy = model.posterior(X, observation_noise=given)
    torch.testing.assert_close(noisy.variance, model.posterior(X).variance + 0.2)


def test_a_gp_of_this_kind_can_stand_beside_a_stock_gp():
    X = normal(8, 2).sigmoid()
    stock = SingleTaskGP(X, Standardize(1)(X[:, :1])[0], outcome_transform=None)
    for model in (build(mode="gaussian"), stock):
        function = qLogExpectedImprovement(model, 0.1)
        assert function(X[:, None]).shape == (8,)


def test_copies_have_states_of_their_own_and_the_module_is_untouched():
    module, X = network(), normal(3, 2)
    with assert_module_unchanged(module):
        weights = gaussian_weights(module)
        model = build(posterior=weights)
        twin = copy.deepcopy(model).float()
        assert twin.posterior(X.float()).mean.dtype == torch.float32
    before = model.posterior(X).mean
    weights.mean.zero_()
    assert torch.equal(model.posterior(X).mean, before)
    again = pickle.loads(pickle.dumps(model.subset_output([0])))
    assert torch.equal(again.posterior(X).mean, before)


def test_default_draws_are_those_of_seed_zero():
    weights, X = gaussian_weights(network()), normal(3, 2)
    first, second = (WeightSpaceModel(weights, X[:1]) for _ in range(2))
    assert torch.equal(first.posterior(X).values, second.posterior(X).values)
    other = WeightSpaceModel(weights, X[:1], generator=seeded(1))
    assert not torch.equal(first.posterior(X).values, other.posterior(X).values)


def test_known_noise_of_a_dataset_is_left_to_the_likelihood():
    X = normal(4, 2)
    names = {"feature_names": ["a", "b"], "outcome_names": ["y"]}
    data = SupervisedDataset(X, X[:, :1], Yvar=X[:, :1].square(), **names)
    options = WeightSpaceModel.construct_inputs(data, mode="gaussian")
    assert set(options) == {"train_X", "train_Y", "mode"}
    model = WeightSpaceModel(gaussian_weights(network()), **options)
    assert model.mode == "gaussian" and model.num_outputs == 1


def test_bad_input_says_what_to_try():
    model, X = build(), normal(3, 2)
    for call in (
        lambda: model.fantasize(X, None),
        lambda: model.condition_on_observations(X, X[:, :1]),
    ):
        with pytest.raises(NotImplementedError, match="LinearizedGP.*SampledGP"):
            call()
    bare = WeightSpaceModel(gaussian_weights(network()))
    with pytest.raises(RuntimeError, match="Pass train_X or num_outputs"):
        _ = bare.num_outputs
    for method in (bare.predict, bare.decompose):
        with pytest.raises(ValueError, match="the model has none. Pass likelihood="):
            method(X)
    with pytest.raises(ValueError, match="but it is NoneType"):
        bare.posterior(X, observation_noise=True)
    with pytest.raises(ShapeError, match=r"variances of shape \(3, 1\)"):
        model.posterior(X, observation_noise=torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"idcs must name outputs in 0 .. 0"):
        model.subset_output([1])
    with pytest.raises(TypeError, match="Sequential, one network.*EmpiricalWeights"):
        WeightSpaceModel(network(), X)
    with pytest.raises(ValueError, match="mode must be one of 'ensemble'"):
        build(mode="laplace")
    with pytest.raises(TypeError, match="needs GaussianWeights"):
        weights = gaussian_weights(network())
        build(posterior=MixtureWeights([weights]), mode="linearized")
    with pytest.raises(ValueError, match="num_outputs must be a whole number"):
        build(num_outputs=0)
    with pytest.raises(ShapeError, match="X must be"):
        model.posterior(X[0])


@pytest.mark.parametrize(
    "outputs, change, options, message",
    [
        (1, lambda Y: Y[:5], {}, r"``8 x 1``.*shape \(5, 1\)"),
        (1, lambda Y: Y.repeat(1, 2), {}, r"``8 x 1``.*shape \(8, 2\)"),
        (1, lambda Y: Y[:, 0], {}, r"Try train_Y\[:, None\]"),
        (1, lambda Y: Y[:, 0], {"outcome_transform": 1}, r"Try train_Y\[:, None\]"),
        (1, lambda Y: Y * torch.nan, {}, "train_Y contains NaN or Inf in 8 of 8"),
        (2, lambda Y: Y, {}, r"HeteroscedasticGaussianLikelihood\(1\)"),
        (1, lambda Y: Y, {"num_outputs": 3}, "num_outputs is 3.*have 1 outputs"),
    ],
)
def test_targets_and_outputs_must_be_those_of_the_network(
    outputs, change, options, message
):
    X = normal(8, 2)
    if "outcome_transform" in options:
        options = {"outcome_transform": Standardize(1)}
    with pytest.raises((ValueError, InputDataError), match=message):
        weights = gaussian_weights(network(outputs))
        WeightSpaceModel(weights, X, change(X[:, :1]), num_samples=4, **options)


def test_targets_alone_are_checked_for_the_transform_that_they_fit():
    weights, Y = gaussian_weights(network()), normal(8, 1)
    for wrong, message in ((Y * torch.nan, "NaN or Inf"), (Y[:, 0], "``... x n x d``")):
        with pytest.raises((ValueError, InputDataError), match=message):
            WeightSpaceModel(weights, train_Y=wrong, outcome_transform=Standardize(1))


@pytest.mark.parametrize(
    "outputs, likelihood, message",
    [
        (3, SoftmaxLikelihood(num_classes=4, mixing_weights=False), "of 4 outputs"),
        (3, HeteroscedasticGaussianLikelihood(), "of 2 outputs.*it has 3"),
        (3, likelihood_for(2), "of 2 outputs.*it has 3"),
        (2, BernoulliLikelihood(), "of 1 outputs.*it has 2"),
    ],
)
def test_the_likelihood_must_be_of_as_many_outputs_as_the_network_has(
    outputs, likelihood, message
):
    with pytest.raises(ShapeError, match=message):
        weights = gaussian_weights(network(outputs))
        WeightSpaceModel(weights, normal(8, 2), likelihood=likelihood, num_samples=4)


def test_labels_are_taken_with_a_likelihood_of_labels_and_checked():
    X, labels = normal(6, 2), torch.arange(6) % 3
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    weights = gaussian_weights(network(3))
    for train_Y in (labels, labels[:, None]):
        model = WeightSpaceModel(weights, X, train_Y, likelihood=softmax)
        assert model.num_outputs == 3
    with pytest.raises(InputDataError, match="must lie in 0 .. 2"):
        WeightSpaceModel(weights, X, labels + 1, likelihood=softmax)
    with pytest.raises(ValueError, match="has labels.*Leave observation_noise out"):
        model.posterior(X, observation_noise=True)


def test_outputs_that_were_announced_wrongly_are_refused_when_they_come():
    for mode in ("ensemble", "gaussian"):
        model = WeightSpaceModel(gaussian_weights(network()), num_outputs=3, mode=mode)
        with pytest.raises(ShapeError, match="num_outputs=3.*have 1 outputs"):
            model.posterior(normal(4, 2))


def test_inputs_of_another_width_than_in_training_are_refused():
    model = WeightSpaceModel(gaussian_weights(network()), normal(4, 2), num_samples=3)
    with pytest.raises(ShapeError, match="X must have 2 columns as the training"):
        model.posterior(normal(4, 3))
    with pytest.raises(ShapeError, match="takes ``... x 2``"):
        WeightSpaceModel(gaussian_weights(network()), normal(4, 3), num_samples=3)


def test_batches_are_in_the_units_of_the_inputs():
    X = 5 + 3 * normal(20, 2)
    torch.manual_seed(0)
    layers = nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)
    weights = gaussian_weights(nn.Sequential(*layers).double())
    options = {"num_samples": 4, "input_transform": Normalize(2)}
    with pytest.warns(ReliabilityWarning, match="Pass batches="):
        WeightSpaceModel(weights, X, **options)
    batches = [(X[:12], None), (X[12:], None)]
    model = WeightSpaceModel(weights, X, batches=batches, **options)
    Z = model.input_transform(X)
    draws = refresh_batch_norm(weights.draw(4, seeded()), [Z[:12], Z[12:]])
    torch.testing.assert_close(model.posterior(X).values, draws(Z))
    with pytest.raises(TypeError, match=r"Wrap it: \[X\]"):
        WeightSpaceModel(weights, X, batches=X, **options)


def test_one_draw_is_refused_and_reprs_say_mode_and_number_of_draws():
    weights = gaussian_weights(network())
    with pytest.raises(ValueError, match="no spread.*num_samples=64"):
        WeightSpaceModel(weights, num_samples=1)
    with pytest.raises(ValueError, match="a posterior with several members"):
        WeightSpaceModel(DeepEnsemble([network()]))
    model = WeightSpaceModel(weights, num_outputs=1, num_samples=5)
    shown = "mode='ensemble', num_outputs=1; WeightDraws(num_draws=5)"
    assert repr(model) == f"WeightSpaceModel({shown})"
    assert "mode='sample', jitter=1e-06" in repr(model.function_space)


def test_beside_a_gp_in_a_list_a_sampler_for_each_is_passed():
    net = FunctionalNet(nn.Linear(2, 1).double())
    spread = torch.ones(3, dtype=torch.float64)
    weights = GaussianWeights(net, 0 * spread, variance=spread)
    X = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)).double()
    ours = WeightSpaceModel(weights, num_outputs=1, num_samples=32)
    both = ModelList(ours, SingleTaskGP(X, X[:, :1]))
    total = GenericMCObjective(lambda Y, X=None: Y.sum(-1))
    options = {"best_f": 0.0, "objective": total}
    with pytest.raises(UnsupportedError, match="same sample shape"):
        qLogExpectedImprovement(both, **options)(X[:2, None])
    s = torch.Size([32])
    sampler = ListSampler(EnumeratingSampler(s), SobolQMCNormalSampler(s, seed=0))
    values = qLogExpectedImprovement(both, sampler=sampler, **options)(X[:2, None])
    assert values.shape == (2,) and bool(values.isfinite().all())
