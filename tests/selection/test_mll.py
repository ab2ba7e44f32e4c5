"""The evidence as a gpytorch objective."""

import pytest
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP

from gpbridge.selection import LaplaceEvidence, fit_evidence
from gpbridge.testing import assert_module_unchanged
from tests.linearized.problems import (
    PROBLEMS,
    both_spaces,
    build,
    every_likelihood,
    inputs,
    network,
)
from tests.selection.test_evidence import ready


@every_likelihood
def test_it_is_the_evidence_per_datum(name):
    model = build(name)
    mll = LaplaceEvidence(model.likelihood, model)
    count = model.train_targets.numel()
    value = mll(model(inputs()), model.train_targets)
    assert count * value.item() == pytest.approx(model.log_evidence().item())
    assert -mll.compute_custom_loss().item() == pytest.approx(value.item())
    raw = model.covar_module.raw_prior_variance
    (gradient,) = torch.autograd.grad(value, raw)
    (expected,) = torch.autograd.grad(model.log_evidence(), raw)
    torch.testing.assert_close(count * gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:BernoulliLikelihood is the probit link")
@pytest.mark.parametrize(
    "name", ["gaussian", "fixed_noise", "multitask_rank_1", "probit", "softmax"]
)
def test_botorchs_optimiser_reaches_the_same_optimum(name):
    net = network(PROBLEMS[name].m)
    expected, model = ready(name, net=net), ready(name, net=net)
    fit_evidence(expected, warn=False)
    with assert_module_unchanged(net):
        mll = fit_gpytorch_mll(LaplaceEvidence(model.likelihood, model))
    assert not mll.training and not model.training
    best = expected.log_evidence().item()
    assert model.log_evidence().item() == pytest.approx(best, abs=1e-4)


@both_spaces
def test_botorchs_optimiser_learns_several_groups(space):
    model = ready("multitask", space, groups="layer")
    before = model.log_evidence().item()
    fit_gpytorch_mll(LaplaceEvidence(model.likelihood, model))
    assert model.log_evidence().item() > before + 1
    gradients = torch.autograd.grad(
        model.log_evidence(), [p for p in model.parameters() if p.requires_grad]
    )
    assert max(g.abs().max().item() for g in gradients) < 1e-2


def test_it_never_builds_the_prior(monkeypatch):
    model = build("gaussian")

    def refuse(X):
        raise AssertionError("the prior was built")

    monkeypatch.setattr(model, "forward", refuse)
    fit_gpytorch_mll(LaplaceEvidence(model.likelihood, model))


@pytest.mark.filterwarnings("ignore:Data .outcome observations. is not standardized")
def test_other_models_are_refused():
    X = inputs()
    model = SingleTaskGP(X, X[:, :1], outcome_transform=None)
    with pytest.raises(
        TypeError, match="needs a gpbridge.LinearizedGP, but model is S"
    ):
        LaplaceEvidence(model.likelihood, model)
