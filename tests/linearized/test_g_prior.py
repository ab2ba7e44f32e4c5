"""The scales of a g-prior: exact sums, their estimate, dead weights, bounded memory."""

import pytest
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from torch import nn

from gpbridge import Exact, LinearizedGP
from gpbridge.functional import FunctionalNet
from gpbridge.linearized import Sampled, g_prior
from gpbridge.linearized.g_prior import exact_squares, probed_squares
from gpbridge.solvers import ConjugateGradients
from tests import oracles
from tests.cases import every_net
from tests.linearized.problems import build, every_likelihood, inputs, network, targets

EXACT = {"rtol": 1e-9, "atol": 1e-11}
SOFTMAX = SoftmaxLikelihood(num_classes=3, mixing_weights=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def probed(case, m, n):
    network = case.network(m)
    net = FunctionalNet(network, input_shape=case.input_shape)
    X = case.inputs(n)
    net.probe(X)
    shaped = X.reshape(-1, *(case.input_shape or (case.width,)))
    return net, X, oracles.jacobian(network, shaped)


def curvature(net, X):
    """Of the softmax, diag(p) - p p', retyped."""
    p = net(X).softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


@every_net
@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
def test_exact_sums_are_the_diagonal_of_the_gauss_newton_matrix(
    case, m, chunk_bytes, monkeypatch
):
    monkeypatch.setattr(g_prior, "_CHUNK_BYTES", chunk_bytes)
    net, X, J = probed(case, m, 5)
    with torch.no_grad():
        got = exact_squares(net, X, None, 2**30)
        torch.testing.assert_close(got, J.square().sum((0, 1)), **EXACT)
        if m == 3:
            got = exact_squares(net, X, SOFTMAX, 2**30)
            B = curvature(net, X)
            expected = torch.einsum("nip,nij,njp->p", J, B, J)
            torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("likelihood", [None, SOFTMAX], ids=["gaussian", "softmax"])
def test_an_estimate_is_unbiased_and_becomes_exact_as_probes_grow(likelihood):
    net = FunctionalNet(network(3))
    X = inputs(20)
    net.probe(X)
    with torch.no_grad():
        exact = exact_squares(net, X, likelihood, 2**30)
        errors = []
        for K in (4, 64):
            found = torch.stack(
                [probed_squares(net, X, likelihood, K, generator(s)) for s in range(8)]
            )
            errors.append(((found - exact) / exact).square().mean().sqrt())
            # one point per group: the worst weight depends on one point only
            spread = (2 / K) ** 0.5
            assert ((found.mean(0) - exact) / exact).abs().max() < 5 * spread / 8**0.5
            assert errors[-1] < spread
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.4)  # the root of 64 / 4


def test_groups_of_points_do_not_bias_the_estimate():
    """The signs of different points are independent: squares of sums sum squares."""
    net = FunctionalNet(network(1))
    X = inputs(256).repeat(2, 1)  # groups of eight points
    net.probe(X)
    with torch.no_grad():
        exact = exact_squares(net, X, None, 2**30)
        found = probed_squares(net, X, None, 100, generator())
    assert (found / exact - 1).abs().max() < 5 * (2 / 100 / 64) ** 0.5
    assert not torch.allclose(found, exact, rtol=1e-3)


@every_likelihood
def test_one_point_per_group_and_one_output_need_one_probe(name):
    """The square of a sign is one: nothing is left to chance."""
    model = build(name, g_prior=1)
    if model.num_outputs > 1:
        return
    expected = build(name, g_prior=True).functional.weight_scale
    torch.testing.assert_close(model.functional.weight_scale, expected)


@pytest.mark.parametrize("option", [True, 20])
def test_dead_weights_stay_zero_where_a_test_point_would_wake_them(option):
    """A unit that is off on all data, and on elsewhere (the published floor is 1e3)."""
    net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        net[0].weight[0], net[0].bias[0] = 1.0, -5.0  # on for x1 + x2 > 5
        net[2].weight[0, 0] = 1.0
    X, far = inputs(30), torch.full((1, 2), 4.0, dtype=torch.float64)
    model = build("gaussian", X=X, net=net, g_prior=option)
    scale = model.functional.weight_scale
    dead = oracles.jacobian(net, X).square().sum((0, 1)) == 0
    assert bool((oracles.jacobian(net, far)[0, 0, dead] != 0).any())
    assert bool((scale[dead] == 0).all()) and bool((scale[~dead] > 0).all())
    assert not model.offset
    J, J_far = (oracles.jacobian(net, x)[:, 0] * scale for x in (X, far))
    H = J.T @ J / 0.03 + torch.eye(len(scale)).double() / 0.4
    variance = J_far @ torch.linalg.solve(H, J_far.T)
    torch.testing.assert_close(model.posterior(far).variance, variance, **EXACT)
    sampled = build(
        "gaussian",
        X=X,
        net=net,
        g_prior=option,
        inference=Sampled(4, ConjugateGradients(1e-8), space="weight"),
    )
    draws = sampled.problem.draws(sampled.prior_variance)
    assert bool((draws.std[dead] == 0).all())
    assert sampled.posterior(far).variance.isfinite().all()


def test_no_dense_features_of_many_points_are_held(monkeypatch):
    """Neither by the sums nor by the bounds of the prior variance."""
    widest = 0
    formed = g_prior.tangent_features

    def counted(net, X, std):
        nonlocal widest
        widest = max(widest, len(X))
        return formed(net, X, std)

    monkeypatch.setattr(g_prior, "tangent_features", counted)
    monkeypatch.setattr(g_prior, "_CHUNK_BYTES", 1)
    build("softmax", X=inputs(40), g_prior=True)
    assert widest == 1


def test_exact_sums_beyond_the_budget_are_refused_with_the_estimate():
    options = {"inference": Exact(memory_budget=100)}
    with pytest.raises(MemoryError, match=r"g-prior by exact sums.*g_prior=32"):
        build("gaussian", g_prior=True, **options)
    assert build("gaussian", g_prior=4, **options).g_prior == 4


@pytest.mark.parametrize("bad", [0, -3, 2.5, "yes", None])
def test_other_options_are_refused(bad):
    with pytest.raises(ValueError, match="g_prior must be True, False, or a number"):
        build("gaussian", g_prior=bad)


def test_an_estimate_is_part_of_the_state():
    X = inputs()
    one = build("gaussian", g_prior=3)
    other = LinearizedGP(network(), X, targets("gaussian", X), g_prior=True)
    other.load_state_dict(one.state_dict())
    scale = other.functional.weight_scale
    assert torch.equal(scale, one.functional.weight_scale)
