"""Ascent by L-BFGS: what is said where the limit of steps came too early."""

import gpytorch
import pytest
import torch
from torch import nn

from gpbridge.checks import NotConvergedWarning
from gpbridge.selection import scan
from gpbridge.selection.ascent import ascend


class Valley(gpytorch.Module):
    """A curved ridge in ten dimensions, which takes some hundred steps."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(10, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self):
        x = self.x
        bends = (x[1:] - x[:-1].square()).square().sum()
        return -100 * bends - (1 - x[:-1]).square().sum() - self.offset.square()


def test_an_ascent_that_is_cut_off_says_by_how_much_it_rose():
    model = Valley()
    cut = ascend(model, model, 30)
    assert "at its limit of 30 iterations" in cut.message and "nats" in cut.message
    assert cut.value == model().item() < -0.2
    whole = ascend(model, model, 1000)
    assert whole.message == "" and whole.value == pytest.approx(0, abs=1e-4)
    assert ascend(model, model, 30).message == ""  # nothing is left


@pytest.mark.parametrize("steps", [3, 5, 10])
def test_a_limit_of_few_iterations_is_said(steps):
    assert "still rose" in ascend(model := Valley(), model, steps).message


def test_a_scan_says_once_that_its_best_point_is_not_the_top():
    message = "best point of offset may not be the top.*limit of 30.*Raise polish_steps"
    grid = [-0.5, 0.0, 0.5]
    options = {"polish": 2, "refit_steps": 0, "progress": False}
    with pytest.warns(NotConvergedWarning, match=message) as caught:
        scan(Valley(), "offset", grid, lambda m: m(), polish_steps=30, **options)
    assert len(caught) == 1
    # Warnings are errors.
    found = scan(Valley(), "offset", grid, lambda m: m(), polish_steps=1000, **options)
    assert found.best_evidence == pytest.approx(0, abs=1e-4)
