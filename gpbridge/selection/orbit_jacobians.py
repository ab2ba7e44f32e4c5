r"""Jacobians of a network that is averaged over orbits, differentiable in the orbits.

The averaged network :math:`\bar f(x) = \sum_a c_a f(T_a x)` has the Jacobian
:math:`\bar J(x) = \sum_a c_a J(T_a x)`. A layer that is called at T positions of one
input is called at s T positions of an orbit, so that its part of the Jacobian is held
as inputs and signals, as that of a convolution is. One backward pass over all orbits
per column of a root R of the outputs' curvature gives :math:`R^\top \bar J`.

In: a network, an augmentation, rows of data. Out: :class:`OrbitNet`, which gives for
parameters of the augmentation the outputs and the Jacobian in blocks of weights.
Next: ``orbit_curvature`` sums them up.

References:
    Immer, van der Ouderaa, Rätsch, Fortuin, van der Wilk, Invariance learning in deep
    neural networks with differentiable Laplace approximations, NeurIPS 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, vmap

from gpbridge.augmentation.base import Augmentation, BoundedAugmentation
from gpbridge.functional import FunctionalNet
from gpbridge.jacobians import jacobian
from gpbridge.layer_gram import tangent_features
from gpbridge.layer_signals import Uncontractible, record_signals
from gpbridge.linearized.weight_blocks import (
    BlockJacobian,
    WeightBlock,
    weight_blocks,
)
from gpbridge.tracing import traceable
from gpbridge.types import Params

Roots = Callable[[Tensor], Tensor]
"""Roots of the outputs' curvature, ``n x m`` to ``n x m x r``."""


