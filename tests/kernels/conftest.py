"""Points of a plane that several files take; a file may have its own."""

import pytest
import torch


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def X(generator):
    return torch.randn(7, 2, dtype=torch.float64, generator=generator)


@pytest.fixture
def X2(generator):
    return torch.randn(4, 2, dtype=torch.float64, generator=generator)
