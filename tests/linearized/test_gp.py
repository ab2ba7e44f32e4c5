"""The model as a whole: BoTorch's contract, its defaults, its state."""

import copy
import pickle
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
from gpbridge.selection import fit_evidence
from gpbridge.testing import ModelContractTestCase
from tests.linearized import problems
from tests.linearized.problems import PROBLEMS, build, every_likelihood

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


def test_the_users_likelihood_is_shared():
    likelihood = GaussianLikelihood().double()
    model = build("gaussian", likelihood=likelihood)
    assert model.likelihood is likelihood
    before = model.posterior(problems.inputs()).variance
    likelihood.noise = torch.tensor([5.0], dtype=torch.float64)
    assert (model.posterior(problems.inputs()).variance > before).all()
    assert model.noise_variance.item() == pytest.approx(5.0)


# -- state ----------------------------------------------------------------------------


@every_likelihood
def test_the_state_carries_network_data_and_hyperparameters(name, tmp_path):
    model = build(name, groups="layer")
    model.prior_variance = torch.tensor([0.3, 0.7], dtype=torch.float64)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    X = problems.inputs()
    other = problems.network(PROBLEMS[name].m, scale=0.7)
    fresh = build(name, X=X.flip(0), groups="layer", net=other)
    fresh.posterior(X)  # caches that must go
    fresh.load_state_dict(state)
    X_test = problems.inputs(5, seed=7)
    got, expected = fresh.posterior(X_test), model.posterior(X_test)
    torch.testing.assert_close(got.mean, expected.mean, rtol=0, atol=0)
    torch.testing.assert_close(got.variance, expected.variance, rtol=0, atol=0)
    assert fresh.log_evidence().item() == model.log_evidence().item()


@every_likelihood
def test_copies_and_pickles_are_independent(name):
    model, X = build(name), problems.inputs(5, seed=7)
    before = model.posterior(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        got = twin.posterior(X)
        torch.testing.assert_close(got.mean, before.mean, rtol=0, atol=0)
        torch.testing.assert_close(got.variance, before.variance, rtol=0, atol=0)
        twin.prior_variance = 2.0
        for p in twin.likelihood.parameters():
            p.data.add_(1.0)
    after = model.posterior(X)
    torch.testing.assert_close(after.variance, before.variance, rtol=0, atol=0)


def test_its_name_says_what_it_is():
    model = build("multitask", parameters=["2"])
    assert repr(model) == (
        "LinearizedGP(n=12, num_outputs=2, random weights=14, "
        "MultitaskGaussianLikelihood, mean='linear_model', hyperparameters not fitted)"
    )
    fit_evidence(model, warn=False)
    assert "hyperparameters fitted by evidence" in repr(model)


def test_stored_data_carry_no_graph_and_inputs_stay_as_they_are():
    # 23: expanded, non-contiguous and gradient-requiring inputs.
    X = problems.inputs().requires_grad_()
    Y = problems.targets("gaussian", X.detach()).requires_grad_()
    model = build("gaussian", X=X, Y=Y)
    assert not model.train_inputs[0].requires_grad
    assert not model.train_targets.requires_grad
    flipped = torch.cat([X, X], -1).detach()[:, ::3]  # columns 0 and 1, strided
    assert not flipped.is_contiguous()
    twin = build("gaussian", X=flipped, Y=Y.detach().expand(12, 1))
    expected = model.posterior(X.detach()).variance
    torch.testing.assert_close(twin.posterior(flipped).variance, expected, **EXACT)


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


@every_likelihood
def test_what_inference_mode_computes_serves_gradients_later(name):
    model = build(name)
    X = problems.inputs(5, seed=7)
    with torch.inference_mode():
        inside = model.posterior(X).variance, model.predict(X), model.draw(2)(X)
        evidence = model.log_evidence().item()
    assert inside[2].shape[0] == 2
    Z = X.clone().requires_grad_()
    posterior = model.posterior(Z)
    torch.testing.assert_close(posterior.variance, inside[0], **EXACT)
    posterior.variance.sum().backward()
    assert Z.grad.abs().max() > 0
    again = model.log_evidence()
    again.backward()
    assert again.item() == pytest.approx(evidence)
