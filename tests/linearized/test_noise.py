"""Noise from where it is asked to come."""

import pytest
import torch

from gpbridge import FitResult, LinearizedGP
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.selection import fit_evidence
from tests.linearized import problems
from tests.linearized.problems import (
    PROBLEMS,
    build,
    gaussian_likelihoods,
    inputs,
    network,
    targets,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("m", [1, 2])
def test_noise_comes_from_where_it_is_asked(m):
    X, net = inputs(), network(m)
    Y = targets("multitask", X)[:, :m]
    result = FitResult(
        net,
        torch.arange(8),
        torch.arange(8, 12),
        torch.full((m,), 0.2).double(),
        torch.full((m,), 0.3).double(),
        1e-4,
    )

    def noise(**options):
        return LinearizedGP.from_fit(result, X, Y, **options).noise_variance

    for options, expected in (
        ({"noise": "fit_residual"}, 0.2),
        ({"noise": "validation"}, 0.3),
        ({"noise": 0.07}, 0.07),
        ({"mean": "network"}, 0.2),
        ({"parameters": "last_layer"}, 0.3),
    ):
        got = noise(**options)
        torch.testing.assert_close(
            got, torch.full((m,), expected).double(), rtol=1e-5, atol=0
        )
    torch.testing.assert_close(noise(), 0.1 * Y.var(0, correction=0), rtol=1e-5, atol=0)
    fixed = LinearizedGP.from_fit(result, X, Y, noise=0.07)
    assert not any(p.requires_grad for p in fixed.likelihood.parameters())
    misfit = (Y - net(X)).detach().square().mean(0)
    with pytest.warns(UserWarning, match="without a fit result takes the residuals of"):
        model = LinearizedGP(net, X, Y, noise="fit_residual")
    torch.testing.assert_close(model.noise_variance, misfit, rtol=1e-5, atol=0)


@gaussian_likelihoods
def test_noise_variances_are_those_of_the_likelihood(name):
    noise = build(name).noise_variance
    expected = PROBLEMS[name].noise(12).diagonal().reshape(12, -1)
    if name != "fixed_noise":
        expected = expected[0]
    torch.testing.assert_close(noise, expected, **EXACT)


def test_a_learnt_noise_around_the_network_is_refused_when_it_would_be_learnt():
    model = build("gaussian", mean="network", noise=0.1)
    model.likelihood.noise_covar.raw_noise.requires_grad_(True)
    with pytest.raises(ValueError, match="noise_covar.raw_noise of the .*use_mean"):
        fit_evidence(model, warn=False)
    model.use_mean("network", 0.2)
    fit_evidence(model, warn=False)
    assert model.noise_variance.item() == pytest.approx(0.2)


@pytest.mark.parametrize("noise", ["nonsense", "validation", 0.1])
def test_a_noise_under_labels_is_refused(noise):
    with pytest.raises(ValueError, match="noise is for regression, but came as"):
        build("softmax", noise=noise)


class Unreached(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.used(x)


def test_warnings_point_at_the_line_that_called():
    X, Y = inputs(), targets("gaussian", inputs())
    net = network()
    run = FitResult(net, torch.arange(12), torch.arange(0), None, None, 1e-4)
    sure = torch.nn.Linear(2, 3).double()
    with torch.no_grad():
        sure.weight.copy_(30 * torch.tensor([[1.0, 0], [0, 1], [-1, -1]]))
        classes = LinearizedGP(sure, X - 0.5, sure(X - 0.5).argmax(-1))
    classes.prior_variance = 900.0
    calls = {
        "parameters='last_layer'": lambda: build("gaussian", parameters="last_layer"),
        "without a fit result": lambda: LinearizedGP.from_fit(
            run, X, Y, noise="fit_residual"
        ),
        "does not reach": lambda: LinearizedGP(Unreached().double(), X, Y),
        "without calibration": lambda: classes.predict(X, "pairwise"),
        "calibrate keeps": lambda: classes.calibrate(X[:1] + 1, torch.tensor([0])),
    }
    for message, call in calls.items():
        with pytest.warns(UserWarning, match=message) as caught:
            call()
        files = {w.filename for w in caught if message in str(w.message)}
        wanted = problems.__file__ if "last_layer" in message else __file__
        assert files == {wanted}, message
    with pytest.warns(UserWarning, match="does not reach") as caught:
        NeuralTangentKernel(Unreached())(torch.zeros(3, 2)).to_dense()
    assert {w.filename for w in caught} == {__file__}
