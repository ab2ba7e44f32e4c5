r"""A table of models: evidence, fit, complexity, weights, and a held-out score.

An evidence is the probability of the data, so that only models of the same numbers can
stand in one table. Targets are compared in their original units, outcome transforms
undone by the change of variables; what cannot be compared is refused by name.

In: models by name. Out: a :class:`Comparison`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpbridge.checks import check_choice, warn_user
from gpbridge.selection.comparable import Entry, check_comparable, measure
from gpbridge.selection.held_out import held_out_log_density, leave_one_out


class Row(NamedTuple):
    """One model; total nats in the units of the original targets.

    ``held_out`` is a mean per point, None where the model has no such score.
    ``weight`` is the posterior probability of the model among those compared, all
    equally probable before.
    """

    name: str
    evidence: float
    kind: str
    fit: float
    complexity: float
    effective_dimension: float
    log_prior: float
    weight: float
    held_out: float | None
    likelihood: str


class Comparison(NamedTuple):
    """Rows by falling evidence, and what they have in common.

    Print it for a table; :meth:`to_dict` for one dictionary per model.
    """

    rows: tuple[Row, ...]
    num_targets: int
    scored_on: str  # what held_out means
    notes: tuple[str, ...]  # the warnings that came with it

    @property
    def best(self) -> str:
        """Name of the model with the highest evidence."""
        return self.rows[0].name

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The numbers of each model by name of the column."""
        return {
            row.name: {k: v for k, v in row._asdict().items() if k != "name"}
            for row in self.rows
        }

    def __str__(self) -> str:
        """The table, one model a line."""
        header = [
            *("model", "log evidence", "kind", "fit", "complexity"),
            *("eff. dim.", "weight", f"held out ({self.scored_on})"),
        ]
        lines = [header]
        for row in self.rows:
            held_out = "-" if row.held_out is None else f"{row.held_out:.3f}"
            lines.append(
                [
                    row.name,
                    f"{row.evidence:.2f}",
                    row.kind,
                    f"{row.fit:.2f}",
                    f"{row.complexity:.2f}",
                    f"{row.effective_dimension:.1f}",
                    f"{row.weight:.3f}",
                    held_out,
                ]
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        left = (0, 2)  # words; numbers stand to the right
        table = [
            "  ".join(
                word.ljust(width) if i in left else word.rjust(width)
                for i, (word, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*table, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__


@torch.no_grad()
def compare(
    models: Mapping[str, Entry],
    data: tuple[Tensor, Tensor] | None = None,
    *,
    held_out: str | tuple[Tensor, Tensor] | None = "leave_one_out",
) -> Comparison:
    """Tabulate models of the same data, by falling evidence.

    Evidences are those at the present hyperparameters, without hyperpriors: fit the
    models before. Values are those of the original targets: a model that standardises
    its targets can stand beside one that does not.

    A high evidence of a LinearizedGP or a deep kernel says little where its features
    were fitted to the same targets; so does leave-one-out. Score such models on data
    that neither has seen.

    Args:
        models: By name: ExactGP and botorch models, LinearizedGP, variational GPs; a
            pair ``(model, likelihood)`` for gpytorch's own variational GPs.
        data: All training inputs and targets, for variational GPs, which keep none.
        held_out: ``"leave_one_out"``, in closed form where there is one; or inputs and
            targets ``(X, Y)`` that no model has seen; or None.

    Returns:
        The table.

    Raises:
        ValueError: If two models do not have the same number of targets, not the same
            targets, or one observes labels and the other numbers.
        TypeError: If a model has no evidence.

    Warns:
        UserWarning: If evidences differ in kind, or in the class of the likelihood.

    Example:
        >>> from botorch.models import SingleTaskGP
        >>> from gpytorch.kernels import RBFKernel
        >>> X = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
        >>> Y = torch.sin(6 * X)
        >>> table = compare({
        ...     "default": SingleTaskGP(X, Y),
        ...     "rbf": SingleTaskGP(X, Y, covar_module=RBFKernel()),
        ... })
        >>> len(table.rows)
        2
    """
    if not isinstance(models, Mapping) or len(models) == 0:
        raise ValueError(
            "models must be a dictionary of models by name with at least one entry, "
            f"but is {models!r}."
        )
    if isinstance(held_out, str):
        check_choice("held_out", held_out, ("leave_one_out",))
    measured = {name: measure(name, entry, data) for name, entry in models.items()}
    notes = check_comparable(measured)
    values = {
        name: float(one.parts.value.sum() + one.log_jacobian.sum())
        for name, one in measured.items()
    }
    weights = torch.tensor(list(values.values()), dtype=torch.float64).softmax(0)
    rows = []
    for (name, entry), weight in zip(models.items(), weights.tolist(), strict=True):
        one = measured[name]
        parts = one.parts
        rows.append(
            Row(
                name,
                values[name],
                parts.kind,
                float(parts.fit.sum() + one.log_jacobian.sum()),
                float(parts.complexity.sum()),
                float(parts.effective_dimension.sum()),
                float(parts.log_prior.sum()),
                weight,
                _score(entry, held_out, one.log_jacobian),
                type(one.likelihood).__name__,
            )
        )
    rows.sort(key=lambda row: -row.evidence)
    for note in notes:
        warn_user(note)
    given = "none" if held_out is None else "given data"
    scored_on = "leave-one-out" if isinstance(held_out, str) else given
    first = next(iter(measured.values()))
    return Comparison(tuple(rows), first.targets.numel(), scored_on, tuple(notes))


def _score(
    entry: Entry, held_out: str | tuple[Tensor, Tensor] | None, log_jacobian: Tensor
) -> float | None:
    """Mean log density of a held-out point, or None where it has no closed form."""
    model, likelihood = entry if isinstance(entry, tuple) else (entry, None)
    if held_out is None:
        return None
    if isinstance(held_out, tuple):
        return float(held_out_log_density(model, *held_out, likelihood).mean())
    try:
        left_out = leave_one_out(model)
    except (NotImplementedError, ValueError):
        return None
    points = left_out.log_density.shape[-1]
    return float(left_out.value.sum() + log_jacobian.sum()) / points
