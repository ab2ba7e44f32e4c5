"""The problems that several benchmarks share: networks and synthetic data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(
    widths: Sequence[int], activation: type[nn.Module] = nn.Tanh, seed: int = 0
) -> nn.Sequential:
    """A multilayer perceptron, initialised from its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inner, outer in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(inner, outer), activation()]
    return nn.Sequential(*layers[:-1])


def small_cnn(seed: int = 0, num_classes: int = 10) -> nn.Sequential:
    """Two convolutions for 1 x 8 x 8 digits, p = 1898."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, num_classes),
        )


def smooth_regression(
    num_train: int, num_test: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eight standard normal inputs, a sine and an interaction, noise std 0.2.

    Targets are standardised; returns train X, train Y ``n x 1``, test X, test Y.
    """
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(num_train + num_test, 8, dtype=torch.float64, generator=generator)
    weights = torch.randn(8, dtype=torch.float64, generator=generator)
    noise = torch.randn(len(X), dtype=torch.float64, generator=generator)
    y = torch.sin(X @ weights) + 0.3 * X[:, 0] * X[:, 1] + 0.2 * noise
    y = ((y - y[:num_train].mean()) / y[:num_train].std()).unsqueeze(-1)
    X, y = X.to(dtype), y.to(dtype)
    return X[:num_train], y[:num_train], X[num_train:], y[num_train:]


def train(
    network: nn.Module, X: Tensor, Y: Tensor, loss: nn.Module, steps: int = 300
) -> nn.Module:
    """Full-batch Adam in place: enough for weights that are not those of a start."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, weight_decay=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(X), Y).backward()
        optimizer.step()
    return network.eval()
