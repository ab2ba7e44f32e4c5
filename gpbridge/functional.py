"""Networks as functions of their random weights and of their inputs.

In: a trained ``nn.Module``. Out: a :class:`FunctionalNet`, which owns a frozen copy and
knows which weights are random. That choice is made here and nowhere else.
Next: ``operators``, ``features`` and everything behind them take such a net.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from gpbridge.frozen import FrozenNet
from gpbridge.probe import probe_network
from gpbridge.types import Apply, Params

Parameters = str | Sequence[str] | Callable[[str], bool]

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
            on parameter names. Weights with ``requires_grad=False`` never are; tied
            weights count once.
        input_shape: Shape of one input, to unflatten the ``d`` columns, as (c, h, w).
        freeze: False leaves the weights of the copy trainable, for kernels learned
            through their network.

    Raises:
        TypeError: If ``network`` is not a module.
        ValueError: If no random weight is left, a name is unknown, or normalisation is
            excluded and layers may be a normalisation of another kind.
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
        names = _random_names(network, parameters)
        super().__init__(network, names, input_shape, freeze)

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


def _random_names(network: nn.Module, parameters: Parameters) -> list[str]:
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
