"""A nested network whose statistics and settings an ensemble must keep."""

import torch
from torch import nn


class Nested(nn.Module):
    """Two norms, a frozen weight, and a setting that only forward knows."""

    def __init__(self, m=1, scale=2.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, m))
        self.body[0].bias.requires_grad_(False)
        self.scale = scale
        self.double()
        self(torch.randn(20, 2).double())  # statistics of its own
        self.eval()

    def forward(self, x):
        return self.scale * self.head(self.body(x))
