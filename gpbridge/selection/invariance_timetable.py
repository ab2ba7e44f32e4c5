"""When weights, law and prior of a network move while its invariance is learnt.

In: options of a run. Out: :class:`Timetable`, which says it of every epoch.
Next: ``invariance_training`` goes by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpbridge.checks import ReliabilityWarning, warn_user

PHASES = ("online", "toggle")


@dataclass(frozen=True)
class Timetable:
    """What moves in which epoch.

    Args:
        phases: ``"online"`` updates after some epochs of training, ``"toggle"`` in
            epochs of their own.
        burn_in: Epochs before the first update may come.
        every: Epochs from one update to the next, or of each of two phases.
        prior_every: Updates to each that moves prior and noise, too.
        has_law: Whether the law has something to learn. If not, only prior and noise
            have updates.
    """

    phases: str
    burn_in: int
    every: int
    prior_every: int
    has_law: bool

    def trains(self, epoch: int) -> bool:
        """Whether the weights move."""
        return self.phases == "online" or not self.updates(epoch)

    def updates(self, epoch: int) -> bool:
        """Whether law or prior move."""
        late = epoch - self.burn_in
        if self.phases == "online":
            due = late >= 0 and (late + 1) % self.every == 0
        else:
            due = late >= 0 and late // self.every % 2 == 1
        return due and (self.has_law or self.moves_prior(epoch))

    def moves_prior(self, epoch: int) -> bool:
        """Whether an update of this epoch would be one of prior and noise."""
        late = epoch - self.burn_in
        if self.phases == "online":
            number = (late + 1) // self.every
        else:
            number = late // (2 * self.every) * self.every + late % self.every + 1
        return number % self.prior_every == 0

    def warn_if_idle(self, epochs: int) -> None:
        """Warn where something that is learnt would never move.

        Burn-in to the end is plain training of the weights, which is fine as long as
        the law has nothing to learn.
        """
        first, first_prior = self._update(1), self._update(self.prior_every)
        late = {}
        if self.has_law and first >= epochs:
            late["the law"] = first
        if self.burn_in < epochs <= first_prior:
            late["prior variances and noise"] = first_prior
        if late:
            when = " and ".join(
                f"{what} would first move in epoch {epoch + 1}"
                for what, epoch in late.items()
            )
            warn_user(
                f"In {epochs} epochs not everything moves that is learnt: {when}. "
                "Choose more epochs, or a smaller every=, prior_every= or burn_in=.",
                ReliabilityWarning,
            )

    def _update(self, number: int) -> int:
        """The epoch of an update, counted from 1, if every one were due."""
        if self.phases == "online":
            return self.burn_in + number * self.every - 1
        block, place = divmod(number - 1, self.every)
        return self.burn_in + (2 * block + 1) * self.every + place
