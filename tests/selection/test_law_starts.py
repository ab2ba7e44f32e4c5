"""Starts of the laws in a kernel: names, values of their parts, copies."""

import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import AdditiveKernel, RBFKernel, ScaleKernel
from torch import nn

from gpbridge.augmentation import PatchAugmentation, Rotation2d
from gpbridge.augmentation.base import Augmentation
from gpbridge.kernels import InvariantKernel
from gpbridge.selection.law_starts import (
    by_name,
    check_starts,
    copy_of_model,
    default_starts,
    free_laws,
    free_names,
    learnt_values,
    short_name,
    value_of,
)

DOUBLE = torch.float64
PATH = "covar_module.base_kernel.augmentation"
X = torch.linspace(0.1, 0.9, 12, dtype=DOUBLE).view(6, 2)


class Drawn(Augmentation):
    """A law whose names hold the prefix of raw parameters in their middle."""

    def __init__(self):
        super().__init__(num_samples=1)
        self.draw_shift = nn.Parameter(torch.tensor(0.25, dtype=DOUBLE))
        self.parts = nn.ModuleDict({"turn": Rotation2d(3).double()})

    def transform(self, x):
        return x[..., None, :] + self.draw_shift


def model_of(*laws):
    kernels = [ScaleKernel(InvariantKernel(RBFKernel(), law)) for law in laws]
    kernel = kernels[0] if len(kernels) == 1 else AdditiveKernel(*kernels)
    Y = X.sum(-1, keepdim=True)
    return SingleTaskGP(X, Y, covar_module=kernel, outcome_transform=None)


def test_only_a_prefix_is_taken_off_a_name():
    model = model_of(Drawn())
    laws = free_laws(model)
    assert list(laws) == [PATH]
    assert free_names(laws[PATH]) == ["draw_shift", "parts.turn.bound"]
    learnt = learnt_values(model, laws)
    assert set(learnt) == {"draw_shift", "parts.turn.bound"}
    assert float(learnt["draw_shift"]) == 0.25


def test_what_is_held_is_no_free_parameter():
    law = Drawn()
    law.draw_shift.requires_grad_(False)
    assert free_names(law) == ["parts.turn.bound"]
    with pytest.raises(ValueError, match="nothing to learn"):
        free_laws(model_of(law.requires_grad_(False)))


def test_a_number_starts_the_half_width_or_the_one_parameter():
    laws = {PATH: Rotation2d(4)}
    (value,) = by_name(0.3, laws).values()
    assert value.dtype == DOUBLE and float(value) == 0.3
    assert list(by_name(0.3, laws)) == [f"{PATH}.bound"]
    drawn = Drawn()
    with pytest.raises(ValueError, match="draw_shift, parts.turn.bound to learn"):
        by_name(0.3, {PATH: drawn})
    drawn.parts.requires_grad_(False)
    assert list(by_name(0.3, {PATH: drawn})) == [f"{PATH}.draw_shift"]


def test_several_laws_are_started_by_their_paths():
    model = model_of(Rotation2d(3), Rotation2d(4))
    laws = free_laws(model)
    first, second = (f"{path}.bound" for path in laws)
    assert short_name(first, laws) == first
    assert {k: float(v) for k, v in by_name({second: 0.2}, laws).items()} == {
        second: 0.2
    }
    with pytest.raises(ValueError, match="has 2 laws to learn"):
        by_name(0.3, laws)
    with pytest.raises(ValueError, match=f"names 'width'.*{first}"):
        by_name({"width": 0.3}, laws)


def test_default_starts_are_midpoints_of_equal_parts_of_the_cap():
    law = Rotation2d(4)
    starts = default_starts({PATH: law}, 4)
    found = torch.stack([start[f"{PATH}.bound"] for start in starts])
    parts = torch.tensor([[1.0], [3.0], [5.0], [7.0]], dtype=DOUBLE) / 8
    assert torch.allclose(found, parts * law.cap.double())
    with pytest.raises(ValueError, match="PatchAugmentation, has no half-width"):
        default_starts({PATH: PatchAugmentation((1, 2), (1, 1), weights=True)}, 4)


def test_starts_are_checked_on_a_copy():
    model = model_of(Rotation2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name = f"{PATH}.bound"
    check_starts([{name: torch.tensor(0.5)}, {name: torch.tensor(1.0)}], model)
    for bad, message in [
        ([], "at least one value"),
        ([{name: torch.tensor(0.5)}, {name: torch.tensor(9.0)}], "Start 1 cannot be"),
        ([{"likelihood.noise": torch.tensor(torch.inf)}], "Start 0 cannot be"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_starts(bad, model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_value_is_a_copy_without_gradient():
    model = model_of(Rotation2d(4))
    value = value_of(model, f"{PATH}.bound")
    kept = value.clone()
    model.covar_module.base_kernel.augmentation.bound = 0.05
    assert torch.equal(value, kept) and not value.requires_grad


def test_a_copy_holds_nothing_of_predictions_and_the_model_keeps_it():
    model = model_of(Rotation2d(4)).eval()
    expected = model(X + 0.05).mean
    kept = model.prediction_strategy
    copied = copy_of_model(model)
    assert copied.prediction_strategy is None and model.prediction_strategy is kept
    assert torch.allclose(copied(X + 0.05).mean, expected)


def test_a_law_of_the_identity_alone_is_refused():
    kernel = InvariantKernel(RBFKernel(), Rotation2d(1))
    with pytest.raises(ValueError, match="identity as its only element .num_samples=1"):
        free_laws(kernel)
