r"""What a model says of data that were held out: the honest companions of the evidence.

The evidence is the sum of :math:`\log p(y_i \mid y_1 \ldots y_{i-1})` in any order, the
first terms from the prior alone. Leaving one out keeps the last term of every order,
the conditional evidence those behind the first m. Both are closed forms at the present
hyperparameters and features.

In: a model. Out: log densities in nats. Next: ``compare`` sets them beside evidence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from botorch.models.approximate_gp import ApproximateGPyTorchModel
from botorch.models.model import Model
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood, _GaussianLikelihoodBase
from gpytorch.models import GP, ApproximateGP
from gpytorch.settings import num_likelihood_samples
from torch import Generator, Tensor
from torch.distributions import Categorical, Normal

from gpbridge.checks import check_same_length
from gpbridge.dnn.training import isolated_randomness
from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.structures import Structure
from gpbridge.selection.gaussian_marginal import (
    check_no_added_terms,
    diagonal_blocks,
    gaussian_marginal,
    log_density,
)
from gpbridge.selection.orders import permutations
from gpbridge.selection.outcome_units import (
    evaluating,
    likelihood_units,
    without_outcome_transform,
)
from gpbridge.selection.variational_bound import likelihood_of

_DRAWS = 256  # of a likelihood without closed form


class LeaveOneOut(NamedTuple):
    """Each point as the others predict it, in transformed units, float64.

    ``value`` is the sum of ``log_density``, in total nats. A point with several tasks
    is left out with all of them.
    """

    value: Tensor  # ...
    log_density: Tensor  # ... x n
    mean: Tensor  # ... x n x m
    variance: Tensor  # of the target, noise included, ... x n x m

    def __repr__(self) -> str:
        """Its value and size, not its numbers."""
        n, value = self.log_density.shape[-1], self.value.tolist()
        return f"{type(self).__name__}(value={value}, n={n})"


class ConditionalEvidence(NamedTuple):
    """The log probability of the other points given the first ones, in total nats.

    ``value`` is the mean of ``values`` over the orders and ``standard_error`` that of
    the mean, NaN for one order. ``num_targets`` counts the numbers predicted. For
    labels, and for a structured curvature, it is a difference of two of Laplace's
    approximations; ``kind`` says so.
    """

    value: Tensor  # ...
    values: Tensor  # orders x ...
    standard_error: Tensor  # ...
    num_first: int
    num_targets: int
    kind: str


def leave_one_out(model: GP) -> LeaveOneOut:
    r"""Log predictive density of each point given all others, without refitting.

    .. math:: y_i \mid y_{-i} \sim N\big(y_i - P_{ii}^{-1} [P r]_i,\; P_{ii}^{-1}\big),
        \qquad P = (K + \Sigma)^{-1}

    with r the residual. One factorisation, n³ in time. Hyperparameters, and the
    features of a LinearizedGP, stay those that all points have chosen: a network that
    was trained on a point does not predict it as if it were new. That needs held-out
    data, or the tangent kernel of an untrained network.

    Args:
        model: An ExactGP or a LinearizedGP, with Gaussian noise.

    Returns:
        The densities, differentiable in the hyperparameters.

    Raises:
        NotImplementedError: For labels, a structured curvature, a variational GP, and
            a kernel with inducing points.
        ValueError: If the model predicts by the network's output, which does not move
            when a point is left out.

    References:
        Rasmussen and Williams (2006), eqs. (5.10)-(5.12). Sundararajan and Keerthi,
        Predictive approaches for choosing hyperparameters in Gaussian processes,
        Neural Computation 2001.

    Example:
        >>> from botorch.models import SingleTaskGP
        >>> X = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
        >>> leave_one_out(SingleTaskGP(X, X.sin())).log_density.shape
        torch.Size([6])
    """
    _check_gaussian(model, "leave_one_out")
    if isinstance(model, LinearizedGP) and model.mean == "network":
        raise ValueError(
            "leave_one_out needs mean='linear_model', but the model has "
            "mean='network': the network's output has seen all points. Score it on "
            "held-out data."
        )
    marginal = gaussian_marginal(model)
    m = marginal.targets.shape[-1]
    L = marginal.factor()
    pulled = torch.cholesky_solve(marginal.residual.unsqueeze(-1), L)
    pulled = pulled.unflatten(-2, (-1, m))  # ... x n x m x 1
    precision = diagonal_blocks(torch.cholesky_inverse(L), m)
    root = torch.linalg.cholesky(precision)
    shift = torch.cholesky_solve(pulled, root)  # y_i less its mean
    squares = (pulled * shift).sum((-1, -2))
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_density_ = log_det - 0.5 * squares - 0.5 * m * math.log(2 * math.pi)
    covariance = torch.cholesky_inverse(root)
    return LeaveOneOut(
        log_density_.sum(-1),
        log_density_,
        marginal.targets - shift[..., 0],
        covariance.diagonal(dim1=-2, dim2=-1),
    )


def conditional_log_evidence(
    model: GP,
    num_first: int | None = None,
    *,
    orders: int | Tensor | None = 10,
    generator: Generator | None = None,
) -> ConditionalEvidence:
    r"""Log probability of the rest of the data given the first m points.

    .. math:: \log p(D_{m+1 \ldots n} \mid D_{1 \ldots m})
        = \log p(D) - \log p(D_{1 \ldots m})

    averaged over random orders. The evidence charges a model for how badly its prior
    predicts the first points; this does not, and is nearer to how well the model
    generalises. With m = 0 it is the evidence. Hyperparameters and features stay.

    Time n³ once and m³ for each order. For a LinearizedGP with labels or a
    structured curvature both terms are Laplace's approximations, fitted anew for each
    order.

    Args:
        model: An ExactGP or a LinearizedGP.
        num_first: The number m of points conditioned on, by default half.
        orders: How many random orders are averaged; or permutations of the points,
            ``orders x n``; or None for the order of the data, as of a series in time.
        generator: Of random orders; by default one with seed 0, so that two models see
            the same.

    Returns:
        The mean over orders and each of them; differentiable for Gaussian noise.

    Raises:
        ValueError: If m or the orders do not fit the data.
        NotImplementedError: For a variational GP, and a kernel with inducing points.

    References:
        Lotfi, Izmailov, Benton, Goldblum, Wilson, Bayesian model selection, the
        marginal likelihood, and generalization, ICML 2022, section 5.
    """
    approximate = isinstance(model, LinearizedGP) and (
        not is_gaussian(model.likelihood) or isinstance(model.inference, Structure)
    )
    if not approximate:
        _check_gaussian(model, "conditional_log_evidence")
    X = model.train_inputs[0]
    n = X.shape[-2]
    m = n // 2 if num_first is None else num_first
    if not isinstance(m, int) or not 0 <= m < n:
        raise ValueError(
            f"num_first must be an int from 0 to {n - 1}, fewer than the {n} points, "
            f"but is {m!r}."
        )
    firsts = permutations(orders, n, generator).to(X.device)[:, :m]
    if approximate:
        whole = model.log_evidence()
        parts = [model.subset_rows(rows).log_evidence() for rows in firsts if m]
        count = n - m
    else:
        marginal = gaussian_marginal(model)
        whole = log_density(marginal)
        parts = [log_density(marginal.subset(rows)) for rows in firsts if m]
        count = (n - m) * marginal.targets.shape[-1]
    if m == 0:
        parts = [torch.zeros_like(whole)] * len(firsts)
    values = torch.stack([whole - part for part in parts])
    error = (
        values.std(0) / len(values) ** 0.5 if len(values) > 1 else values[0] * math.nan
    )
    kind = "approximation" if approximate else "exact"
    return ConditionalEvidence(values.mean(0), values, error.detach(), m, count, kind)


@torch.no_grad()
def held_out_log_density(
    model: GP | Model,
    X: Tensor,
    Y: Tensor,
    likelihood: Likelihood | None = None,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Log predictive density of new data, point by point, in their own units.

    Of the marginal distribution of each output, summed over outputs. Under an outcome
    transform it is the density of the transformed target, by the change of variables,
    as in the evidence. A likelihood without closed form, such as gpytorch's softmax, is
    averaged over 256 draws, or more if ``num_likelihood_samples`` says so.

    Args:
        model: A LinearizedGP, a botorch model, or a GP of gpytorch's. Its mode stays.
        X: Inputs ``n x d``.
        Y: Targets ``n x m`` or ``n``, untransformed.
        likelihood: For gpytorch's own variational GPs, which have none; it goes before
            the model's own.
        generator: Of such draws; by default one with seed 0, so that two models see the
            same.

    Returns:
        Nats per point, ``n``.

    Raises:
        ValueError: If there is no likelihood, or the transform does not take a target.
    """
    check_same_length(X=X, Y=Y)
    column = Y[:, None] if Y.dim() == 1 else Y
    own = getattr(model, "likelihood", None)
    likelihood = likelihood_of(model, likelihood)
    linearized = isinstance(model, LinearizedGP) and likelihood is own
    gaussian = isinstance(likelihood, _GaussianLikelihoodBase)
    with evaluating(model):
        if linearized and not gaussian:
            predicted = model.predict(X)
            y = Y.reshape(-1) if isinstance(predicted, Categorical) else column
            return predicted.log_prob(y).reshape(len(X), -1).sum(-1).double()
        Z = model.transform_inputs(X) if isinstance(model, Model) else X
        targets, log_jacobian = likelihood_units(model, column, Z)
        with without_outcome_transform(model):
            if linearized:
                normal = model.predict(X)
                mean, variance = normal.mean, normal.variance
            elif gaussian and isinstance(model, Model) and likelihood is own:
                posterior = model.posterior(X, observation_noise=True)
                mean, variance = posterior.mean, posterior.variance
            else:
                known = isinstance(model, Model)
                latent = model.posterior(X).distribution if known else model(X)
                if not gaussian:
                    y = targets.reshape(len(X))
                    return _log_marginal(likelihood, y, latent, generator)
                predicted = likelihood(latent, X)
                mean, variance = predicted.mean, predicted.variance
    shape = column.shape
    density = _normal(mean.reshape(shape), variance.reshape(shape), targets)
    return density + log_jacobian.sum(-1)


