"""Runs that learn an invariance: what moves when, state, what fails."""

import copy
import math

import pytest
import torch

from gpbridge.augmentation import Rotation2d
from gpbridge.checks import ReliabilityWarning
from gpbridge.dnn import DivergedError
from gpbridge.linearized import Exact, Kronecker
from gpbridge.selection import InvarianceFit, TangentBlocks, learn_invariance
from gpbridge.selection.invariance_training import InvarianceTraining
from gpbridge.selection.online_hyperparameters import OnlineHyperparameters
from gpbridge.selection.orbit_curvature import OrbitCurvature
from gpbridge.selection.orbit_jacobians import OrbitNet
from gpbridge.testing import assert_module_unchanged
from tests.selection.invariance_problems import N, Nested, equal, rings, run, tanh_net

# -- when ------------------------------------------------------------------------------


def test_phases_say_when_weights_and_when_the_law_move():
    online = run(epochs=5, burn_in=1, every=2)
    assert [step.epoch for step in online.steps] == [3, 5]
    toggle = run(epochs=7, burn_in=1, every=2, phases="toggle")
    assert [step.epoch for step in toggle.steps] == [4, 5]
    # Epochs of updates train nothing.
    assert len(set(toggle.losses)) == 5


def test_the_rate_of_the_law_falls_as_a_cosine():
    seen = []

    def watch(training):
        seen.append(training.augmentation_optimizer.param_groups[0]["lr"])

    rates = {
        "augmentation_learning_rate": 0.1,
        "final_augmentation_learning_rate": 0.02,
    }
    run(epochs=5, callback=watch, **rates)
    expected = [0.02 + 0.04 * (1 + math.cos(math.pi * k / 4)) for k in range(5)]
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize("phases", ["online", "toggle"])
def test_prior_and_law_move_by_structures_of_their_own(phases, monkeypatch):
    original, drawn = OnlineHyperparameters.ascend, []

    def watched(self, measured, steps):
        drawn.append(getattr(measured.curvature, "scale", 1.0) > 1)
        return original(self, measured, steps)

    monkeypatch.setattr(OnlineHyperparameters, "ascend", watched)
    sampled = TangentBlocks(block_size=6, outputs="sampled", num_blocks=1)
    options = {"phases": phases, "structure": sampled, "every": 2, "epochs": 16}
    fit = run(prior_structure=Exact(), prior_every=3, **options)
    sizes = [step.block_size for step in fit.steps]
    assert sizes == [6, 6, N] * 2 + [6, 6] and fit.block_size == N
    # A drawn block counts for several, all data for themselves: what the prior ascends.
    assert drawn == [True, True, False] * 2 + [True, True]
    assert not fit.evidence.lower_bound
    priors = [step.prior_variance[0] for step in fit.steps]
    assert priors[0] == priors[1] == 1.0
    assert len(set(priors)) == 3 and priors[2] == priors[4]
    laws = [step.augmentation[0] for step in fit.steps]
    assert len(set(laws)) == 8
    # Two structures of equal block size are told apart by this alone.
    moved = [False, False, True] * 2 + [False, False]
    assert fit.history["moves_prior"].tolist() == moved


def test_a_law_that_is_held_is_measured_only_where_the_prior_moves():
    law = Rotation2d(3).requires_grad_(False)
    sampled = TangentBlocks(block_size=6, outputs="sampled")
    options = {"structure": sampled, "prior_structure": Exact(), "prior_every": 2}
    fit = run(augmentation=law, epochs=5, **options)
    assert [step.epoch for step in fit.steps] == [2, 4]
    toggle = run(augmentation=law, epochs=7, phases="toggle", **options | {"every": 2})
    # The third epoch is one of updates by its phase, but has none: it trains.
    assert [step.epoch for step in toggle.steps] == [4]
    assert len(set(toggle.losses)) == 6


def test_a_law_that_would_never_move_is_said_before_training():
    class Started(Exception):
        pass

    def stop(training):
        raise Started

    with (
        pytest.warns(ReliabilityWarning, match="the law would first move in epoch 51"),
        pytest.raises(Started),
    ):
        run(burn_in=50, callback=stop)


def test_a_prior_that_leaves_a_constant_network_is_said():
    options = {"prior_variance": 1e-9, "hyper_learning_rate": 1e-3}
    with pytest.warns(UserWarning, match="prefers a constant network.*larger burn_in"):
        fit = run(**options)
    assert fit.evidence.effective_dimension < 1


