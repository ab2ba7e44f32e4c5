"""The evidence against dense oracles: its value, its parts and its gradient."""

import os
import subprocess
import sys

import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.constraints import Positive
from gpytorch.settings import (
    cg_tolerance,
    fast_computations,
    max_cholesky_size,
    num_trace_samples,
)

from gpbridge import Exact
from gpbridge.selection import log_evidence
from tests import oracles_linearized as oracles
from tests.conftest import ROOT
from tests.linearized.problems import (
    PRIOR_VARIANCE,
    PROBLEMS,
    both_spaces,
    build,
    curvature,
    every_likelihood,
    gaussian_likelihoods,
    inputs,
    label_likelihoods,
    network,
    targets,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@both_spaces
@gaussian_likelihoods
@pytest.mark.parametrize("offset", [True, False])
def test_under_gaussian_noise_it_is_the_log_density_of_the_targets(name, space, offset):
    X = inputs()
    train = oracles.tangent(network(PROBLEMS[name].m), X)
    noise, Y = PROBLEMS[name].noise(len(X)), targets(name, X)
    expected = oracles.gaussian_log_evidence(train, PRIOR_VARIANCE, noise, Y, offset)
    got = build(name, space, offset=offset).log_evidence()
    torch.testing.assert_close(got, expected, **EXACT)


@both_spaces
def test_evaluations_from_one_eigendecomposition_are_the_same(space):
    """The third and later ones, while hyperparameters are learnt."""

    def evaluate(model):
        evidence = model.evidence()
        (-evidence.value).backward()
        slopes = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return evidence, slopes

    model = build("gaussian", space)
    for prior, noise in ((0.7, 0.3), (2.0, 1e-3), (0.1, 5.0)):
        fresh = build("gaussian", space)
        for one in (model, fresh):
            one.prior_variance, one.likelihood.noise = prior, noise
        exact, slopes = evaluate(fresh)
        for _ in range(3):
            evidence, got = evaluate(model)
        assert model.problem.noise_spectrum is not None
        assert fresh.problem.noise_spectrum is None
        for value, expected in zip(evidence, exact, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)
        assert len(slopes) == 2
        torch.testing.assert_close(got, slopes, rtol=1e-6, atol=1e-9)


def test_evaluations_keep_their_digits_where_weights_outnumber_data():
    X = inputs()
    net = network(width=12)
    options = {"net": net, "X": X, "Y": targets("gaussian", X)}
    values = []
    for space in ("weight", "function"):
        model = build("gaussian", space, **options)
        assert model.functional.num_params > len(X)
        model.likelihood.noise_covar.register_constraint("raw_noise", Positive())
        model.likelihood.noise = 1e-6
        values += [model.log_evidence() for _ in range(3)]
    for value in values:
        torch.testing.assert_close(value, values[-1], rtol=1e-8, atol=1e-8)


@both_spaces
@label_likelihoods
def test_under_labels_it_is_laplaces_at_the_optimum_of_the_linear_model(name, space):
    X, net, m = inputs(), network(PROBLEMS[name].m), PROBLEMS[name].m
    train = oracles.tangent(net, X)
    expected = oracles.laplace_log_evidence(
        train,
        PRIOR_VARIANCE,
        PROBLEMS[name].log_density,
        targets(name, X),
        m,
        curvature(name, net, X),
    )
    got = build(name, space).log_evidence().item()
    assert got == pytest.approx(expected, rel=1e-9)


def test_at_the_optimum_the_evidence_at_given_weights_is_the_exact_one():
    X, Y = inputs(), targets("gaussian", inputs())
    train = oracles.tangent(network(), X)
    Phi = train.features(PRIOR_VARIANCE)
    H = torch.eye(Phi.shape[1]).double() + Phi.T @ Phi / 0.03
    w = torch.linalg.solve(H, Phi.T @ (Y[:, 0] - train.mean())) / 0.03
    w = w * PRIOR_VARIANCE**0.5
    expected = oracles.evidence_at_weights(
        train, PRIOR_VARIANCE, 0.03, Y, w, train.mean() + train.J @ w
    )
    got = build("gaussian").log_evidence()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0.0)
    trained = oracles.evidence_at_weights(
        train, PRIOR_VARIANCE, 0.03, Y, train.weights, train.value
    )
    assert trained < got  # the network is not at that optimum


