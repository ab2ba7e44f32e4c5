"""The gradient of the evidence through the curvature, against finite differences."""

import pytest
import torch
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    MultitaskGaussianLikelihood,
)
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.checks import ShapeError
from gpbridge.linearized import (
    Diagonal,
    Exact,
    Kronecker,
    LowRank,
    Sampled,
    weight_posterior,
)
from gpbridge.selection import evidence_gradient
from gpbridge.testing import assert_module_unchanged
from tests import oracles_curvature as oracles

NOISE = torch.tensor(0.1, dtype=torch.float64)
INFERENCES = {
    "exact": Exact(),
    "diagonal": Diagonal(),
    "expand": Kronecker(),
    "reduce": Kronecker("reduce"),
}
every_inference = pytest.mark.parametrize(
    "inference", INFERENCES.values(), ids=INFERENCES
)


class RotateAndStretch(nn.Module):
    def __init__(self):
        super().__init__()
        self.angle = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor([1.0, 0.8, 1.2], dtype=torch.float64))

    def forward(self, x):
        c, s = self.angle.cos(), self.angle.sin()
        moved = [c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1], x[:, 2]]
        return torch.tanh(torch.stack(moved, -1) * self.scale)


class Convolution(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.body = nn.ModuleDict({"conv": nn.Conv1d(1, 3, 2), "norm": nn.LayerNorm(2)})
        self.out = nn.Linear(6, m)

    def forward(self, x):
        h = self.body["norm"](self.body["conv"](x[:, None]))
        return self.out(torch.tanh(h).flatten(1))


def tanh_net(m):
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, m)).double()


def model_of(net, m, inference, n=24):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    if m == 1:
        Y = X.sum(-1, keepdim=True).sin()
        return LinearizedGP(net, X, Y, inference=inference, noise=NOISE)
    return LinearizedGP(net, X, torch.arange(n) % m, inference=inference)


def value_at(model, shift):
    transform = RotateAndStretch()
    with torch.no_grad():
        transform.angle += shift[0]
        transform.scale += shift[1:]
    return evidence_gradient(model, transform).evidence.value


@every_inference
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("build", [tanh_net, lambda m: Convolution(m).double()])
def test_the_gradient_is_that_of_finite_differences(inference, m, build):
    model = model_of(build(m), m, inference)
    found = evidence_gradient(model, RotateAndStretch(), batch_size=7).gradients
    got = torch.cat([found["angle"][None], found["scale"]])
    step = 1e-5 * torch.eye(4).double()
    slopes = [(value_at(model, s) - value_at(model, -s)) / 2e-5 for s in step]
    expected = torch.stack(slopes)
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_the_value_is_that_of_dense_matrices():
    net = tanh_net(3)
    model = model_of(net, 3, Exact())
    transform = RotateAndStretch()
    X = transform(model.train_inputs[0]).detach()
    logits = net(X).detach()
    M = oracles.gauss_newton(oracles.jacobian(net, X), oracles.softmax_hessians(logits))
    s = model.prior_variance.item()
    w = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    labels = (torch.arange(24) % 3)[:, None]
    fit = logits.log_softmax(-1).gather(-1, labels).sum() - w.square().sum() / (2 * s)
    complexity = 0.5 * torch.logdet(torch.eye(len(M)).double() + s * M)
    got = evidence_gradient(model, transform).evidence
    torch.testing.assert_close(got.value, fit - complexity)
    torch.testing.assert_close(got.complexity, complexity)


@every_inference
def test_minibatches_do_not_matter_and_nothing_is_changed(inference):
    net = tanh_net(3)
    model, transform = model_of(net, 3, inference), RotateAndStretch()
    with assert_module_unchanged(net):
        one = evidence_gradient(model, transform, batch_size=24)
        many = evidence_gradient(model, transform, batch_size=5)
    torch.testing.assert_close(one.evidence.value, many.evidence.value)
    torch.testing.assert_close(one.gradients, many.gradients)
    assert transform.angle.grad is None
    assert one.evidence.lower_bound == isinstance(inference, Diagonal)


