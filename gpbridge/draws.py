r"""Frozen draws of functions from draws of weights.

In: weights, ``s x p``. Out: a differentiable function of X that evaluates all draws in
one vectorised pass: of the tangent model, :math:`m(x) + J(x) w_s`, or of the network
itself, :math:`f(x, w_s)`. Both satisfy :class:`~gpbridge.types.FunctionDraws`.
Next: posteriors of every kind return these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gpbridge.checks import ShapeError, check_count
from gpbridge.functional import FunctionalNet
from gpbridge.jacobians import jacobian, jvp
from gpbridge.probe import explain_failure, warn_looped
from gpbridge.stacked_layers import stack_chain
from gpbridge.types import FunctionDraws, Params


class TangentDraws(nn.Module):
    """Draws of the tangent model of a network.

    Args:
        net: The network.
        change: Weight changes ``s x p``; a draw is ``offset_scale f + J change``.
        offset_scale: 1 to add the network's output, 0 for a model without offset.
        finish: Maps outputs ``s x ... x n x m`` to the caller's units, given the
            network's inputs.
        prepare: Maps the caller's inputs to the network's.
        output_indices: Outputs to keep; default all.
    """

    def __init__(
        self,
        net: FunctionalNet,
        change: Tensor,
        offset_scale: float = 1.0,
        prepare: Callable[[Tensor], Tensor] | None = None,
        finish: Callable[[Tensor, Tensor], Tensor] | None = None,
        output_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("change", change)
        self.offset_scale = offset_scale
        self.prepare, self.finish = prepare, finish
        self.output_indices = None if output_indices is None else list(output_indices)

    @property
    def num_samples(self) -> int:
        """The number s of functions."""
        return len(self.change)

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate all draws, ``... x n x d`` to ``s x ... x n x m``."""
        return self._evaluate(X, None)

    def each(self, X: Tensor) -> Tensor:
        """Evaluate each draw at inputs of its own, ``s x ... x n x d`` likewise."""
        _check_own_inputs(X, self.num_samples)
        return self._evaluate(X, 0)

    def take(self, samples: Tensor) -> TangentDraws:
        """Some of the functions, by number."""
        return TangentDraws(
            self.net,
            self.change[samples.to(self.change.device)],
            self.offset_scale,
            self.prepare,
            self.finish,
            self.output_indices,
        )

    def _evaluate(self, X: Tensor, dim: int | None) -> Tensor:
        prepared = X if self.prepare is None else self.prepare(X)
        Z = prepared.to(self.net.dtype)
        try:
            values = self._outputs(Z, dim)
        except Exception:
            explain_failure(self.net, Z)
            raise
        values = values.to(X.dtype)
        if self.output_indices is not None:
            values = values[..., self.output_indices]
        return values if self.finish is None else self.finish(values, prepared)

    def _outputs(self, Z: Tensor, dim: int | None) -> Tensor:
        net, change = self.net, self.change.to(Z)
        if net.vectorized:
            moved = torch.func.vmap(lambda v, z: jvp(net, z, v), (0, dim))(change, Z)
        elif dim is None:
            moved = (jacobian(net, Z) @ change.mT).movedim(-1, 0)
        else:
            pairs = zip(Z, change, strict=True)
            moved = torch.stack([jacobian(net, z) @ v for z, v in pairs])
        return moved + self.offset_scale * net(Z) if self.offset_scale else moved


