"""Several starts of an invariance: one seed, an order, doors."""

import pytest
import torch

from gpbridge.augmentation import Rotation2d
from gpbridge.augmentation.base import Augmentation
from gpbridge.checks import NotConvergedWarning
from gpbridge.dnn import DivergedError
from gpbridge.selection import (
    invariance_starts,
    learn_invariance,
    learn_invariance_from,
)
from tests.selection.invariance_problems import N, rings, tanh_net


def test_several_starts_are_ordered_by_evidence():
    data = rings(N, 120)
    fits = learn_invariance_from(
        [0.1, 2.0], tanh_net(), data, Rotation2d(3), epochs=2, progress=False
    )
    values = [float(fit.evidence.value) for fit in fits]
    assert values == sorted(values, reverse=True)
    bounds = sorted(fit.learnt["bound"].item() for fit in fits)
    assert bounds[0] < 0.2 and bounds[1] > 1.5
    law = fits[0].augmentation  # can be learnt on from there
    again = learn_invariance(tanh_net(), data, law, epochs=2, progress=False)
    assert not torch.equal(again.learnt["bound"], fits[0].learnt["bound"])


def test_one_seed_is_of_all_starts():
    options = {"epochs": 1, "progress": False}
    data, start = rings(N, 120), [0.3]
    first, second = (
        learn_invariance_from(start, tanh_net(), data, Rotation2d(3), seed=s, **options)
        for s in (1, 1)
    )
    other = learn_invariance_from(
        start, tanh_net(), data, Rotation2d(3), seed=2, **options
    )
    assert first[0].losses == second[0].losses != other[0].losses


def diverging(starts, failing, monkeypatch):
    """Runs of which some diverge, and the half-widths that were started."""
    tried, original = [], invariance_starts.learn_invariance

    def run(network, data, law, *args, **options):
        tried.append(law.bound.item())
        if len(tried) - 1 in failing:
            raise DivergedError(f"run {len(tried)} is not finite", "good")
        return original(network, data, law, *args, **options)

    monkeypatch.setattr(invariance_starts, "learn_invariance", run)
    fits = learn_invariance_from(
        starts, tanh_net(), rings(N, 120), Rotation2d(3), epochs=1, progress=False
    )
    return fits, tried


def test_a_start_that_diverges_is_said_and_the_others_are_kept(monkeypatch):
    with pytest.warns(NotConvergedWarning, match="Start 1 of 3 failed: run 2 is not"):
        fits, tried = diverging([0.1, 0.5, 1.0], {1}, monkeypatch)
    assert len(fits) == 2 and tried == pytest.approx([0.1, 0.5, 1.0])


def test_starts_that_all_diverge_raise_the_first_error(monkeypatch):
    with (
        pytest.warns(NotConvergedWarning, match="Start . of 2 failed"),
        pytest.raises(DivergedError, match="All 2 .* first said: run 1") as caught,
    ):
        diverging([0.1, 0.5], {0, 1}, monkeypatch)
    assert caught.value.last_good == "good"


@pytest.mark.parametrize("start", [9.0, 0.0, [0.1, 0.2]])
def test_a_start_that_cannot_be_is_refused_before_the_first(start, monkeypatch):
    monkeypatch.setattr(invariance_starts, "learn_invariance", None)  # none is run
    with pytest.raises(ValueError, match="Start 2 cannot be: "):
        learn_invariance_from(
            [0.1, 0.5, start], tanh_net(), rings(N, 120), Rotation2d(3)
        )


@pytest.mark.parametrize(
    "name, value", [("checkpoint", "a.pt"), ("generator", torch.Generator())]
)
def test_what_belongs_to_one_run_is_refused(name, value):
    with pytest.raises(TypeError, match=rf"\['{name}'\] are of one run, but there are"):
        learn_invariance_from(
            [0.1, 1.0], tanh_net(), rings(N, 120), Rotation2d(3), **{name: value}
        )


def test_starts_that_are_none_are_refused():
    data = rings(N, 120)
    with pytest.raises(ValueError, match="nothing to learn from several starts"):
        learn_invariance_from(
            [0.1], tanh_net(), data, Rotation2d(3).requires_grad_(False)
        )
    for start in (0.5, torch.tensor(0.5)):
        with pytest.raises(
            TypeError, match=r"starts must be a sequence.*Try starts=\["
        ):
            learn_invariance_from(start, tanh_net(), data, Rotation2d(3))
    with pytest.raises(ValueError, match="at least one half-width"):
        learn_invariance_from([], tanh_net(), data, Rotation2d(3))
    with pytest.raises(TypeError, match="has no bound to start from"):
        learn_invariance_from([1.0], tanh_net(), data, Augmentation(2))
