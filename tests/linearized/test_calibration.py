"""Calibration on held-out data, its guard, and the warning that is free."""

import copy
import pickle

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.checks import ShapeError
from gpbridge.linearized.calibration import check_held_out
from gpbridge.linearized.predictive import (
    choose_calibration,
    probabilities,
)
from gpbridge.testing import assert_module_unchanged
from tests import oracles_likelihoods, oracles_linearized
from tests.linearized.problems import (
    PROBLEMS,
    both_spaces,
    build,
    curvature,
    inputs,
    label_likelihoods,
    network,
    targets,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def labels_of(net, X, seed):
    """Labels drawn from the network's own probabilities: its logits are calibrated."""
    with torch.no_grad():
        logits = net(X)
    if logits.shape[-1] == 1:
        return torch.bernoulli(logits.sigmoid(), generator=seeded(seed))[:, 0]
    return torch.multinomial(logits.softmax(-1), 1, generator=seeded(seed))[:, 0]


class Overconfident(nn.Module):
    """Logits that are too large by a factor."""

    def __init__(self, net, factor=6.0):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x):
        return self.factor * self.net(x)


def wide_inputs(n, seed):
    return 4 * inputs(n, seed=seed) - 2


def overconfident_model(m=3, n=60, **options):
    net = network(m, scale=1.2)
    X, X_val = wide_inputs(n, 0), wide_inputs(100, 1)
    model = LinearizedGP(Overconfident(net), X, labels_of(net, X, 0), **options)
    return net, model, X_val, labels_of(net, X_val, 1)


@both_spaces
@pytest.mark.filterwarnings("ignore:calibrate keeps")
@pytest.mark.filterwarnings("ignore:BernoulliLikelihood is the probit link")
@label_likelihoods
def test_one_decomposition_serves_what_fresh_factors_would_choose(name, space):
    net, X = network(PROBLEMS[name].m), inputs()
    X_val, model = wide_inputs(30, 3), build(name, space)
    labels = targets(name, X_val)
    train = oracles_linearized.tangent(net, X)
    held_out = oracles_linearized.tangent(net, X_val)
    m, lam = PROBLEMS[name].m, curvature(name, net, X)

    def covariance_of(prior_variance):
        joint = oracles_linearized.laplace_covariance(
            train, held_out, prior_variance, lam
        ).unflatten(0, (30, m))
        joint = joint.unflatten(-1, (30, m))
        return torch.stack([joint[i, :, i] for i in range(30)])

    canonical = labels if m > 1 else labels.reshape(-1, 1)
    with torch.no_grad():
        expected = choose_calibration(
            model.likelihood, net(X_val), canonical, covariance_of
        )
    found = model.calibrate(X_val, labels)
    assert (found is not None) == expected.adopted
    if found is not None:
        assert found.prior_variance == pytest.approx(expected.prior_variance)
        assert found.temperature == pytest.approx(
            expected.calibration_temperature, rel=1e-4
        )
        assert found.gain == pytest.approx(expected.gain, rel=1e-6)
        assert found.gain_std_error == pytest.approx(expected.gain_std_error, rel=1e-6)


@pytest.mark.parametrize("m", [1, 3])
def test_an_overconfident_network_is_calibrated_and_predicts_better(m):
    net, model, X_val, Y_val = overconfident_model(m)
    before = model.predict(X_val).probs
    found = model.calibrate(X_val, Y_val)
    assert found is not None and found.gain > found.gain_std_error
    assert model.calibration == found and "fitted by calibrate" in repr(model)
    X_test = wide_inputs(400, 5)
    Y_test = labels_of(net, X_test, 5)
    Y_test = Y_test if m > 1 else Y_test[:, None]
    calibrated = -model.predict(X_test).log_prob(Y_test).mean()
    plain = -model.predict(X_test, link="plugin").log_prob(Y_test).mean()
    assert calibrated < plain - 0.5 * found.gain
    # The network's own probabilities stay within reach, untempered.
    torch.testing.assert_close(model.predict(X_val, link="plugin").probs, before)
    if found.link == "pairwise":
        mean, blocks = model.marginals(X_test)
        q = probabilities(model.likelihood, mean, blocks, "pairwise", found.temperature)
        torch.testing.assert_close(model.predict(X_test).probs, q, **EXACT)


@pytest.mark.filterwarnings("ignore:calibrate keeps")
def test_a_network_that_is_calibrated_mostly_stays_and_loses_little():
    X_test, worse = wide_inputs(400, 9), 0
    for seed in range(8):
        net = network(3, scale=0.8 + 0.1 * seed)
        X, X_val = wide_inputs(60, 20 + seed), wide_inputs(150, 140 + seed)
        model = LinearizedGP(net, X, labels_of(net, X, seed))
        Y_test = labels_of(net, X_test, 60 + seed)
        plain = -model.predict(X_test).log_prob(Y_test)
        model.calibrate(X_val, labels_of(net, X_val, 80 + seed))
        loss = -model.predict(X_test).log_prob(Y_test) - plain
        worse += bool(loss.mean() > loss.std() / 20 and loss.mean() > 0.02)
    assert worse <= 1