class WeightDraws(nn.Module):
    """Draws of the nonlinear network, one set of weights each.

    Evaluated at once, all draws hold their activations side by side; ``chunk_size``
    bounds how many do.

    Args:
        net: The network.
        weights: ``s x p``.
        chunk_size: Draws evaluated at once; default all. May be set later.
    """

    def __init__(
        self, net: FunctionalNet, weights: Tensor, chunk_size: int | None = None
    ) -> None:
        super().__init__()
        if chunk_size is not None:
            check_count(chunk_size=chunk_size)
        self.net, self.chunk_size = net, chunk_size
        self.register_buffer("weights", weights)
        # Of batch norm: the buffers that hold them.
        self._statistics: dict[str, str] = {}

    @property
    def statistics(self) -> Params:
        """Buffers of the network that each draw has of its own, ``s x ...``."""
        return {name: getattr(self, held) for name, held in self._statistics.items()}

    @statistics.setter
    def statistics(self, values: Params) -> None:
        self._statistics = {name: own_buffer(name) for name in values}
        for name, held in self._statistics.items():
            self.register_buffer(held, values[name])

    @property
    def num_samples(self) -> int:
        """The number s of functions."""
        return len(self.weights)

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate all draws, ``... x n x d`` to ``s x ... x n x m``.

        Raises:
            TypeError: If the network does not return one tensor.
            ShapeError: If the inputs do not fit the network.
        """  # noqa: DOC502
        return self._in_chunks(X, None)

    def each(self, X: Tensor) -> Tensor:
        """Evaluate each draw at inputs of its own, ``s x ... x n x d`` likewise."""
        _check_own_inputs(X, self.num_samples)
        return self._in_chunks(X, 0)

    def take(self, samples: Tensor) -> WeightDraws:
        """Some of the functions, by number."""
        samples = samples.to(self.weights.device)
        some = WeightDraws(self.net, self.weights[samples], self.chunk_size)
        some.statistics = {name: v[samples] for name, v in self.statistics.items()}
        return some

    def _in_chunks(self, X: Tensor, dim: int | None) -> Tensor:
        net, Z = self.net, X.to(self.net.dtype)
        params = net.unflatten(self.weights.to(Z))
        for name, value in self.statistics.items():
            params[name] = value.to(Z) if value.is_floating_point() else value
        s = len(self.weights)
        size = s if self.chunk_size is None else self.chunk_size
        try:
            parts = [
                self._evaluate(
                    {k: v[i : i + size] for k, v in params.items()},
                    Z if dim is None else Z[i : i + size],
                    dim,
                )
                for i in range(0, s, size)
            ]
        except Exception as error:
            explain_failure(net, Z if dim is None else Z[0])
            # Nobody may have asked the probe yet.
            if not net.vectorized or type(error) is not RuntimeError:
                raise
            warn_looped(error)
            net.vectorized = False
            return self._in_chunks(X, dim)
        return torch.cat(parts).to(X.dtype)

    def extra_repr(self) -> str:
        """How many draws, and what each has of its own."""
        own = ", own batch-norm statistics" if self.statistics else ""
        return f"num_draws={len(self.weights)}{own}"

    def _evaluate(self, params: Params, Z: Tensor, dim: int | None) -> Tensor:
        net, s = self.net, len(next(iter(params.values())))
        chain = stack_chain(net)
        if chain is not None:
            shape = Z.shape[:-1] if dim is None else Z.shape[1:-1]
            rows = Z.reshape(-1, Z.shape[-1]) if dim is None else Z.flatten(1, -2)
            values = chain(params, rows.expand(s, -1, -1))
            return values.reshape(s, *shape, values.shape[-1])
        if net.vectorized:
            return torch.func.vmap(net.apply_network, in_dims=(0, dim))(params, Z)
        each = ({k: v[i] for k, v in params.items()} for i in range(s))
        inputs = [Z] * s if dim is None else Z
        pairs = zip(each, inputs, strict=True)
        return torch.stack([net.apply_network(own, z) for own, z in pairs])


def own_buffer(name: str) -> str:
    """Under which name a tensor of the network is kept beside it, one row per draw."""
    return "own_" + name.replace(".", "__")


class JoinedDraws(nn.Module):
    """Draws of several kinds, one after the other.

    Args:
        parts: Functions of X with outputs of one width.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate all draws, ``... x n x d`` to ``s x ... x n x m``."""
        return torch.cat([part(X) for part in self.parts])

    @property
    def num_samples(self) -> int:
        """The number s of functions."""
        return sum(part.num_samples for part in self.parts)

    def each(self, X: Tensor) -> Tensor:
        """Evaluate each draw at inputs of its own, ``s x ... x n x d`` likewise."""
        _check_own_inputs(X, self.num_samples)
        inputs = X.split([part.num_samples for part in self.parts])
        pairs = zip(self.parts, inputs, strict=True)
        return torch.cat([at_own_inputs(part, Z) for part, Z in pairs])


def at_own_inputs(draws: FunctionDraws, X: Tensor) -> Tensor:
    """Values of each draw at inputs of its own, ``s x ... x n x d``.

    Draws without a method ``each`` are evaluated one after the other, all of them each
    time, which costs s times as much.
    """
    if hasattr(draws, "each"):
        return draws.each(X)
    return torch.stack([draws(x)[i] for i, x in enumerate(X)])


def _check_own_inputs(X: Tensor, num_samples: int) -> None:
    if X.dim() < 3 or len(X) != num_samples:
        raise ShapeError(
            f"X must be ``{num_samples} x ... x n x d``, the inputs of each of the "
            f"{num_samples} functions, but has shape {tuple(X.shape)}. For the same "
            "inputs for all, call the draws."
        )
