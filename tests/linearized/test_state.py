"""What a linearised GP keeps, and when it computes it anew."""

import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood

from gpbridge.selection import fit_evidence
from tests.linearized import problems
from tests.linearized.problems import build, every_likelihood

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def test_its_name_says_what_it_is():
    model = build("multitask", parameters=["2"])
    assert repr(model) == (
        "LinearizedGP(n=12, num_outputs=2, random weights=14, "
        "MultitaskGaussianLikelihood, mean='linear_model', hyperparameters not fitted)"
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
