r"""The evidence's gradient through the curvature, by a trace over minibatches.

A transformation of the inputs, with parameters :math:`\eta`, changes the outputs and
the curvature :math:`M(\eta) = \sum_n J_n^\top R_n R_n^\top J_n` of a network. The
gradient of the log determinant needs no graph through all data,

.. math::
    \frac{\partial}{\partial \eta} \log\det(I + S^{1/2} M S^{1/2})
      = \sum_b \Big\langle \frac{\partial \log\det}{\partial M},
               \frac{\partial M_b}{\partial \eta} \Big\rangle,

since M is a sum over minibatches b and the first factor is the same for all: one pass
without a graph sums M up, a second one differentiates one minibatch at a time. The same
holds for the sums that other structures are made of. The weights are held fixed, as in
all published versions: their dependence on :math:`\eta` through training is ignored.

In: a linearised network, a transformation of its inputs. Out: the evidence and its
gradient in the transformation's parameters. Next: an optimiser of the user's.

References:
    Immer, van der Ouderaa, Rätsch, Fortuin, van der Wilk, Invariance learning in deep
    neural networks with differentiable Laplace approximations, NeurIPS 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from torch import Tensor, nn

from gpbridge.checks import ShapeError, check_memory, check_positive
from gpbridge.features import TangentFeatures
from gpbridge.layer_gram import tangent_features
from gpbridge.likelihoods import hessian_root, log_prob
from gpbridge.linearized.curvature_sums import kronecker_sums, squares_in_basis
from gpbridge.linearized.data_curvature import check_structure_size
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.inference import Exact
from gpbridge.linearized.problem import TangentProblem
from gpbridge.linearized.structures import Diagonal, Kronecker
from gpbridge.linearized.weight_blocks import (
    WeightBlock,
    block_jacobian,
    weight_blocks,
)
from gpbridge.tracing import ordinary_tensors
from gpbridge.types import Evidence


class EvidenceGradient(NamedTuple):
    """The evidence of a transformation, and its derivatives by its parameters."""

    evidence: Evidence
    gradients: dict[str, Tensor]


@ordinary_tensors()
def evidence_gradient(
    model: LinearizedGP, transform: nn.Module, batch_size: int = 256
) -> EvidenceGradient:
    r"""Evidence of a network behind a transformation of its inputs, with its gradient.

    .. math::
        E(\eta) = \log p(y \mid f(T_\eta x, w^*)) - \tfrac12 {w^*}^\top S^{-1} w^*
                 - \tfrac12 \log\det(I + S^{1/2} M(\eta) S^{1/2}),

    at fixed weights, prior variances and noise. Differentiates through the curvature:
    twice through the network, so that activations should be smooth. The curvature is
    that of the model's inference: exact in weight space, diagonal or Kronecker.

    Cost: two passes of m backward passes per point, one of them differentiated once
    more. Memory that of one minibatch and of the sums, whatever the number of data.

    Args:
        model: A linearised network; it is not changed.
        transform: Maps inputs ``b x d`` to ``b x d``, row by row, in the dtype of the
            network. Its parameters with ``requires_grad`` are differentiated.
        batch_size: Points per minibatch.

    Returns:
        The evidence in total nats, and the gradient of its value by parameter name.

    Raises:
        TypeError: If the model is another.
        ValueError: If the transformation has nothing to learn, or a value is not
            finite.
        ShapeError: If it returns another shape.
        NotImplementedError: If the inference is another, the prior that of previous
            data, or Kronecker factors meet unequal noise of several outputs.
        MemoryError: If the curvature needs more than the memory budget.

    Example:
        >>> class Stretch(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.log_scale = nn.Parameter(torch.zeros(()).double())
        ...     def forward(self, x):
        ...         return x * self.log_scale.exp()
        >>> X = torch.linspace(-1, 1, 12).double()[:, None]
        >>> net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        >>> model = LinearizedGP(net, X, X.sin(), noise=0.1)
        >>> sorted(evidence_gradient(model, Stretch()).gradients)
        ['log_scale']
    """
    if not isinstance(model, LinearizedGP):
        raise TypeError(
            "evidence_gradient needs a gpbridge.LinearizedGP, but model is "
            f"{type(model).__name__}."
        )
    model.check_all_data_is_training_data("The evidence of a transformation")
    model.check_prior_of_its_own("The evidence of a transformation")
    check_positive(batch_size=batch_size)
    learnt = {n: p for n, p in transform.named_parameters() if p.requires_grad}
    if not learnt:
        raise ValueError(
            f"{type(transform).__name__} has no parameter with requires_grad, so that "
            "there is no gradient to compute."
        )
    sums = _Sums(model)
    prior_variance = model.prior_variance.detach().double()
    batches = _Batches(sums.problem, transform, batch_size)
    totals: list[Tensor] | None = None
    with torch.no_grad():
        for x, y, noise in batches:
            part, _ = sums.of_batch(x, y, noise)
            totals = (
                part if totals is None else [a + b for a, b in _pairs(totals, part)]
            )
    totals = [total.requires_grad_() for total in totals]
    complexity = 0.5 * sums.logdet(totals, prior_variance)
    slopes = torch.autograd.grad(complexity, totals, materialize_grads=True)
    fit = 0.0
    gradients = {name: torch.zeros_like(p) for name, p in learnt.items()}
    for x, y, noise in batches:
        part, log_likelihood = sums.of_batch(x, y, noise)
        inner = sum((slope * value).sum() for slope, value in _pairs(slopes, part))
        found = torch.autograd.grad(
            log_likelihood - inner, list(learnt.values()), materialize_grads=True
        )
        for name, gradient in zip(learnt, found, strict=True):
            gradients[name] += gradient
        fit = fit + log_likelihood.detach()
    fit = fit - 0.5 * sums.penalty(prior_variance)
    complexity = complexity.detach()
    numbers = [fit - complexity, *gradients.values()]
    if not all(bool(number.isfinite().all()) for number in numbers):
        raise ValueError(
            f"The evidence is not finite or its gradient: fit {float(fit):.6g}, "
            f"complexity {float(complexity):.6g} nats. Check the parameters of "
            f"{type(transform).__name__} and what it returns."
        )
    unknown = torch.full_like(complexity, torch.nan)
    value = Evidence(fit - complexity, fit, complexity, unknown, sums.is_lower_bound)
    return EvidenceGradient(value, gradients)


class _Batches:
    """Minibatches of transformed inputs and targets, the same in every pass."""

    def __init__(
        self, problem: TangentProblem, transform: nn.Module, batch_size: int
    ) -> None:
        self.problem, self.transform, self.size = problem, transform, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        X, Y, own = self.problem.X, self.problem.Y, self._noise()
        for start in range(0, len(X), self.size):
            here = slice(start, start + self.size)
            x, y, noise = X[here], Y[here], None if own is None else own[here]
            moved = self.transform(x)
            if moved.shape != x.shape:
                raise ShapeError(
                    f"transform must map {tuple(x.shape)} to the same shape, but "
                    f"returned {tuple(moved.shape)}."
                )
            yield moved.to(x), y, noise

    def _noise(self) -> Tensor | None:
        """Noise variances that belong to single points."""
        likelihood = self.problem.likelihood
        if isinstance(likelihood, FixedNoiseGaussianLikelihood):
            return likelihood.noise_covar.noise
        return None


class _Sums:
    """The sums over data that a structure's log determinant is a function of."""

    def __init__(self, model: LinearizedGP) -> None:
        self.problem, self.inference = model.problem, model.inference
        if not isinstance(self.inference, Exact | Diagonal | Kronecker):
            raise NotImplementedError(
                f"evidence_gradient takes Exact, Diagonal and Kronecker inference, but "
                f"the model has {type(self.inference).__name__}."
            )
        options = self.inference
        special = getattr(options, "curvature", "ggn") != "ggn"
        if special or getattr(options, "eigenvalue_correction", False):
            raise NotImplementedError(
                "evidence_gradient differentiates the Gauss-Newton curvature: build "
                "the model with curvature='ggn', without eigenvalue_correction, whose "
                "basis has no gradient."
            )
        problem = self.problem
        if isinstance(options, Exact):
            p = problem.num_params
            check_memory(
                f"The curvature of {p} random weights",
                8.0 * 3 * p**2,
                options.memory_budget,
                "Build the model with inference=Kronecker() or Diagonal().",
            )
        self.sizes = {name: problem.net.params[name].shape for name in problem.unit_std}
        groups = [set(names) for names in problem.groups]
        first = self._features(problem.X[:1])
        self.blocks: list[WeightBlock] = weight_blocks(first, self.sizes, groups)
        if isinstance(options, Kronecker):
            check_structure_size(self.blocks, options, 1)
            noise = problem.channel_weights()
            if bool((noise != noise[0]).any()):
                raise NotImplementedError(
                    "evidence_gradient takes Kronecker factors of one noise variance, "
                    f"but those of the outputs are {(1 / noise).tolist()}. Build the "
                    "model with inference=Diagonal() or Exact()."
                )

    @property
    def is_lower_bound(self) -> bool:
        return isinstance(self.inference, Diagonal)

    def _features(self, x: Tensor) -> TangentFeatures:
        return tangent_features(self.problem.net, x, self.problem.unit_std, "layers")

    def of_batch(
        self, x: Tensor, y: Tensor, noise: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The batch's part of the sums, and its log likelihood."""
        problem = self.problem
        features = self._features(x)
        outputs = features.value.double()
        log_likelihood = log_prob(problem.likelihood, outputs, y, noise).sum()
        root = hessian_root(problem.likelihood, outputs, noise)
        if isinstance(self.inference, Exact):
            rows = features.rows().double().unflatten(0, outputs.shape)
            weighted = (root.mT @ rows).flatten(0, 1)
            return [weighted.mT @ weighted], log_likelihood
        root, parts = root.to(features.value), []
        for block in self.blocks:
            J = block_jacobian(features, block, self.sizes).weighted(root)
            if isinstance(self.inference, Diagonal):
                parts.append(squares_in_basis(J, 1))
            else:
                parts += kronecker_sums(J, 1, self.inference.sharing)
        return parts, log_likelihood

    def logdet(self, totals: list[Tensor], prior_variance: Tensor) -> Tensor:
        """Log determinant of I + S^1/2 M S^1/2 as a function of the sums."""
        if isinstance(self.inference, Exact):
            std = self.problem.expand(prior_variance.sqrt())
            eye = torch.eye(len(std)).to(std)
            return torch.logdet(eye + std[:, None] * totals[0] * std)
        logs = []
        for k, block in enumerate(self.blocks):
            s = prior_variance[block.group]
            if isinstance(self.inference, Diagonal):
                logs.append((s * totals[k]).log1p().sum())
                continue
            A, G, count = totals[3 * k : 3 * k + 3]
            a, g = torch.linalg.eigvalsh(A[0]), torch.linalg.eigvalsh(G[0])
            products = g.clamp_min(0.0)[:, None] * a.clamp_min(0.0)
            tiny = torch.finfo(products.dtype).tiny
            logs.append((s * products / count.clamp_min(tiny)).log1p().sum())
        return torch.stack(logs).sum()

    def penalty(self, prior_variance: Tensor) -> Tensor:
        """Squared norm of the trained weights under the prior."""
        problem = self.problem
        w = problem.net.flatten(problem.net.params).detach().double()
        scale = problem.unit_scale() * problem.expand(prior_variance.sqrt())
        return torch.where(scale > 0, w / scale, 0.0).square().sum()


def _pairs(left: list[Tensor], right: list[Tensor]) -> zip:
    return zip(left, right, strict=True)
