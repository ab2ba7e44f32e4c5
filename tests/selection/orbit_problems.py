"""Networks on orbits, their evidence, and all that its dense formula needs."""

import functools

import torch
from gpytorch.likelihoods import MultitaskGaussianLikelihood, SoftmaxLikelihood
from torch import nn

from gpbridge.augmentation import Rotation2d
from gpbridge.linearized import Diagonal, Exact, Kronecker
from gpbridge.selection import TangentBlocks
from gpbridge.selection.orbit_curvature import OrbitCurvature
from gpbridge.selection.orbit_jacobians import OrbitNet, orbits, row_noise
from gpbridge.selection.orbit_likelihood import OrbitData
from tests import oracles_invariance as oracles

N, S = 9, 4

PRIOR = torch.tensor([0.7, 1.3], dtype=torch.float64)


class Nested(nn.Module):
    """Contractible layers, a normalisation, and a weight that no layer owns."""

    def __init__(self, m):
        super().__init__()
        self.body = nn.ModuleDict({"first": nn.Linear(2, 5), "norm": nn.LayerNorm(5)})
        self.head = nn.Linear(5, m)
        self.scale = nn.Parameter(torch.tensor(0.8))

    def forward(self, x):
        return self.head(self.body["norm"](self.body["first"](x).tanh())) * self.scale


def points(n=N, d=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def network(m, seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Nested(m).double()


@functools.cache
def problem(kind, m=3):
    """Network on orbits, data, likelihood, noise."""
    net, X = network(m), points()
    names = [n for n, _ in net.named_parameters()]
    groups = [names[:3], names[3:]]
    augmentation = Rotation2d(S).double()
    augmentation.bound = 0.9
    on_orbits = OrbitNet(net, augmentation, groups, None, X)
    if kind == "softmax":
        likelihood = SoftmaxLikelihood(num_classes=m, mixing_weights=False)
        return on_orbits, X, torch.arange(N) % m, likelihood, None
    likelihood = MultitaskGaussianLikelihood(m, rank=0)
    noises = [0.3, 0.3, 0.3] if kind == "one noise" else [0.3, 0.1, 0.6]
    noise = torch.tensor(noises, dtype=torch.float64)[:m]
    return on_orbits, X, X[:, :1].sin() * torch.ones(m).double(), likelihood, noise


def jittered(X, on_orbits):
    return row_noise(on_orbits.augmentation, len(X), torch.Generator().manual_seed(4))


def evidence_at(bound, kind, structure, per_datum=True, gradient=False, seed=0):
    on_orbits, X, Y, likelihood, noise = problem(kind)
    on_orbits.augmentation.bound = bound
    data = OrbitData(X, Y, jittered(X, on_orbits) if per_datum else None)
    curvature = OrbitCurvature(on_orbits, likelihood, structure, N)
    values = dict(on_orbits.augmentation.named_parameters()) if gradient else {}
    generator = torch.Generator().manual_seed(seed)
    measured = curvature.measure(data, PRIOR, noise, values, generator)
    return measured.evidence(PRIOR, noise, True), measured.gradients


def dense(kind, per_datum=True):
    """Everything that the oracle needs, by plain loops."""
    on_orbits, X, Y, likelihood, noise = problem(kind)
    drawn = jittered(X, on_orbits) if per_datum else None
    images = orbits(on_orbits.augmentation, X, None, drawn)
    net = on_orbits.net.network
    w = torch.cat([p.detach().flatten() for p in net.parameters()])
    names = [n for n, _ in net.named_parameters()]
    sizes = [p.numel() for p in net.parameters()]
    per_tensor = torch.tensor([PRIOR[0 if k < 3 else 1] for k in range(len(names))])
    variance = per_tensor.double().repeat_interleave(torch.tensor(sizes))
    f, J = oracles.averaged_jacobian(net, images)
    return kind, f, J, Y, w, variance, noise


KINDS = ["softmax", "gaussian"]

STRUCTURES = {
    "weights": Exact(space="weight"),
    "functions": Exact(space="function"),
    "blocks": TangentBlocks(block_size=4),
    "independent": TangentBlocks(block_size=4, outputs="independent"),
    "sampled": TangentBlocks(block_size=4, outputs="sampled"),
    "drawn": TangentBlocks(block_size=4, num_blocks=2),
    "diagonal": Diagonal(),
    "kronecker": Kronecker(),
}
