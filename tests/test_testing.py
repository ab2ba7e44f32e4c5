import unittest

import pytest
import torch
from botorch.exceptions.warnings import InputDataWarning
from botorch.models import SingleTaskGP
from botorch.posteriors import GPyTorchPosterior
from gpytorch.likelihoods import GaussianLikelihood
from torch import nn

from gpbridge.linearized.gp import LinearizedGP
from gpbridge.testing import (
    ModelContractTestCase,
    assert_gradients_match_finite_differences,
    assert_module_unchanged,
)


class TestSingleTaskGP(ModelContractTestCase, unittest.TestCase):
    model_class = SingleTaskGP
    pathwise_tolerance = 0.5  # random Fourier features only approximate the variance

    def create_model(self, dtype, num_outputs=1, **options):
        return self.model_class(**{"outcome_transform": None} | options)


def failures(model_class, test, **flags):
    """What one test of the contract says about a model."""
    case = type("Case", (TestSingleTaskGP,), {"model_class": model_class} | flags)
    result = unittest.TestResult()
    case(test).run(result)
    assert result.testsRun == 1
    assert not result.skipped
    return [message for _, message in result.failures + result.errors]


class MutatedByConditioning(SingleTaskGP):
    def condition_on_observations(self, X, Y, **kwargs):
        conditioned = super().condition_on_observations(X, Y, **kwargs)
        with torch.no_grad():
            self.mean_module.raw_constant.add_(1.0)
        return conditioned


class ConditionsOnTheFirstPoint(SingleTaskGP):
    def condition_on_observations(self, X, Y, **kwargs):
        return super().condition_on_observations(X[..., :1, :], Y[..., :1, :], **kwargs)


class DependsOnPosition(SingleTaskGP):
    def posterior(self, X, *args, **kwargs):
        if X.dim() > 2:
            X = X + 1e-3 * torch.arange(len(X)).to(X).reshape(-1, *[1] * (X.dim() - 1))
        return super().posterior(X, *args, **kwargs)


class IgnoresNoise(SingleTaskGP):
    def posterior(self, X, observation_noise=False, **kwargs):
        return super().posterior(X, **kwargs)


class IgnoresPosteriorTransform(SingleTaskGP):
    def posterior(self, X, posterior_transform=None, **kwargs):
        return super().posterior(X, **kwargs)


class DetachesInputs(SingleTaskGP):
    def posterior(self, X, *args, **kwargs):
        # Still a function of X for autograd, with half of the gradient.
        return super().posterior(0.5 * (X + X.detach()), *args, **kwargs)


class DrawsGlobally(SingleTaskGP):
    def posterior(self, X, *args, **kwargs):
        torch.rand(1)
        return super().posterior(X, *args, **kwargs)


class ForgetsItsState(SingleTaskGP):
    def load_state_dict(self, state_dict, *args, **kwargs):
        return None


class SelectsTheFirstOutput(SingleTaskGP):
    def subset_output(self, idcs):
        return super().subset_output(list(range(len(idcs))))


class IgnoresInputTransform(SingleTaskGP):
    def __init__(self, *args, input_transform=None, **kwargs):
        super().__init__(*args, **kwargs)


class PicklesItsData(SingleTaskGP):
    def __getstate__(self):
        state = super().__getstate__().copy()
        state["train_targets"] = state["train_targets"] + 1
        state["prediction_strategy"] = None
        return state


class FantasizesOncePerModel(SingleTaskGP):
    def fantasize(self, X, sampler, **kwargs):
        return super().fantasize(X.expand(2, *X.shape), sampler, **kwargs)


class SwapsConstructorArguments(SingleTaskGP):
    @classmethod
    def construct_inputs(cls, training_data, **kwargs):
        inputs = super().construct_inputs(training_data, **kwargs)
        return inputs | {"train_Y": -inputs["train_Y"]}


class NoisyUnlessLeftAlone(SingleTaskGP):
    def posterior(self, X, output_indices=None, observation_noise=None, **kwargs):
        # A list of models says False, where a caller says nothing.
        noisy = observation_noise is not None
        return super().posterior(X, output_indices, noisy, **kwargs)


