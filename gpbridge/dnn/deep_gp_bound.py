"""The lower bound of a deep Gaussian process, by draws of its hidden layers' marginals.

Draws of a point need those of the layers before at that point only, so that a minibatch
costs no covariances between its rows. In: layers, rows, standard normals. Out: moments
of the last layer for each draw, and the bound per datum. Next: ``deep_gp``.

References:
    Salimbeni, Deisenroth, Doubly stochastic variational inference for deep Gaussian
    processes, NeurIPS 2017, eqs. (14), (15) and (18).
"""

from __future__ import annotations

from collections.abc import Sequence

from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    Likelihood,
    SoftmaxLikelihood,
)
from gpytorch.mlls import DeepApproximateMLL, VariationalELBO
from gpytorch.models.deep_gps import DeepGP
from gpytorch.settings import num_likelihood_samples
from torch import Generator, Tensor

from gpbridge.checks import check_count
from gpbridge.dnn.deep_gp_layer import InducingLayer
from gpbridge.dnn.training import isolated_randomness
from gpbridge.likelihoods import is_gaussian
from gpbridge.randomness import fresh, standard_normal


def draw_count(num_samples: int | None) -> int:
    """The number of draws; default gpytorch's setting."""
    s = num_likelihood_samples.value() if num_samples is None else num_samples
    check_count(num_samples=s)
    return s


def hidden_noise(
    layers: Sequence[InducingLayer],
    batch_shape: Sequence[int],
    num_samples: int | None = None,
    generator: Generator | None = None,
) -> list[Tensor]:
    """Standard normals ``s x batch_shape x h`` for each layer but the last."""
    shape = draw_count(num_samples), *batch_shape
    like = layers[0].variational_strategy.inducing_points
    generator = fresh(generator, like.device)
    return [
        standard_normal((*shape, layer.output_dims), generator, like)
        for layer in layers[:-1]
    ]


def last_marginals(
    layers: Sequence[InducingLayer], X: Tensor, noise: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Means and variances of the last layer for each draw, ``s x ... x n x m``."""
    values = X.unsqueeze(0)
    for layer, normal in zip(layers[:-1], noise, strict=True):
        mean, variance = layer.marginals(values)
        values = mean + variance.sqrt() * normal
    return layers[-1].marginals(values)


def expected_bound(
    model: DeepGP,
    f: MultivariateNormal,
    targets: Tensor,
    num_data: int,
    num_samples: int,
    generator: Generator,
) -> Tensor:
    """Gpytorch's bound per datum at marginals ``s x n`` or ``s x n x m`` of a batch."""
    bound = DeepApproximateMLL(VariationalELBO(model.likelihood, model, num_data))
    # Upstream's softmax draws its outputs from the global state: one for each hidden
    # draw, so that one layer has as many draws as two.
    each = 1 if f.batch_shape[0] > 1 else num_samples
    with isolated_randomness(generator, f.mean.device), num_likelihood_samples(each):
        return bound(f, targets)


def check_likelihood(likelihood: Likelihood) -> None:
    """Require a likelihood of single points, whose noise is not correlated.

    Raises:
        ValueError: If it holds one noise for each training point, mixes its inputs, or
            has correlated noise, whose correlations upstream's bound leaves out.
    """
    name, remedy = type(likelihood).__name__, None
    if isinstance(likelihood, FixedNoiseGaussianLikelihood):
        remedy = "GaussianLikelihood(): minibatches do not know which noise is theirs"
    elif getattr(likelihood, "rank", 0) and is_gaussian(likelihood):
        remedy = "MultitaskGaussianLikelihood(num_tasks, rank=0)"
    elif (
        isinstance(likelihood, SoftmaxLikelihood)
        and likelihood.mixing_weights is not None
    ):
        remedy = "SoftmaxLikelihood(num_classes=..., mixing_weights=False)"
    if remedy is not None:
        raise ValueError(f"A deep GP cannot be trained with this {name}. Try {remedy}.")