@both_spaces
@every_likelihood
def test_its_parts_add_up_and_the_dimension_is_a_trace(name, space):
    X, net = inputs(), network(PROBLEMS[name].m)
    Phi = oracles.tangent(net, X).features(PRIOR_VARIANCE)
    if PROBLEMS[name].gaussian:
        precision = torch.linalg.inv(PROBLEMS[name].noise(len(X)))
    else:
        precision = curvature(name, net, X)
    H = torch.eye(Phi.shape[1]).double() + Phi.T @ precision @ Phi
    found = build(name, space).evidence()
    assert found.value.item() == pytest.approx((found.fit - found.complexity).item())
    torch.testing.assert_close(found.complexity, 0.5 * torch.logdet(H), **EXACT)
    dimension = Phi.shape[1] - torch.linalg.inv(H).trace()
    torch.testing.assert_close(found.effective_dimension, dimension, **EXACT)


@both_spaces
@pytest.mark.parametrize("groups", ["all", "layer", "tensor"])
@every_likelihood
def test_its_gradient_matches_finite_differences(name, space, groups):
    if name == "fixed_noise" and groups != "layer":
        pytest.skip("no noise to differentiate")
    model = build(name, space, groups=groups)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for i, p in enumerate(parameters):
        with torch.no_grad():
            p.add_(0.1 * torch.linspace(-1, 1, p.numel()).reshape(p.shape) + 0.01 * i)
    gradients = torch.autograd.grad(model.log_evidence(), parameters)
    step = 1e-4
    for p, gradient in zip(parameters, gradients, strict=True):
        for i in range(p.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * step
                    values.append(model.log_evidence())
                    p.view(-1)[i] -= sign * step
            expected = (values[0] - values[1]) / (2 * step)
            torch.testing.assert_close(
                gradient.view(-1)[i], expected, rtol=2e-5, atol=2e-6
            )


SCRIPT = """
{imports}
import torch
from botorch.models import SingleTaskGP
from gpbridge.selection import log_evidence
torch.set_num_threads(1)
torch.manual_seed(0)
X = torch.rand(810, 2).double()
Y = (6 * X[:, :1]).sin() + 0.1 * torch.randn(810, 1).double()
net = torch.nn.Sequential(
    torch.nn.Linear(2, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)
).double()
with torch.no_grad():
    print(gpbridge.LinearizedGP(net, X, Y).log_evidence().item())
    print(log_evidence(SingleTaskGP(X, Y, outcome_transform=None)).item())
"""


@every_likelihood
def test_its_value_does_not_depend_on_upstreams_settings(name):
    # Importing botorch changes some of them: above 800 points without it, and 4096
    # with it, upstream's determinants are stochastic.
    X = inputs()
    Y = targets("gaussian", X)
    gp = SingleTaskGP(X, (Y - Y.mean()) / Y.std(), outcome_transform=None)
    expected = build(name).log_evidence().item(), log_evidence(gp).item()
    with (
        max_cholesky_size(1),
        fast_computations(True, True, True),
        num_trace_samples(1),
        cg_tolerance(1.0),
    ):
        assert build(name).log_evidence().item() == expected[0]
        assert log_evidence(gp).item() == expected[1]


@pytest.mark.slow
def test_its_value_does_not_depend_on_the_order_of_imports():
    orders = ("import gpytorch; import gpbridge", "import gpbridge")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(imports=imports)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for imports in orders
    ]
    first, second = (process.communicate()[0].split() for process in running)
    assert len(first) == 2 and first == second


def test_beyond_the_memory_budget_it_is_refused_with_the_memory_it_needs():
    model = build("gaussian", inference=Exact(memory_budget=4000))
    message = r"exact evidence of 12 points with 1 outputs and 25 random .* GiB"
    with pytest.raises(MemoryError, match=message):
        model.log_evidence()
