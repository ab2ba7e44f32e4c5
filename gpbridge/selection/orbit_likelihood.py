r"""The likelihood of an averaged network: its outputs, Jacobian and misfit on rows.

What every way to sum up the curvature
:math:`\sum_n \bar J_n^\top R_n R_n^\top \bar J_n` reads off some data, in the graph of
the augmentation's parameters.

In: an :class:`~gpbridge.selection.orbit_jacobians.OrbitNet`, a likelihood, rows of
data. Out: :class:`OrbitLikelihood`. Next: ``orbit_blocks`` and ``orbit_sums``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor

from gpbridge.likelihoods import hessian_root, is_gaussian, log_prob
from gpbridge.linearized.data_curvature import unit_roots
from gpbridge.linearized.weight_blocks import BlockJacobian
from gpbridge.selection.orbit_jacobians import OrbitNet
from gpbridge.types import Params


class OrbitData(NamedTuple):
    """Rows and targets, with base noise of each row or that of the augmentation."""

    X: Tensor
    Y: Tensor
    noise: Tensor | None = None  # n x s x k

    def take(self, rows: Tensor | slice) -> OrbitData:
        """Some of the rows."""
        noise = None if self.noise is None else self.noise[rows]
        return OrbitData(self.X[rows], self.Y[rows], noise)


class OrbitLikelihood:
    """What some data say about an averaged network at its weights.

    Args:
        net: The network on orbits.
        likelihood: Of the targets.

    Attributes:
        is_gaussian: Whether each output has a noise of its own.
        channels: How many noises there are; one for labels.
        num_groups: Of prior variances.
        device: Where it computes.
    """

    def __init__(self, net: OrbitNet, likelihood: Likelihood) -> None:
        self.net, self.likelihood = net, likelihood
        self.is_gaussian = is_gaussian(likelihood)
        self.channels = net.net.num_outputs if self.is_gaussian else 1
        self.num_groups = 1 + max(block.group for block in net.blocks)
        self.device = next(net.net.parameters()).device

    def jacobian(
        self,
        part: OrbitData,
        leaves: Params,
        roots: Callable[[Tensor], Tensor] | None = None,
        reduce: bool = False,
    ) -> tuple[Tensor, list[BlockJacobian]]:
        """Outputs ``n x m`` and rows of the rooted Jacobian; see ``OrbitNet``."""
        roots = self.roots if roots is None else roots
        return self.net.jacobian(part.X, roots, leaves, part.noise, reduce)

    def bytes_per_row(
        self, X: Tensor, num_columns: int | None = None, reduce: bool = False
    ) -> int:
        """Bytes of one row's inputs, signals and derivatives, with their graph.

        Args:
            X: Inputs, of which one row is looked at.
            num_columns: Of the root; None is all.
            reduce: Whether only signals are needed; see ``OrbitNet``.
        """
        seen = []

        def first(f: Tensor) -> Tensor:
            root = self.roots(f)
            seen.append(root.shape[-1])
            return root[..., :1]

        with torch.no_grad():
            _, J = self.jacobian(OrbitData(X[:1], X[:1]), {}, first, reduce)
        r = seen[-1] if num_columns is None else num_columns
        numbers, derivatives = 0, 0
        for part, block in zip(J, self.net.blocks, strict=True):
            if part.signal is None:
                numbers += r * part.columns.numel()
            else:
                numbers += part.inputs.numel() + r * part.signal.numel()
            derivatives += 0 if reduce else r * block.o * block.i
        # Measured: the graph holds four of each, and three float64 of a derivative,
        # whose products are formed in it.
        return 4 * numbers * self.net.net.dtype.itemsize + 24 * derivatives

    def roots(self, f: Tensor) -> Tensor:
        """Of the outputs' curvature at unit noise, ``n x m x r``."""
        return unit_roots(f) if self.is_gaussian else hessian_root(self.likelihood, f)

    def weights(self, like: Tensor, noise_variance: Tensor | None) -> Tensor:
        """Inverse noise variances, or a one for labels."""
        if noise_variance is None:
            return like.new_ones(1)
        return noise_variance.detach().reciprocal()

    def no_misfit(self) -> Tensor:
        """A zero to which the misfits of parts are added."""
        shape = (self.channels,) if self.is_gaussian else ()
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def misfit(self, value: Tensor, Y: Tensor) -> Tensor:
        """Squared residuals ``m`` of Gaussian noise; else the log likelihood."""
        if self.is_gaussian:
            return (Y - value).double().square().sum(0)
        return log_prob(self.likelihood, value.double(), Y).sum()

    def log_likelihood(
        self, value: Tensor, Y: Tensor, noise_variance: Tensor | None
    ) -> Tensor:
        """In nats, up to a constant."""
        misfit = self.misfit(value, Y)
        if noise_variance is None:
            return misfit
        return -0.5 * (misfit / noise_variance.detach()).sum()

    def squares(self) -> Tensor:
        """Squared norms of the weights of each group."""
        params = self.net.net.params
        found = [torch.zeros((), dtype=torch.float64)] * self.num_groups
        for block in self.net.blocks:
            for name in block.names:
                square = params[name].detach().double().square().sum()
                found[block.group] = found[block.group].to(square) + square
        return torch.stack(found)


def no_gradients(leaves: Params) -> Params:
    """Zeros to which the gradients of parts are added."""
    return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}


def add_gradients(gradients: Params, objective: Tensor, leaves: Params) -> None:
    """Differentiate the objective of a part of the data, and let go of its graph."""
    found = torch.autograd.grad(
        objective, list(leaves.values()), materialize_grads=True
    )
    for name, gradient in zip(leaves, found, strict=True):
        gradients[name] += gradient
