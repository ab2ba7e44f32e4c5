"""The average of a network over orbits of its inputs."""

import pytest
import torch
from torch import nn

from gpbridge.augmentation import (
    AveragedNetwork,
    FiniteOrbit,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3), "act": nn.Tanh()})
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block["act"](self.block["conv"](x)).flatten(1))


def test_an_averaged_network_is_the_mean_of_its_outputs(generator):
    network, flips = Nested().double(), FiniteOrbit.flips((4, 4), "both")
    x = torch.randn(5, 16, dtype=torch.float64, generator=generator)
    averaged = AveragedNetwork(network, flips, input_shape=(1, 4, 4))
    images = x.reshape(5, 1, 4, 4)
    flipped = [images, images.flip(-1), images.flip(-2), images.flip(-2).flip(-1)]
    expected = sum(network(image) for image in flipped) / 4
    torch.testing.assert_close(averaged(x), expected)
    torch.testing.assert_close(averaged(images.flip(-1).flatten(1)), expected)
