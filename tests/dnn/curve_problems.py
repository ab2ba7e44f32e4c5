"""Networks, data and bent curves that curves are tested on."""

import torch
from torch import nn

QUICK = {"epochs": 4, "batch_size": 16, "progress": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Nested(nn.Module):
    """Modules inside modules, batch norm, dropout, a buffer and a fixed weight."""

    def __init__(self, m=3):
        super().__init__()
        self.head = nn.ModuleDict({"out": nn.Linear(5, m)})
        self.body = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.fixed = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("shift", torch.full((2,), 0.1))

    def forward(self, x):
        return self.head["out"](torch.tanh(self.body(x + self.shift)) * self.fixed)


def pair(build=Nested, dtype=torch.float64):
    return build().to(dtype).train(), build().to(dtype).train()


def moving(network):
    return torch.cat(
        [p.detach().flatten() for p in network.parameters() if p.requires_grad]
    )


def data(n=40):
    X = torch.randn(n, 2, generator=seeded(1), dtype=torch.float64)
    return X, (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


def bent(kind, num_bends, networks):
    curve = kind(*networks, num_bends=num_bends)
    with torch.no_grad():
        noise = torch.randn(curve.bends.shape, generator=seeded(3), dtype=torch.float64)
        curve.bends.add_(noise)
    return curve
