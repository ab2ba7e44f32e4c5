r"""The state of a training run of many copies of one network, epoch by epoch.

The weights of k copies are stacked, a minibatch of each copy goes through all of them
in one batched pass, and one optimiser of torch moves the stack. Its arithmetic is
elementwise, so that each copy is trained as it would be alone: same batches, same
losses. Where a network is small a step costs about as much as that of one copy.

In: a module, k initial weights, data in common or for each copy, a loss. Out: one more
epoch, and a state from which the next gives the same bits. Next: ``replicas`` runs it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gpbridge.checks import check_same_device
from gpbridge.dnn.divergence import DivergedError, rate_advice
from gpbridge.dnn.objective import EVALUATION_ROWS
from gpbridge.dnn.replica_fit import ReplicaFit
from gpbridge.dnn.replica_input import (
    check_normalisation,
    check_rows,
    drawn_seed,
    one_generator_each,
    stacked_data,
    stacked_state,
)
from gpbridge.dnn.replica_options import ReplicaOptions
from gpbridge.dnn.run_key import check_same_run, checksum, described, structure
from gpbridge.dnn.stacked_loss import Loss, stack_loss
from gpbridge.dnn.training import isolated_randomness
from gpbridge.functional import FunctionalNet
from gpbridge.stacked_layers import stack_layers
from gpbridge.types import Params

_GATHERED = 2**24  # numbers of a minibatch sequence that are gathered at once


class StackedTraining:
    """The state of a training run of k copies, one epoch at a time.

    For the loop, its bar and its files see :func:`gpbridge.dnn.train_replicas`, whose
    arguments these are.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: Tensor | Params,
        X: Tensor,
        Y: Tensor,
        loss: Loss,
        options: ReplicaOptions,
        *,
        rows: Tensor | None,
        validation: tuple[Tensor, Tensor] | None,
        keep_best: bool,
        input_shape: Sequence[int] | None,
        generator: Generator | Sequence[Generator] | None,
    ) -> None:
        if isinstance(network, FunctionalNet):
            self.net = copy.deepcopy(network)
        else:
            self.net = FunctionalNet(network, input_shape=input_shape)
        self.state = stacked_state(self.net, weights)
        self.num_replicas = k = len(self.state[self.net.names[0]])
        self.X, self.Y = stacked_data(X, Y, k, self.net.dtype)
        check_same_device(X=X, Y=Y, weights=self.state[self.net.names[0]])
        self.validation = None
        if validation is not None:
            self.validation = stacked_data(
                *validation, k, self.net.dtype, "validation "
            )
        self.rows = None if rows is None else check_rows(rows, self.X.shape[1], k)
        self.num_rows = self.X.shape[1] if rows is None else rows.shape[1]
        self.options, self.loss = options, loss
        self._mixes_rows = check_normalisation(
            self.net.network, min(self.num_rows, options.batch_size)
        )
        self.generators = one_generator_each(generator, k)
        # As many numbers are taken of each as fit_map takes, so that batches agree.
        seeds = [drawn_seed(g) for g in self.generators]
        self._noise = Generator().manual_seed(seeds[0])
        self._begins = checksum(torch.tensor(seeds)), self._weights_checksum()

        self._leaves = [self.state[name].requires_grad_() for name in self.net.names]
        self._each = torch.arange(k, device=self.X.device)[:, None]
        self._ones = torch.ones(k, dtype=self.X.dtype, device=self.X.device)
        self._forward = stack_layers(self.net)
        self._loss = stack_loss(
            loss, self.net, lambda X: self._forward(self.state, X), self.X, self.Y
        )
        self.optimizer = options.optimizer_of(self._leaves)
        self.epoch = 0
        self.entries: list[Params] = []
        self.keeps_best = keep_best and validation is not None
        self._good = self._copies()
        self.best = self._copies() if self.keeps_best else {}
        self.best_loss = torch.full_like(self._ones, math.inf)
        self.best_epoch = torch.zeros(k, dtype=torch.long, device=self.X.device)

    def train_epoch(self) -> Params:
        """One pass of every copy over its rows; returns this epoch's entries, ``k``.

        Raises:
            DivergedError: If a copy has a loss or a weight that is not finite. All
                copies then are as they were before the epoch.
        """
        group = self.optimizer.param_groups[0]
        group["lr"] = rate = self.options.rate(self.epoch)
        decay = self._decay()
        total, seen = torch.zeros_like(self._ones), 0
        self.net.network.train()
        with isolated_randomness(self._noise, self.X.device):
            for X, Y in self._batches():
                losses = self._loss(self._forward(self.state, X), Y)
                for p in self._leaves:  # the optimiser's own loop takes longer
                    p.grad = None
                losses.backward(self._ones)
                if decay is not None:
                    for p in self._leaves:
                        p.grad.addcmul_(p.detach(), _beside(decay, p))
                self.optimizer.step()
                total += X.shape[1] * losses.detach()
                seen += X.shape[1]
        self.net.network.eval()
        entry = {
            "train_loss": total / seen,
            "weight_decay": self._decay_entry(decay),
            "learning_rate": torch.full_like(total, rate),
        }
        if self.validation is not None:
            entry["validation_loss"] = self._validation_loss()
        self._check(entry)
        self._keep(entry)
        self.entries.append(entry)
        self.epoch += 1
        return entry

    def result(self) -> ReplicaFit:
        """The copies at their best epochs, or as they are."""
        chosen = self.best if self.keeps_best else self._good
        state = {name: value.clone() for name, value in chosen.items()}
        history = {
            key: torch.stack([entry[key] for entry in self.entries]).cpu()
            for key in (self.entries[0] if self.entries else ())
        }
        best_epoch = self.best_epoch.clone() if self.keeps_best else None
        return ReplicaFit(self.net.flatten(state), state, history, best_epoch)

    def current(self) -> Params:
        """Weights and buffers by name as they are now, not copied."""
        return {name: value.detach() for name, value in self.state.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, but for data and options."""
        return {
            "epoch": self.epoch,
            "state": self._copies(),
            "best": {name: value.clone() for name, value in self.best.items()},
            "best_loss": self.best_loss.clone(),
            "best_epoch": self.best_epoch.clone(),
            "entries": [dict(entry) for entry in self.entries],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "generators": [g.get_state() for g in self.generators],
            "noise": self._noise.get_state(),
            "run": self._key(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run of the same data and options.

        Raises:
            ValueError: If the state is of another run.
        """  # noqa: DOC502
        check_same_run(
            state["run"], self._key(), "Pass the same arguments, or start anew."
        )
        for name, value in state["state"].items():
            self.state[name].copy_(value)
            self._good[name].copy_(value)
        for name, value in state["best"].items():
            self.best[name].copy_(value)
        self.epoch = state["epoch"]
        self.best_loss, self.best_epoch = state["best_loss"], state["best_epoch"]
        self.entries = [dict(entry) for entry in state["entries"]]
        # It keeps the tensors, and would move them in the caller's state.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for generator, value in zip(self.generators, state["generators"], strict=True):
            generator.set_state(value.cpu())
        self._noise.set_state(state["noise"].cpu())

    def _key(self) -> dict[str, Any]:
        """What a continued run must have in common with the one before."""
        held_out = self.validation or ()
        return {
            "number of copies": self.num_replicas,
            "number of rows": self.num_rows,
            "network": structure(self.net.network, set(self.net.names)),
            "input shape": described(self.net.input_shape),
            **self.options.key(),
            "keeping of the best epoch": self.keeps_best,
            "loss": described(self.loss),
            "inputs": checksum(self.X),
            "targets": checksum(self.Y),
            "rows": described(self.rows),
            "validation": [checksum(part) for part in held_out],
            "seed": self._begins[0],
            "first weights": self._begins[1],
        }

    def _weights_checksum(self) -> str:
        flat = [self.state[name].detach().flatten(1) for name in self.net.names]
        return checksum(torch.cat(flat, 1))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Minibatches ``k x b x d`` of an epoch, each copy in an order of its own."""
        n, b = self.num_rows, self.options.batch_size
        orders = [
            torch.randperm(n, generator=g, device=g.device) for g in self.generators
        ]
        order = torch.stack(orders).to(self.X.device)
        if self._mixes_rows and n % b == 1:
            order = order[:, :-1]
        if self.rows is not None:
            order = self.rows.gather(1, order)
        numbers = len(order) * b * (self.X.shape[-1] + self.Y[0, 0].numel())
        together = b * max(1, _GATHERED // numbers)
        for rows in order.split(together, 1):
            X, Y = self.X[self._each, rows], self.Y[self._each, rows]
            yield from zip(X.split(b, 1), Y.split(b, 1), strict=True)

    @torch.no_grad()
    def _validation_loss(self) -> Tensor:
        X, Y = self.validation
        chunks = X.split(max(1, EVALUATION_ROWS // self.num_replicas), 1)
        outputs = torch.cat([self._forward(self.state, chunk) for chunk in chunks], 1)
        return self._loss(outputs, Y)

    def _decay(self) -> Tensor | None:
        """Hand one decay to the optimiser, or return those of the copies, ``k``."""
        value = self.options.decay(self.epoch, self.current())
        single = value.dim() == 0
        self.optimizer.param_groups[0]["weight_decay"] = float(value) if single else 0.0
        return None if single else value.to(self._ones)

    def _decay_entry(self, decay: Tensor | None) -> Tensor:
        if decay is not None:
            return decay.clone()
        return torch.full_like(
            self._ones, self.optimizer.param_groups[0]["weight_decay"]
        )

    def _check(self, entry: Params) -> None:
        # One NaN or Inf makes a sum one, and a sum is the cheapest pass.
        sums = [value.detach().flatten(1).sum(1) for value in self._leaves]
        fine = torch.isfinite(torch.stack([*entry.values(), *sums])).all(0)
        if bool(fine.all()):
            return
        bad = torch.nonzero(~fine).flatten().tolist()
        with torch.no_grad():
            for name, value in self._good.items():
                self.state[name].copy_(value)
        losses = [f"{float(entry['train_loss'][r]):.3g}" for r in bad]
        raise DivergedError(
            f"Training diverged in epoch {self.epoch} in copies {bad} of "
            f"{self.num_replicas} (train loss {', '.join(losses)}). All copies are "
            "kept as they were before, as .last_good of this error. Standardise data, "
            f"or try {rate_advice(self.options.learning_rate, 5e-3)}.",
            self.result(),
        )

    @torch.no_grad()
    def _keep(self, entry: Params) -> None:
        for name, value in self.state.items():
            self._good[name].copy_(value)
        if not self.keeps_best:
            return
        better = entry["validation_loss"] < self.best_loss
        for name, value in self.state.items():
            chosen = torch.where(_beside(better, value), value, self.best[name])
            self.best[name].copy_(chosen)
        self.best_loss = torch.where(better, entry["validation_loss"], self.best_loss)
        self.best_epoch = torch.where(better, self.epoch, self.best_epoch)

    def _copies(self) -> Params:
        return {name: value.detach().clone() for name, value in self.state.items()}


def _beside(values: Tensor, like: Tensor) -> Tensor:
    """One number for each copy, with the dimensions of the copies' tensors."""
    return values.view(-1, *[1] * (like.dim() - 1))
