"""Distributions of labels from latent moments, in the caller's dtype.

In: moments of the network's outputs at each point, a link. Out: a torch distribution.
Next: ``gp`` predicts labels with it.
"""

from __future__ import annotations

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from gpbridge.linearized.predictive import class_log_probabilities
from gpbridge.metrics import apply_temperature


def label_distribution(
    likelihood: Likelihood,
    mean: Tensor,
    blocks: Tensor,
    link: str,
    temperature: float,
    dtype: torch.dtype,
) -> Distribution:
    """Distribution of the label at each point.

    Args:
        likelihood: A softmax, logistic or probit likelihood.
        mean: Of the network's outputs, ``... x n x m``.
        blocks: Their covariance at each point, ``... x n x m x m``.
        link: One of the names in ``LINKS``.
        temperature: Divides the log probabilities.
        dtype: Of the result.

    Returns:
        Bernoulli ``... x n x 1`` for one output, else categorical ``... x n``.
    """
    logs = class_log_probabilities(likelihood, mean, blocks, link)
    logs = apply_temperature(logs, temperature).to(dtype)
    if mean.shape[-1] == 1:
        return Bernoulli(logits=logs[..., 1:] - logs[..., :1])
    # The check of its arguments fails for no points at all.
    return Categorical(logits=logs, validate_args=logs.numel() > 0)