def _log_marginal(
    likelihood: Likelihood,
    y: Tensor,
    latent: MultivariateNormal,
    generator: Generator | None,
) -> Tensor:
    generator = Generator().manual_seed(0) if generator is None else generator
    draws = max(_DRAWS, num_likelihood_samples.value())
    training = likelihood.training
    likelihood.train()  # where it draws, points one by one
    try:
        # Upstream draws from the global state, which is put back.
        with isolated_randomness(generator, y.device), torch.no_grad():
            with num_likelihood_samples(draws):
                return likelihood.log_marginal(y, latent)
    finally:
        likelihood.train(training)


def _normal(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    mean, variance, y = mean.double(), variance.double(), y.double()
    return Normal(mean, variance.sqrt()).log_prob(y).sum(-1)


def _check_gaussian(model: GP, what: str) -> None:
    check_no_added_terms(model, what)
    if isinstance(model, ApproximateGP | ApproximateGPyTorchModel):
        raise NotImplementedError(
            f"{what} has no closed form for a variational GP ({type(model).__name__}). "
            "Score it on held-out data."
        )
    if isinstance(model, LinearizedGP) and not is_gaussian(model.likelihood):
        raise NotImplementedError(
            f"{what} has a closed form for Gaussian noise only, but the model has a "
            f"{type(model.likelihood).__name__}. Score it on held-out data, or use "
            "conditional_log_evidence."
        )
