"""Training an ensemble of networks in one run.

Members differ in their first weights and in the order of their data, and on request in
a bootstrap sample. They share the validation rows, which none of them is trained on.

In: a module, its data and a likelihood. Out: an ``EnsembleFit``, trained copies with
their rows and histories. Next: ``ensembles`` sees them as a posterior.

References:
    Lakshminarayanan, Pritzel, Blundell, Simple and scalable predictive uncertainty
    estimation using deep ensembles, NeurIPS 2017.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor, nn

from gpbridge.checks import (
    check_count,
    check_finite,
    check_inputs,
    check_not_empty,
    check_same_device,
    check_same_length,
    check_tensor,
)
from gpbridge.dnn.divergence import DivergedError
from gpbridge.dnn.fit_input import (
    WeightDecay,
    check_decay,
    check_options,
    check_weights,
    probe_outputs,
    shaped,
    split_rows,
)
from gpbridge.dnn.initial_weights import first_members
from gpbridge.dnn.objective import objective_for, residual_variance
from gpbridge.dnn.replica_fit import ReplicaFit
from gpbridge.dnn.replica_input import drawn_seed
from gpbridge.dnn.replicas import Callback, train_replicas
from gpbridge.dnn.schedules import cyclical_factor
from gpbridge.dnn.training import isolated_randomness
from gpbridge.types import FitResult, Params


@dataclass(frozen=True)
class EnsembleFit:
    """Trained members of one architecture and the facts about their training.

    Attributes:
        networks: The trained modules, in eval mode.
        weights: Their trained weights, ``k x p``.
        fit_rows: Row numbers that were not held out.
        validation_rows: Row numbers held out from all members, or empty.
        member_rows: Row numbers each member was trained on, ``k x n'``; with
            ``bootstrap`` some come repeatedly.
        residual_variances: Mean squared residuals on the fit rows, ``k x m``; None for
            classification.
        validation_variances: The same on the validation rows.
        history: One ``epochs x k`` tensor per recorded quantity.
        best_epoch: The epoch whose weights are returned, ``k``; None for the last.
        seeds: Member r is what ``fit_map`` makes of its first weights with a generator
            of seed r, these validation rows, and no dropout.
        input_shape: The shape to which the ``d`` columns of one input were unflattened;
            None if they were not.
    """

    networks: list[nn.Module]
    weights: Tensor
    fit_rows: Tensor
    validation_rows: Tensor
    member_rows: Tensor
    residual_variances: Tensor | None
    validation_variances: Tensor | None
    history: dict[str, Tensor]
    best_epoch: Tensor | None
    seeds: tuple[int, ...]
    input_shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.networks)

    def member(self, index: int) -> FitResult:
        """One member, as ``fit_map`` would return it."""
        variances = self.residual_variances, self.validation_variances
        decay = math.nan  # of a run that diverged at once
        if "weight_decay" in self.history:
            decay = float(self.history["weight_decay"][-1, index])
        return FitResult(
            self.networks[index],
            self.member_rows[index].unique(),
            self.validation_rows,
            *(None if v is None else v[index] for v in variances),
            decay,
            {name: values[:, index].tolist() for name, values in self.history.items()},
        )

    def __repr__(self) -> str:
        """Numbers of members and rows, and what was recorded."""
        recorded = ", ".join(
            f"{name} {float(values[-1].mean()):.4g}"
            for name, values in self.history.items()
        )
        return (
            f"{type(self).__name__}({len(self)} x {type(self.networks[0]).__name__}, "
            f"{len(self.fit_rows)} fit rows, {len(self.validation_rows)} validation "
            f"rows; last mean: {recorded})"
        )


def fit_ensemble(
    network: nn.Module,
    train_X: Tensor,
    train_Y: Tensor,
    num_members: int = 5,
    likelihood: Likelihood | None = None,
    *,
    epochs: int = 300,
    learning_rate: float = 5e-3,
    batch_size: int = 100,
    weight_decay: float | WeightDecay = 1e-4,
    validation_fraction: float = 0.1,
    validation_rows: Tensor | None = None,
    early_stopping: bool = True,
    schedule: str | Callable[[int], float] = "constant",
    input_shape: Sequence[int] | None = None,
    bootstrap: bool = False,
    initial: Sequence[nn.Module] | None = None,
    checkpoint: str | PathLike | None = None,
    checkpoint_every: int = 10,
    generator: torch.Generator | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> EnsembleFit:
    """Train the members of a deep ensemble at once, by Adam on a mean loss with decay.

    The loss and its options are those of :func:`gpbridge.dnn.fit_map`, of which this is
    as many runs. For small networks it takes little more time than one of them.

    Args:
        network: The architecture; its own weights are the first of none of the members.
            Copied, never changed.
        train_X: Inputs, ``n x d``, or images in the layout of the network.
        train_Y: Targets, as for ``fit_map``.
        num_members: How many members k.
        likelihood: Picks the loss, as for ``fit_map``.
        epochs: Passes over the fit rows.
        learning_rate: Of Adam, at the start.
        batch_size: Rows per step and member.
        weight_decay: The decay, or a function of (epoch, network, fit inputs, fit
            targets), called for every member before every epoch.
        validation_fraction: Share of rows to hold out from all members, at random.
        validation_rows: Row numbers to hold out instead.
        early_stopping: Whether each member is returned at its best epoch. Without, only
            ``validation_rows`` are held out, and they are merely recorded.
        schedule: ``"constant"``, ``"cosine"`` to zero over the epochs, or the factor of
            an epoch, as in :mod:`gpbridge.dnn.schedules`.
        input_shape: Shape of one input, to unflatten the ``d`` columns.
        bootstrap: Whether each member is trained on as many rows drawn from the fit
            rows with replacement.
        initial: Modules to start from, one for each member. Default: copies whose
            layers' ``reset_parameters`` is called again; frozen weights stay.
        checkpoint: A file from which an interrupted run continues, to the same bits, if
            all arguments are the same; ``epochs`` may be larger.
        checkpoint_every: Epochs between two writes.
        generator: Source of all randomness: split, first weights, batches, dropout.
            None is a fresh one with seed 0.
        progress: Whether to show a bar, if there is a terminal.
        callback: Called after every epoch with (epoch, weights and buffers by name
            ``k x shape``, entries ``k`` of the history); True ends training.

    Returns:
        The members.

    Raises:
        DivergedError: If a member diverges; it names the member, and its ``last_good``
            holds all members as they were an epoch before.
        ValueError: If an option is out of range, or a layer has weights and no
            ``reset_parameters`` and there is no ``initial``.

    Example:
        >>> X = torch.linspace(-1, 1, 40)[:, None]
        >>> fit = fit_ensemble(nn.Linear(1, 1), X, 3 * X, 3, epochs=2, progress=False)
        >>> len(fit), fit.weights.shape
        (3, torch.Size([3, 2]))
    """
    word = "constant" if callable(schedule) else schedule
    check_count(num_members=num_members)
    check_options(network, epochs, learning_rate, batch_size, weight_decay, word)
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            "validation_fraction must lie in [0, 1), but is "
            f"{validation_fraction}. For a tenth of the rows pass 0.1, for none 0."
        )
    check_inputs(train_X)
    check_tensor(train_Y=train_Y)
    check_not_empty(train_X=train_X)
    check_same_length(train_X=train_X, train_Y=train_Y)
    check_same_device(train_X=train_X, train_Y=train_Y)
    check_finite(train_Y=train_Y)
    check_weights(network, train_X)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    train_X, train_Y = train_X.detach(), train_Y.detach()
    X = shaped(train_X, input_shape)
    fraction = validation_fraction if early_stopping else 0.0
    fit_rows, held_out = split_rows(train_X, fraction, validation_rows, generator)
    members = first_members(network, num_members, initial, generator)
    seeds = tuple(drawn_seed(generator) for _ in members)
    rows = fit_rows.expand(num_members, -1)
    if bootstrap:
        shape, n = rows.shape, rows.shape[1]
        drawn = torch.randint(n, shape, generator=generator, device=generator.device)
        rows = fit_rows[drawn.to(fit_rows.device)]

    own = members[0]
    with isolated_randomness(generator, X.device):
        m = probe_outputs(own, X, input_shape)
    objective = objective_for(likelihood, train_Y, m, len(X), X.dtype)
    flat, targets = X.reshape(len(X), -1), objective.targets
    if callable(schedule):
        factor = schedule
    elif schedule == "cosine":
        factor = cyclical_factor(epochs)  # one cycle
    else:
        factor = None
    decay = weight_decay
    if callable(weight_decay):
        decay = _decays(weight_decay, own, train_X[fit_rows], train_Y[fit_rows])

    def finished(fit: ReplicaFit) -> EnsembleFit:
        for r, member in enumerate(members):
            load_copy(member, fit.state, r)
        variances = [
            torch.stack(
                [residual_variance(f, X[part], train_Y[part], m) for f in members]
            )
            if objective.is_regression and len(part)
            else None
            for part in (fit_rows, held_out)
        ]
        return EnsembleFit(
            members,
            fit.weights,
            fit_rows,
            held_out,
            rows,
            *variances,
            fit.history,
            fit.best_epoch,
            seeds,
            None if input_shape is None else tuple(input_shape),
        )

    try:
        fit = train_replicas(
            own,
            {name: torch.stack(values) for name, values in _named(members)},
            flat,
            targets,
            objective.loss,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=decay,
            schedule=factor,
            rows=rows,
            validation=(flat[held_out], targets[held_out]) if len(held_out) else None,
            keep_best=early_stopping,
            input_shape=X.shape[1:] if X.dim() > 2 else None,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            callback=callback,
            progress=progress,
        )
    except DivergedError as error:
        raise DivergedError(str(error), finished(error.last_good)) from None
    return finished(fit)


@torch.no_grad()
def load_copy(module: nn.Module, state: Params, index: int) -> nn.Module:
    """Set the weights and buffers of a module to those of one of k copies."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, values in state.items():
        named[name].copy_(values[index])
    return module


def _named(members: list[nn.Module]) -> Iterator[tuple[str, list[Tensor]]]:
    """All weights and buffers that a copy may have of its own, by name."""
    tensors = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in members]
    for name in tensors[0]:
        yield name, [each[name].detach() for each in tensors]


def _decays(
    weight_decay: WeightDecay, network: nn.Module, X: Tensor, Y: Tensor
) -> Callable[[int, Params], Tensor]:
    """The decay of every member before an epoch, as fit_map asks for it."""
    work = copy.deepcopy(network)

    def decays(epoch: int, state: Params) -> Tensor:
        values = []
        for r in range(len(next(iter(state.values())))):
            value = float(weight_decay(epoch, load_copy(work, state, r), X, Y))
            check_decay(value, f"weight_decay of member {r} in epoch {epoch}")
            values.append(value)
        return torch.tensor(values, dtype=torch.float64)

    return decays