class Held:
    """A tensor that a graph keeps; counts the numbers that are kept at one time."""

    now, most = 0, 0

    def __init__(self, tensor):
        self.tensor = tensor
        Held.now += tensor.numel()
        Held.most = max(Held.most, Held.now)

    def __del__(self):
        Held.now -= self.tensor.numel()


def test_memory_is_that_of_one_minibatch_whatever_the_number_of_data():
    most = {}
    for n, batch_size in ((24, 24), (48, 24), (240, 24), (240, 240)):
        model = model_of(tanh_net(1), 1, Diagonal(), n)
        _ = model.problem
        Held.now = Held.most = 0
        hooks = torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor)
        with hooks:
            evidence_gradient(model, RotateAndStretch(), batch_size)
        most[n, batch_size] = Held.most
    assert most[240, 24] == most[48, 24] <= 1.1 * most[24, 24]
    assert most[240, 240] > 5 * most[240, 24]


def test_parameters_that_do_not_learn_are_left_out():
    transform = RotateAndStretch()
    transform.scale.requires_grad_(False)
    found = evidence_gradient(model_of(tanh_net(1), 1, Diagonal()), transform)
    assert list(found.gradients) == ["angle"]


def test_noise_of_single_points_is_read_batch_by_batch():
    X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0)).double()
    likelihood = FixedNoiseGaussianLikelihood(torch.linspace(0.01, 1, 24).double())
    model = LinearizedGP(
        tanh_net(1), X, X.sum(-1, keepdim=True).sin(), likelihood, inference=Exact()
    )
    whole, parts = (
        evidence_gradient(model, RotateAndStretch(), size) for size in (24, 7)
    )
    torch.testing.assert_close(parts.evidence.value, whole.evidence.value)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(parts.gradients[name], gradient)


def test_what_would_be_another_evidence_is_refused():
    X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0)).double()
    likelihood = MultitaskGaussianLikelihood(2, rank=0).double()
    likelihood.task_noises = torch.tensor([0.01, 1.0]).double()
    likelihood.requires_grad_(False)
    model = LinearizedGP(tanh_net(2), X, X[:, :2], likelihood, inference=Kronecker())
    with pytest.raises(NotImplementedError, match="Kronecker factors of one noise"):
        evidence_gradient(model, RotateAndStretch())
    first = model_of(tanh_net(1), 1, Kronecker())
    second = LinearizedGP(
        tanh_net(1), X, X[:, :1], noise=NOISE, inference=Kronecker(),
        previous=weight_posterior(first),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="previous posterior"):
        evidence_gradient(second, RotateAndStretch())
    small = model_of(tanh_net(1), 1, Kronecker(memory_budget=100))
    with pytest.raises(MemoryError, match="Kronecker, most of it for"):
        evidence_gradient(small, RotateAndStretch())


def test_bad_input_is_named():
    model = model_of(tanh_net(1), 1, Diagonal())
    with pytest.raises(TypeError, match="needs a gpbridge.LinearizedGP"):
        evidence_gradient(tanh_net(1), RotateAndStretch())
    with pytest.raises(
        ValueError, match="Identity has no parameter with requires_grad"
    ):
        evidence_gradient(model, nn.Identity())
    with pytest.raises(ShapeError, match="returned"):
        evidence_gradient(model, nn.Linear(3, 2).double())
    with pytest.raises(ValueError, match="batch_size must be positive"):
        evidence_gradient(model, RotateAndStretch(), 0)
    broken = RotateAndStretch()
    broken.angle.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="The evidence is not finite"):
        evidence_gradient(model, broken)
    for inference in (LowRank(5), Sampled(4)):
        with pytest.raises(NotImplementedError, match="takes Exact, Diagonal and Kron"):
            evidence_gradient(model_of(tanh_net(1), 1, inference), RotateAndStretch())
    for inference in (
        Kronecker(eigenvalue_correction=True),
        Diagonal(curvature="empirical"),
    ):
        with pytest.raises(NotImplementedError, match="curvature='ggn'"):
            evidence_gradient(model_of(tanh_net(1), 1, inference), RotateAndStretch())
    with pytest.raises(MemoryError, match="inference=Kronecker"):
        small = Exact(space="weight", memory_budget=1e3)
        evidence_gradient(model_of(tanh_net(1), 1, small), RotateAndStretch())
