"""Ascent of an evidence lower bound by Adam over minibatches, resumable bit for bit.

In: a model and its bound on some rows. Out: an :class:`ELBOFit`, the trained model, the
bounds of the epochs, and a plain state from which the same run goes on. Where the bound
becomes NaN the error has the last good one. Next: ``vae``, ``gp_vae_fit``,
``deep_gp_fit`` and ``selection.sparse_fit`` say what the rows are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Generator, Tensor, nn
from tqdm import tqdm

from gpbridge.batch_norm import norm_layers
from gpbridge.checks import check_count, check_generator, check_positive, warn_user
from gpbridge.convergence import warn_if_rising
from gpbridge.dnn.divergence import DivergedError, rate_advice
from gpbridge.dnn.run_key import check_same_run, checksum, structure
from gpbridge.dnn.training import Callback, adam, isolated_randomness, split_rows
from gpbridge.frozen import first_line

_DIVERGED = (FloatingPointError, torch.linalg.LinAlgError, NanError, NotPSDError)
_KEYS = {"model", "optimizer", "generator", "history", "run"}


@dataclass(frozen=True)
class ELBOFit:
    """A model trained on its evidence lower bound.

    Attributes:
        model: The trained copy, in eval mode.
        history: ``elbo``, nats per datum, the mean over each epoch.
        state: Weights, moments of Adam, the generator, and what data and model the run
            is of: pass it as ``resume`` to train on as if there had been no pause.
            Plain, for :func:`gpbridge.storage.save_state`.
    """

    model: nn.Module
    history: dict[str, list[float]]
    state: dict[str, Any] = field(repr=False)


def ascend_elbo(
    model: nn.Module,
    elbo: Callable[[Tensor, Generator], Tensor],
    data: Sequence[Tensor],
    *,
    groups: list[tuple[list[nn.Parameter], float]],
    epochs: int,
    batch_size: int,
    generator: Generator | None,
    resume: dict[str, Any] | None,
    progress: bool,
    callback: Callback | None,
    name: str,
    usual_rate: float,
    optimizer: torch.optim.Optimizer | None = None,
    before_epoch: Callable[[int], None] | None = None,
    warn_rising: bool = False,
) -> ELBOFit:
    """Train ``model`` in place, leave it in eval mode at its last good epoch.

    Args:
        model: What is trained; not the caller's.
        elbo: The bound per datum of some row numbers, with a source of randomness.
        data: What the bound is of: tensors whose first axis are the n rows.
        groups: Parameters and their learning rates; frozen ones stay.
        epochs: Passes over the rows, after those of ``resume``.
        batch_size: Rows per step.
        generator: Source of all randomness; None is a fresh one with seed 0.
        resume: The state of a run before, of the same data and a model of the same
            structure. Learning rates and ``batch_size`` may be others. Public
            attributes of its modules with plain values are options, and must be the
            same; what a module counts as it is called belongs in a buffer, which the
            state holds, or in an attribute with an underscore.
        progress: Whether to show a bar, if there is a terminal.
        callback: Called after every epoch with (epoch, model, entries of the history);
            True ends training.
        name: Of the bar.
        usual_rate: A learning rate that is seldom too large, for messages.
        optimizer: In place of Adam on the groups.
        before_epoch: Called with the number of each epoch, those of ``resume`` counted,
            before its first step.
        warn_rising: Whether to say that the last epoch came before convergence.

    Returns:
        The model with its history and state.

    Raises:
        DivergedError: If the bound or a weight is not finite; its ``last_good`` is the
            :class:`ELBOFit` of the last good epoch, or of none.
        KeyboardInterrupt: If it comes before one epoch is done.
        TypeError: If ``resume`` is no state.
        ValueError: If an option is out of range, nothing can be trained, or ``resume``
            is of other data or of another model.

    Warns:
        NotConvergedWarning: If the bound still rises at the last epoch, and
            ``warn_rising``.
        RuntimeWarning: If the keyboard interrupts: the last good epoch is returned.
    """
    check_count(epochs=epochs, batch_size=batch_size)
    check_positive(learning_rate=groups[0][1])
    if resume is not None and generator is not None:
        raise ValueError(
            "Pass resume or generator and not both: a resumed run goes on with the "
            "random numbers of its state."
        )
    if resume is not None and not isinstance(resume, Mapping):
        raise TypeError(
            "resume must be the state of a fit before, fit.state, but is "
            f"{type(resume).__name__}."
        )
    if resume is not None and not _KEYS <= set(resume):
        raise ValueError(
            "resume must be the state of a fit before, fit.state, but lacks "
            f"{', '.join(sorted(_KEYS - set(resume)))}."
        )
    num_data, device = len(data[0]), data[0].device
    # Not its values, which the state replaces, nor what changes as it is called.
    run = {
        "data": [checksum(part) for part in data],
        "model": structure(model, values=False, private=False),
    }
    optimizer = adam(groups) if optimizer is None else optimizer
    history: dict[str, list[float]] = {"elbo": []}
    if resume is None:
        generator = Generator(device).manual_seed(0) if generator is None else generator
        check_generator(generator, device)
    else:
        remedy = (
            "Pass the same data and a model built alike, or start anew. What a module "
            "counts as it is called is no option of it: keep it in a buffer, or in an "
            "attribute with an underscore."
        )
        check_same_run(resume["run"], run, remedy)
        generator = Generator(device)
        generator.set_state(resume["generator"].cpu())
        model.load_state_dict(resume["model"])
        rates = [group["lr"] for group in optimizer.param_groups]
        # Adam would move the moments of the caller's state.
        optimizer.load_state_dict(copy.deepcopy(resume["optimizer"]))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        history = copy.deepcopy(resume["history"])

    def snapshot() -> dict[str, Any]:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "history": history,
            "run": run,
        }
        return copy.deepcopy(state)

    good, first = snapshot(), len(history["elbo"])
    trouble, interrupted = None, False
    bar = tqdm(
        range(epochs), desc=name, leave=False, disable=None if progress else True
    )
    try:
        for epoch in bar:
            model.train()
            where = f"in epoch {first + epoch}"
            try:
                if before_epoch is not None:
                    before_epoch(first + epoch)
                with isolated_randomness(generator, device):
                    order = torch.randperm(
                        num_data, generator=generator, device=generator.device
                    )
                    batches = order.to(device).split(batch_size)
                    # A deep kernel's stay in eval mode and take single rows.
                    if any(m.training for m in norm_layers(model).values()):
                        batches = split_rows(order.to(device), batch_size, model)
                    value = _epoch(elbo, optimizer, batches, generator)
            except Exception as error:
                # Weights that are NaN make distributions and factorisations raise.
                if not isinstance(error, _DIVERGED) and _is_finite(model):
                    raise
                trouble = f"{first_line(error)} ({where})"
                break
            if not (math.isfinite(value) and _is_finite(model)):
                trouble = f"the bound or a weight was not finite {where}"
                break
            model.eval()
            history["elbo"].append(value)
            good = snapshot()
            if not bar.disable:
                bar.set_postfix_str(f"elbo {value:.4g}", refresh=False)
            entry = {"elbo": value}
            if callback is not None and callback(first + epoch, model, entry) is True:
                break
    except KeyboardInterrupt:
        interrupted = True
        if len(good["history"]["elbo"]) == first:
            raise
    finally:
        bar.close()
        model.eval()
        model.zero_grad()
    done, rate = len(good["history"]["elbo"]) - first, groups[0][1]
    if trouble is not None or interrupted:
        model.load_state_dict(good["model"])
    fit = ELBOFit(model, copy.deepcopy(good["history"]), good)
    if trouble is not None:
        raise DivergedError(
            f"Training diverged after {done} of {epochs} epochs: {trouble}. The last "
            "good state is .last_good of this error. Standardise the data, or go on by "
            f"resume=error.last_good.state with {rate_advice(rate, usual_rate)}.",
            fit,
        )
    if interrupted:
        warn_user(
            f"Training was interrupted after {done} of {epochs} epochs; the last good "
            "state is returned.",
            RuntimeWarning,
        )
    elif warn_rising and done == epochs:  # no callback ended it
        remedy = (
            f"Try more epochs= (now {epochs}) or a larger learning_rate= (now {rate:g})"
            "; resume=fit.state goes on from here."
        )
        warn_if_rising(fit.history["elbo"][first:], name, remedy)
    return fit


def _epoch(
    elbo: Callable[[Tensor, Generator], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Tensor],
    generator: Generator,
) -> float:
    total = 0.0
    for rows in batches:
        optimizer.zero_grad()
        value = elbo(rows, generator)
        (-value).backward()
        optimizer.step()
        total = total + len(rows) * value.detach()
    return float(total) / sum(map(len, batches))


def _is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())