def orbits(
    augmentation: Augmentation,
    X: Tensor,
    values: Params | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Orbits of rows, as a function of the augmentation's parameters.

    Args:
        augmentation: The law of the transformations; not changed.
        X: Inputs ``n x d``.
        values: Parameters by name; those that are not given keep their own values.
        noise: Base noise of each row, ``n x s x k``; None is the augmentation's own,
            which all rows share.

    Returns:
        ``n x s x d'``.
    """
    values = {} if values is None else values
    if noise is None:
        return functional_call(augmentation, values, (X,))

    def one(row: Tensor, own: Tensor) -> Tensor:
        return functional_call(augmentation, {**values, "noise": own}, (row[None],))[0]

    with traceable():
        return vmap(one)(X, noise)


def row_noise(
    augmentation: Augmentation, num_rows: int, generator: Generator
) -> Tensor:
    """Base noise of its own for each row: that of the augmentation, shifted.

    A shift that is uniform over the period keeps every point uniform and the points
    of a row as evenly spread as they were.

    Args:
        augmentation: With noise that is uniform on [-1, 1].
        num_rows: The number n of rows.
        generator: Source of randomness.

    Returns:
        ``n x s x k``.

    Raises:
        NotImplementedError: If the noise is of another kind.
    """
    if not isinstance(augmentation, BoundedAugmentation):
        raise NotImplementedError(
            "orbit='per_datum' shifts noise that is uniform on [-1, 1], which "
            f"{type(augmentation).__name__} does not have. Choose orbit='fixed' or "
            "'resampled'."
        )
    noise = augmentation.noise
    shape = (num_rows, 1, noise.shape[-1])
    shift = torch.rand(shape, generator=generator, device=generator.device)
    return (noise + 1 + 2 * shift.to(noise)) % 2 - 1


class OrbitNet(nn.Module):
    """A frozen network whose outputs are averaged over orbits.

    Args:
        network: The network, of single images of the orbit; it is copied.
        augmentation: The law of the orbits; its parameters are arguments of every call.
        groups: Names of the weights that share a prior variance.
        input_shape: Shape of one input of the network, if not a row.
        first: Some inputs ``n x d``, to look at the network.

    Attributes:
        net: The frozen copy.
        blocks: Its weights in blocks, in whose order Jacobians come.
        example: An input ``1 x d``.
    """

    def __init__(
        self,
        network: nn.Module,
        augmentation: Augmentation,
        groups: Sequence[Sequence[str]],
        input_shape: Sequence[int] | None,
        first: Tensor,
    ) -> None:
        super().__init__()
        self.net = FunctionalNet(network, input_shape=input_shape)
        self.augmentation = augmentation
        self.example = first[:1]
        with torch.no_grad():
            few = orbits(augmentation, first[:2]).flatten(0, 1)
        self.net.probe(few)
        params = self.net.params
        self.sizes = {name: value.shape for name, value in params.items()}
        unit = {name: few.new_ones(()) for name in params}
        features = tangent_features(self.net, few[:2], unit, "layers")
        names = [set(group) for group in groups]
        self.blocks: list[WeightBlock] = weight_blocks(features, self.sizes, names)

    @property
    def num_params(self) -> int:
        """The number p of weights."""
        return self.net.num_params

    def coefficients(self, values: Params | None, like: Tensor) -> Tensor:
        """Weights of the images of an orbit, ``s``."""
        if not values:
            return self.augmentation.coefficients(like)
        # ``weights`` may be a parameter of the augmentation.
        return functional_call(_Coefficients(self.augmentation), _inner(values), like)

    def average(
        self, X: Tensor, values: Params | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The outputs at rows ``n x d``, ``n x m``."""
        images = self._images(X, values, noise)
        outputs = self.net(images)
        return torch.einsum("nsm,s->nm", outputs, self.coefficients(values, outputs))

    def jacobian(
        self,
        X: Tensor,
        roots: Roots,
        values: Params | None = None,
        noise: Tensor | None = None,
        reduce: bool = False,
    ) -> tuple[Tensor, list[BlockJacobian]]:
        r"""Outputs, and :math:`R^\top \bar J` in blocks of weights.

        Cost: one forward pass over n s images and one backward pass per column of R.

        Args:
            X: Inputs ``n x d``.
            roots: Makes R from the averaged outputs.
            values: Parameters of the augmentation; with a gradient if they require it.
            noise: Base noise of each row, ``n x s x k``.
            reduce: Average the inputs of a layer over the orbit and add up its
                signals, as Kronecker factors need them; else the Jacobian is exact.

        Returns:
            ``n x m``, and for each of ``blocks`` its derivatives, ``n x r`` of them.
        """
        images = self._images(X, values, noise)
        n, s = images.shape[:2]
        c = self.coefficients(values, images)
        seen: dict[str, Tensor] = {}

        def directions(outputs: Tensor) -> Tensor:
            seen["value"] = torch.einsum("nsm,s->nm", outputs.unflatten(0, (n, s)), c)
            seen["root"] = roots(seen["value"])
            return (seen["root"][:, None] * c[:, None, None]).flatten(0, 1)

        rows = images.flatten(0, 1)
        learnt = rows.requires_grad or c.requires_grad  # transformations, or weights
        keep_graph = torch.is_grad_enabled() and learnt
        signals: dict[str, tuple[Tensor, Tensor]] = {}
        try:
            _, signals = record_signals(
                self.net, rows, self.net.layer_names or (), directions, keep_graph
            )
        except Uncontractible:  # control flow that depends on these data
            directions(self.net(rows))
        if not keep_graph:
            seen = {name: t.detach() for name, t in seen.items()}
        parts = []
        for block in self.blocks:
            layer = block.names[0].rpartition(".")[0]
            if layer in signals:
                parts.append(_folded(block, *signals[layer], n, s, reduce))
            else:
                parts.append(self._columns(block, rows, c, seen["root"]))
        return seen["value"], parts

    def _images(self, X: Tensor, values: Params | None, noise: Tensor | None) -> Tensor:
        # The law keeps its precision; the network may have another.
        return orbits(self.augmentation, X, values, noise).to(self.net.dtype)

    def _columns(
        self, block: WeightBlock, rows: Tensor, c: Tensor, root: Tensor
    ) -> BlockJacobian:
        params = self.net.params
        n, s = len(root), len(c)
        columns = []
        for name in block.names:
            J = jacobian(self.net, rows, {name: params[name]})  # (n s) x m x p
            J = torch.einsum("nsmp,s->nmp", J.unflatten(0, (n, s)), c)
            columns.append((root.mT @ J).unflatten(-1, (block.o, -1)))
        return BlockJacobian(None, None, torch.cat(columns, -1))


class _Coefficients(nn.Module):
    """The weights of an augmentation as a function of its parameters."""

    def __init__(self, augmentation: Augmentation) -> None:
        super().__init__()
        self.inner = augmentation

    def forward(self, like: Tensor) -> Tensor:
        return self.inner.coefficients(like)


def _inner(values: Params) -> Params:
    return {f"inner.{name}": value for name, value in values.items()}


def _folded(
    block: WeightBlock, inputs: Tensor, signal: Tensor, n: int, s: int, reduce: bool
) -> BlockJacobian:
    """A layer's inputs and signals at the positions of whole orbits."""
    parts = []
    for name in block.names:
        if name.rpartition(".")[2] == "weight":
            parts.append(inputs)
        else:
            parts.append(inputs.new_ones(*inputs.shape[:-1], 1))
    inputs = torch.cat(parts, -1).unflatten(0, (n, s))  # n x s x T x i
    signal = signal.unflatten(0, (n, s)).movedim(1, 2)  # n x r x s x T x o
    if reduce:
        return BlockJacobian(inputs.mean(1), signal.sum(2), None)
    return BlockJacobian(inputs.flatten(1, 2), signal.flatten(2, 3), None)
