r"""Sparse variational posteriors whose inducing variables live below an average.

With u = g(Z) in the space of a base kernel (``inducing_covariances``), and q(u)
whitened by :math:`L L^\top = K_{uu} + \epsilon I` to mean m and covariance S,

.. math:: A = L^{-1} K_{uf}, \qquad E f = \mu + A^\top m, \qquad
    \mathrm{Cov} f = K_{ff} + A^\top (S - I) A.

This is exactly the posterior of the base process averaged over orbits.

In: a variational GP's prior and its inducing points. Out: gpytorch distributions.
Next: ``inducing_points`` chooses the points, ``inducing_gp`` is a model ready to use.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.models import ApproximateGP
from gpytorch.settings import trace_mode
from gpytorch.utils.memoize import clear_cache_hook
from gpytorch.variational import VariationalStrategy, _VariationalDistribution
from linear_operator.operators import (
    DiagLinearOperator,
    LinearOperator,
    SumLinearOperator,
    TriangularLinearOperator,
)
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_finite,
    check_floating,
    check_same_dtype,
    check_tensor,
)
from gpbridge.inducing_covariances import (
    inducing_covariance,
    inducing_cross_covariance,
    inducing_width,
)
from gpbridge.inducing_orbits import OrbitMoments, orbit_covariances
from gpbridge.shared_covariance import SharedCovarianceOperator


class InterdomainVariationalStrategy(VariationalStrategy):
    r"""Inducing variables in the space of the base kernel, for kernels with orbits.

    Inducing points of a ``ConvolutionalKernel`` are patches, those of an
    ``InvariantKernel`` are single elements of orbits. Scales, sums and products of such
    kernels work, also with kernels that have no orbits; without any the posterior is
    upstream's. A step costs one average over orbits for n inputs and m inducing points,
    n m s evaluations of the base kernel, and the kernel's own variance at the inputs.

    It stands where gpytorch's ``VariationalStrategy`` stands, wrappers for several
    outputs included. The model's ``forward`` must return the covariance as a kernel
    evaluated at its inputs, ``self.covar_module(x)``. The jitter is
    relative to the mean variance of u and added to :math:`K_{uu}` only; upstream's is
    absolute, and is added to the variance of every input too.

    Args:
        model: The variational GP.
        inducing_points: Inducing points ``... m x d'``, as the base kernel sees them.
        variational_distribution: Of the m whitened inducing variables.
        learn_inducing_locations: Whether they are parameters.
        jitter_val: Times the mean of the diagonal of :math:`K_{uu}`, added to it;
            default gpytorch's ``variational_cholesky_jitter``.

    Raises:
        ShapeError: If the inducing points have another width than the base kernel
            sees; at the first call, which knows the inputs.
        TypeError: If inputs have another dtype than the inducing points; at that call.
        ValueError: If the model gives its kernel features of the inputs, and the kernel
            selects columns of them by ``active_dims``; at the first call.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> from gpbridge.inducing_gp import SparseGP
        >>> from gpbridge.kernels import ConvolutionalKernel
        >>> kernel = ConvolutionalKernel(RBFKernel(), (4, 4), (2, 2))
        >>> model = SparseGP(kernel, torch.rand(5, 4))
        >>> type(model.variational_strategy).__name__
        'InterdomainVariationalStrategy'
        >>> model(torch.rand(3, 16)).mean.shape
        torch.Size([3])

    References:
        Hensman et al., Scalable variational Gaussian process classification, AISTATS
        2015; van der Wilk et al., Convolutional Gaussian processes, NeurIPS 2017, eqs.
        (13) and (14).
    """

    def __init__(
        self,
        model: ApproximateGP,
        inducing_points: Tensor,
        variational_distribution: _VariationalDistribution,
        learn_inducing_locations: bool = True,
        jitter_val: float | None = None,
    ) -> None:
        check_inducing_points(inducing_points)
        m, expected = inducing_points.shape[-2], variational_distribution.shape()[-1]
        if m != expected:
            raise ShapeError(
                f"The variational distribution has {expected} inducing values, but "
                f"there are {m} inducing points."
            )
        super().__init__(
            model,
            inducing_points,
            variational_distribution,
            learn_inducing_locations,
            jitter_val,
        )
        self._has_checked_columns = False
        # Upstream would condition on function values at the inducing points.
        self.has_fantasy_strategy = False

    @property
    def pseudo_points(self) -> NoReturn:
        """Not available: u is no value of the function at any input."""
        raise NotImplementedError(
            "Inducing variables in another domain are no pseudo-observations of the "
            "function. Refit the model with the new data instead."
        )

    def __getstate__(self) -> dict[str, Any]:
        # What upstream keeps between predictions has a graph, and cannot be copied.
        return {k: v for k, v in self.__dict__.items() if k != "_memoize_cache"}

    def _apply(self, *args: Any, **kwargs: Any) -> InterdomainVariationalStrategy:
        clear_cache_hook(self)  # it has the dtype and device of before
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        clear_cache_hook(self)
        super()._load_from_state_dict(*args, **kwargs)

    def _expand_inputs(
        self, x: Tensor, inducing_points: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Inducing points are not repeated for a batch of inputs: one Cholesky factor.
        batch = torch.broadcast_shapes(inducing_points.shape[:-2], x.shape[:-2])
        return x.expand(*batch, *x.shape[-2:]), inducing_points

    def forward(
        self,
        x: Tensor,
        inducing_points: Tensor,
        inducing_values: Tensor,
        variational_inducing_covar: LinearOperator | None = None,
        diag: bool = True,
        elements: Tensor | None = None,
        moments: bool = False,
        **kwargs: Any,
    ) -> MultivariateNormal | OrbitMoments:
        """The posterior at inputs, or what it is over some elements of their orbits.

        Args:
            x: Inputs ``... n x d``.
            inducing_points: Inducing points ``... m x d'``.
            inducing_values: Whitened mean ``... m``.
            variational_inducing_covar: Whitened covariance ``... m x m``.
            diag: As upstream.
            elements: Of the orbit, from
                :func:`gpbridge.inducing_orbits.draw_elements`: f averages these only,
                and the result has variances and no covariances.
            moments: Whether to return the moments of each element instead.
            **kwargs: For the model's ``forward``.

        Returns:
            The distribution of f, or the moments.
        """
        prior = self.model.forward(x, **kwargs)
        kernel, inputs = self._kernel_and_inputs(prior, x)
        # Promotion would hide it until a product of matrices fails.
        dtype = inducing_points.dtype
        check_same_dtype("x", inputs, dtype, "inducing points of the model")
        self._check_width(kernel, inputs)
        L = self._root(inducing_covariance(kernel, inducing_points))
        q = inducing_values, variational_inducing_covar
        if elements is not None:
            cross, own = orbit_covariances(kernel, inducing_points, inputs, elements)
            if moments:
                return self._moments(L, cross, own, *q, prior.mean)
            cross, own = cross.mean(-1), own.mean((-1, -2))
        else:
            cross = inducing_cross_covariance(kernel, inducing_points, inputs)
            own = prior.lazy_covariance_matrix
        mean, covariance = self._compute_predictive_updates(
            chol=L,
            induc_data_covar=cross,
            inducing_values=inducing_values,
            variational_inducing_covar=variational_inducing_covar,
            prior_covar=self.prior_distribution.lazy_covariance_matrix,
            diag=diag,
        )
        if elements is None:
            if own.batch_shape != covariance.batch_shape:
                own = SharedCovarianceOperator(own, covariance.batch_shape)
            covariance = SumLinearOperator(own, covariance)
        else:
            change = covariance.diagonal(dim1=-2, dim2=-1)
            covariance = DiagLinearOperator(own + change)
        if trace_mode.on():
            covariance = covariance.to_dense()
        return MultivariateNormal(prior.mean + mean, covariance)

    def _moments(
        self,
        L: TriangularLinearOperator,
        cross: Tensor,
        own: Tensor,
        values: Tensor,
        covariance: LinearOperator | None,
        offset: Tensor,
    ) -> OrbitMoments:
        n, C = cross.shape[-2:]
        A = L.solve(cross.flatten(-2).type(L.dtype)).type(cross.dtype)  # ... m x n C
        # A Delta distribution has no covariance.
        middle = self.prior_distribution.lazy_covariance_matrix.to_dense().neg()
        if covariance is not None:
            middle = middle + covariance.to_dense()
        mean = (A.mT @ values[..., None]).squeeze(-1).unflatten(-1, (n, C))
        change = (A * (middle @ A)).sum(-2).unflatten(-1, (n, C))
        pooled = A.unflatten(-1, (n, C)).mean(-1)
        return OrbitMoments(
            mean=mean,
            variance=own.diagonal(dim1=-2, dim2=-1) + change,
            pooled=own.mean((-1, -2)) + (pooled * (middle @ pooled)).sum(-2),
            offset=offset,
        )

    def _root(self, covariance: Tensor) -> TriangularLinearOperator:
        """Cholesky factor with the jitter, kept between predictions in eval mode."""
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        # Rounding errors grow with the scale of the kernel, and so must the jitter.
        jitter = self.jitter_val * variance.mean(-1, keepdim=True)
        covariance = covariance + torch.diag_embed(jitter.expand(variance.shape))
        L = self._cholesky_factor(covariance)
        if L.shape != covariance.shape:  # of another batch of hyperparameters
            clear_cache_hook(self)
            L = self._cholesky_factor(covariance)
        return L

    def _kernel_and_inputs(
        self, prior: MultivariateNormal, x: Tensor
    ) -> tuple[Kernel, Tensor]:
        covariance = prior.lazy_covariance_matrix
        if not isinstance(covariance, LazyEvaluatedKernelTensor):
            raise TypeError(
                "The model's forward must return MultivariateNormal(mean, "
                "self.covar_module(x)), whose covariance is a kernel at its inputs, "
                f"but it is a {type(covariance).__name__}. Put sums and scales into "
                "the kernel, as ScaleKernel(k1 + k2), and leave "
                "gpytorch.settings.lazily_evaluate_kernels on."
            )
        kernel = covariance.kernel
        # The inputs of the kernel may be features of x; but if it selects columns, it
        # has done so already, and would select again.
        if kernel.active_dims is None:
            return kernel, covariance.x1
        if not self._has_checked_columns:  # once: a comparison stops the device
            _check_columns(kernel, covariance.x1, x)
            self._has_checked_columns = True
        return kernel, x

    def _check_width(self, kernel: Kernel, x: Tensor) -> None:
        width = inducing_width(kernel, x.shape[-1])
        found = self.inducing_points.shape[-1]
        if found != width:
            raise ShapeError(
                f"inducing_points must have {width} columns, what the base kernel of "
                f"{type(kernel).__name__} sees of inputs with {x.shape[-1]}, but have "
                f"{found} (shape {tuple(self.inducing_points.shape)}). Try "
                "gpbridge.inducing_points.initial_inducing_points."
            )


def check_inducing_points(inducing_points: Tensor) -> None:
    """Require at least one finite floating inducing point, ``... x m x d``."""
    check_tensor(inducing_points=inducing_points)
    check_floating(inducing_points=inducing_points)
    if inducing_points.dim() < 2 or inducing_points.shape[-2] == 0:
        remedy = "For one column try inducing_points[:, None]."
        if inducing_points.dim() != 1:
            remedy = "Try gpbridge.inducing_points.initial_inducing_points."
        raise ShapeError(
            "inducing_points must be ``... x m x d`` with m of at least one, but has "
            f"shape {tuple(inducing_points.shape)}. {remedy}"
        )
    check_finite(inducing_points=inducing_points)


def _check_columns(kernel: Kernel, found: Tensor, x: Tensor) -> None:
    """Require that what a kernel selected are columns of the inputs themselves."""
    dims = kernel.active_dims
    if int(dims.max()) < x.shape[-1]:
        expected = x.index_select(-1, dims)
        if found.shape == expected.shape and torch.equal(found, expected):
            return
    raise ValueError(
        f"{type(kernel).__name__} selects columns {dims.tolist()} of features, since "
        "the model's forward does not give it the inputs themselves. What it selects "
        "from cannot be known here. Select the columns in forward, as "
        "self.covar_module(features[..., columns]), and leave active_dims unset."
    )