BROKEN = {
    MutatedByConditioning: "conditioning_does_not_change_the_model_or_its_arguments",
    ConditionsOnTheFirstPoint: "conditioning_equals_refit",
    DependsOnPosition: "acquisition_ignores_position_in_and_size_of_the_batch",
    IgnoresNoise: "observation_noise_adds_to_the_variance_only",
    IgnoresPosteriorTransform: "posterior_transform_scalarises_the_outputs",
    DetachesInputs: "acquisition_gradients_match_finite_differences",
    DrawsGlobally: "posterior_leaves_the_global_random_state_alone",
    ForgetsItsState: "state_dict_restores_the_posterior",
    SelectsTheFirstOutput: "subset_output_selects_columns",
    IgnoresInputTransform: "transforms_act_on_inputs_and_outcomes",
    PicklesItsData: "deepcopy_and_pickle_keep_the_posterior",
    FantasizesOncePerModel: "fantasies_broadcast_over_test_batches",
    SwapsConstructorArguments: "construct_inputs_gives_constructor_arguments",
    NoisyUnlessLeftAlone: "model_list_stacks_the_outputs",
}


@pytest.mark.parametrize(("model_class", "test"), BROKEN.items(), ids=str)
def test_a_broken_model_fails_the_contract(model_class, test):
    assert not failures(SingleTaskGP, f"test_{test}")
    assert failures(model_class, f"test_{test}")


@pytest.mark.parametrize("model_class", [DependsOnPosition])
def test_a_posterior_that_depends_on_its_place_is_not_a_loop(model_class):
    assert failures(model_class, "test_batch_equals_loop")


class OverstatesItsVariance(LinearizedGP):
    def posterior(self, X, *args, **kwargs):
        posterior = super().posterior(X, *args, **kwargs)
        mvn = posterior.distribution
        wide = type(mvn)(mvn.mean, 1.4 * mvn.covariance_matrix)
        return GPyTorchPosterior(wide)


def test_paths_have_the_variance_of_the_posterior_unless_a_model_declares_less():
    def create(case, dtype, num_outputs=1, **options):
        network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
        return case.model_class(network, **options)

    test = "test_pathwise_draws_are_functions_with_the_posterior_moments"
    tight = ModelContractTestCase.pathwise_tolerance
    options = {"create_model": create, "outputs": (1,), "pathwise_tolerance": tight}
    assert not failures(LinearizedGP, test, **options)
    assert failures(OverstatesItsVariance, test, **options)
    options["pathwise_tolerance"] = 0.6
    assert not failures(OverstatesItsVariance, test, **options)


def test_a_contract_without_a_model_says_what_to_define():
    case = type("Case", (ModelContractTestCase, unittest.TestCase), {})
    result = unittest.TestResult()
    case("test_batch_equals_loop").run(result)
    assert "Define create_model" in result.errors[0][1]


@pytest.mark.parametrize(
    ("flag", "test"),
    [
        ("supports_conditioning", "conditioning_equals_refit"),
        ("conditioning_equals_refit", "conditioning_equals_refit"),
        ("supports_fantasies", "knowledge_gradient_optimises_end_to_end"),
        ("supports_subset_output", "subset_output_selects_columns"),
        ("supports_transforms", "transforms_act_on_inputs_and_outcomes"),
        ("supports_construct_inputs", "construct_inputs_gives_constructor_arguments"),
        (
            "supports_pathwise",
            "pathwise_draws_are_functions_with_the_posterior_moments",
        ),
    ],
)
def test_what_is_declared_unsupported_is_skipped(flag, test):
    case = type("Case", (TestSingleTaskGP,), {flag: False})
    result = unittest.TestResult()
    case(f"test_{test}").run(result)
    assert len(result.skipped) == 1
    assert result.wasSuccessful()


def test_a_watched_network_must_not_change():
    class Training(TestSingleTaskGP):
        def create_model(self, dtype, num_outputs=1, **options):
            network = self.watch(nn.Linear(2, 1))
            network.eval()
            return super().create_model(dtype, num_outputs, **options)

    result = unittest.TestResult()
    Training("test_batch_equals_loop").run(result)
    messages = [message for _, message in result.failures + result.errors]
    assert "training mode of the module" in messages[0]


@pytest.fixture
def network():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


def add_hook(network):
    network[0].register_forward_hook(lambda *arguments: None)


def zero_weight(network):
    with torch.no_grad():
        network[0].weight[0, 0] = 0.0


