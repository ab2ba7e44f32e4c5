"""What observes the weights of a training run and never owns it.

In: a network being trained, or its weights by name. Out: their flat vector, checked,
handed to a subclass that keeps moments or copies of it. Next: ``snapshots``, ``swag``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpbridge.checks import ShapeError
from gpbridge.functional import FunctionalNet, Parameters
from gpbridge.types import FitResult, Params


class WeightTracker(nn.Module):
    """Reads the weights of a run, one snapshot at a time.

    Args:
        network: The module that is trained; its weights are read, nothing is changed.
        parameters: Which weights are read, as in
            :class:`~gpbridge.functional.FunctionalNet`; the others are taken as they
            are at the last update.
        input_shape: Shape of one input, to unflatten the ``d`` columns.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Parameters = "all",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.net = FunctionalNet(network, parameters, input_shape)
        self.register_buffer("num_snapshots", torch.zeros((), dtype=torch.long))

    def update(self, network: nn.Module | FitResult | Params) -> None:
        """Take the present weights in; costs a few p operations.

        Args:
            network: The module that is trained, a result of ``fit_map``, or weights by
                name, buffers among them if there are any that training changes.

        Raises:
            TypeError: If it is none of these, or a weight has another dtype.
            ShapeError: If a weight has another shape than the tracker's.
            ValueError: If a weight is missing or not finite; the tracker stays as it
                was.
        """  # noqa: DOC502
        self.accept(network, self.read(network))

    @torch.no_grad()
    def read(self, network: nn.Module | FitResult | Params) -> Tensor:
        """The weights as one vector, checked; nothing is taken in.

        Args:
            network: As for :meth:`update`.

        Returns:
            The weights, ``p``.

        Raises:
            ShapeError: As for :meth:`update`.
            TypeError: As for :meth:`update`.
            ValueError: As for :meth:`update`.
        """
        network = _module_or_weights(network)
        is_module = isinstance(network, nn.Module)
        own = dict(network.named_parameters()) if is_module else network
        missing = [name for name in self.net.names if name not in own]
        if missing:
            raise ValueError(
                f"The network has no {', '.join(missing)}, which the tracker was built "
                "for. Pass the module that is trained, or a copy of it."
            )
        tensors = dict(self.net.network.named_parameters())
        for name in self.net.names:
            p = tensors[name]
            if own[name].shape != p.shape:
                raise ShapeError(
                    f"{name} must have shape {tuple(p.shape)} as in the network the "
                    f"tracker was built for, but has {tuple(own[name].shape)}. Of "
                    "stacked weights pass those of one copy."
                )
            if own[name].dtype != p.dtype:
                raise TypeError(
                    f"{name} must be {p.dtype} as in the network the tracker was built "
                    f"for, but is {own[name].dtype}. Try network.to({p.dtype})."
                )
        weights = self.net.flatten(self.net.read(own))
        if not bool(torch.isfinite(weights).all()):
            raise ValueError(
                "The weights contain NaN or Inf: training has diverged. The tracker "
                f"keeps the {int(self.num_snapshots)} snapshots before; lower the "
                "learning rate."
            )
        return weights

    @torch.no_grad()
    def accept(self, network: nn.Module | FitResult | Params, weights: Tensor) -> None:
        """Take in what was read of a network."""
        network = _module_or_weights(network)
        # What is not tracked, buffers among it, is that of the last snapshot.
        state = network.state_dict() if isinstance(network, nn.Module) else network
        random = set(self.net.names) - set(self.net.entries)
        for name, value in self.net.network.state_dict().items():
            if name not in random and name in state:
                value.copy_(state[name])
        self._take(weights)

    def _take(self, weights: Tensor) -> None:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """How many snapshots were taken."""
        return f"num_snapshots={int(self.num_snapshots)}"

    def own_net(self) -> FunctionalNet:
        """A copy of the network, whose weights that are not read stay as they are."""
        return copy.deepcopy(self.net)

    def _need(self, wanted: int) -> None:
        if int(self.num_snapshots) < wanted:
            raise RuntimeError(
                f"The tracker has {int(self.num_snapshots)} snapshots and needs "
                f"{wanted}. Call update(network) at the end of each epoch."
            )


def _module_or_weights(network: nn.Module | FitResult | Params) -> nn.Module | Params:
    if isinstance(network, FitResult):
        return network.network
    if not isinstance(network, nn.Module | dict):
        raise TypeError(
            "network must be a module, a result of fit_map, or a dict of weights by "
            f"name, but is {type(network).__name__}."
        )
    return network
