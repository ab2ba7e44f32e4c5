r"""Low-dimensional planes in the space of weights.

.. math:: w(z) = \hat w + B^\top z

with r coordinates z. Inference that is out of reach for p weights, as Markov chains on
all data, is easy for r of them.

In: a centre, and directions: random, those of a SWAG run, or those of a curve between
two modes. Out: weights as a function of coordinates, and posteriors over coordinates as
posteriors over weights. Next: ``subspace_inference`` finds such a posterior.

References:
    Izmailov, Maddox, Kirichenko, Garipov, Vetrov, Wilson, Subspace inference for
    Bayesian deep learning, UAI 2019, section 4.
"""

from __future__ import annotations

import copy

import torch
from torch import Generator, Tensor, nn

from gpbridge.checks import (
    ShapeError,
    check_count,
    check_finite,
    check_positive,
    check_tensor,
)
from gpbridge.dnn.swag import SWAG
from gpbridge.functional import FunctionalNet
from gpbridge.randomness import standard_normal
from gpbridge.weights import EmpiricalWeights, GaussianWeights


class Subspace(nn.Module):
    r"""The weights :math:`w(z) = \hat w + B^\top z` of a network.

    Args:
        net: The network as a function of its random weights.
        origin: :math:`\hat w`, ``p``.
        basis: B, one direction per row, ``r x p``; their lengths say how far a unit of
            z goes.

    Raises:
        ShapeError: If a tensor does not fit the p weights, or there is no direction.

    Example:
        >>> net = FunctionalNet(nn.Linear(2, 1))
        >>> subspace = Subspace(net, torch.zeros(3), torch.eye(3)[:2])
        >>> subspace.weights(torch.tensor([1.0, 2.0]))
        tensor([1., 2., 0.])
    """

    def __init__(self, net: FunctionalNet, origin: Tensor, basis: Tensor) -> None:
        super().__init__()
        p = net.num_params
        _check_vectors(p, origin=origin)
        check_tensor(basis=basis)
        if basis.dim() != 2 or basis.shape[1] != p or not len(basis):
            raise ShapeError(
                f"basis must be ``r x {p}``, a row of weights per direction, but has "
                f"shape {tuple(basis.shape)}."
            )
        check_finite(basis=basis)
        self.net = net
        self.register_buffer("origin", origin.detach().clone())
        self.register_buffer("basis", basis.detach().clone())

    @classmethod
    def random(
        cls,
        net: FunctionalNet | nn.Module,
        origin: Tensor | None,
        dim: int,
        *,
        orthonormal: bool = True,
        length: float = 1.0,
        generator: Generator | None = None,
    ) -> Subspace:
        """Directions drawn uniformly.

        Args:
            net: The network; of a plain module all weights that require gradients.
            origin: The centre, ``p``, as the mean of a run of SWA; None for the
                network's own weights.
            dim: The number r of directions.
            orthonormal: Whether to make the directions orthogonal, which for r far
                below p they nearly are.
            length: Of every direction.
            generator: Source of randomness.

        Returns:
            The subspace.

        Raises:
            ValueError: If there are more directions than weights.
            TypeError: If the network is none.
        """
        check_count(dim=dim)
        check_positive(length=length)
        if not isinstance(net, nn.Module):
            raise TypeError(
                f"net must be a network, but is {type(net).__name__}. Pass a module or "
                "a FunctionalNet."
            )
        net = net if isinstance(net, FunctionalNet) else FunctionalNet(net)
        if dim > net.num_params:
            raise ValueError(
                f"dim must be at most the number of random weights, {net.num_params}, "
                f"but is {dim}."
            )
        if origin is None:
            origin = net.flatten(net.params).detach()
        basis = standard_normal((dim, net.num_params), generator, origin)
        if orthonormal:
            basis = torch.linalg.qr(basis.mT).Q.mT
        return cls(net, origin, length * basis / basis.norm(dim=1, keepdim=True))

    @classmethod
    def pca(cls, tracker: SWAG, dim: int | None = None) -> Subspace:
        r"""Principal directions of the weights along a run, around their mean.

        With the singular values of the deviations
        :math:`D / \sqrt{k - 1} = P S V^\top`, the rows of B are :math:`s_i v_i`:
        standard normal z have the covariance of the low-rank part of SWAG at scale one,
        and with all k directions exactly so. Costs k^2 p.

        Args:
            tracker: The moments of the run.
            dim: The number r of directions, the largest first; default all k.

        Returns:
            The subspace. Running centring makes the very first deviation zero, and
            deviations from the final mean sum to zero: until more snapshots come, the
            last of k directions then has length zero, and z moves nothing along it.

        Raises:
            TypeError: If it is no tracker.
            RuntimeError: If there are fewer than two snapshots.
            ValueError: If there are fewer deviations than directions.
        """
        if not isinstance(tracker, SWAG):
            raise TypeError(
                "tracker must be a SWAG, whose deviations are the directions, but is a "
                f"{type(tracker).__name__}. Of a posterior pass the tracker that it is "
                "made of."
            )
        deviations = tracker.deviations
        k = len(deviations)
        dim = k if dim is None else dim
        check_count(dim=dim)
        if dim > k:
            raise ValueError(
                f"dim must be at most the number of deviations, but is {dim} and the "
                f"tracker has {k} (of a rank of {tracker.rank}). Lower dim, or take "
                "more snapshots with a higher rank."
            )
        _, lengths, directions = torch.linalg.svd(
            deviations / (k - 1) ** 0.5, full_matrices=False
        )
        basis = lengths[:dim, None] * directions[:dim]
        return cls(tracker.own_net(), tracker.mean, basis)

    @classmethod
    def curve(
        cls, net: FunctionalNet, start: Tensor, end: Tensor, control: Tensor
    ) -> Subspace:
        r"""The plane of a quadratic Bezier curve between two modes.

        Through :math:`w_0`, :math:`w_2` and the middle of the curve,
        :math:`w_1 = \tfrac14 (w_0 + w_2) + \tfrac12 \theta`, around their mean, with
        :math:`u = (w_2 - w_0) / \sqrt 3` and v two thirds of the part of
        :math:`w_1 - w_0` orthogonal to u.

        Args:
            net: The network.
            start: Weights of one mode, ``p``.
            end: Weights of the other, ``p``.
            control: The trained control point :math:`\theta`, ``p``.

        Returns:
            The subspace, of two directions.

        Raises:
            ValueError: If the three points lie on a line.
        """
        _check_vectors(net.num_params, start=start, end=end, control=control)
        middle = (start + end) / 4 + control / 2
        u = (end - start) / 3**0.5
        rise = middle - start
        v = rise - (rise @ u) / (u @ u).clamp_min(torch.finfo(u.dtype).tiny) * u
        if not u.norm() > 0 or not v.norm() > 1e-6 * rise.norm():
            raise ValueError(
                "The start, the end and the control point of the curve lie on a line, "
                "which spans no plane. Train the curve first, or take another basis."
            )
        origin = (start + middle + end) / 3
        return cls(net, origin, torch.stack([u, v / 1.5]))

    @property
    def dim(self) -> int:
        """The number r of coordinates."""
        return len(self.basis)

    def weights(self, z: Tensor) -> Tensor:
        """Weights at coordinates, ``... x r`` to ``... x p``; costs r p each."""
        check_tensor(z=z)
        if z.shape[-1:] != (self.dim,):
            raise ShapeError(
                f"z must be ``... x {self.dim}`` coordinates, but has shape "
                f"{tuple(z.shape)}."
            )
        return self.origin + z.to(self.basis) @ self.basis

    def coordinates(self, weights: Tensor) -> Tensor:
        """Those of the nearest points of the subspace, ``... x p`` to ``... x r``."""
        inverse = torch.linalg.pinv(self.basis @ self.basis.mT, hermitian=True)
        return (weights - self.origin) @ self.basis.mT @ inverse

    def posterior_of(self, samples: Tensor) -> EmpiricalWeights:
        """Draws of coordinates, ``... x r``, as equally likely weights."""
        weights = self.weights(samples)
        weights = weights.reshape(-1, weights.shape[-1])
        return EmpiricalWeights(copy.deepcopy(self.net), weights)

    def gaussian_of(self, mean: Tensor, root: Tensor | None = None) -> GaussianWeights:
        r"""Coordinates :math:`z \sim N(m, L L^\top)` as a Gaussian of low rank.

        Args:
            mean: m, ``r``.
            root: L, ``r x k``, or a vector ``r`` of standard deviations; default unit
                variances.

        Returns:
            Weights with mean w(m) and root :math:`B^\top L`.
        """
        if root is None:
            root = torch.ones_like(mean)
        wide = root[:, None] * self.basis if root.dim() == 1 else root.mT @ self.basis
        return GaussianWeights(
            copy.deepcopy(self.net), self.weights(mean), root=wide.mT
        )

    def extra_repr(self) -> str:
        """How many directions of how many weights."""
        return f"{self.dim} directions of {self.basis.shape[1]} weights"


def _check_vectors(p: int, **values: Tensor) -> None:
    check_tensor(**values)
    for name, value in values.items():
        if tuple(value.shape) != (p,):
            raise ShapeError(
                f"{name} must be ``{p}`` for a network of these random weights, but "
                f"has shape {tuple(value.shape)}."
            )
        check_finite(**{name: value[:, None]})
