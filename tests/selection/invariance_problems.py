"""Networks, data and runs for tests of learnt invariances."""

import math

import torch
from torch import nn

from gpbridge.augmentation import Rotation2d
from gpbridge.selection import learn_invariance

N = 24


class Nested(nn.Module):
    """Layers in modules, batch norm, and an output of shape n."""

    def __init__(self, m=2):
        super().__init__()
        self.body = nn.ModuleDict({"first": nn.Linear(2, 6), "norm": nn.BatchNorm1d(6)})
        self.head = nn.Linear(6, m)

    def forward(self, x):
        return self.head(self.body["norm"](self.body["first"](x)).tanh()).squeeze(-1)


def tanh_net(width=6, m=2, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, m))


def rings(n, arc, seed=0):
    """Two classes on two circles, and some of the second at the origin."""
    generator = torch.Generator().manual_seed(seed)
    half = n // 2
    radius, label = torch.full((n,), 0.5), torch.zeros(n, dtype=torch.long)
    label[half:], radius[half:] = 1, 1.0
    radius[half + (n - half) * 2 // 3 :] = 0.0
    angle = torch.rand(n, generator=generator) * math.radians(arc)
    X = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    return X + 0.06 * torch.randn(n, 2, generator=generator), label


def run(network=None, data=None, augmentation=None, **options):
    options = {"epochs": 4, "progress": False} | options
    augmentation = Rotation2d(3) if augmentation is None else augmentation
    network = tanh_net() if network is None else network
    return learn_invariance(network, data or rings(N, 120), augmentation, **options)


def equal(fit, other):
    a, b = fit.network.state_dict(), other.network.state_dict()
    same = all(torch.equal(a[name], b[name]) for name in a)
    return same and fit.losses == other.losses and fit.steps == other.steps
