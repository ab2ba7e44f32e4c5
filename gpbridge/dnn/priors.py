r"""Priors over the weights of a network, as log densities of named weights.

In: weights by name. Out: log densities in nats, summed over weights, constants
included. Next: ``log_posterior`` adds a likelihood.

References:
    Fortuin, Garriga-Alonso, Ober, Wenzel, Rätsch, Turner, van der Wilk, Aitchison,
    Bayesian neural network priors revisited, ICLR 2022, section 4 (heavy tails for
    dense layers, correlations within convolution filters).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpbridge.checks import check_positive
from gpbridge.types import Params


class GaussianPrior(nn.Module):
    r"""Independent :math:`w \sim N(0, v)`.

    Args:
        variance: v, one number or one that broadcasts with the weights.
    """

    def __init__(self, variance: float | Tensor = 1.0) -> None:
        super().__init__()
        check_positive(variance=variance)
        self.register_buffer("variance", torch.as_tensor(variance))

    def forward(self, weight: Tensor) -> Tensor:
        """Log density of one tensor of weights, summed."""
        v = self.variance.to(weight)
        return -0.5 * (weight.square() / v + (2 * math.pi * v).log()).sum()


class LaplacePrior(nn.Module):
    r"""Independent with density :math:`\exp(-|w| / b) / 2b`, of variance 2 b^2.

    Args:
        scale: b.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        check_positive(scale=scale)
        self.register_buffer("scale", torch.as_tensor(scale))

    def forward(self, weight: Tensor) -> Tensor:
        """Log density of one tensor of weights, summed."""
        b = self.scale.to(weight)
        return -(weight.abs() / b + (2 * b).log()).sum()


class StudentTPrior(nn.Module):
    r"""Independent Student-t with :math:`\nu` degrees of freedom and scale s.

    Args:
        df: :math:`\nu`.
        scale: s.
    """

    def __init__(self, df: float = 5.0, scale: float = 1.0) -> None:
        super().__init__()
        check_positive(df=df, scale=scale)
        self.register_buffer("df", torch.as_tensor(df))
        self.register_buffer("scale", torch.as_tensor(scale))

    def forward(self, weight: Tensor) -> Tensor:
        """Log density of one tensor of weights, summed."""
        df, scale = self.df.to(weight), self.scale.to(weight)
        # NaN gives NaN, as with the other priors, for whoever looks after the run.
        law = torch.distributions.StudentT(df, 0.0, scale, validate_args=False)
        return law.log_prob(weight).sum()


class ConvolutionPrior(nn.Module):
    r"""Filters with a covariance over the kernel window, independent between channels.

    .. math:: \mathrm{cov}(w_i, w_j) = v \exp(-\| x_i - x_j \| / \ell)

    Args:
        variance: v of each weight.
        lengthscale: :math:`\ell` in pixels.
    """

    def __init__(self, variance: float = 1.0, lengthscale: float = 1.0) -> None:
        super().__init__()
        check_positive(variance=variance, lengthscale=lengthscale)
        self.register_buffer("variance", torch.as_tensor(variance))
        self.register_buffer("lengthscale", torch.as_tensor(lengthscale))

    def covariance(self, window: tuple[int, ...]) -> Tensor:
        """Covariance of the weights of one window, flattened, float64."""
        axes = [torch.arange(size, dtype=torch.float64) for size in window]
        places = torch.cartesian_prod(*axes).reshape(-1, len(window))
        distance = torch.cdist(places, places)
        variance, length = self.variance.double().cpu(), self.lengthscale.double().cpu()
        return variance * torch.exp(-distance / length)

    def forward(self, weight: Tensor) -> Tensor:
        """Log density of filters ``out x in x window``, summed."""
        if weight.dim() < 3:
            raise ValueError(
                "ConvolutionPrior takes filters ``out x in x window``, but the weights "
                f"have shape {tuple(weight.shape)}. Choose GaussianPrior for them."
            )
        L = torch.linalg.cholesky(self.covariance(tuple(weight.shape[2:]))).to(weight)
        rows = weight.flatten(2).flatten(0, 1)  # filters x pixels
        whitened = torch.linalg.solve_triangular(L, rows.mT, upper=False)
        log_det = 2 * L.diagonal().log().sum() + len(L) * math.log(2 * math.pi)
        return -0.5 * (whitened.square().sum() + len(rows) * log_det)


class WeightPrior(nn.Module):
    """A prior for every group of weights.

    Args:
        default: Of the weights that no rule names.
        rules: Predicates on names with their priors, the first that holds counts.
    """

    def __init__(
        self,
        default: nn.Module | None = None,
        rules: list[tuple[Callable[[str], bool], nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        rules = list(rules or ())
        self.default = GaussianPrior() if default is None else default
        self.predicates = [predicate for predicate, _ in rules]
        self.priors = nn.ModuleList(prior for _, prior in rules)

    def prior_of(self, name: str) -> nn.Module:
        """The prior of a weight."""
        for predicate, prior in zip(self.predicates, self.priors, strict=True):
            if predicate(name):
                return prior
        return self.default

    def forward(self, params: Params) -> Tensor:
        """Log density of weights by name, total nats."""
        return sum(self.prior_of(name)(value) for name, value in params.items())
