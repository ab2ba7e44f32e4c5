"""On an accelerator everything follows the inputs; run where there is one."""

import pytest
import torch
from botorch.acquisition import qLogExpectedImprovement
from gpytorch.likelihoods import SoftmaxLikelihood
from torch import nn

from gpbridge import Exact, LinearizedGP
from gpbridge.dnn import fit_map
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.selection import fit_evidence

pytestmark = pytest.mark.gpu


def problem(num_outputs):
    net = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, num_outputs))
    X = torch.rand(60, 3, dtype=torch.float64)
    return net.double(), X, torch.rand(7, 3, dtype=torch.float64)


@pytest.mark.parametrize("space", ["weight", "function", "matrix_free"])
def test_regression_on_the_device_equals_the_cpu(space):
    net, X, T = problem(1)
    Y = torch.sin(5 * X.sum(-1, keepdim=True))
    found = {}
    for device in ("cpu", "cuda"):
        model = LinearizedGP(
            net.to(device),
            X.to(device),
            Y.to(device),
            inference=Exact(space=space),
        )
        fit_evidence(model, warn=False)
        posterior = model.posterior(T.to(device))
        assert posterior.mean.device.type == device
        assert model.predict(T.to(device)).mean.device.type == device
        new = model.condition_on_observations(T.to(device), Y[:7].to(device))
        draws = model.draw(8)(T.to(device))
        assert draws.device.type == device
        found[device] = [
            posterior.mean.cpu(),
            posterior.variance.cpu(),
            new.posterior(T.to(device)).variance.cpu(),
            model.log_evidence().detach().cpu(),
        ]
    for a, b in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_classification_on_the_device_equals_the_cpu():
    net, X, T = problem(3)
    labels = (3 * X[:, 0]).long()
    found = {}
    for device in ("cpu", "cuda"):
        model = LinearizedGP(
            net.to(device),
            X.to(device),
            labels.to(device),
            SoftmaxLikelihood(num_classes=3, mixing_weights=False),
        )
        fit_evidence(model)
        probs = model.predict(T.to(device), link="pairwise").probs
        found[device] = [probs.cpu(), model.log_evidence().detach().cpu()]
    for a, b in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_training_acquisition_and_kernel_run_on_the_device():
    net, X, T = problem(1)
    X, Y = X.cuda(), torch.sin(5 * X.sum(-1, keepdim=True)).cuda()
    trained = fit_map(net.cuda(), X, Y, epochs=5, progress=False)
    model = LinearizedGP.from_fit(trained, X, Y)
    fit_evidence(model, warn=False)
    points = T[:, None].cuda().requires_grad_()
    qLogExpectedImprovement(model, Y.max())(points).sum().backward()
    assert points.grad.isfinite().all()
    gram = NeuralTangentKernel(net)(X).to_dense()
    assert gram.device.type == "cuda" and gram.isfinite().all()


def test_float32_on_the_device_keeps_positive_variances():
    net, X, T = problem(1)
    Y = torch.sin(5 * X.sum(-1, keepdim=True))
    exact = LinearizedGP(net, X, Y, noise=1e-4).posterior(T)
    single = LinearizedGP(
        net.float().cuda(), X.float().cuda(), Y.float().cuda(), noise=1e-4
    ).posterior(T.float().cuda())
    assert (single.variance > 0).all()
    torch.testing.assert_close(
        single.variance.cpu().double(), exact.variance.detach(), rtol=0.05, atol=0
    )
