"""On an accelerator everything follows the inputs; run where there is one."""

import pytest
import torch
from botorch.acquisition import qLogExpectedImprovement
from gpytorch.kernels import LinearKernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import SoftmaxLikelihood
from torch import nn

from gpbridge import Exact, LinearizedGP, SampledGP
from gpbridge.dnn import fit_map
from gpbridge.kernel_operator import KernelMatrixOperator
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.linearized import Sampled
from gpbridge.selection import SampleBasedEM, fit_evidence, fit_iterative
from gpbridge.solvers import (
    AlternatingProjections,
    Cholesky,
    ConjugateGradients,
    SketchAndProject,
)

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


DEVICES = ("cpu", "cuda")


def seeded():
    return torch.Generator().manual_seed(0)  # on the CPU, so that draws are the same


def sampled_model(X, Y, device):
    kernel = ScaleKernel(MaternKernel(2.5, ard_num_dims=3)).double()
    model = SampledGP(X, Y, kernel, num_samples=8).to(device)
    model.likelihood.noise = 0.01
    return model


def test_a_sampled_gp_on_the_device_equals_the_cpu():
    _, X, T = problem(1)
    Y = torch.sin(5 * X.sum(-1, keepdim=True))
    found = []
    for device in DEVICES:
        model, Z = sampled_model(X, Y, device), T.to(device)
        posterior = model.posterior(Z)
        draw = model.draw(20, seeded())  # more than the model has: a solve of its own
        own = Z.expand(20, *Z.shape)
        new = model.condition_on_observations(Z[:, None], Y[:7, None].to(device))
        values = [
            posterior.mean,
            posterior.variance,
            draw(Z),
            draw.each(own),
            new.posterior(Z).variance,
            model.predict(Z).stddev,
        ]
        assert all(value.device.type == device for value in values)
        found.append([value.detach().cpu() for value in values])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "solver",
    [
        Cholesky(),
        ConjugateGradients(tolerance=1e-9),
        AlternatingProjections(tolerance=1e-7),
        SketchAndProject(tolerance=1e-7),
    ],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_a_solver_on_a_kernel_matrix_of_the_device_equals_the_cpu(
    solver, compute_dtype
):
    net, X, T = problem(1)
    X, V = torch.cat([X, T]), torch.cat([X, T]).cos()
    found = []
    for device in DEVICES:
        for kernel in (MaternKernel(1.5), LinearKernel(), NeuralTangentKernel(net)):
            H = KernelMatrixOperator(
                X.to(device),
                0.1,
                kernel=kernel.double().to(device),
                compute_dtype=compute_dtype,
            )
            solution = solver(H, V.to(device))
            assert solution.converged and solution.value.device.type == device
            found.append(solution.value.cpu())
    for a, b in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_iterative_fit_on_the_device_equals_the_cpu():
    _, X, _ = problem(1)
    Y = torch.sin(5 * X.sum(-1, keepdim=True))
    found = []
    for device in DEVICES:
        fit = fit_iterative(
            sampled_model(X, Y, device),
            steps=2,
            solver=ConjugateGradients(tolerance=1e-10),
        )
        found.append([*fit.hyperparameters.values(), *fit.gradients.values()])
    for cpu, cuda in zip(*found, strict=True):
        for a, b in zip(cpu, cuda, strict=True):
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-6)


def test_sampled_inference_and_its_em_on_the_device_equal_the_cpu():
    net, X, T = problem(1)
    Y = torch.sin(5 * X.sum(-1, keepdim=True))
    found = []
    for device in DEVICES:
        inference = Sampled(16, ConjugateGradients(tolerance=1e-10))
        model = LinearizedGP(
            net.to(device), X.to(device), Y.to(device), inference=inference
        )
        (step,) = SampleBasedEM(model).run(1, progress=False)
        posterior = model.posterior(T.to(device))
        assert posterior.mean.device.type == device
        values = [posterior.mean, posterior.variance, model.prior_variance]
        values.append(torch.tensor(step.effective_dimension))
        found.append([value.detach().cpu() for value in values])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
