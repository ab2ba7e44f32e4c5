"""Copies, pickles and state dicts of a linearised GP."""

import copy
import pickle

import torch

from tests.linearized import problems
from tests.linearized.problems import PROBLEMS, build, every_likelihood


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
