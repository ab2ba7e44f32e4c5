r"""The g-prior: a scale for each weight by the size of its feature on the data.

.. math::
    s_i = d_i^{-1/2}, \qquad d_i = \Big( \sum_n J_n^\top R_n R_n^\top J_n \Big)_{ii}

with R = I for Gaussian noise, one size of which the prior variance absorbs (noise that
differs by point does not weigh the points here). Predictions then
do not depend on the scale of weights in front of a normalisation, which changes
nothing.

In: a network, inputs, a likelihood. Out: the scales. Next: ``gp`` keeps them with the
network.

References:
    Antorán, Janz, Allingham, Daxberger, Barbano, Nalisnick, Hernández-Lobato, Adapting
    the linearised Laplace model evidence for modern deep learning, ICML 2022, section
    4. Antorán, Padhy, Barbano, Nalisnick, Janz, Hernández-Lobato, Sampling-based
    inference for large linear models, with application to linearised Laplace, ICLR
    2023, section 4.
"""

from __future__ import annotations

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor

from gpbridge.checks import check_memory
from gpbridge.features import DenseFeatures, TangentFeatures
from gpbridge.functional import FunctionalNet
from gpbridge.layer_gram import tangent_features
from gpbridge.layer_signals import outer_products
from gpbridge.likelihoods import hessian_root, is_gaussian
from gpbridge.operators import JacobianOperator

_CHUNK_BYTES = 64 * 2**20  # features and Jacobians of one chunk of points
_MOST_POINTS = 1024  # of a chunk
_GROUPS = 64  # of points, at least: an estimate averages over them
_PROBED_POINTS = 64  # that one backward pass of an estimate sums over, at most
_DEAD = 1e-20  # squared size of a feature, of the largest, below which it is dead


@torch.no_grad()
def feature_scale(
    net: FunctionalNet,
    Z: Tensor,
    likelihood: Likelihood,
    g_prior: bool | int,
    memory_budget: float,
) -> Tensor:
    """Scale of each weight under a g-prior, ``p``.

    Weights whose feature vanishes on the data get scale 0: dividing by a small floor
    would make them the largest.

    Args:
        net: The network, probed.
        Z: Inputs ``n x d``.
        likelihood: Of the targets.
        g_prior: True for exact sums, or the number of probes.
        memory_budget: Bytes for the features of one point in exact sums.

    Returns:
        The scales in the dtype of the network.

    Raises:
        MemoryError: If exact sums need more than the budget.
    """
    total = feature_squares(net, Z, likelihood, g_prior, memory_budget)
    alive = total > _DEAD * total.max()
    tiny = torch.finfo(total.dtype).tiny
    return torch.where(alive, total.clamp_min(tiny).rsqrt(), 0.0).to(net.dtype)


@torch.no_grad()
def feature_squares(
    net: FunctionalNet,
    Z: Tensor,
    likelihood: Likelihood | None,
    g_prior: bool | int,
    memory_budget: float,
) -> Tensor:
    """The diagonal d, ``p``, float64, in the way that the option asks for.

    Args:
        net: The network, probed.
        Z: Inputs ``n x d``.
        likelihood: Of the targets; None for R = I.
        g_prior: The number of probes; exact sums for True and False.
        memory_budget: Bytes for the features of one point in exact sums.

    Returns:
        The sums of squares, or their estimate.
    """
    Z = Z.to(net.dtype)
    if isinstance(g_prior, bool):
        return exact_squares(net, Z, likelihood, memory_budget)
    generator = torch.Generator().manual_seed(0)
    return probed_squares(net, Z, likelihood, g_prior, generator)


