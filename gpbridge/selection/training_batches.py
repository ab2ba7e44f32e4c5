"""Data that training passes over again and again: tensors, or a loader of batches.

In: inputs and targets, or a loader. Out: batches in a fresh order for training and all
data for a curvature, checked once, with targets in the form that the likelihood wants.
Next: ``online_training``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor, nn

from gpbridge.batch_norm import norm_layers
from gpbridge.checks import (
    ShapeError,
    check_inputs,
    check_not_empty,
    check_same_device,
    check_same_dtype,
    check_same_length,
    check_tensor,
)
from gpbridge.dnn.fit_input import check_weights, shaped
from gpbridge.dnn.run_key import checksum
from gpbridge.dnn.training import split_rows
from gpbridge.functional import FunctionalNet
from gpbridge.likelihoods import is_gaussian
from gpbridge.targets import check_targets, default_likelihood

Batch = tuple[Tensor, Tensor]
Data = tuple[Tensor, Tensor] | Iterable[Sequence[Tensor]]


class TrainingBatches:
    """Batches of inputs in the shape of the network, with targets.

    Args:
        data: Inputs and targets, or a loader: anything that gives pairs of a batch of
            inputs and a batch of targets, each time it is iterated over.
        network: The network that is trained.
        likelihood: Of the targets, or None for the one that they suggest.
        batch_size: Rows of a batch, where data are tensors.
        input_shape: Shape of one input, to unflatten the columns.

    Attributes:
        likelihood: The user's, or the one that the targets suggest.
        net: A frozen copy of the network, probed.
        num_rows: The number n of data in one pass.

    Raises:
        TypeError: If data are none of both, a loader is used up by one pass, or targets
            of a regression have another dtype than inputs.
        ShapeError: If data, network and likelihood disagree.
    """

    def __init__(
        self,
        data: Data,
        network: nn.Module,
        likelihood: Likelihood | None,
        batch_size: int,
        input_shape: Sequence[int] | None,
    ) -> None:
        pair = isinstance(data, tuple | list) and len(data) == 2
        self.is_tensors = pair and all(isinstance(part, Tensor) for part in data)
        self._skips_single = bool(norm_layers(network))
        self.batch_size, self.input_shape = batch_size, input_shape
        if self.is_tensors:
            X, Y = (part.detach() for part in data)
            check_same_length(train_X=X, train_Y=Y)
            check_same_device(train_X=X, train_Y=Y)
            check_not_empty(train_X=X)
            batches = [(X, Y)]
        else:
            self._loader = _checked_loader(data)
            batches = self._pass(as_they_are=True)
        self.num_rows, labels = 0, []
        for X, Y in batches:
            check_inputs(X)
            check_tensor(train_Y=Y)
            if not labels:
                self._open(network, X)
            self.num_rows += len(X)
            labels.append(Y)
        if not labels:
            raise ValueError("The loader gives no batch. Pass one that holds data.")
        Y = torch.cat(labels).to(self.device)
        m = self.net.num_outputs
        if likelihood is None:
            likelihood = default_likelihood(Y, m, self.dtype)
        Y = check_targets(likelihood, Y, m, self.num_rows, self.dtype)
        if is_gaussian(likelihood):
            check_same_dtype("train_Y", Y, self.dtype)
        # The order of a loader may be another each time.
        known = Y if self.is_tensors else Y.sort(0).values
        self.likelihood, self._targets = likelihood, checksum(known)
        self._inputs: str | None = None
        if self.is_tensors:
            self.X, self.Y = shaped(X, self.input_shape), Y
            # Refuses batches that batch norm cannot do with.
            split_rows(torch.arange(len(X)), batch_size, network)

    def _open(self, network: nn.Module, X: Tensor) -> None:
        """Take from the first batch what all have in common."""
        if self.is_tensors:
            check_weights(network, X)
        else:
            check_weights(network, X.to(next(network.parameters()).device))
        if self.input_shape is None and X.dim() > 2:
            self.input_shape = tuple(X.shape[1:])
        self.device, self.dtype = next(network.parameters()).device, X.dtype
        self.net = FunctionalNet(network, input_shape=self.input_shape)
        self.first = shaped(X[:64].to(self.device), self.input_shape)
        self.net.probe(self.first.flatten(1))

    def shuffled(self, generator: Generator) -> Iterator[Batch]:
        """One epoch; a loader shuffles by itself.

        Yields:
            Inputs and targets of a batch.
        """
        if not self.is_tensors:
            for X, Y in self._pass():
                if len(X) > 1 or not self._skips_single:
                    yield X, Y
            return
        n = len(self.X)
        order = torch.randperm(n, generator=generator, device=generator.device)
        order = order.to(self.X.device)
        for rows in split_rows(order, self.batch_size, self.net.network):
            yield self.X[rows], self.Y[rows]

    def every(self) -> Iterable[Batch]:
        """All data once, in as large pieces as there are."""
        return [(self.X, self.Y)] if self.is_tensors else self._pass()

    def key(self) -> dict[str, object]:
        """What a continued run must have in common with the one before.

        Of a loader the targets of one pass, in any order: its inputs may be augmented
        by draws of its own.
        """
        if self._inputs is None:  # at the first save: it reads all inputs
            self._inputs = checksum(self.X) if self.is_tensors else "a loader"
        size = self.batch_size if self.is_tensors else "of the loader"
        return {
            "number of rows": self.num_rows,
            "inputs": self._inputs,
            "targets": self._targets,
            "batch size": size,
            "input shape": str(self.input_shape),
        }

    def _pass(self, as_they_are: bool = False) -> Iterator[Batch]:
        """One pass over the loader; its length must be that of the first."""
        count = 0
        for batch in self._loader:
            if not isinstance(batch, Sequence) or len(batch) != 2:
                raise TypeError(
                    "Each batch of the loader must be a pair of inputs and targets, "
                    f"but one is {_described(batch)}. Wrap the loader so that it gives "
                    "(X, Y)."
                )
            X, Y = batch
            check_tensor(inputs=X, targets=Y)
            count += len(X)
            if as_they_are:
                check_same_length(inputs=X, targets=Y)
                yield X, Y
                continue
            if count > self.num_rows:
                break
            X = shaped(X.to(self.device), self.input_shape)
            yield X, self._canonical(Y.to(self.device))
        if not as_they_are and count != self.num_rows:
            more = "more than that" if count > self.num_rows else f"only {count}"
            raise ShapeError(
                f"The loader gave {self.num_rows} rows in its first pass and {more} in "
                "a later one, but prior and evidence count every row once per pass. "
                "Pass a loader of constant length, such as a DataLoader over a "
                "data set; an iterator that is used up has nothing left."
            )

    def _canonical(self, Y: Tensor) -> Tensor:
        """Targets in the form of ``check_targets``, which has seen all of them."""
        if is_gaussian(self.likelihood):
            return Y
        if hasattr(self.likelihood, "num_classes"):
            return Y.long()
        return Y.reshape(-1, 1).to(self.dtype)


def _checked_loader(data: object) -> Iterable[Sequence[Tensor]]:
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            "data must be a pair of tensors (X, Y), or a loader of such pairs, but is "
            f"{type(data).__name__}."
        )
    if isinstance(data, Iterator):
        raise TypeError(
            f"data must be iterable more than once, but is {type(data).__name__}, "
            "which one pass uses up. Pass the DataLoader itself, or a list of batches."
        )
    return data


def _described(batch: object) -> str:
    if isinstance(batch, Sequence):
        return f"a {type(batch).__name__} of {len(batch)}"
    return type(batch).__name__
