"""The model as a whole: BoTorch's contract, its defaults, its outputs."""

import unittest

import pytest
import torch
from botorch.utils.datasets import SupervisedDataset
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import nn

from gpbridge import Exact, LinearizedGP
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.testing import ModelContractTestCase
from tests.linearized import problems
from tests.linearized.problems import PROBLEMS, build

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def network(num_outputs, dtype=torch.float64):
    """A tanh network with fixed weights, independent of the global random state."""
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, num_outputs))
    net = net.to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


def likelihood(num_outputs, dtype):
    if num_outputs == 1:
        made = GaussianLikelihood().to(dtype)
        made.noise = 0.02
    else:
        made = MultitaskGaussianLikelihood(num_outputs, has_global_noise=False).to(
            dtype
        )
        made.task_noises = torch.linspace(0.02, 0.04, num_outputs).to(dtype)
    return made


class Contract(ModelContractTestCase):
    space = "auto"

    def create_model(self, dtype, num_outputs=1, **options):
        model = LinearizedGP(
            self.watch(network(num_outputs, dtype)),
            likelihood=likelihood(num_outputs, dtype),
            inference=Exact(space=self.space),
            **options,
        )
        model.prior_variance = 0.5
        return model


class TestFunctionSpace(Contract, unittest.TestCase):
    space = "function"


class TestWeightSpace(Contract, unittest.TestCase):
    space = "weight"


@pytest.mark.slow
class TestMatrixFree(Contract, unittest.TestCase):
    space = "matrix_free"


class TestLabels(Contract, unittest.TestCase):
    classification = True
    outputs = (1, 3)

    def create_model(self, dtype, num_outputs=1, **options):
        model = LinearizedGP(self.watch(network(num_outputs, dtype)), **options)
        model.prior_variance = 0.5
        return model


@pytest.mark.parametrize("case", [TestFunctionSpace, TestLabels])
def test_the_targets_are_kept_once_as_the_likelihood_sees_them(case):
    model = case().build()
    own = {name for name, _ in model.named_buffers(recurse=False)}
    assert own == {"_train_X", "_targets"}


# -- defaults -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind, mean",
    [
        ("gaussian", GaussianLikelihood, "linear_model"),
        ("multitask", MultitaskGaussianLikelihood, "linear_model"),
        ("logistic", LogisticLikelihood, "network"),
        ("softmax", SoftmaxLikelihood, "network"),
    ],
)
def test_targets_choose_likelihood_and_mean(name, kind, mean):
    X = problems.inputs()
    net = problems.network(PROBLEMS[name].m)
    model = LinearizedGP(net, X, problems.targets(name, X))
    assert type(model.likelihood) is kind and model.mean == mean
    assert model.prior_variance.tolist() == pytest.approx([1.0])
    assert model.offset == (mean == "linear_model")
    assert len(model.covar_module.groups) == 1


def test_one_function_serves_vectors_and_columns_of_binary_labels():
    X = problems.inputs()
    Y = problems.targets("logistic", X)
    net = problems.network()
    models = [
        LinearizedGP(net, X, labels)
        for labels in (Y[:, 0], Y, Y.long(), Y.bool(), Y[:, 0].int())
    ]
    expected = models[0].posterior(X)
    for model in models[1:]:
        got = model.posterior(X)
        torch.testing.assert_close(got.variance, expected.variance, **EXACT)
        torch.testing.assert_close(
            model.log_evidence(), models[0].log_evidence(), **EXACT
        )


def test_known_noise_of_a_dataset_becomes_fixed_noise():
    X = problems.inputs()
    Y, Yvar = problems.targets("gaussian", X), problems.point_noise()[:, None]
    data = SupervisedDataset(
        X, Y, Yvar=Yvar, feature_names=["a", "b"], outcome_names=["y"]
    )
    options = LinearizedGP.construct_inputs(data, network=problems.network())
    model = LinearizedGP(**options)
    assert isinstance(model.likelihood, FixedNoiseGaussianLikelihood)
    torch.testing.assert_close(model.noise_variance, Yvar, **EXACT)


def test_the_train_gap_and_the_noise_belong_to_their_own_kind():
    with pytest.raises(TypeError, match="SoftmaxLikelihood has no noise variance"):
        _ = build("softmax").noise_variance
    with pytest.raises(NotImplementedError, match="observes labels, so its noise"):
        build("softmax").posterior(problems.inputs(), observation_noise=True)


def test_outputs_are_chosen_by_name_of_their_column():
    model, X = build("multitask"), problems.inputs(5, seed=7)
    whole = model.posterior(X)
    for columns in ([1], [0], [1, 0], [-1]):
        got = model.posterior(X, output_indices=columns)
        torch.testing.assert_close(got.mean, whole.mean[:, columns], **EXACT)
        torch.testing.assert_close(got.variance, whole.variance[:, columns], **EXACT)
        law = model.subset_output(columns).predict(X)
        torch.testing.assert_close(law.mean, whole.mean[:, columns], **EXACT)
    swapped = model.subset_output([1, 0]).subset_output([1])
    torch.testing.assert_close(swapped.posterior(X).mean, whole.mean[:, :1], **EXACT)
    for bad in ([], [2], [-3]):
        with pytest.raises(ValueError, match=r"must name outputs in 0 .. 1, but is"):
            model.subset_output(bad)