def test_the_same_structure_for_both_is_one_structure():
    one = run(structure=Exact())
    two = run(structure=Exact(), prior_structure=Exact())
    assert one.steps == two.steps


@pytest.mark.parametrize("structure", [Exact, Kronecker])
def test_jacobians_have_the_precision_that_is_asked_for(structure, monkeypatch):
    whole, seen = OrbitNet.jacobian, []

    def noted(self, *args):
        value, parts = whole(self, *args)
        seen.extend(part.dense().dtype for part in parts)
        return value, parts

    monkeypatch.setattr(OrbitNet, "jacobian", noted)
    for dtype in (torch.float64, None):
        seen.clear()
        fit = run(structure=structure(jacobian_dtype=dtype), epochs=2)
        assert set(seen) == {torch.float32 if dtype is None else dtype}
        assert fit.augmentation.bound.dtype == torch.float32
        assert fit.augmentation.bound.item() != Rotation2d(3).bound.item()


# -- state -----------------------------------------------------------------------------


@pytest.mark.parametrize("orbit", ["fixed", "resampled", "per_datum"])
def test_an_interrupted_run_continues_to_the_same_bits(tmp_path, orbit):
    sampled = TangentBlocks(block_size=9, outputs="sampled", num_blocks=2)
    options = {"epochs": 5, "orbit": orbit, "structure": sampled, "batch_size": 10}
    options |= {"prior_structure": Exact(), "prior_every": 2}
    file = {"checkpoint": tmp_path / "run", "checkpoint_every": 2}
    whole = run(**options)

    class Killed(Exception):
        pass

    def kill(training):
        if training.epoch == 3:
            raise Killed

    with pytest.raises(Killed):
        run(callback=kill, **options, **file)
    assert equal(run(**options, **file), whole)
    with pytest.raises(ValueError, match="its orbit is"):
        other = "fixed" if orbit != "fixed" else "per_datum"
        run(**options | {"orbit": other}, **file)
    with pytest.raises(ValueError, match="its number of epochs is 5, and now it is 6"):
        run(**options | {"epochs": 6}, **file)


def test_nothing_of_the_users_changes_and_seeds_decide():
    network, law = Nested().train(), Rotation2d(3).train()
    state = torch.get_rng_state()

    def fit(seed):
        return run(
            network, augmentation=law, generator=torch.Generator().manual_seed(seed)
        )

    with assert_module_unchanged(network), assert_module_unchanged(law):
        first, again, other = fit(1), fit(1), fit(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first, again) and not equal(first, other)
    assert law.raw_bound.requires_grad and copy.deepcopy(first.network) is not None


@pytest.mark.parametrize("orbit", ["resampled", "per_datum"])
def test_an_evidence_in_between_changes_no_transformation(orbit):
    seen = []

    def look(training):
        noise = training.augmentation.noise.clone()
        training.evidence()
        seen.append(torch.equal(training.augmentation.noise, noise))

    looked = run(orbit=orbit, callback=look)
    assert seen == [True] * 4 and equal(looked, run(orbit=orbit))


def test_a_gradient_that_is_not_finite_keeps_the_last_good_fit(monkeypatch):
    measure, calls = OrbitCurvature.measure, []

    def broken(self, *args):
        found = measure(self, *args)
        calls.append(found)
        if len(calls) == 3:
            found.gradients["raw_bound"].fill_(math.nan)
        return found

    monkeypatch.setattr(OrbitCurvature, "measure", broken)
    message = "a gradient of the augmentation of .nan. nats in epoch 2"
    with pytest.raises(DivergedError, match=message) as info:
        run(epochs=5, augmentation_learning_rate=0.1)
    monkeypatch.undo()
    good = info.value.last_good
    assert isinstance(good, InvarianceFit) and "unknown" in repr(good)
    assert len(good.steps) == 2 and len(good.losses) == 2
    assert good.learnt["bound"].item() == pytest.approx(good.steps[-1].augmentation[0])


# -- doors -----------------------------------------------------------------------------


def test_an_evidence_that_fails_at_the_end_keeps_the_fit(monkeypatch):
    def fails(self):
        raise torch.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(InvarianceTraining, "evidence", fails)
    with pytest.raises(DivergedError, match="a curvature that cannot be factori") as e:
        learn_invariance(
            tanh_net(), rings(20, 90.0), Rotation2d(3), epochs=2, progress=False
        )
    assert len(e.value.last_good.losses) == 2
