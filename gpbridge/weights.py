r"""Distributions over the weights of a network, seen as distributions over functions.

Each satisfies :class:`~gpbridge.types.WeightPosterior`: :meth:`draw` freezes functions.
They say nothing of how they were found: SWAG, variational inference and Laplace give
:class:`GaussianWeights`; snapshots, ensembles and Markov chains
:class:`EmpiricalWeights`; several runs of any of them :class:`MixtureWeights`.

In: a functional network, moments or samples of its weights. Out: draws, a covariance as
a linear operator, densities. Next: ``dnn`` makes them, ``surrogates`` uses them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from linear_operator.operators import (
    DiagLinearOperator,
    LinearOperator,
    LowRankRootLinearOperator,
    ZeroLinearOperator,
)
from torch import Generator, Tensor, nn

from gpbridge.checks import ShapeError, check_finite, check_positive, check_tensor
from gpbridge.draws import JoinedDraws, WeightDraws, own_buffer
from gpbridge.functional import FunctionalNet
from gpbridge.randomness import fresh, standard_normal
from gpbridge.types import FunctionDraws, Params, WeightPosterior


class Drawable(nn.Module):
    """A posterior as a module: functions are drawn of it, it is none itself."""

    def forward(self, *args: object, **kwargs: object) -> NoReturn:
        """Not possible; the error says what is.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{type(self).__name__} is a distribution over functions, not one of them. "
            "Draw functions, .draw(num_samples)(X), or pass it to "
            "gpbridge.function_space.FunctionSpace or "
            "gpbridge.surrogates.WeightSpaceModel."
        )


class GaussianWeights(Drawable):
    r"""Weights :math:`w \sim N(m, \mathrm{diag}(v) + U U^\top)` of a network.

    Memory (k + 2) p; a draw costs k p and a pass through the network.

    Args:
        net: The network as a function of its random weights.
        mean: m, ``p``.
        variance: v, ``p``; none for no diagonal part.
        root: U, ``p x k``; none for no low-rank part.

    Raises:
        ShapeError: If a tensor does not fit the p weights.
        ValueError: If a variance is negative.

    Example:
        >>> net = FunctionalNet(nn.Linear(2, 1))
        >>> weights = GaussianWeights(net, torch.zeros(3), variance=torch.ones(3))
        >>> weights.draw(5)(torch.zeros(4, 2)).shape
        torch.Size([5, 4, 1])
    """

    def __init__(
        self,
        net: FunctionalNet,
        mean: Tensor,
        variance: Tensor | None = None,
        root: Tensor | None = None,
    ) -> None:
        super().__init__()
        p = net.num_params
        _check_weights("mean", mean, (p,))
        if variance is not None:
            _check_weights("variance", variance, (p,))
            if bool((variance < 0).any()):
                raise ValueError(
                    "variance must be at least zero, but is as low as "
                    f"{variance.min().item():.3g}. Standard deviations are squared."
                )
        if root is not None:
            _check_weights("root", root, (p, *root.shape[1:2]))
        self.net = net
        self.register_buffer("mean", _copied(mean))
        self.register_buffer("variance", _copied(variance))
        self.register_buffer("root", _copied(root))

    def extra_repr(self) -> str:
        """Which parts the covariance has, and the size of a standard deviation."""
        rank = 0 if self.root is None else self.root.shape[-1]
        variances = torch.zeros_like(self.mean)
        if self.variance is not None:
            variances = variances + self.variance
        if rank:
            variances = variances + self.root.square().sum(-1)
        std = variances.mean().sqrt().item()
        diagonal = self.variance is not None
        return f"p={len(self.mean)}, diagonal={diagonal}, rank={rank}, std={std:.3g}"

    @property
    def covariance(self) -> LinearOperator:
        """Covariance of the weights, ``p x p``, never formed."""
        p, like = len(self.mean), {"dtype": self.mean.dtype, "device": self.mean.device}
        parts = []
        if self.root is not None and self.root.shape[-1]:
            parts.append(LowRankRootLinearOperator(self.root))
        if self.variance is not None:
            parts.append(DiagLinearOperator(self.variance))
        if not parts:
            return ZeroLinearOperator(p, p, **like)
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def log_prob(self, weights: Tensor) -> Tensor:
        r"""Log density in nats, by the matrix inversion and determinant lemmas.

        With :math:`A = I_k + U^\top V^{-1} U = L L^\top` and :math:`r = w - m`,

        .. math::
            -2 \log p = r^\top V^{-1} r - \|L^{-1} U^\top V^{-1} r\|^2
            + \sum \log v + 2 \sum \log L_{ii} + p \log 2 \pi .

        Costs k^2 p + k^3.

        Args:
            weights: ``... x p``.

        Returns:
            Log densities ``...``.

        Raises:
            ValueError: If a direction has no variance, so that there is no density.
        """
        if self.variance is None or not bool((self.variance > 0).all()):
            raise ValueError(
                "Weights without variance in some directions have no density. Give "
                "every weight a positive variance."
            )
        r = (weights - self.mean).double()
        v = self.variance.double()
        quadratic = (r.square() / v).sum(-1)
        log_det = v.log().sum()
        if self.root is not None and self.root.shape[-1]:
            U = self.root.double()
            scaled = U / v[:, None]
            A = U.mT @ scaled + torch.eye(U.shape[-1]).to(U)
            L = torch.linalg.cholesky(A)
            seen = torch.linalg.solve_triangular(
                L, (r @ scaled)[..., None], upper=False
            )
            quadratic = quadratic - seen.square().sum((-2, -1))
            log_det = log_det + 2 * L.diagonal().log().sum()
        total = quadratic + log_det + len(v) * math.log(2 * math.pi)
        return (-0.5 * total).to(weights)

    def temper(self, scale: float) -> GaussianWeights:
        """The same mean with ``scale`` times the covariance."""
        check_positive(scale=scale)
        variance = None if self.variance is None else scale * self.variance
        root = None if self.root is None else scale**0.5 * self.root
        # A network of its own: moving one posterior must not move the other's.
        net = copy.deepcopy(self.net)
        return GaussianWeights(net, self.mean, variance, root)

    def sample_weights(
        self, num_samples: int, generator: Generator | None = None
    ) -> Tensor:
        """Draws of the weights, ``s x p``."""
        check_positive(num_samples=num_samples)
        generator = fresh(generator, self.mean.device)
        weights = self.mean.expand(num_samples, -1)
        if self.variance is not None:
            noise = standard_normal(weights.shape, generator, self.mean)
            weights = weights + self.variance.sqrt() * noise
        if self.root is not None:
            shape = num_samples, self.root.shape[-1]
            noise = standard_normal(shape, generator, self.mean)
            weights = weights + noise @ self.root.mT
        return weights.contiguous()

    def draw(self, num_samples: int, generator: Generator | None = None) -> WeightDraws:
        """Freeze functions of the nonlinear network at draws of the weights."""
        return WeightDraws(self.net, self.sample_weights(num_samples, generator))