def test_what_is_not_adopted_changes_nothing_and_says_so():
    net, X = network(3), wide_inputs(40, 0)
    model = LinearizedGP(net, X, labels_of(net, X, 0))
    X_val = wide_inputs(40, 1)
    before, prior = model.predict(X_val).probs, model.prior_variance.item()
    with assert_module_unchanged(net):
        with pytest.warns(UserWarning, match="keeps the network's own .* saves -?0"):
            assert model.calibrate(X_val[:1], labels_of(net, X_val[:1], 1)) is None
    assert model.calibration is None and model.prior_variance.item() == prior
    torch.testing.assert_close(model.predict(X_val).probs, before, rtol=0, atol=0)
    torch.testing.assert_close(before, net(X_val).softmax(-1).detach(), **EXACT)


def test_copies_pickles_and_state_dicts_stay_calibrated(tmp_path):
    _, model, X_val, Y_val = overconfident_model()
    assert model.calibrate(X_val, Y_val) is not None
    expected = model.predict(X_val).probs
    torch.save(model.state_dict(), tmp_path / "model.pt")
    _, fresh, _, _ = overconfident_model()
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.calibration == model.calibration
        torch.testing.assert_close(twin.predict(X_val).probs, expected)


@both_spaces
@label_likelihoods
def test_the_train_gap_is_the_mean_probability_of_other_labels(name, space):
    net, X, m = network(PROBLEMS[name].m), inputs(), PROBLEMS[name].m
    train, Y = oracles_linearized.tangent(net, X), targets(name, X)
    covariance = oracles_linearized.laplace_covariance(
        train, train, 0.4, curvature(name, net, X)
    )
    gaps, f = [], train.value.reshape(-1, m)
    for averaged in (True, False):
        right = 0.0
        for i in range(12):
            block = slice(i * m, (i + 1) * m)
            S = covariance[block, block] * averaged
            if name == "softmax":
                q = oracles_likelihoods.pairwise_link(f[i], S)[Y[i]].item()
            else:
                scale = 1 + S.item() * (1 if name == "probit" else torch.pi / 8)
                q = (f[i] / scale**0.5).item()
                law = torch.distributions.Normal(0.0, 1.0)
                q = torch.tensor(q, dtype=torch.float64)
                q = law.cdf(q) if name == "probit" else q.sigmoid()
                q = (q if Y[i] else 1 - q).item()
            right += q / 12
        gaps.append(1 - right)
    assert build(name, space).train_gap == pytest.approx(tuple(gaps), rel=1e-6)


def test_an_average_that_contradicts_its_data_warns():
    net, X = network(3, scale=3.0), wide_inputs(60, 0)
    with torch.no_grad():
        model = LinearizedGP(Overconfident(net), X, net(X).argmax(-1))
    model.prior_variance = 10.0
    gap = model.train_gap
    assert gap.posterior > gap.network + 0.05
    with pytest.warns(UserWarning, match="contradicts the labels .* calibrate()"):
        model.predict(X, link="pairwise")
    model.prior_variance = 1e-6
    model.predict(X, link="pairwise")  # silent: warnings are errors
    model.predict(X, link="plugin")


def test_regressions_and_groups_and_bad_labels_are_refused():
    X = inputs()
    with pytest.raises(TypeError, match="calibrate is for classification; under"):
        build("gaussian").calibrate(X, X[:, :1])
    with pytest.raises(TypeError, match="train_gap is for classification"):
        _ = build("gaussian").train_gap
    Y = targets("softmax", X)
    with pytest.raises(ValueError, match="has 2 groups. Build it with groups='all'"):
        build("softmax", groups="layer").calibrate(X + 1, Y)
    with pytest.raises(ValueError, match="has mean='linear_model'. Build it with"):
        build("softmax", mean="linear_model").calibrate(X, Y)
    model = build("softmax")
    with pytest.raises(ShapeError, match="X_val must have 2 columns"):
        model.calibrate(X[:, :1], Y)
    with pytest.raises(InputDataError, match="X_val has no rows .*Pass at least one"):
        model.calibrate(X[:0], Y[:0])
    with pytest.raises(InputDataError, match="X_val contains NaN"):
        model.calibrate(X * float("nan"), Y)
    with pytest.raises(ShapeError, match="Y_val must have 12 rows"):
        model.calibrate(X, Y[:5])
    with pytest.raises(InputDataError, match=r"Y_val must lie in 0 .. 2"):
        model.calibrate(X, Y + 5)
    with pytest.raises(TypeError, match="Y_val must hold integer class labels"):
        model.calibrate(X, Y.double())
    with pytest.raises(TypeError, match="X_val must be torch.float64"):
        model.calibrate(X.float(), Y)
    with pytest.raises(ValueError, match="link must be one of 'plugin', 'pairwise'"):
        model.predict(X, link="mean_field")


def test_a_calibration_that_is_not_adopted_leaves_the_earlier_one():
    net, model, X_val, Y_val = overconfident_model()
    first = model.calibrate(X_val, Y_val)
    assert first is not None
    expected = model.predict(X_val).probs
    with pytest.warns(UserWarning, match="calibrate keeps"):
        assert model.calibrate(X_val[:1], Y_val[:1]) is None
    assert model.calibration == first and "fitted by calibrate" in repr(model)
    torch.testing.assert_close(model.predict(X_val).probs, expected, rtol=0, atol=0)


def test_minus_zero_is_the_same_row_as_zero():
    X, Y = torch.zeros(2, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="All 2 rows of X_val"):
        check_held_out(-X, Y, X, Y)
    check_held_out(X, Y + 1, X[:1], Y[:1])
