"""The posterior of one data set as the prior of the next.

In: a fitted model with a curvature structure. Out: the Gaussian over its weights, under
which a network is trained further and which ``LinearizedGP(..., previous=...)`` takes.
"""

from __future__ import annotations

import torch

from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.structured_weights import StructuredWeights
from gpbridge.linearized.structures import Structure


@torch.no_grad()
def weight_posterior(model: LinearizedGP) -> StructuredWeights:
    r"""The Gaussian posterior of a structured model over the weights of its network.

    Its mean is that of the linear model, or the trained weights where the network's
    output is the mean. It includes what came with ``previous``.

    Args:
        model: A model with a curvature structure as its inference.

    Returns:
        The Gaussian.

    Raises:
        TypeError: If the inference is no structure.
        ValueError: If the prior is a g-prior, whose scales are those of its data.
        NotImplementedError: If the model was conditioned on further observations, or
            the mean is that of a linear model without offset.

    Example:
        >>> from gpbridge.linearized import Diagonal
        >>> X = torch.linspace(0, 1, 20)[:, None]
        >>> net = torch.nn.Linear(1, 1)
        >>> first = LinearizedGP(net, X, 2 * X, inference=Diagonal())
        >>> prior = weight_posterior(first)  # and train net further under it
        >>> second = LinearizedGP(
        ...     net, X + 1, 2 * X + 2, inference=Diagonal(), previous=prior)
        >>> bool((second.posterior(X).variance < first.posterior(X).variance).all())
        True
    """
    if not isinstance(model.inference, Structure):
        raise TypeError(
            "A posterior over weights needs a curvature structure, but inference is "
            f"{type(model.inference).__name__}. Pass inference=Kronecker(), Diagonal() "
            "or LowRank(...)."
        )
    if model.g_prior:
        raise ValueError(
            "g_prior scales each weight by the data of this model, which the next data "
            "do not share. Pass g_prior=False."
        )
    model.check_all_data_is_training_data("The posterior over weights")
    if model.mean == "linear_model" and not model.offset:
        raise NotImplementedError(
            "The weights of a linear model without offset are not those of the "
            "network. Build the model with mean='network', or with Gaussian noise and "
            "offset=True."
        )
    posterior, problem, net = model._conditioned(), model.problem, model.functional
    mean = net.flatten(net.params).double()
    variance = model.prior_variance.double()
    if posterior.weights is not None:
        change = posterior.weights * problem.expand(variance.sqrt())
        mean = mean + change
    numbers = torch.arange(len(problem.groups), device=mean.device)
    return StructuredWeights(
        {name: value.shape for name, value in net.params.items()},
        mean,
        variance,
        problem.expand(numbers.double()).long(),
        problem.total_curvature(),
        net.entries,
    )