def negative_zero(network):
    with torch.no_grad():
        network[1].running_mean.neg_()


CHANGES = {
    "weight": (zero_weight, "parameter 0.weight"),
    "sign of a zero": (negative_zero, "buffer 1.running_mean"),
    "buffer": (lambda net: net(torch.ones(4, 2)), "buffer 1.running_mean"),
    "mode": (lambda net: net[2].eval(), "training mode of 2"),
    "hook": (add_hook, "_forward_hooks of 0"),
    "requires_grad": (
        lambda net: net[0].bias.requires_grad_(False),
        "requires_grad of parameter 0.bias",
    ),
    "gradient": (
        lambda net: net[0](torch.ones(1, 2)).sum().backward(),
        "gradient of parameter 0",
    ),
    "attribute": (lambda net: setattr(net, "output_size", 3), "attributes of"),
    "submodule": (lambda net: net.append(nn.ReLU()), "type of 3"),
    "dtype": (lambda net: net.double(), "parameter 0.weight"),
    "parameter object": (
        lambda net: setattr(net[0], "bias", nn.Parameter(net[0].bias.detach())),
        "identity of parameter 0.bias",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_module_is_noticed(network, change):
    apply, message = CHANGES[change]
    with pytest.raises(AssertionError, match=message):
        with assert_module_unchanged(network):
            apply(network)


def test_a_module_is_checked_after_a_failure_too(network):
    with pytest.raises(AssertionError, match="training mode"):
        with assert_module_unchanged(network):
            network.eval()
            raise ValueError("from the block")


def test_an_unchanged_module_passes_and_errors_come_through(network):
    network[1].running_var[0] = float("nan")
    network.eval()
    with pytest.raises(ValueError, match="from the block"):
        with assert_module_unchanged(network):
            network(torch.ones(4, 2))
            raise ValueError("from the block")


def test_right_gradients_pass_and_wrong_ones_fail():
    X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    assert_gradients_match_finite_differences(lambda X: X.sin() * X.cumsum(-1), X)
    with pytest.raises(AssertionError, match="not close"):
        assert_gradients_match_finite_differences(lambda X: X * X.detach(), X)


def test_gradients_that_cancel_in_the_sum_of_outputs_are_compared():
    X = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="not close"):
        assert_gradients_match_finite_differences(
            lambda X: torch.stack([X.detach().sum(), -X.detach().sum()]) + 0 * X.sum(),
            X,
        )


def test_random_functions_and_single_precision_are_refused():
    X = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="two values for the same inputs"):
        assert_gradients_match_finite_differences(lambda X: X * torch.rand(2), X)
    with pytest.raises(TypeError, match="X must be float64"):
        assert_gradients_match_finite_differences(lambda X: X, X.float())


def test_the_contract_restores_the_global_random_state():
    before = torch.get_rng_state()
    assert not failures(SingleTaskGP, "test_samples_have_the_moments_of_the_posterior")
    assert torch.equal(before, torch.get_rng_state())


def test_data_and_inputs_do_not_depend_on_the_global_random_state():
    case = TestSingleTaskGP()
    first = case.train_data(torch.float64, 2)
    torch.rand(1)
    assert all(map(torch.equal, first, case.train_data(torch.float64, 2)))


def test_labels_suit_the_number_of_outputs():
    case = type("Case", (TestSingleTaskGP,), {"classification": True})()
    _, labels = case.train_data(torch.float64, 3)
    assert labels.shape == (12,)
    assert labels.dtype == torch.long
    assert set(labels.tolist()) <= {0, 1, 2}
    _, binary = case.train_data(torch.float32, 1)
    assert binary.shape == (12, 1)
    assert set(binary.flatten().tolist()) == {0.0, 1.0}


def test_a_fixed_likelihood_passes_what_depends_on_it():
    def create(case, dtype, num_outputs=1, **options):
        likelihood = GaussianLikelihood().to(dtype)
        likelihood.noise = 0.05
        return SingleTaskGP(
            likelihood=likelihood, **{"outcome_transform": None} | options
        )

    assert not failures(
        SingleTaskGP,
        "test_conditioning_equals_refit",
        create_model=create,
        outputs=(1,),
    )
    with pytest.warns(InputDataWarning):
        create(None, torch.float32, train_X=torch.rand(3, 2), train_Y=torch.rand(3, 1))
