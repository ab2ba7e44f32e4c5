r"""How much a label would tell, from draws of a posterior or of its probabilities.

In: probabilities or outputs of s functions at a pool. Out: one score for each point of
the pool; ``ranking`` takes the best. What the functions disagree about can be learnt,
what each of them is unsure of cannot: ``bald`` is the first part alone, the entropy of
the averaged probabilities (:func:`gpbridge.metrics.predictive_entropy`) both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpbridge.checks import ShapeError, check_finite, check_tensor

TOLERANCE = 1e-3  # of sums of probabilities


def bald(probabilities: Tensor) -> Tensor:
    r"""Mutual information of the label of a point and the function, in nats.

    .. math::
        H\bigl[\tfrac1s \sum_i p_i\bigr] - \tfrac1s \sum_i H[p_i]
        = \tfrac1s \sum_i \mathrm{KL}\bigl(p_i \,\|\, \tfrac1s \sum_j p_j\bigr)

    Computed as the second form, which rounding cannot make negative. It is zero where
    all draws agree, however unsure they are, and at most log s.

    Args:
        probabilities: Of the classes under each draw, ``s x ... x n x C``.

    Returns:
        ``... x n``.

    Raises:
        ShapeError: If there is no draw dimension.
        ValueError: If rows are not probabilities.

    Example:
        >>> disagreeing = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> bald(disagreeing)
        tensor([0.6931])

    References:
        Houlsby, Huszár, Ghahramani, Lengyel, Bayesian active learning for
        classification and preference learning, arXiv 1112.5745, eq. (2).
    """
    _check_draws("probabilities", probabilities, "C")
    lowest = probabilities.amin()
    error = (probabilities.sum(-1) - 1).abs().amax()
    if not (lowest >= 0 and error <= TOLERANCE):
        raise ValueError(
            "probabilities must be nonnegative with sum one in the last dimension, but "
            f"their smallest entry is {float(lowest):.3g} and their sums miss one by "
            f"up to {float(error):.3g}. For logits pass logits.softmax(-1)."
        )
    mean = probabilities.mean(0)
    cross = torch.special.xlogy(probabilities, mean)
    own = torch.special.xlogy(probabilities, probabilities)
    return (own - cross).sum(-1).mean(0).clamp_min(0)


def predictive_variance(values: Tensor) -> Tensor:
    r"""Variance over the draws, summed over outputs, divided by s.

    Of logits, of probabilities, or of real outputs; in the squares of their units. For
    a Gaussian posterior there is ``model.posterior(X).variance.sum(-1)``.

    Args:
        values: Outputs of each draw, ``s x ... x n x m``.

    Returns:
        ``... x n``.

    Raises:
        ShapeError: If there is no draw dimension.

    Example:
        >>> predictive_variance(torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]]]))
        tensor([1.])
    """  # noqa: DOC502
    _check_draws("values", values, "m")
    return values.var(0, correction=0).sum(-1)


def _check_draws(name: str, values: Tensor, last: str) -> None:
    check_tensor(**{name: values})
    if values.dim() < 3 or not len(values):
        raise ShapeError(
            f"{name} must be ``s x ... x n x {last}`` with at least one draw, but has "
            f"shape {tuple(values.shape)}. For one function pass {name}[None]; it "
            "disagrees with none."
        )
    check_finite(**{name: values})