def check_g_prior(g_prior: bool | int) -> None:
    """Require a flag, or a number of probes.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(g_prior, bool):
        return
    if not isinstance(g_prior, int) or g_prior < 1:
        raise ValueError(
            "g_prior must be True, False, or a number of probes of at least 1, but is "
            f"{g_prior!r}."
        )


def exact_squares(
    net: FunctionalNet,
    Z: Tensor,
    likelihood: Likelihood | None,
    memory_budget: float,
) -> Tensor:
    r"""The diagonal d, ``p``, float64, from the features of every point.

    m backward passes per point. A linear layer needs no per-point Jacobian: with
    signals :math:`\delta` and inputs a, the squares of a point are those of its signals
    times those of its inputs. Memory is that of one chunk of points.

    Args:
        net: The network, probed.
        Z: Inputs ``n x d`` of the network's dtype.
        likelihood: Of the targets; None for R = I.
        memory_budget: Bytes for the features of one point.

    Returns:
        The sums of squares.

    Raises:
        MemoryError: If the features of one point are beyond the budget.
    """
    one = {name: Z.new_ones(()) for name in net.params}
    per_point = _bytes_per_point(net, Z, one)
    check_memory(
        f"A g-prior by exact sums, for {net.num_outputs} outputs and "
        f"{net.num_params} random weights,",
        per_point,
        memory_budget,
        "Estimate it by probes, for example g_prior=32.",
    )
    step = int(max(1, min(_CHUNK_BYTES // per_point, _MOST_POINTS)))
    total = Z.new_zeros(net.num_params, dtype=torch.float64)
    for x in Z.split(step):
        features = tangent_features(net, x, one)
        total += _squares(features, _root(likelihood, features.value))
    return total


def probed_squares(
    net: FunctionalNet,
    Z: Tensor,
    likelihood: Likelihood | None,
    num_probes: int,
    generator: torch.Generator,
) -> Tensor:
    r"""An unbiased estimate of the diagonal d, ``p``, float64.

    With independent random signs :math:`\xi` and groups c of points,

    .. math::
        \hat d_i = \frac1K \sum_k \sum_c
        \Big( \sum_{n \in c} J_n^\top R_n \xi_{nk} \Big)_i^2,

    since the products of different points have mean zero. K backward passes per point
    for any number of outputs; memory is a few times p numbers, and workspace.
    The relative standard deviation is :math:`\sqrt{2 / K}` divided by the root of the
    number of groups that matter; there are at least min(n, 64).

    Args:
        net: The network, probed.
        Z: Inputs ``n x d`` of the network's dtype.
        likelihood: Of the targets; None for R = I.
        num_probes: The number K.
        generator: Source of the signs.

    Returns:
        The estimate, exactly zero where every feature is.
    """
    step = max(1, min(_PROBED_POINTS, len(Z) // _GROUPS))
    together = max(1, min(num_probes, _CHUNK_BYTES // (8 * net.num_params)))
    total = Z.new_zeros(net.num_params, dtype=torch.float64)
    for x in Z.split(step):
        root = _root(likelihood, net(x))
        J = JacobianOperator(x, net=net)
        for start in range(0, num_probes, together):
            columns = min(together, num_probes - start)
            shape = len(x), net.num_outputs, columns
            u = (torch.randint(2, shape, generator=generator) * 2 - 1).to(x)
            if root is not None:
                u = (root @ u.double()).to(x)
            total += J._t_matmul(u.flatten(0, 1)).double().square().sum(1)
    return total / num_probes


def _root(likelihood: Likelihood | None, values: Tensor) -> Tensor | None:
    """Roots R ``n x m x m`` at the network's outputs, or None for the identity."""
    if likelihood is None or is_gaussian(likelihood):
        return None
    return hessian_root(likelihood, values.double())


def _squares(features: TangentFeatures, root: Tensor | None) -> Tensor:
    """Sums of squares of the columns of R'J over points and outputs, ``p``."""
    if isinstance(features, DenseFeatures):
        return _rotated(features.matrix, features.value, root).square().sum((0, 1))
    sources: dict[str | None, Tensor] = {
        None: _rotated(features.matrix, features.value, root).square().sum((0, 1))
    }
    for name, layer in features.layers.items():
        signal = layer.signal.double()  # n x m x T x o
        if root is not None:
            signal = torch.einsum("nij,nito->njto", root, signal)
        inputs = layer.inputs.double()  # n x T x i
        if inputs.shape[-2] == 1:
            square = signal[..., 0, :].square().sum(1)  # n x o
            found = square.mT @ inputs[:, 0].square()  # o x i
        else:
            found = outer_products(signal, inputs).square().sum((0, 1))
        sources[name] = found.flatten()
    return torch.cat([c.view(sources[c.source]).flatten() for c in features.columns])


def _rotated(matrix: Tensor, value: Tensor, root: Tensor | None) -> Tensor:
    rows = matrix.double().unflatten(0, value.shape)  # n x m x f
    return rows if root is None else root.mT @ rows


def _bytes_per_point(net: FunctionalNet, Z: Tensor, one: dict[str, Tensor]) -> float:
    """Float64 bytes that the sums need for one point, workspace included."""
    features = tangent_features(net, Z[:1], one)
    if isinstance(features, DenseFeatures):
        return 8.0 * 3 * features.matrix.numel()
    numbers = 3 * features.matrix.numel()
    for layer in features.layers.values():
        numbers += 3 * (layer.inputs.numel() + layer.signal.numel())
        if layer.inputs.shape[-2] > 1:
            m, o, i = net.num_outputs, layer.signal.shape[-1], layer.inputs.shape[-1]
            numbers += 2 * m * o * i
    return 8.0 * max(1, numbers)
