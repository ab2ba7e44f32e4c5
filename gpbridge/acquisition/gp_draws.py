r"""Functions of any surrogate, frozen: what Thompson sampling maximises.

In: a posterior or a BoTorch model. Out: s functions in the caller's units, evaluated
together or each at inputs of its own, at a cost linear in the number of data and
without a joint covariance. Next: ``thompson`` maximises them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from botorch.models.gpytorch import BatchedMultiOutputGPyTorchModel
from botorch.models.model import Model, ModelList
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.sampling.pathwise.features.maps import FeatureMap
from botorch.sampling.pathwise.utils import get_train_inputs, get_train_targets
from gpytorch.kernels import Kernel
from gpytorch.models import ExactGP
from torch import Generator, Tensor, nn

from gpbridge.checks import ReliabilityWarning, check_count, warn_user
from gpbridge.function_draws import (
    SeenDraws,
    evaluate,
    evaluate_each,
    freeze,
    refreshed,
    take,
)
from gpbridge.pathwise import gaussian_noise
from gpbridge.posterior_draws import MeanColumns, PosteriorDraw, condition, dense
from gpbridge.prior_draws import PriorDraw, draw_prior
from gpbridge.randomness import fresh, standard_normal
from gpbridge.types import FunctionDraws, WeightPosterior

MAX_ANCHORS = 1024
_JITTER = 1e-8  # of the prior variance, in float64


class OutputDraws(nn.Module):
    """Draws of several models, an output or more of each, side by side.

    Args:
        parts: As many functions of each model.
    """

    def __init__(self, parts: Sequence[FunctionDraws]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @property
    def num_samples(self) -> int:
        """The number s of functions."""
        return self.parts[0].num_samples

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate all draws, ``... x n x d`` to ``s x ... x n x m``."""
        return torch.cat([evaluate(part, X) for part in self.parts], -1)

    def each(self, X: Tensor) -> Tensor:
        """Evaluate each draw at inputs of its own, ``s x ... x n x d`` likewise."""
        return torch.cat([evaluate_each(part, X) for part in self.parts], -1)

    def take(self, samples: Tensor) -> OutputDraws:
        """Some of the functions, by number."""
        return OutputDraws([take(part, samples) for part in self.parts])


class Untransform(nn.Module):
    """From transformed outcomes to the caller's.

    Args:
        transform: Fitted, or None.
    """

    def __init__(self, transform: OutcomeTransform | None) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, values: Tensor, X: Tensor) -> Tensor:
        """``... x n x m`` likewise, given the inputs."""
        if self.transform is None:
            return values
        return self.transform.untransform(values, X=X)[0]


class AnchorMap(FeatureMap):
    r"""Covariances with fixed points, :math:`\phi(x) = k(x, Z)`.

    Args:
        kernel: The kernel.
        points: Z, ``M x d``.
    """

    def __init__(self, kernel: Kernel, points: Tensor) -> None:
        super().__init__()
        self.kernel, self.num_outputs = kernel, len(points)
        self.input_transform = self.output_transform = nn.Identity()
        self.register_buffer("points", points)

    def forward(self, x: Tensor) -> Tensor:
        """``... x n x d`` to ``... x n x M``."""
        return dense(self.kernel, x, self.points)


def draw_functions(
    model: WeightPosterior | FunctionDraws | Model,
    num_samples: int,
    generator: Generator | None = None,
    *,
    anchors: Tensor | None = None,
) -> FunctionDraws:
    r"""Frozen functions of a posterior, in the caller's units.

    ===============================  ===============================================
    a GP of this library             its own ``draw``
    a posterior over weights         its ``draw``; of k members at most k, each once
    exact GPs of botorch             :func:`~gpbridge.pathwise.condition` of prior
                                     draws with Fourier features of their own, or the
                                     exact ones of the kernel
    several such GPs in a list       one after the other, outputs side by side
    functions                        a copy
    ===============================  ===============================================

    Their covariance is the posterior's, without bias. A kernel that has no features,
    as the infinitely wide network's, is drawn jointly at ``anchors`` and interpolated
    between them by its own conditional mean, which is smoother than the prior: how much
    variance is missing is measured, and said if it is more than a percent.

    Args:
        model: See above.
        num_samples: The number s of functions.
        generator: Source of all randomness. Without one, draws are fresh on each call;
            the global random state is left alone in either case.
        anchors: Points ``M x d`` in the caller's units, for kernels without features.

    Returns:
        A function of X, ``... x n x d`` to ``s x ... x n x m``.

    Raises:
        TypeError: If nothing can be drawn.

    Warns:
        ReliabilityWarning: If variance is missing between anchors, or batch norm has
            the statistics of other weights.

    Example:
        >>> from botorch.models import SingleTaskGP
        >>> X = torch.rand(8, 2).double()
        >>> draws = draw_functions(SingleTaskGP(X, X[:, :1]), 5)
        >>> draws(X[:3]).shape, draws.each(torch.rand(5, 3, 2).double()).shape
        (torch.Size([5, 3, 1]), torch.Size([5, 3, 1]))
    """
    check_count(num_samples=num_samples)
    generator = fresh(generator)
    if hasattr(model, "draw") or not isinstance(model, Model):
        return refreshed(freeze(model, num_samples, generator), None)
    if isinstance(model, ModelList):
        return OutputDraws(
            [
                draw_functions(part, num_samples, generator, anchors=anchors)
                for part in model.models
            ]
        )
    return _of_exact_gp(model, num_samples, generator, anchors)


