"""Contextual bandits as tables, and one network for all of them.

In: a name, a horizon, a seed. Out: contexts, what each arm would pay at each step, and
its mean, so that all methods meet the same world. Next: ``quality_bandits``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpbridge.data import load_images


class Bandit(NamedTuple):
    """``contexts`` T x d, ``rewards`` and ``means`` T x K, ``bounds`` 2 x d.

    In the ``first`` steps arms take turns.
    """

    contexts: Tensor
    rewards: Tensor
    means: Tensor
    bounds: Tensor
    first: int

    @property
    def regrets(self) -> Tensor:
        """Expected regret of each arm, T x K."""
        return self.means.amax(-1, keepdim=True) - self.means


def wheel(delta: float, horizon: int, seed: int) -> Bandit:
    """Contexts uniform in the unit disk; one of five arms pays 1.2, the others 1.

    Outside the radius delta one of the others pays 50, another one in each quadrant.
    All rewards have standard deviation .01. Riquelme, Tucker, Snoek, Deep Bayesian
    bandits showdown, ICLR 2018, section 5.
    """
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(horizon, 2, generator=generator, dtype=torch.float64)
    radius, angle = u[:, 0].sqrt(), 2 * math.pi * u[:, 1]
    contexts = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    means = torch.ones(horizon, 5, dtype=torch.float64)
    means[:, 0] = 1.2
    outside = radius > delta
    quadrant = 1 + 2 * (contexts[:, 0] > 0).long() + (contexts[:, 1] > 0).long()
    means[outside, quadrant[outside]] = 50.0
    noise = torch.randn(means.shape, generator=generator, dtype=torch.float64)
    bounds = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    first = min(100, horizon // 2)  # or the large reward is often not seen at all
    return Bandit(contexts, means + 0.01 * noise, means, bounds, first)


def classes(X: Tensor, y: Tensor, horizon: int, seed: int) -> Bandit:
    """An arm for each class, which pays 1 if it is that of the image and else 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(X), generator=generator)[:horizon]
    means = F.one_hot(y[rows], 10).double()
    # One scale for all pixels: some never change.
    bounds = torch.stack([torch.zeros(X.shape[1]), torch.ones(X.shape[1])]).double()
    return Bandit(X[rows].double(), means, means, bounds, 20)


def load(name: str, horizon: int, seed: int, path: Path | None) -> Bandit:
    """A bandit by name: ``wheel .5``, ``digits``, ``fashion_mnist``."""
    if name.startswith("wheel"):
        return wheel(float(name.split()[1]), horizon, seed)
    if name == "digits":
        from sklearn.datasets import load_digits

        X, y = load_digits(return_X_y=True)
        return classes(torch.tensor(X) / 16, torch.tensor(y), horizon, seed)
    X, y, _, _ = load_images(path / "images", name, num_train=10_000, num_test=1)
    return classes(F.avg_pool2d(X, 2).flatten(1), y, horizon, seed)


class ArmNetwork(nn.Module):
    """One output per arm, of which the indicators behind the context pick one.

    A loss on it is masked: it tells the other outputs nothing.
    """

    def __init__(self, num_inputs: int, arms: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.arms = arms
        drop = [nn.Dropout(dropout)] if dropout else []
        self.body = nn.Sequential(
            *(nn.Linear(num_inputs - arms, 64), nn.ReLU(), *drop),
            *(nn.Linear(64, 64), nn.ReLU(), *drop),
        )
        self.head = nn.Linear(64, arms)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.head(self.body(x[..., : -self.arms]))
        return (outputs * x[..., -self.arms :]).sum(-1, keepdim=True)