class EmpiricalWeights(Drawable):
    """A finite set of weights, equally likely.

    Args:
        net: The network as a function of its random weights.
        weights: One row per member, ``s x p``.
        statistics: Other tensors of the network that each member has of its own, by
            name ``s x shape``: batch-norm statistics, frozen weights.

    Raises:
        ShapeError: If a row does not have p weights, or there is none, or statistics do
            not have one row for each member.
    """

    def __init__(
        self, net: FunctionalNet, weights: Tensor, statistics: Params | None = None
    ) -> None:
        super().__init__()
        _check_weights("weights", weights, (*weights.shape[:1], net.num_params))
        if not len(weights):
            raise ShapeError("weights must have at least one row, but has none.")
        self.net = net
        self.register_buffer("weights", _copied(weights))
        self._held = {name: own_buffer(name) for name in statistics or {}}
        for name, held in self._held.items():
            if len(statistics[name]) != len(weights):
                raise ShapeError(
                    f"statistics[{name!r}] must have one row for each of the "
                    f"{len(weights)} members, but has {len(statistics[name])}."
                )
            self.register_buffer(held, _copied(statistics[name]))

    def extra_repr(self) -> str:
        """How many members, and whether they have more of their own than weights."""
        own = f", own tensors: {len(self._held)}" if self._held else ""
        return f"num_members={self.num_members}{own}"

    @property
    def num_members(self) -> int:
        """The number s of members."""
        return len(self.weights)

    def draw(
        self, num_samples: int | None = None, generator: Generator | None = None
    ) -> WeightDraws:
        """Freeze members as functions.

        Args:
            num_samples: How many; default every member once, in order. Up to s they
                are distinct, beyond that every member comes as often as any other, up
                to one.
            generator: Source of the choice.

        Returns:
            The functions.
        """
        if num_samples is None:
            return self.members(torch.arange(self.num_members))
        return self.members(even_choice(num_samples, self.num_members, generator))

    def members(self, numbers: Tensor) -> WeightDraws:
        """Freeze the members of these numbers, in this order."""
        numbers = numbers.to(self.weights.device)
        draws = WeightDraws(self.net, self.weights[numbers])
        draws.statistics = {
            name: getattr(self, held)[numbers] for name, held in self._held.items()
        }
        return draws


class MixtureWeights(Drawable):
    """Several posteriors of one or of several networks, equally likely.

    Predictive densities are mixed, not moments: a draw comes from one of the parts.

    Args:
        parts: Posteriors with a ``draw``.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, parts: Sequence[WeightPosterior]) -> None:
        super().__init__()
        parts = list(parts)
        if not parts:
            raise ValueError("parts must hold at least one posterior, but is empty.")
        self.parts = nn.ModuleList(parts)

    def extra_repr(self) -> str:
        """How many parts."""
        return f"num_parts={len(self.parts)}"

    def draw(self, num_samples: int, generator: Generator | None = None) -> JoinedDraws:
        """Freeze functions, as many of each part as of any other, up to one."""
        generator = fresh(generator)
        chosen = even_choice(num_samples, len(self.parts), generator)
        counts = torch.bincount(chosen, minlength=len(self.parts)).tolist()
        draws: list[FunctionDraws] = [
            part.draw(count, generator)
            for part, count in zip(self.parts, counts, strict=True)
            if count
        ]
        return JoinedDraws(draws)


def even_choice(
    num_samples: int, num_members: int, generator: Generator | None
) -> Tensor:
    """Numbers of members, each as often as any other, up to one.

    Args:
        num_samples: How many numbers.
        num_members: How many members there are.
        generator: Source of the choice.

    Returns:
        The numbers, on the CPU.
    """
    check_positive(num_samples=num_samples)
    generator = fresh(generator)
    rounds = -(-num_samples // num_members)
    orders = [
        torch.randperm(num_members, generator=generator, device=generator.device)
        for _ in range(rounds)
    ]
    return torch.cat(orders)[:num_samples].cpu()


def _check_weights(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(**{name: value})
    if tuple(value.shape) != shape:
        wanted = " x ".join(map(str, shape))
        raise ShapeError(
            f"{name} must be ``{wanted}`` for a network of these random weights, but "
            f"has shape {tuple(value.shape)}."
        )
    check_finite(**{name: value if value.dim() > 1 else value[:, None]})


def _copied(value: Tensor | None) -> Tensor | None:
    # A state that is loaded is written in place: never into another's tensor.
    return None if value is None else value.detach().clone()
