r"""Fisher embeddings: what a label would tell about the weights, as a few vectors.

In: a linearised network and a pool. Out: for each point the rows
:math:`V = R^\top J \Sigma^{1/2}` with the root R of the likelihood's output Hessian and
the posterior covariance :math:`\Sigma` of the weights, so that :math:`V^\top V` is the
Fisher information of the point in units in which the data so far count as the identity.
Next: ``bait`` chooses points by them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpbridge.checks import ShapeError, check_finite, check_inputs, check_tensor
from gpbridge.likelihoods import hessian_root
from gpbridge.linearized.factored import FactoredStrategy
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.inference import Exact
from gpbridge.prediction import WeightSpaceStrategy


@torch.no_grad()
def fisher_embeddings(model: LinearizedGP, X: Tensor) -> Tensor:
    r"""Fisher embeddings of a pool under the posterior of a linearised network.

    The Gram matrix of the rows is :math:`R^\top \Sigma_f R` with the joint posterior
    covariance of the outputs, exactly so with ``Exact``, and as the structure has it
    with ``Kronecker`` or ``Diagonal``. Time and memory of the features, n m p, plus
    for ``Exact`` one decomposition of those of the l training points,
    l m p min(p, l m): never p x p where there are fewer training rows.

    Args:
        model: The model; ``parameters="last_layer"`` keeps p small.
        X: The pool, ``n x d``.

    Returns:
        ``n x m x p`` in float64.

    Raises:
        NotImplementedError: If the posterior of the model has no root of p columns.
        ShapeError: If the pool is no matrix.

    References:
        Ash, Goel, Krishnamurthy, Kakade, Gone fishing: neural active learning with
        Fisher embeddings, NeurIPS 2021, section 3. There the last layer, by gradients
        at each possible label; here R, which gives the same matrix with any likelihood.
    """
    check_inputs(X, "X", model._train_X.shape[-1])
    if X.dim() != 2:
        raise ShapeError(f"X must be ``n x d``, but has shape {tuple(X.shape)}.")
    model.eval()
    model.check_all_data_is_training_data("The Fisher embedding")
    problem, prior_variance = model.problem, model.prior_variance.detach()
    std = problem.feature_std(prior_variance)
    Z = model.transform_inputs(X).to(problem.net.dtype)
    features = problem.features(Z, std)
    root = hessian_root(model.likelihood, features.value.double())
    strategy = problem.strategy(prior_variance)
    if isinstance(strategy, FactoredStrategy | WeightSpaceStrategy):
        return _rooted(root, strategy.project(features).factor)
    if isinstance(model.inference, Exact):
        rows = _rooted(root, features.rows().double())
        seen = problem.features(problem.X, std)
        seen = _rooted(problem.root().double(), seen.rows().double())
        return whitened(rows, seen)
    raise NotImplementedError(
        f"Fisher embeddings need a root of the weights' covariance, which "
        f"{type(model.inference).__name__} does not have. Build the model with "
        "inference=Exact(), Kronecker() or Diagonal()."
    )


def whitened(rows: Tensor, labelled: Tensor, precision: float = 1.0) -> Tensor:
    r"""Rows in the units in which prior and labelled points count as the identity.

    .. math:: V (\lambda I + V_0^\top V_0)^{-1/2}

    By the singular vectors of the labelled rows. Cost n m p r + l m p r for their
    number r = min(p, l m).

    Args:
        rows: Embeddings of a pool, ``n x m x p``.
        labelled: Those of labelled points, ``l x m x p``.
        precision: The prior precision.

    Returns:
        ``n x m x p``.

    Raises:
        ShapeError: If the widths differ.
    """
    check_tensor(labelled=labelled)
    if labelled.dim() != 3 or labelled.shape[-1] != rows.shape[-1]:
        raise ShapeError(
            f"labelled must be ``l x m x {rows.shape[-1]}`` as the pool is, but has "
            f"shape {tuple(labelled.shape)}."
        )
    check_finite(labelled=labelled)
    scaled = rows / precision**0.5
    seen = labelled.flatten(0, 1)
    if len(seen) > seen.shape[-1]:
        seen = torch.linalg.qr(seen, mode="r").R
    _, s, Q = torch.linalg.svd(seen, full_matrices=False)
    shrink = (1 + s.square() / precision).rsqrt() - 1
    return scaled + (scaled @ Q.mT * shrink) @ Q


def _rooted(root: Tensor, rows: Tensor) -> Tensor:
    """R' Phi of each point, from ``n x m x m`` and ``(n m) x p``."""
    return root.mT @ rows.unflatten(0, root.shape[:2])
