r"""The linear model of a network on its data, and what stays while it is fitted.

The model is :math:`f(x, w) = m(x) + J(x) w` with :math:`w \sim N(0, S)`, S one variance
per group of weights, and a likelihood of y given f. With offset, :math:`m(x) = f(x,
w^*) - J(x) w^*`; without, m = 0. Gram or scatter matrices at unit prior variance are
formed once; every evidence and posterior is assembled from them.

In: a frozen network, inputs, targets, groups. Out: a :class:`TangentProblem`.
Next: ``mode`` finds its optimum, ``evidence`` its marginal likelihood.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor

from gpbridge.checks import check_memory
from gpbridge.features import DenseFeatures, TangentFeatures
from gpbridge.functional import FunctionalNet
from gpbridge.jacobians import jvp, vjp
from gpbridge.layer_gram import tangent_features
from gpbridge.likelihoods import hessian_root, is_gaussian, log_prob
from gpbridge.linearized.inference import Inference, Sampled
from gpbridge.linearized.sampled_problem import SampledProblem
from gpbridge.linearized.structured_problem import (
    StructuredProblem,
    has_shared_noise,
)
from gpbridge.linearized.structures import Structure
from gpbridge.matrix_free import MatrixFreeStrategy
from gpbridge.prediction import (
    FunctionSpaceStrategy,
    PredictionStrategy,
    WeightSpaceStrategy,
    add_scatter,
    apply_root,
    symmetrise,
)
from gpbridge.solvers import ConjugateGradients
from gpbridge.spectral import GaussianSpectrum

_CHUNK_BYTES = 64 * 2**20  # dense features held at a time while they are summed up


class TangentProblem(SampledProblem, StructuredProblem):
    """Data, likelihood and prior of a linear model, with caches at unit variance.

    Args:
        net: The frozen, probed network.
        X: Inputs ``n x d`` of the network's dtype.
        Y: Targets in the likelihood's form.
        likelihood: The likelihood, read at every call.
        groups: Names of the weights that share a prior variance.
        unit_std: Prior standard deviation of each weight at unit variance.
        offset: Whether the prior is centred at w = 0 for the tangent at w*.
        inference: Space and memory budget.

    Attributes:
        outputs: The network at the data, ``n x m``, float64.
        prior_mean: m at the data, ``n x m``, float64.
        noise_spectrum: What :func:`~gpbridge.linearized.evidence.noise_spectrum` found.
        evaluations: How often the evidence was asked for.
    """

    def __init__(
        self,
        net: FunctionalNet,
        X: Tensor,
        Y: Tensor,
        likelihood: Likelihood,
        groups: list[list[str]],
        unit_std: dict[str, Tensor],
        offset: bool,
        inference: Inference,
    ) -> None:
        self.net, self.X, self.Y = net, X, Y
        self.likelihood, self.groups, self.unit_std = likelihood, groups, unit_std
        self.offset, self.inference = offset, inference
        with torch.no_grad():
            self.outputs = torch.cat([net(x).double() for x in self._chunks()])
            self.prior_mean = torch.zeros_like(self.outputs)
            if offset:
                w = net.flatten(net.params)
                moved = torch.cat([jvp(net, x, w).double() for x in self._chunks()])
                self.prior_mean = self.outputs - moved
        n, m = self.outputs.shape
        self.num_params = sum(net.params[name].numel() for name in unit_std)
        space = inference.space
        if space in ("auto", "matrix_free"):
            space = "weight" if self.num_params < n * m else "function"
        self.space = space
        self._grams: list[Tensor] | None = None
        self._scatter: dict[tuple[int, int], Tensor] | None = None
        self._frozen_precision: tuple[Tensor, Tensor] | None = None
        self._rows: Tensor | None = None
        # Kept for ``evidence``: what an eigendecomposition left, and whether it pays.
        self.noise_spectrum: GaussianSpectrum | None = None
        self.evaluations = 0

    @property
    def size(self) -> int:
        """Side of the matrix that is factorised, n m or p."""
        return self.num_params if self.space == "weight" else self.outputs.numel()

    @property
    def bytes_needed(self) -> float:
        """Memory of the exact posterior: matrices of each group, factor, workspace."""
        kept = len(self.groups)
        if self.space == "weight":
            m = self.outputs.shape[1]
            correlated = getattr(self.likelihood, "rank", 0) > 0
            kept = m * (m + 1) // 2 if correlated else m
            if not is_gaussian(self.likelihood) or not has_shared_noise(
                self.likelihood
            ):
                kept = 1
        return 8.0 * self.size**2 * (kept + 3)

    def check_size(self, what: str) -> None:
        """Refuse a matrix beyond the budget, and say what it would need."""
        check_memory(
            f"{what} of {len(self.X)} points with {self.outputs.shape[1]} outputs and "
            f"{self.num_params} random weights, in {self.space} space,",
            self.bytes_needed,
            self.inference.memory_budget,
            "Choose fewer random weights (parameters='last_layer' or names), fewer "
            "points, or a larger budget, Exact(memory_budget=...).",
        )

    def root(self, at: Tensor | None = None) -> Tensor:
        """Roots R of the output Hessian, ``n x m x m``, at the network's outputs."""
        return hessian_root(self.likelihood, self.outputs if at is None else at)

    def log_prob(self, values: Tensor) -> Tensor:
        """Log likelihood of the targets at latent values ``n x m``, total nats."""
        return log_prob(self.likelihood, values, self.Y).sum()

    def expand(self, per_group: Tensor) -> Tensor:
        """Spread one number per group over the weights, ``p``."""
        by_name = {
            n: per_group[g] for g, names in enumerate(self.groups) for n in names
        }
        params = self.net.params
        return torch.cat(
            [by_name[name].expand(params[name].numel()) for name in self.unit_std]
        )

    def unit_scale(self) -> Tensor:
        """Standard deviation of each weight at unit prior variance, ``p``."""
        params = self.net.params
        return torch.cat(
            [s.expand(params[n].shape).reshape(-1) for n, s in self.unit_std.items()]
        ).double()

    # -- function space -------------------------------------------------------------

    def grams(self) -> list[Tensor]:
        """Gram matrix of each group at unit variance, ``(n m) x (n m)``, float64."""
        if self._grams is None:
            self.check_size("The Gram matrix")
            with torch.no_grad():
                self._grams = [
                    self.features(
                        self.X,
                        {n: self.unit_std[n] for n in self.unit_std if n in names},
                    )
                    .to(torch.float64)  # before the sums, or K loses positivity
                    .gram()
                    for names in map(set, self.groups)
                ]
        return self._grams

    def gram(self, prior_variance: Tensor) -> Tensor:
        """Prior covariance of the latent values, differentiable in its variances."""
        total = 0.0
        for variance, gram in zip(prior_variance, self.grams(), strict=True):
            total = total + variance * gram
        return total

    # -- weight space ---------------------------------------------------------------

    def batches(self, unit: bool = True, std: dict[str, Tensor] | None = None):
        """The data in chunks whose dense features fit the workspace."""
        return _Batches(self, self.unit_std if unit else std)

    def precision(self) -> Tensor:
        r""":math:`J^\top R R^\top J` at unit variance, ``p x p``, float64.

        Differentiable in Gaussian noise; where one noise serves all points the scatter
        of each pair of outputs is kept and combined. Else R is frozen.
        """
        root = self.root()
        if not is_gaussian(self.likelihood) or not has_shared_noise(self.likelihood):
            if is_gaussian(self.likelihood) and root.requires_grad:
                return _Precision.apply(root, self)
            root = root.detach()
            kept = self._frozen_precision
            if kept is None or not torch.equal(kept[0], root):
                self._frozen_precision = (root, self._accumulate(root))
            return self._frozen_precision[1]
        curvature = root[0] @ root[0].mT  # the same m x m matrix at every point
        total = 0.0
        for (j, k), scatter in self.scatter().items():
            total = total + curvature[j, k] * scatter
        return total

    def scatter(self) -> dict[tuple[int, int], Tensor]:
        r""":math:`J_j^\top J_k` by pair of outputs, symmetrised, without zero pairs."""
        if self._scatter is None:
            self.check_size("The scatter matrix")
            m, p = self.outputs.shape[1], self.num_params
            diagonal = not getattr(self.likelihood, "rank", 0)
            pairs = [(j, k) for j in range(m) for k in range(j, m)]
            pairs = [(j, k) for j, k in pairs if j == k or not diagonal]
            total = {pair: self.outputs.new_zeros(p, p) for pair in pairs}
            with torch.no_grad():
                for features, _ in self.batches():
                    rows = features.rows().double().unflatten(0, (-1, m))
                    for (j, k), scatter in total.items():
                        scatter.addmm_(rows[:, j].mT, rows[:, k])
            self._scatter = {
                (j, k): s if j == k else s + s.mT for (j, k), s in total.items()
            }
        return self._scatter

    def _accumulate(self, root: Tensor) -> Tensor:
        self.check_size("The precision matrix")
        total = self.outputs.new_zeros(self.num_params, self.num_params)
        start = 0
        with torch.no_grad():
            for features, _ in self.batches():
                stop = start + features.value.shape[0]
                rows = features.rows().double()
                add_scatter(total, apply_root(root[start:stop].mT, rows))
                start = stop
        return symmetrise(total)

    def rows(self) -> Tensor | None:
        """Dense unit features ``(n m) x p``, or None if they take too much memory."""
        needed = 8 * self.outputs.numel() * self.num_params
        if needed > self.inference.memory_budget / 4:
            return None
        if self._rows is None:
            with torch.no_grad():
                parts = [features.rows().double() for features, _ in self.batches()]
            self._rows = torch.cat(parts)
        return self._rows

    def matmul(self, weights: Tensor) -> Tensor:
        """Product of the unit features with a ``p`` vector, ``n x m``."""
        rows = self.rows()
        if rows is not None:
            return (rows @ weights).reshape(self.outputs.shape)
        full = weights * self.unit_scale()
        return torch.cat(
            [jvp(self.net, x, full.to(x)).double() for x in self._chunks()]
        )

    def t_matmul(self, values: Tensor) -> Tensor:
        """Transposed product of the unit features with ``n x m``, ``p``."""
        rows = self.rows()
        if rows is not None:
            return rows.mT @ values.reshape(-1)
        total, start = 0.0, 0
        for x in self._chunks():
            u = values[start : start + len(x)]
            total = total + vjp(self.net, x, u.to(x)).double()
            start += len(x)
        return total * self.unit_scale()

    def _chunks(self) -> Iterator[Tensor]:
        return iter(self.X.split(256))

    # -- conditioning ---------------------------------------------------------------

    def features(self, X: Tensor, std: dict[str, Tensor]) -> TangentFeatures:
        """Features of ``batch x n`` points for a prior standard deviation."""
        structured = isinstance(self.inference, Structure)
        return tangent_features(self.net, X, std, "layers" if structured else "auto")

    def scaled_std(self, prior_variance: Tensor) -> dict[str, Tensor]:
        """Prior standard deviation of each weight, detached."""
        std = prior_variance.detach().sqrt().to(self.net.dtype)
        by_name = {n: std[g] for g, names in enumerate(self.groups) for n in names}
        return {n: unit * by_name[n] for n, unit in self.unit_std.items()}

    def feature_std(self, prior_variance: Tensor) -> dict[str, Tensor]:
        """Deviations of the features that the strategy sees test points by."""
        if isinstance(self.inference, Sampled):
            one = prior_variance.new_ones((), dtype=self.net.dtype)
            return {name: one for name in self.unit_std}
        return self.scaled_std(prior_variance)

    def strategy(self, prior_variance: Tensor) -> PredictionStrategy:
        """Condition the linear model, at the roots R of the network's outputs."""
        inference = self.inference
        if isinstance(inference, Sampled):
            return self.sampled_strategy(prior_variance)
        if isinstance(inference, Structure):
            return self.structured_strategy(prior_variance)
        with torch.no_grad():
            std = self.scaled_std(prior_variance)
            too_large = self.bytes_needed > inference.memory_budget
            if inference.space == "matrix_free" or (
                inference.space == "auto" and too_large
            ):
                solver = ConjugateGradients(tolerance=inference.tolerance)
                return MatrixFreeStrategy(self.net, self.X, std, self.root(), solver)
            if self.space == "function":
                features = self.features(self.X, std)
                gram = self.gram(prior_variance.detach().double())
                return FunctionSpaceStrategy(features, gram, self.root())
            scale = self.expand(prior_variance.detach().double().sqrt())
            precision = self.precision() * scale * scale[:, None]
            batches = self.batches(unit=False, std=std)
            return WeightSpaceStrategy(batches, self.num_params, precision)


