r"""Noise on the outputs of linear maps in place of noise on their weights.

Where weights :math:`W \sim N(\mu, \sigma^2)` meet every datum once, the outputs of a
datum are independent normals, and can be drawn instead of the weights:

.. math:: h \sim N(x \mu^\top, \; x^2 (\sigma^2)^\top)

Every datum then has noise of its own, and gradients average over the batch. A
convolution, or a linear map that is applied at several positions of one datum, shares
its weights between positions: there independent outputs have the right marginal law and
lack its correlations.

In: a network as a function of weights. Out: which of them can be treated so, and a
context in which the network is called with moments. Next: ``variational``.

References:
    Kingma, Salimans and Welling, Variational dropout and the local reparameterization
    trick, NeurIPS 2015, eq. (6).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gpbridge.randomness import standard_normal
from gpbridge.types import Params

_LINEAR_MAPS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def local_weights(
    network: nn.Module, params: Params, inputs: Tensor, positions: bool = False
) -> set[str]:
    """Find the weights whose noise can be moved to the outputs of their layer.

    They enter one linear map or convolution, once in a pass, and nothing else; so do
    their biases. Found by running the network on some inputs and watching.

    Args:
        network: The module, called by ``functional_call``.
        params: Its random weights by name.
        inputs: A batch ``b x ...`` as the network takes it.
        positions: Whether layers that see several positions of a datum count too,
            although independent noise is an approximation there.

    Returns:
        Names of weights and of biases.
    """
    # Views of their own, so that an identity belongs to one name.
    own = {name: value.detach().view_as(value) for name, value in params.items()}
    with torch.no_grad(), _Watch(own) as watch:
        functional_call(network, own, (inputs,))
    found = set()
    for weight, bias, num_outputs in watch.maps:
        once = all(watch.uses[n] == 1 for n in (weight, bias) if n is not None)
        per_datum = num_outputs == len(inputs) * len(params[weight])
        if once and (per_datum or positions):
            found.update(n for n in (weight, bias) if n is not None)
    return found


class LocalNoise(TorchFunctionMode):
    """A context in which linear maps of given means draw their outputs.

    Args:
        means: Means of weights and biases, the very tensors that the network will use.
        variances: Their variances, by the same names.
        generator: Source of the noise.
    """

    def __init__(
        self, means: Params, variances: Params, generator: Generator | None
    ) -> None:
        super().__init__()
        self.means = means  # kept alive: their identities are keys
        self.names = {id(value): name for name, value in means.items()}
        self.variances, self.generator = variances, generator
        self.seen: set[str] = set()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace the maps of weights with a variance, run everything else."""
        kwargs = kwargs or {}
        used = [
            self.names[id(t)] for t in _tensors((args, kwargs)) if id(t) in self.names
        ]
        if not used:
            return func(*args, **kwargs)
        if func not in _LINEAR_MAPS:
            result = func(*args, **kwargs)
            if any(True for _ in _tensors(result)):
                raise _changed(used)
            return result
        if not self.seen.isdisjoint(used):
            raise _changed(used)
        self.seen.update(used)
        call = _named(args, kwargs)
        x, weight, bias = call.pop("input"), call.pop("weight"), call.pop("bias", None)
        variance, bias_variance = (
            self.variances.get(self.names.get(id(t), "")) for t in (weight, bias)
        )
        mean = func(x, weight, bias, **call)
        spread = func(x.square(), variance, bias_variance, **call)
        # A row of zeros has no spread, where the root has no slope.
        std = spread.clamp_min(torch.finfo(spread.dtype).tiny).sqrt()
        return mean + std * standard_normal(mean.shape, self.generator, mean)


class _Watch(TorchFunctionMode):
    """Record which calls each of some tensors takes part in."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in params.items()}
        self.uses = dict.fromkeys(params, 0)
        self.maps: list[tuple[str, str | None, int]] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        used = [id(t) for t in _tensors((args, kwargs)) if id(t) in self.names]
        # A shape or a dtype that is read off is no use of the values.
        if used and any(True for _ in _tensors(result)):
            for key in used:
                self.uses[self.names[key]] += 1
            call = _named(args, kwargs) if func in _LINEAR_MAPS else {}
            weight = self.names.get(id(call.get("weight")))
            if weight is not None and id(call["input"]) not in self.names:
                bias = self.names.get(id(call.get("bias")))
                self.maps.append((weight, bias, result.numel()))
        return result


def _named(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a linear map by name."""
    names = "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _changed(names: list[str]) -> RuntimeError:
    return RuntimeError(
        f"The network uses {', '.join(names)} in another way than on its first batch, "
        "so that noise cannot be moved to the outputs of the layer. Pass "
        "local_reparameterization='none'."
    )
