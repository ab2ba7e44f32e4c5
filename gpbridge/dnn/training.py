"""The training loop: Adam over batches, and the best epoch kept.

In: a network, an objective, rows to fit and rows to validate on. Out: the network
trained in place, at the weights of its best epoch, and the history of its losses.
Next: ``fit`` wraps it so that nothing of the caller's is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gpbridge.batch_norm import norm_layers
from gpbridge.checks import warn_user
from gpbridge.dnn.checkpoints import Checkpoint
from gpbridge.dnn.divergence import DivergedError, rate_advice
from gpbridge.dnn.objective import Objective, evaluate
from gpbridge.dnn.schedules import cyclical_factor
from gpbridge.dnn.training_state import TrainingState

USUAL_RATE = 5e-3

Callback = Callable[[int, nn.Module, dict[str, float]], object]


class Part(NamedTuple):
    """Rows of inputs and of the objective's targets."""

    X: Tensor
    targets: Tensor


def descend(
    network: nn.Module,
    objective: Objective,
    fit: Part,
    validation: Part,
    *,
    decay_at: Callable[[int], float],
    epochs: int,
    learning_rate: float,
    batch_size: int,
    cosine: bool,
    keep_best: bool,
    generator: torch.Generator,
    progress: bool,
    callback: Callback | None,
    checkpoint: Checkpoint,
    key: dict[str, Any],
) -> dict[str, list[float]]:
    """Run the epochs on ``network`` in place, leave it at the best, in eval mode."""
    n, loss, num_outputs = len(fit.X), objective.loss, objective.num_outputs
    validates = len(validation.X) > 0
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = adam([(weights, learning_rate)])
    state = TrainingState(network, optimizer, generator, key)
    checkpoint.resume(state.load_state_dict, epochs, fit.X.device)
    group = optimizer.param_groups[0]  # a loaded state brings its own

    # No bar without a terminal: disable=None.
    bar = tqdm(
        range(state.epoch, epochs),
        desc="fit_map",
        leave=False,
        disable=None if progress else True,
    )
    try:
        for epoch in bar:
            group["weight_decay"] = decay = decay_at(epoch)
            if cosine:
                group["lr"] = learning_rate * cyclical_factor(epochs)(epoch)
            before = state.copies()
            order = torch.randperm(n, generator=generator, device=generator.device)
            batches = split_rows(order.to(fit.X.device), batch_size, network)
            network.train()
            total = 0.0
            for rows in batches:
                optimizer.zero_grad()
                # Networks may squeeze: always n x m, also for a last batch of one row.
                outputs = network(fit.X[rows]).reshape(len(rows), num_outputs)
                batch_loss = loss(outputs, fit.targets[rows])
                batch_loss.backward()
                optimizer.step()
                total = total + len(rows) * batch_loss.detach()
            network.eval()
            seen = sum(map(len, batches))
            entry = {"train_loss": float(total) / seen, "weight_decay": decay}
            if validates:
                outputs = evaluate(network, validation.X, num_outputs)
                entry["validation_loss"] = float(loss(outputs, validation.targets))
            if not (all(map(math.isfinite, entry.values())) and _is_finite(network)):
                state.restore(state.good if state.best is None else state.best)
                raise DivergedError(
                    f"Training diverged in epoch {epoch}: {entry}. The network as "
                    "it was before is .last_good of this error. Standardise inputs and "
                    f"targets, or try {rate_advice(learning_rate, USUAL_RATE)}.",
                    network,
                )
            # Without validation the last step may have made the weights absurd.
            state.record(entry, state.copies() if validates else before, keep_best)
            if not bar.disable:
                shown = entry.get("validation_loss", entry["train_loss"])
                bar.set_postfix_str(f"loss {shown:.3g}", refresh=False)
            stop = callback is not None and callback(epoch, network, entry) is True
            checkpoint.keep(epoch + 1, stop or epoch + 1 == epochs, state.state_dict)
            if stop:
                break
    except KeyboardInterrupt:
        if not state.epoch:
            raise
        which = "best" if state.best is not None else "last"
        warn_user(
            f"Training was interrupted after {state.epoch} of {epochs} epochs; the "
            f"{which} weights so far are returned.",
            RuntimeWarning,
        )
    finally:
        bar.close()
        network.eval()
        network.zero_grad()
    if state.best is not None:
        state.restore(state.best)
    return state.history


def _is_finite(network: nn.Module) -> bool:
    # One NaN or Inf makes a sum one, and a sum is the cheapest pass.
    sums = [p.detach().sum() for p in network.parameters() if p.requires_grad]
    return all(map(math.isfinite, map(float, sums)))


def split_rows(
    order: torch.Tensor, batch_size: int, network: nn.Module
) -> tuple[torch.Tensor, ...]:
    """Batches of row numbers; batch norm cannot do with a last one of a single row.

    Raises:
        ValueError: If then there is no batch left.
    """
    batches = order.split(batch_size)
    if len(batches[-1]) > 1 or not norm_layers(network):
        return batches
    if min(len(order), batch_size) == 1:
        raise ValueError(
            "The network has batch normalisation, which needs batches of two rows or "
            f"more, but batch_size is {batch_size} and {len(order)} rows are fitted."
        )
    return batches[:-1]


def adam(
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
) -> torch.optim.Adam:
    """Adam with its defaults, by the fastest kernel that takes these weights.

    Args:
        groups: Weights and their learning rates.

    Returns:
        The optimiser of those that require gradients.

    Raises:
        ValueError: If none does.
    """
    free = [([p for p in group if p.requires_grad], rate) for group, rate in groups]
    weights = [p for group, _ in free for p in group]
    if not weights:
        raise ValueError(
            "The model has nothing to train: no parameter has requires_grad. Try "
            "model.requires_grad_(True), or on the part of it that is to be trained."
        )
    # One fused kernel per step: a third faster on small networks on a CPU.
    fused = all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in weights
    )
    return torch.optim.Adam(
        [{"params": group, "lr": rate} for group, rate in free if group], fused=fused
    )


@contextmanager
def isolated_randomness(
    generator: torch.Generator, device: torch.device
) -> Iterator[None]:
    """Seed torch's own random state from ``generator`` and put it back afterwards."""
    # Dropout has no generator argument.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    accelerators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators), torch.enable_grad():
        # torch.manual_seed would seed devices whose state is not saved.
        torch.default_generator.manual_seed(seed)
        for accelerator in accelerators:
            with torch.cuda.device(accelerator):
                torch.cuda.manual_seed(seed)
        yield
