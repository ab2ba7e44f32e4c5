"""Networks as functions of their random weights and of their inputs.

In: a trained ``nn.Module``. Out: a :class:`FunctionalNet`, which owns a frozen copy and
knows which weights are random. That choice is made here and nowhere else.
Next: ``operators``, ``features`` and everything behind them take such a net.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gpbridge.checks import ShapeError, check_tensor
from gpbridge.frozen import FrozenNet
from gpbridge.probe import probe_network
from gpbridge.types import Apply, Params

Parameters = str | Sequence[str] | Callable[[str], bool] | Mapping[str, Tensor]

# With weights of their own. By type: what another module does, its name does not tell.
NORMALIZATIONS: tuple[type[nn.Module], ...] = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)


class FunctionalNet(FrozenNet):
    r"""A network as a function :math:`f(x, w)` of its random weights and its inputs.

    Owns a deep copy of ``network`` in eval mode, so that batch-norm statistics and
    dropout are fixed, without the caller's hooks; the caller's module is never changed.
    ``.train()`` leaves the copy in eval mode. Inputs are ``... x n x d``, outputs
    ``... x n x m``. The number of outputs is known once :meth:`probe` has seen a point.

    Args:
        network: Any module that maps ``n x d`` (or ``n x input_shape``) to ``n x m`` or
            ``n``, row by row and without fresh randomness.
        parameters: Which weights are random: ``"all"``, ``"last_layer"``,
            ``"without_normalization"`` (all but those of batch, layer, group, instance
            and RMS normalisation), names of parameters or of submodules, or a predicate
            on parameter names. For single entries, a mapping from names to masks of the
            tensors' shapes, or to places in the flattened tensors, as
            :mod:`gpbridge.subnetworks` makes them; p is the number of these entries.
            Weights with ``requires_grad=False`` never are random; tied weights count
            once.
        input_shape: Shape of one input, to unflatten the ``d`` columns, as (c, h, w).
        freeze: False leaves the weights of the copy trainable, for kernels learned
            through their network.

    Raises:
        TypeError: If ``network`` is not a module.
        ValueError: If no random weight is left, a name is unknown, or normalisation is
            excluded and layers may be a normalisation of another kind.
        ShapeError: If a mask does not have the shape of its tensor.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Parameters = "all",
        input_shape: Sequence[int] | None = None,
        freeze: bool = True,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"network must be a torch.nn.Module, but is {type(network).__name__}."
            )
        entries = {}
        if isinstance(parameters, Mapping):
            parameters, entries = random_entries(network, parameters)
        names = random_names(network, parameters)
        entries = {name: entries[name] for name in names if name in entries}
        super().__init__(network, names, input_shape, freeze, entries)

    def probe(self, X: Tensor) -> int:
        """Check on up to three points that the network is a function we can linearise.

        Args:
            X: Inputs ``... x n x d``, at least one point.

        Returns:
            The number of outputs m.

        Raises:
            TypeError: If the output is not one tensor.
            ShapeError: If the output is not one row per point, or X has no points or
                another width than ``input_shape``.
            ValueError: If the network draws randomness, changes itself, mixes rows, or
                cannot be differentiated in its random weights.
        """
        return probe_network(self, X)


def functionalize(
    network: nn.Module, parameters: Parameters = "all"
) -> tuple[Apply, Params]:
    """Split a module into a pure function and a detached copy of its random weights."""
    net = FunctionalNet(network, parameters)
    return net.apply_network, {name: p.clone() for name, p in net.params.items()}