@torch.no_grad()
def _of_exact_gp(
    model: Model, num_samples: int, generator: Generator, anchors: Tensor | None
) -> PosteriorDraw | SeenDraws:
    batched = isinstance(model, BatchedMultiOutputGPyTorchModel)
    if not isinstance(model, ExactGP) or (model.num_outputs > 1 and not batched):
        raise TypeError(_cannot_draw(model))
    model.eval()
    (X,) = get_train_inputs(model, transformed=True)
    Y = get_train_targets(model, transformed=True)
    if anchors is not None:
        anchors = model.transform_inputs(anchors.to(X))
    m, mean, kernel = model.num_outputs, model.mean_module, model.covar_module
    try:
        noise = gaussian_noise(model, X).diagonal(dim1=-1, dim2=-2)
        parts = [
            condition(
                _prior(
                    kernel if m == 1 else kernel[j],
                    X if m == 1 else X[j],
                    num_samples,
                    generator,
                    anchors,
                ),
                *((X, Y, noise) if m == 1 else (X[j], Y[j], noise[j])),
                mean=mean if m == 1 else MeanColumns(mean, m, [j]),
                generator=generator,
            )
            for j in range(m)
        ]
    except NotImplementedError as error:
        raise TypeError(f"{_cannot_draw(model)} {error}") from error
    before = copy.deepcopy(getattr(model, "input_transform", None))
    after = copy.deepcopy(getattr(model, "outcome_transform", None))
    if m > 1:
        before = nn.Identity() if before is None else before
        return SeenDraws(OutputDraws(parts), before, Untransform(after))
    (drawn,) = parts
    return PosteriorDraw(
        *(drawn.prior, drawn.X, drawn.weights, drawn.mean, before, after),
        drawn.solution,
    )


def _cannot_draw(model: Model) -> str:
    return (
        f"model is a {type(model).__name__}, of which no functions can be drawn. Pass "
        "an exact GP with Gaussian noise, a model or posterior with draw(num_samples, "
        "generator), or functions ``... x n x d`` to ``s x ... x n x m``."
    )


def _prior(
    kernel: Kernel,
    X: Tensor,
    num_samples: int,
    generator: Generator,
    anchors: Tensor | None,
) -> PriorDraw:
    try:
        return draw_prior(kernel, X.shape[-1], num_samples, generator=generator)
    except NotImplementedError:
        if anchors is None:
            raise
    Z = anchors
    if len(Z) > MAX_ANCHORS:
        order = torch.randperm(len(Z), generator=generator, device=generator.device)
        Z = Z[order[:MAX_ANCHORS].to(Z.device)]
    # At the data the draws must be exact, or the update would pull them elsewhere.
    seen = torch.randperm(len(X), generator=generator, device=generator.device)
    Z = torch.cat([X[seen[:MAX_ANCHORS].to(X.device)], Z])
    return _interpolated(copy.deepcopy(kernel), Z, num_samples, generator)


def _interpolated(
    kernel: Kernel, Z: Tensor, num_samples: int, generator: Generator
) -> PriorDraw:
    """Prior draws that are exact at the points Z and conditional means elsewhere."""
    kernel = kernel.double().requires_grad_(False)
    Z = Z.double()
    K = dense(kernel, Z, Z)
    variance = K.diagonal().mean()
    K.diagonal().add_(_JITTER * variance)
    root = torch.linalg.cholesky(K)
    # What the points before them leave open at the last tenth stands for other points.
    last = -max(len(Z) // 10, 1)
    missing = float(root.diagonal()[last:].square().mean() / variance)
    if missing > 0.01:
        warn_user(
            f"{type(kernel).__name__} has no feature map. Its draws are exact at "
            f"{len(Z)} points and lack {missing:.1%} of the prior variance between "
            "them. Pass more anchors, or another kernel.",
            ReliabilityWarning,
        )
    normal = standard_normal((len(Z), num_samples), generator, Z)
    weights = torch.linalg.solve_triangular(root.mT, normal, upper=True)
    return PriorDraw(kernel, [AnchorMap(kernel, Z)], [weights[..., None]], Z.shape[-1])