class _Precision(torch.autograd.Function):
    """The precision as a function of roots that a learnt noise moves, point by point.

    A graph through all rows would hold n m p numbers: backward is one more pass.
    """

    @staticmethod
    def forward(ctx: Any, root: Tensor, problem: TangentProblem) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(root)
        return problem._accumulate(root)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (root,), parts, start = ctx.saved_tensors, [], 0
        both = grad + grad.mT
        for features, _ in ctx.problem.batches():
            rows = features.rows().double().unflatten(0, features.value.shape)
            here = root[start : start + len(rows)]
            parts.append(rows @ both @ rows.mT @ here)
            start += len(rows)
        return torch.cat(parts), None


class _Batches:
    """Re-iterable pairs of features and roots, one chunk of points at a time."""

    def __init__(self, problem: TangentProblem, std: dict[str, Tensor]) -> None:
        self.problem, self.std = problem, std

    def __iter__(self) -> Iterator[tuple[DenseFeatures, Tensor]]:
        problem = self.problem
        per_point = 8 * problem.outputs.shape[1] * problem.num_params
        step = max(1, _CHUNK_BYTES // per_point)
        roots = problem.root().detach()
        for x, root in zip(problem.X.split(step), roots.split(step), strict=True):
            with torch.no_grad():
                features = tangent_features(problem.net, x, self.std)
                yield DenseFeatures(features.value, features.rows()), root