def random_names(network: nn.Module, parameters: Parameters = "all") -> list[str]:
    """Names of the tensors that a choice of random weights takes, in their order.

    Args:
        network: The module.
        parameters: As for :class:`FunctionalNet`, no mapping.

    Returns:
        The names, at least one.

    Raises:
        ValueError: As for :class:`FunctionalNet`.
    """  # noqa: DOC502
    every = [name for name, _ in network.named_parameters()]
    free = [name for name, p in network.named_parameters() if p.requires_grad]
    if parameters == "all":
        names = free
    elif parameters == "last_layer":
        owners = [name.rpartition(".")[0] for name in free]
        names = [name for name in free if name.rpartition(".")[0] == owners[-1]]
    elif parameters == "without_normalization":
        fixed = _normalization_weights(network)
        names = [name for name in free if name not in fixed]
    elif callable(parameters):
        names = [name for name in free if parameters(name)]
    elif isinstance(parameters, str):
        raise ValueError(
            "parameters must be 'all', 'last_layer', 'without_normalization', a list "
            f"of names or a predicate, but is {parameters!r}. For one layer pass a "
            f"list, [{parameters!r}]."
        )
    else:
        asked = list(parameters)
        unknown = [a for a in asked if not any(_belongs(n, a) for n in every)]
        if unknown:
            raise ValueError(
                f"parameters names {unknown}, which the network does not have. "
                f"It has {every}."
            )
        names = [name for name in free if any(_belongs(name, a) for a in asked)]
    if not names:
        raise ValueError(
            f"The network has no random weight left: {len(every)} parameters, "
            f"{len(free)} of them with requires_grad, none selected by "
            f"parameters={parameters!r}. Set requires_grad_(True) on those that should "
            "be random, or select others."
        )
    return names


def random_entries(
    network: nn.Module, choice: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, Tensor]]:
    """Read a choice of single entries.

    Args:
        network: The module.
        choice: A mask of the tensor's shape, or places in the flattened tensor, by
            name.

    Returns:
        The names of the tensors with at least one entry, and the increasing places of
        those that are not taken as a whole.

    Raises:
        ValueError: If a name is unknown, a place is not there or named twice, or no
            entry is chosen.
        ShapeError: If a mask has another shape.
        TypeError: If a value is neither a mask nor places.
    """
    own = dict(network.named_parameters())
    unknown = [name for name in choice if name not in own]
    if unknown:
        raise ValueError(
            f"parameters masks {unknown}, which the network does not have. It has "
            f"{list(own)}."
        )
    names, entries = [], {}
    for name, chosen in choice.items():
        places = _places(name, chosen, own[name])
        if len(places):
            names.append(name)
        if len(places) < own[name].numel():
            entries[name] = places.to(own[name].device)
    if not names:
        raise ValueError(
            f"parameters chooses no entry of {list(choice)}: every mask is empty. "
            "Choose at least one."
        )
    return names, entries


def _places(name: str, chosen: Tensor, own: Tensor) -> Tensor:
    check_tensor(**{f"parameters[{name!r}]": chosen})
    if chosen.dtype == torch.bool:
        if chosen.shape != own.shape:
            raise ShapeError(
                f"The mask of {name} must have its shape {tuple(own.shape)}, but has "
                f"shape {tuple(chosen.shape)}."
            )
        return chosen.reshape(-1).nonzero().flatten()
    if chosen.is_floating_point() or chosen.is_complex():
        raise TypeError(
            f"parameters[{name!r}] must be a mask or integer places, but is "
            f"{chosen.dtype}. Try a comparison, or .bool()."
        )
    if chosen.dim() != 1:
        raise ShapeError(
            f"Places of the entries of {name} must be a vector of integers, but have "
            f"shape {tuple(chosen.shape)}. A mask is of dtype torch.bool."
        )
    places = chosen.long().unique()
    if len(places) < len(chosen):
        raise ValueError(f"parameters[{name!r}] names a place twice. Try .unique().")
    if len(places) and not 0 <= int(places[0]) <= int(places[-1]) < own.numel():
        raise ValueError(
            f"Places of the entries of {name} must lie in 0 .. {own.numel() - 1}, but "
            f"are between {int(places[0])} and {int(places[-1])}."
        )
    return places


def _normalization_weights(network: nn.Module) -> set[str]:
    fixed: set[str] = set()
    doubtful = []
    for name, module in network.named_modules():
        own = [
            f"{name}.{kind}".lstrip(".")
            for kind, _ in module.named_parameters(recurse=False)
        ]
        if isinstance(module, NORMALIZATIONS):
            fixed.update(own)
        elif own and "norm" in type(module).__name__.lower():
            doubtful.append(f"{name} ({type(module).__name__})")
    if doubtful:
        raise ValueError(
            "parameters='without_normalization' knows the layers of torch.nn, and "
            f"cannot tell whether {', '.join(doubtful)} normalise. Name the random "
            "weights: pass a list of names or a predicate on names."
        )
    return fixed


def _belongs(name: str, asked: str) -> bool:
    return name == asked or name.startswith(asked + ".")
