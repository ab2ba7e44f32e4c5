"""When weights, law and prior move: phases, idle options."""

import itertools

import pytest

from gpbridge.checks import ReliabilityWarning
from gpbridge.selection.invariance_timetable import Timetable

OPTIONS = list(itertools.product((0, 1, 3), (1, 2, 3), (1, 2, 5), (True, False)))


def table(phases, burn_in=0, every=1, prior_every=1, has_law=True):
    return Timetable(phases, burn_in, every, prior_every, has_law)


def test_online_updates_end_every_few_epochs_of_training():
    found = table("online", burn_in=2, every=3)
    assert [e for e in range(12) if found.updates(e)] == [4, 7, 10]
    assert all(found.trains(e) for e in range(12))


def test_toggled_phases_have_as_many_epochs_each():
    found = table("toggle", burn_in=1, every=2)
    assert [e for e in range(11) if found.updates(e)] == [3, 4, 7, 8]
    assert [e for e in range(11) if found.trains(e)] == [0, 1, 2, 5, 6, 9, 10]


@pytest.mark.parametrize("phases", ["online", "toggle"])
@pytest.mark.parametrize("burn_in, every, prior_every, has_law", OPTIONS)
def test_no_epoch_is_idle_and_the_prior_moves_with_every_kth_update(
    phases, burn_in, every, prior_every, has_law
):
    found = table(phases, burn_in, every, prior_every, has_law)
    moves = [(found.trains(e), found.updates(e)) for e in range(80)]
    assert all(trains or updates for trains, updates in moves)
    priors = [found.moves_prior(e) for e in range(80) if found.updates(e)]
    if has_law:
        expected = [k % prior_every == 0 for k in range(1, len(priors) + 1)]
    else:
        expected = [True] * len(priors)
    assert priors and priors == expected
    if phases == "toggle":
        assert not any(trains and updates for trains, updates in moves)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"burn_in": 50}, "In 4 epochs .*: the law would first move in epoch 51. Ch"),
        ({"every": 5}, "the law .* in epoch 5 and prior variances and noise .* in ep"),
        ({"prior_every": 50}, ": prior variances and noise would .* in epoch 50. Ch"),
        ({"every": 5, "has_law": False}, ": prior variances and noise .* in epoch 5"),
        ({"every": 4, "phases": "toggle"}, "the law would first move in epoch 5 and "),
    ],
)
def test_what_never_moves_is_said(options, message):
    found = table(**{"phases": "online"} | options)
    with pytest.warns(ReliabilityWarning, match=message):
        found.warn_if_idle(4)


@pytest.mark.parametrize("phases", ["online", "toggle"])
@pytest.mark.parametrize("burn_in, every, prior_every, has_law", OPTIONS)
def test_the_epochs_that_are_said_are_those_of_the_timetable(
    phases, burn_in, every, prior_every, has_law
):
    found = table(phases, burn_in, every, prior_every, has_law)
    updates = [e for e in range(80) if found.updates(e)]
    first, prior = updates[0], next(e for e in updates if found.moves_prior(e))
    if prior > burn_in:
        message = f"noise would first move in epoch {prior + 1}\\."
        with pytest.warns(ReliabilityWarning, match=message):
            found.warn_if_idle(prior)
    if has_law and first:
        message = f"the law would first move in epoch {first + 1}\\b"
        with pytest.warns(ReliabilityWarning, match=message):
            found.warn_if_idle(first)
    found.warn_if_idle(prior + 1)


@pytest.mark.parametrize("phases", ["online", "toggle"])
def test_an_update_that_comes_never_is_found_at_once(phases):
    with pytest.warns(ReliabilityWarning, match="noise would first move in epoch .000"):
        table(phases, prior_every=10**15).warn_if_idle(4)


def test_epochs_that_are_enough_and_plain_training_are_silent():
    table("online", burn_in=1, every=3, prior_every=2).warn_if_idle(7)
    table("toggle", burn_in=1, every=2, prior_every=2).warn_if_idle(5)
    table("online", burn_in=9, has_law=False).warn_if_idle(4)
