"""What a linearised GP keeps, and when it computes it anew."""

import pytest
import torch
from botorch.models.gpytorch import GPyTorchModel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.models import GP

from gpbridge.linearized.state import (
    BUILT_WITH,
    CACHES,
    FOUND,
    KEPT,
    MOVED,
    SAVED,
    TangentState,
)
from gpbridge.selection import fit_evidence
from tests.linearized import problems
from tests.linearized.problems import build, every_likelihood

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def test_its_name_says_what_it_is():
    model = build("multitask", parameters=["2"])
    assert repr(model) == (
        "LinearizedGP(n=12, num_outputs=2, random weights=14, "
        "MultitaskGaussianLikelihood, mean='linear_model', inference=Exact, "
        "hyperparameters not fitted)"
    )
    fit_evidence(model, warn=False)
    assert "hyperparameters fitted by evidence" in repr(model)


def test_the_users_likelihood_is_shared():
    likelihood = GaussianLikelihood().double()
    model = build("gaussian", likelihood=likelihood)
    assert model.likelihood is likelihood
    before = model.posterior(problems.inputs()).variance
    likelihood.noise = torch.tensor([5.0], dtype=torch.float64)
    assert (model.posterior(problems.inputs()).variance > before).all()
    assert model.noise_variance.item() == pytest.approx(5.0)


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


def test_a_likelihood_put_in_its_place_is_seen():
    model, X = build("gaussian"), problems.inputs(5, seed=7)
    model.posterior(X), model.log_evidence()
    other = GaussianLikelihood().double()
    other.noise = torch.tensor([1.0], dtype=torch.float64)
    model.likelihood = other
    expected = build("gaussian", likelihood=other)
    assert model.log_evidence().item() == expected.log_evidence().item()
    torch.testing.assert_close(
        model.posterior(X).variance, expected.posterior(X).variance, **EXACT
    )


@pytest.mark.parametrize("name", ["gaussian", "softmax"])
def test_other_weights_in_the_network_are_seen(name):
    m = problems.PROBLEMS[name].m
    other = build(name, net=problems.network(m, scale=0.5))
    expected, X = other.posterior(problems.inputs()), problems.inputs()
    for assign in (False, True):
        model = build(name)
        model.posterior(X), model.log_evidence()
        gap = None if name == "gaussian" else model.train_gap
        model.covar_module.load_state_dict(
            other.covar_module.state_dict(), assign=assign
        )
        got = model.posterior(X)
        torch.testing.assert_close(got.mean, expected.mean, **EXACT)
        torch.testing.assert_close(got.variance, expected.variance, **EXACT)
        assert model.log_evidence().item() == pytest.approx(other.log_evidence().item())
        assert gap is None or model.train_gap == other.train_gap != gap


def test_what_did_not_change_is_kept():
    model, X = build("gaussian"), problems.inputs(5, seed=7)
    model.posterior(X)
    kept = model.problem, model._conditioned()
    with torch.inference_mode():
        model.posterior(X), model.predict(X)
    model.log_evidence().backward()
    assert (model.problem, model._conditioned()) == kept


def test_a_subset_made_in_inference_mode_serves_gradients_later():
    for make in (
        lambda model: model.subset_output([1]),
        lambda model: model.problem and model,
        lambda model: model.use_mean("network", 0.1) or model,
    ):
        model = build("multitask")
        with torch.inference_mode():
            made = make(model)
        Z = problems.inputs(5, seed=7).requires_grad_()
        posterior = made.posterior(Z)
        (posterior.variance.sum() + posterior.mean.sum()).backward()
        assert Z.grad.abs().max() > 0


def test_every_attribute_is_declared_with_what_becomes_of_it():
    class Bare(GPyTorchModel, GP):
        pass

    model = build("gaussian")
    fit_evidence(model, warn=False)
    own = set(vars(model)) - set(vars(Bare()))
    declared = [*BUILT_WITH, *FOUND, *SAVED, *MOVED, *KEPT, *CACHES]
    assert own <= set(declared) <= set(TangentState.__annotations__)
    assert len(set(declared)) == len(declared)
