r"""Stochastic lower bounds over minibatches of data and of orbits.

.. math:: \log p(y) \ge \sum_i E_q \log p(y_i \mid f(x_i)) - \mathrm{KL}(q(u) \| p(u)),
    \qquad f(x) = E_a\, g(T_a x).

With C elements of each orbit in place of all, a log likelihood that is quadratic in f
needs unbiased moments only, and bound and gradients are unbiased. For log-concave
likelihoods the average over the C elements gives a lower bound of the bound, by
Jensen's inequality, with a gap of O(1/C).

In: a sparse GP whose kernel averages over an orbit, a batch. Out: the bound per datum.
Next: ``sparse_fit`` maximises it.

References:
    van der Wilk, Bauer, John and Hensman, Learning invariances using the marginal
    likelihood, NeurIPS 2018, section 4. Schwöbel, Jørgensen, Ober and van der Wilk,
    Last layer marginal likelihood for invariance learning, AISTATS 2022, section 3.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from gpytorch.mlls import VariationalELBO
from gpytorch.models import ApproximateGP
from gpytorch.variational import IndependentMultitaskVariationalStrategy
from torch import Generator, Size, Tensor

from gpbridge.augmentation import Augmentation
from gpbridge.checks import (
    ShapeError,
    check_count,
    check_floating,
    check_same_length,
    check_tensor,
)
from gpbridge.dnn.training import isolated_randomness
from gpbridge.gpytorch_targets import check_target_shape
from gpbridge.inducing_orbits import draw_elements, orbit_kernel, unbiased_moments
from gpbridge.inducing_strategy import InterdomainVariationalStrategy
from gpbridge.likelihoods import GAUSSIAN, check_outputs
from gpbridge.polya_gamma import expected_quadratic, is_quadratic
from gpbridge.selection.variational_bound import inducing_strategy


class _Expected(NamedTuple):
    """Expected log likelihoods ``n``, where upstream has a distribution of f."""

    value: Tensor

    @property
    def event_shape(self) -> Size:
        return self.value.shape[-1:]


class OrbitVariationalELBO(VariationalELBO):
    r"""The variational bound per datum, with a few elements of each orbit.

    Called as ``elbo(x, y)``, with inputs and not with ``model(x)``: each call draws C
    elements of the orbit, the same for all inputs of the batch. A finite orbit gives
    them without replacement; from a continuous law they are independent, whatever the
    sampling of the augmentation's own noise, which predictions keep using.

    * ``unbiased``: for Gaussian noise and ``PolyaGammaBernoulliLikelihood``. The value
      and its gradients have those of all of the orbit as expectation; noisy values may
      lie above. The bound of a label touches at a c from elements of their own, since a
      c from the same ones would bring a bias back; this takes a second evaluation,
      without gradients.
    * ``jensen``: for any likelihood; a bound, in expectation, where it is log-concave:
      softmax, logistic, probit, Gaussian. All of the orbit gives the exact value.

    A step costs C (m + C) evaluations of the base kernel per input with m inducing
    points; the unbiased form also C m² products.

    Args:
        likelihood: The likelihood.
        model: A variational GP on an ``InterdomainVariationalStrategy``, as
            :class:`gpbridge.inducing_gp.SparseGP`; its kernel an ``InvariantKernel`` or
            ``ConvolutionalKernel``, alone or in scales.
        num_data: The number of training points.
        num_orbit_samples: The number C of elements.
        unbiased: Estimate the bound itself; default: if the likelihood is quadratic.
        jensen: Bound it once more; default: if the likelihood is not quadratic.
        beta: A factor of the KL divergence.
        combine_terms: As in gpytorch's ``VariationalELBO``.

    Raises:
        TypeError: If ``unbiased`` is asked for a likelihood that is not quadratic, or
            the model has another strategy or kernel.
        ValueError: If both forms are asked for, or none, or C does not fit the orbit.
        ShapeError: If the likelihood is one of another number of outputs.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> from gpbridge.augmentation import Rotation2d
        >>> from gpbridge.inducing_gp import SparseGP
        >>> from gpbridge.kernels import InvariantKernel
        >>> kernel = InvariantKernel(RBFKernel(), Rotation2d())
        >>> model = SparseGP(kernel, torch.rand(5, 2))
        >>> elbo = OrbitVariationalELBO(model.likelihood, model, num_data=100)
        >>> elbo(torch.rand(10, 2), torch.rand(10)).shape
        torch.Size([])
    """

    def __init__(
        self,
        likelihood: Likelihood,
        model: ApproximateGP,
        num_data: int,
        num_orbit_samples: int = 10,
        *,
        unbiased: bool | None = None,
        jensen: bool | None = None,
        beta: float = 1.0,
        combine_terms: bool = True,
    ) -> None:
        check_count(num_data=num_data, num_orbit_samples=num_orbit_samples)
        super().__init__(likelihood, model, num_data, beta, combine_terms)
        if unbiased is None:
            unbiased = is_quadratic(likelihood) if jensen is None else not jensen
        jensen = not unbiased if jensen is None else jensen
        if unbiased == jensen:
            raise ValueError(
                f"Choose one of two bounds, but unbiased={unbiased} and jensen="
                f"{jensen}. Quadratic likelihoods allow unbiased=True, others "
                "jensen=True."
            )
        if unbiased and not is_quadratic(likelihood):
            expected_quadratic(likelihood, *[torch.zeros(0)] * 3)  # says why
        strategy = inducing_strategy(model)
        if not isinstance(strategy, InterdomainVariationalStrategy):
            raise TypeError(
                "OrbitVariationalELBO needs a model on an "
                "InterdomainVariationalStrategy (gpbridge.inducing_gp.SparseGP), but "
                f"this one has a {type(strategy).__name__}."
            )
        wrapper = model.variational_strategy
        check_outputs(likelihood, getattr(wrapper, "num_tasks", 1))
        independent = wrapper is strategy or isinstance(
            wrapper, IndependentMultitaskVariationalStrategy
        )
        if unbiased and not independent:
            raise TypeError(
                f"{type(wrapper).__name__} mixes outputs, whose moments are then not "
                "known one by one. Take jensen=True, or "
                "IndependentMultitaskVariationalStrategy."
            )
        self.unbiased, self.jensen = unbiased, jensen
        self.num_orbit_samples = num_orbit_samples
        size = self.augmentation.orbit_size
        if num_orbit_samples > size or (unbiased and num_orbit_samples == 1 < size):
            at_least = 2 if unbiased and size > 1 else 1
            raise ValueError(
                f"num_orbit_samples must be at least {at_least} and at most {size}, "
                f"the number of elements, but is {num_orbit_samples}. Pairs of "
                "different elements are what an unbiased variance is made of."
            )

    @property
    def augmentation(self) -> Augmentation:
        """The distribution over transformations that the kernel averages."""
        return orbit_kernel(self.model.covar_module)[1].augmentation

    def draw_elements(self, generator: Generator | None = None) -> Tensor:
        """Elements of the orbit, as a call draws them."""
        return draw_elements(self.augmentation, self.num_orbit_samples, generator)

    def forward(
        self,
        x: Tensor,
        target: Tensor,
        *,
        generator: Generator | None = None,
        elements: Tensor | None = None,
        expansion_elements: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """The bound per datum of a batch.

        Args:
            x: Inputs ``n x d``.
            target: Labels or targets ``n``, or ``n x m`` for several outputs.
            generator: Source of randomness. Without one, draws differ in each call.
            elements: Take these elements instead of drawing some.
            expansion_elements: Take these for the points c of a quadratic bound.
            **kwargs: For the likelihood's ``expected_log_prob``; ``noise`` are the
                fixed noise variances of the batch.

        Returns:
            The bound, or its terms without ``combine_terms``. NaN in the inputs gives
            NaN; ``fit_sparse_gp`` checks all data once.

        Raises:
            ShapeError: If inputs are no rows, or targets have another shape.
            TypeError: If they are no floats.
        """
        # Values are not looked at: that would stop the device in each step.
        check_tensor(x=x, target=target)
        check_floating(x=x)
        if x.dim() != 2:
            remedy = "For one input dimension try x[:, None]."
            if x.dim() > 2:
                remedy = "Pass rows, x.flatten(1) for images."
            raise ShapeError(
                f"x must be ``n x d``, but has shape {tuple(x.shape)}. {remedy}"
            )
        check_same_length(x=x, target=target)
        check_target_shape(self.likelihood, target, len(x), "target")
        if elements is None:
            elements = self.draw_elements(generator)
            if self.unbiased and expansion_elements is None:
                expansion_elements = self._expansion_elements(elements, generator)
        if self.jensen:
            # Upstream's likelihoods draw from the global state.
            guard = nullcontext()
            if generator is not None:
                guard = isolated_randomness(generator, x.device)
            with guard:
                return super().forward(
                    self.model(x, elements=elements), target, **kwargs
                )
        expansion = None
        if expansion_elements is not None:
            with torch.no_grad():
                expansion = self._moments(x, expansion_elements)[1]
                expansion = expansion.clamp_min(0).sqrt()
        mean, second = self._moments(x, elements)
        fit = expected_quadratic(
            self.likelihood, target, mean, second, expansion, **kwargs
        )
        return super().forward(_Expected(fit), target)

    def _log_likelihood_term(self, distribution: Any, target: Tensor, **kwargs: Any):
        if isinstance(distribution, _Expected):
            return distribution.value.sum(-1)
        return super()._log_likelihood_term(distribution, target, **kwargs)

    def _expansion_elements(
        self, elements: Tensor, generator: Generator | None
    ) -> Tensor | None:
        """Elements for c that are independent of the others, where there is a c."""
        exact = len(elements) == self.augmentation.orbit_size
        if exact or isinstance(self.likelihood, GAUSSIAN):
            return None
        return self.draw_elements(generator)

    def _moments(self, x: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
        """Unbiased first two moments of f, shaped as the targets."""
        strategy = inducing_strategy(self.model)
        moments = strategy(x, elements=elements, moments=True)
        mean, second = unbiased_moments(moments, self.augmentation.orbit_size)
        if self.model.variational_strategy is strategy:
            return mean, second
        return mean.mT, second.mT  # outputs came first
