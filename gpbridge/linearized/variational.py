r"""Variational refinement of a linearised classifier, from its training data alone.

A confident network has next to no curvature at its own outputs, so that its Laplace
posterior stays close to the prior and contradicts the labels. Here the Gaussian over
the weights of the linear model maximises the variational bound instead,

.. math::
    \sum_i \mathbb{E} \log p(y_i \mid f_i) - \mathrm{KL}\big(N(w, H^{-1}) \,\|\,
        N(0, S)\big), \qquad f_i \sim N(f(x_i) + J_i (w - w^*), \; J_i H^{-1} J_i^\top),

by damped natural-gradient steps: Laplace's formulas with the expected gradient and the
expected curvature over the logits. In: a classifier's problem. Out: a
:class:`Refinement`. Next: ``posterior`` answers with its mean and covariance together.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch
from typing import NamedTuple

import torch
from gpytorch.likelihoods import BernoulliLikelihood, Likelihood, SoftmaxLikelihood
from torch import Tensor
from tqdm import tqdm

from gpbridge.checks import check_count, check_positive, warn_user
from gpbridge.likelihoods import hessian_root, is_gaussian, log_prob, residual
from gpbridge.linearized.inference import Exact
from gpbridge.linearized.predictive import class_log_probabilities
from gpbridge.linearized.problem import TangentProblem
from gpbridge.prediction import (
    FunctionSpaceStrategy,
    PredictionStrategy,
    WeightSpaceStrategy,
    add_scatter,
    apply_root,
    factorise,
    symmetrise,
    triangular_blocks,
    triangular_inverse,
    whiten,
)
from gpbridge.randomness import row_normals

_LARGEST_STEP = 0.8  # measured: full steps oscillate
_HALVINGS = 8  # of a step that does not raise the bound
_SAMPLE_NUMBERS = 2**22  # alive at once, 32 MiB
_ROW_NUMBERS = 2**23  # of features alive at once, 64 MiB
_WORSE = 0.01  # nats per point above Laplace's that are not round-off of the draws
_MISFIT = 0.1  # nats per point above the network's that deserve a warning


class Refinement(NamedTuple):
    """A Gaussian over the weights of the linear model, chosen by the variational bound.

    Attributes:
        shift: Move of its mean away from the trained weights, over the prior standard
            deviation of each weight, ``p``.
        curvature: Expected curvature of each point in its outputs, ``n x m x m``.
        prior_variance: One per group, that it was found for.
        bounds: The bound on the log marginal likelihood of the linear model, total
            nats, at the start and after each step: estimates by fixed draws.
        losses: Mean training NLL of the averaged prediction (link ``"pairwise"``) at
            the start and after each step.
        network_loss: Mean training NLL of the network's own probabilities.
        step_size: Of the next step.
    """

    shift: Tensor
    curvature: Tensor
    prior_variance: Tensor
    bounds: Tensor
    losses: Tensor
    network_loss: Tensor
    step_size: Tensor

    def __repr__(self) -> str:
        """Its bound and loss, not its numbers."""
        steps, (n, _) = len(self.bounds) - 1, self.curvature.shape[:2]
        return (
            f"{type(self).__name__}(steps={steps}, bound={float(self.bounds[-1]):.6g}, "
            f"loss={float(self.losses[-1]):.4g}, n={n})"
        )

    def fits(self, prior_variance: Tensor, mean: str) -> bool:
        """Whether it is that of a model with these settings."""
        now, then = prior_variance.detach().double(), self.prior_variance.double()
        same = now.shape == then.shape and bool(
            ((now - then).abs() <= 1e-5 * then).all()
        )
        return same and mean == "network"


def check_refinable(likelihood: Likelihood, mean: str, inference: object) -> None:
    """Require a classifier around the network's output with a dense posterior.

    Raises:
        TypeError: If the model is a regression.
        ValueError: If its mean is another.
        NotImplementedError: If the posterior is not a dense one.
    """
    if is_gaussian(likelihood):
        raise TypeError(
            "refine is for classification: under Gaussian noise the posterior is exact "
            "already."
        )
    if mean != "network":
        raise ValueError(
            "refine starts from the network's output, but the model has "
            f"mean={mean!r}. Build it with mean='network'."
        )
    if not isinstance(inference, Exact) or inference.space == "matrix_free":
        raise NotImplementedError(
            f"refine needs a dense factor, inference is {type(inference).__name__}. "
            "Build it with inference=Exact(), perhaps with fewer random weights, as by "
            "parameters='last_layer'."
        )


@torch.no_grad()
def refine(
    problem: TangentProblem,
    prior_variance: Tensor,
    start: Refinement | None = None,
    *,
    max_steps: int = 1,
    tolerance: float = 1e-3,
    num_pairs: int = 40,
    seed: int = 0,
    progress: bool = True,
) -> Refinement | None:
    r"""Raise the variational bound from Laplace's approximation, or from a refinement.

    With :math:`\bar g_i, \bar B_i` the mean gradient and curvature of
    :math:`\log p(y_i \mid f_i)` over the marginal of its latent values, a step is

    .. math::
        C_i \leftarrow (1 - \rho) C_i + \rho \bar B_i, \qquad
        w \leftarrow w + \rho H^{-1} \Big( \sum_i J_i^\top \bar g_i - S^{-1} w \Big),
        \qquad H = S^{-1} + \sum_i J_i^\top C_i J_i .

    It is taken if the bound rises, else :math:`\rho` is halved. The bound and not the
    training NLL decides because it has a maximum at a posterior that is neither too
    broad nor too narrow; the NLL alone would also reward to drop the uncertainty. Means
    over logits are those of fixed antithetic draws, so that bounds are comparable.

    Each step costs what conditioning does: a few passes over the features where they
    are not held, a factorisation of the smaller matrix and the covariance of each
    training point. A halved step costs another.

    Args:
        problem: A classifier that :func:`check_refinable` lets pass.
        prior_variance: One variance per group.
        start: Where to go on.
        max_steps: Steps at most. The bound goes on rising after one, but held-out NLL
            may not: for overconfident networks one is the safer number.
        tolerance: Stop once a step gains less than this, in nats per point.
        num_pairs: Antithetic pairs of draws for each point.
        seed: Of the draws.
        progress: Whether to show a bar.

    Returns:
        The refinement, or None if no step from Laplace's approximation raised the bound
        or if its prediction fits the training labels worse than Laplace's.

    Raises:
        MemoryError: If the factor needs more than the memory budget.
        ValueError: If an option is out of range.

    References:
        Khan and Lin, Conjugate-computation variational inference, AISTATS 2017, for the
        steps. Opper and Archambeau, The variational Gaussian approximation revisited,
        Neural Computation 2009, for their fixed point.
    """
    check_count(max_steps=max_steps, num_pairs=num_pairs)
    check_positive(tolerance=tolerance)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ValueError(f"seed must be a whole number below 2^31, but is {seed!r}.")
    problem.check_size("The variational refinement")
    model = _LinearModel(problem, prior_variance.detach().double(), num_pairs, seed)
    step_size = _LARGEST_STEP
    if start is None:
        curvature = _square(problem.root().double())
        now = model.evaluate(curvature, torch.zeros_like(model.scale))
        bounds, losses = [now.bound], [now.loss]
    else:
        step_size = float(start.step_size)
        now = model.evaluate(start.curvature.double(), start.shift.double())
        bounds, losses = list(start.bounds), list(start.losses)
    bar = tqdm(
        range(max_steps), desc="refine", disable=None if progress else True, leave=False
    )
    for _ in bar:
        moved, step_size = _step(model, now, step_size)
        if moved is None:
            break
        gained = moved.bound - now.bound
        now = moved
        bounds.append(now.bound)
        losses.append(now.loss)
        bar.set_postfix(bound=float(now.bound), loss=float(now.loss))
        if gained <= tolerance * len(problem.X):
            break
    if len(bounds) == 1 or not losses[-1] <= losses[0] + _WORSE:
        return None
    network = class_log_probabilities(
        problem.likelihood, problem.outputs, torch.zeros_like(now.curvature), "plugin"
    )
    return Refinement(
        now.shift,
        now.curvature,
        prior_variance.detach().clone(),
        torch.stack(bounds),
        torch.stack(losses),
        -_of_labels(network, problem.Y).mean(),
        torch.as_tensor(step_size, dtype=torch.float64, device=now.shift.device),
    )


def refined_strategy(
    problem: TangentProblem, prior_variance: Tensor, refinement: Refinement
) -> PredictionStrategy:
    """Condition the linear model at the expected curvature of each point."""
    root = _curvature_root(refinement.curvature.double())
    std = problem.scaled_std(prior_variance)
    if problem.space == "function":
        gram = problem.gram(prior_variance.detach().double())
        return FunctionSpaceStrategy(problem.features(problem.X, std), gram, root)
    scale = problem.expand(prior_variance.detach().double().sqrt())
    precision = _precision(problem, root) * scale * scale[:, None]
    batches = problem.batches(unit=False, std=std)
    return WeightSpaceStrategy(batches, problem.num_params, precision)


def warn_about_refinement(found: Refinement | None) -> None:
    """Say where a refinement was given up, or does not fit its own labels."""
    if found is None:
        warn_user(
            "refine keeps the posterior as it was, and the network's own "
            "probabilities: no step improved it. The prior variance may be so small "
            "that the linear model cannot reach the labels; try that of the training, "
            "1 / (n weight_decay), or calibrate() on held-out data."
        )
    elif found.losses[-1] > found.network_loss + _MISFIT:
        warn_user(
            "The refined prediction fits the training labels worse than the network, "
            f"{float(found.losses[-1]):.3f} against {float(found.network_loss):.3f} "
            "nats per point. Try a larger prior variance, or calibrate() on held-out "
            "data."
        )


class _Point(NamedTuple):
    """A Gaussian over the weights, and what the next step needs to know of it."""

    curvature: Tensor
    shift: Tensor
    bound: Tensor
    loss: Tensor
    gradient: Tensor  # expected, of the log likelihood in the scaled weights, p
    expected: Tensor  # expected curvature, n x m x m


def _step(
    model: _LinearModel, now: _Point, step_size: float
) -> tuple[_Point | None, float]:
    """The next point and the size of the step after it; no point if none is better."""
    for _ in range(_HALVINGS):
        moved = model.move(now, step_size)
        if bool(moved.bound > now.bound):  # false for NaN
            return moved, min(2 * step_size, _LARGEST_STEP)
        step_size /= 2
    return None, step_size


class _LinearModel:
    """The offset form of a problem at fixed prior variances, in scaled weights."""

    def __init__(
        self,
        problem: TangentProblem,
        prior_variance: Tensor,
        num_pairs: int,
        seed: int,
    ) -> None:
        self.problem, self.num_pairs, self.seed = problem, num_pairs, seed
        self.scale = problem.expand(prior_variance.sqrt())
        net, std = problem.net, self.scale * problem.unit_scale()
        trained = net.flatten(net.params).detach().double()
        # A weight without prior variance has no feature, and stays where it is.
        self.trained = torch.where(std > 0, trained / std, 0.0)
        self.gram = None
        if problem.space == "function":
            self.gram = problem.gram(prior_variance)

    def factor(self, curvature: Tensor) -> _FunctionFactor | _WeightFactor:
        kind = _WeightFactor if self.gram is None else _FunctionFactor
        return kind(self, _curvature_root(curvature))

    def matmul(self, weights: Tensor) -> Tensor:
        return self.problem.matmul(self.scale * weights)

    def t_matmul(self, values: Tensor) -> Tensor:
        return self.scale * self.problem.t_matmul(values)

    def move(self, now: _Point, step_size: float) -> _Point:
        curvature = torch.lerp(now.curvature, now.expected, step_size)
        factor = self.factor(curvature)
        gradient = now.gradient - (self.trained + now.shift)
        shift = now.shift + step_size * factor.solve(gradient)
        return self._evaluate(curvature, shift, factor)

    def evaluate(self, curvature: Tensor, shift: Tensor) -> _Point:
        return self._evaluate(curvature, shift, self.factor(curvature))

    def _evaluate(self, curvature, shift, factor) -> _Point:
        problem = self.problem
        mean = problem.outputs + self.matmul(shift)
        blocks = factor.blocks()
        fit, gradient, expected = self._expect(mean, blocks)
        norm = (self.trained + shift).square().sum()
        divergence = 0.5 * (norm + factor.excess_trace() + factor.log_det())
        logs = class_log_probabilities(problem.likelihood, mean, blocks, "pairwise")
        loss = -_of_labels(logs, problem.Y).mean()
        gradient = self.t_matmul(gradient)  # once, however often a step is halved
        return _Point(curvature, shift, fit - divergence, loss, gradient, expected)

    def _expect(self, mean: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means over draws: log likelihood of all data, gradients, curvatures."""
        likelihood, (n, m) = self.problem.likelihood, mean.shape
        roots = _symmetric_root(likelihood, blocks)
        step = max(1, _SAMPLE_NUMBERS // (2 * self.num_pairs * m))
        fit, gradients, curvatures = 0.0, [], []
        for start in range(0, n, step):
            here = slice(start, start + step)
            f, y = mean[here], self.problem.Y[here]
            columns = self.num_pairs * m
            normal = row_normals(len(f), columns, self.seed, skip=start).to(f)
            moves = normal.unflatten(-1, (self.num_pairs, m)) @ roots[here]
            moves = moves.transpose(0, 1)  # pairs x b x m
            f = torch.cat([f + moves, f - moves])
            gradient = residual(likelihood, f, y)
            fit = fit + log_prob(likelihood, f, y).mean(0).sum()
            gradients.append(gradient.mean(0))
            curvatures.append(_mean_curvature(likelihood, f, gradient))
        return fit, torch.cat(gradients), torch.cat(curvatures)


class _FunctionFactor:
    """The factor of A = I + R' K R, ``n m x n m``."""

    def __init__(self, model: _LinearModel, root: Tensor) -> None:
        self.model, self.root = model, root
        self.cholesky = factorise(whiten(model.gram, root))
        self.inverse = triangular_inverse(self.cholesky)

    def solve(self, weights: Tensor) -> Tensor:
        seen = apply_root(self.root.mT, self.model.matmul(weights).reshape(-1, 1))
        explained = apply_root(self.root, torch.cholesky_solve(seen, self.cholesky))
        shape = self.model.problem.outputs.shape
        return weights - self.model.t_matmul(explained.reshape(shape))

    def blocks(self) -> Tensor:
        n, m = self.model.problem.outputs.shape
        step = max(1, _ROW_NUMBERS // (n * m * m))
        blocks = []
        for start in range(0, n, step):
            stop = min(start + step, n)
            gram = self.model.gram[:, start * m : stop * m]
            V = self.inverse @ apply_root(self.root.mT, gram)
            V = V.mT.unflatten(0, (-1, m))
            prior = gram[start * m : stop * m].unflatten(0, (-1, m))
            prior = prior.unflatten(-1, (-1, m)).diagonal(dim1=0, dim2=2)
            blocks.append(prior.permute(2, 0, 1) - V @ V.mT)
        return torch.cat(blocks)

    def excess_trace(self) -> Tensor:
        """Trace of H^-1 minus p, which is that of A^-1 minus n m."""
        return self.inverse.square().sum() - len(self.inverse)

    def log_det(self) -> Tensor:
        return 2 * self.cholesky.diagonal().log().sum()


class _WeightFactor:
    """The factor of H, ``p x p``."""

    def __init__(self, model: _LinearModel, root: Tensor) -> None:
        self.model, scale = model, model.scale
        H = _precision(model.problem, root).mul_(scale).mul_(scale[:, None])
        self.cholesky = factorise(H)
        self.inverse = triangular_inverse(self.cholesky)

    def solve(self, weights: Tensor) -> Tensor:
        return torch.cholesky_solve(weights[:, None], self.cholesky)[:, 0]

    def blocks(self) -> Tensor:
        m, scale = self.model.problem.outputs.shape[1], self.model.scale
        blocks = []
        for _, rows in _rows(self.model.problem):
            per_point = len(rows) // m, m
            blocks.append(triangular_blocks(rows * scale, self.inverse.mT, per_point))
        return torch.cat(blocks)

    def excess_trace(self) -> Tensor:
        return self.inverse.square().sum() - len(self.inverse)

    def log_det(self) -> Tensor:
        return 2 * self.cholesky.diagonal().log().sum()


def _rows(problem: TangentProblem) -> Iterator[tuple[slice, Tensor]]:
    """Unit features of some points at a time, ``(b m) x p``."""
    n, m = problem.outputs.shape
    kept, start = problem.rows(), 0
    if kept is not None:
        step = max(1, _ROW_NUMBERS // (m * problem.num_params))
        for start in range(0, n, step):
            stop = min(start + step, n)
            yield slice(start, stop), kept[start * m : stop * m]
        return
    for features, _ in problem.batches():
        stop = start + len(features.value)
        yield slice(start, stop), features.rows().double()
        start = stop


def _precision(problem: TangentProblem, root: Tensor) -> Tensor:
    """J' R R' J at unit prior variance, ``p x p``."""
    total = root.new_zeros(problem.num_params, problem.num_params)
    for here, rows in _rows(problem):
        add_scatter(total, apply_root(root[here].mT, rows))
    return symmetrise(total)


def _curvature_root(curvature: Tensor) -> Tensor:
    """Roots R with R R' = curvature, round-off below zero cut off."""
    if curvature.shape[-1] == 1:
        return curvature.clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(curvature)
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2)


def _symmetric_root(likelihood: Likelihood, blocks: Tensor) -> Tensor:
    """Symmetric roots of covariances: unlike Cholesky's they exist if singular."""
    if blocks.shape[-1] == 1:
        return blocks.clamp_min(0).sqrt()
    if isinstance(likelihood, SoftmaxLikelihood):  # which ignores a common shift
        blocks = blocks - blocks.mean(-1, keepdim=True)
        blocks = blocks - blocks.mean(-2, keepdim=True)
    values, vectors = torch.linalg.eigh(blocks)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def _square(root: Tensor) -> Tensor:
    return root @ root.mT


@singledispatch
def _mean_curvature(likelihood: Likelihood, f: Tensor, gradient: Tensor) -> Tensor:
    """Mean of minus the second derivative of log p over samples ``s x n x m``."""
    return _square(hessian_root(likelihood, f)).mean(0)


@_mean_curvature.register(SoftmaxLikelihood)
def _(likelihood, f, gradient):
    p = torch.softmax(f, -1).transpose(0, 1)  # n x s x m
    return torch.diag_embed(p.mean(1)) - p.mT @ p / p.shape[1]


@_mean_curvature.register(BernoulliLikelihood)
def _(likelihood, f, gradient):
    # The bound asks for the Hessian of this label, not for the Fisher information.
    # Rasmussen and Williams (2006), eq. (3.16): it is g (g + f), g = y phi / Phi.
    return (gradient * (gradient + f)).clamp_min(0).mean(0).unsqueeze(-1)


def _of_labels(logs: Tensor, Y: Tensor) -> Tensor:
    """Log probabilities of the labels, ``n``."""
    return logs.gather(-1, Y.reshape(-1, 1).long())[:, 0]
