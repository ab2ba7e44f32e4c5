"""What a sampled GP observes: data that fit together, their noise, further batches.

In: tensors as the user passes them. Out: errors at the door, :class:`NewData`, one
noise variance per point. Several outputs share one linear system, so that a point has
one noise variance. Next: ``state`` keeps them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
)
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_finite,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_device,
    check_same_dtype,
    check_same_length,
    check_tensor,
)
from gpbridge.types import Solver

NOISE_FLOOR = 1e-6
GAUSSIAN = (GaussianLikelihood, FixedNoiseGaussianLikelihood)


class NewData(NamedTuple):
    """Observations that a batch of systems does not share, targets transformed."""

    X: Tensor  # batch x n' x d, as the user passed them
    Y: Tensor  # batch' x n' x m
    noise: Tensor  # batch x n'


def shared_noise(noise: Tensor, X: Tensor) -> Tensor:
    """One variance per point, of ``... x n' x m`` or ``... x 1 x m``."""
    check_tensor(noise=noise)
    check_positive(noise=noise)
    wanted = tuple(X.shape[:-1])
    broadcast = noise.dim() > 1 and noise.dim() <= X.dim()
    if not broadcast or noise.shape[-2] not in (1, X.shape[-2]):
        raise ShapeError(
            f"noise must be ``{' x '.join(map(str, wanted))} x m`` for X of shape "
            f"{tuple(X.shape)}, but has shape {tuple(noise.shape)}."
        )
    if not bool((noise == noise[..., :1]).all()):
        raise ValueError(
            "noise must be the same for all outputs, which share one linear system, "
            f"but has shape {tuple(noise.shape)} and differs. Put one model per output "
            "in a ModelList, with generators of different seeds."
        )
    return noise[..., 0].detach().expand(X.shape[:-1])


def appended(old: NewData, new: NewData) -> NewData:
    """Concatenate observations along points, batches broadcast."""
    joined = []
    for a, b, trailing in zip(old, new, (2, 2, 1), strict=True):
        batch = torch.broadcast_shapes(a.shape[:-trailing], b.shape[:-trailing])
        a = a.expand(*batch, *a.shape[-trailing:])
        b = b.expand(*batch, *b.shape[-trailing:])
        joined.append(torch.cat([a, b], dim=-trailing))
    return NewData(*joined)


def check_data(X: Tensor, Y: Tensor, variance: Tensor | None) -> None:
    """The data of the constructor."""
    check_inputs(X)
    check_not_empty(train_X=X)
    check_tensor(train_Y=Y)
    if X.dim() != 2 or Y.dim() != 2:
        raise ShapeError(
            "train_X must be ``n x d`` and train_Y ``n x m``, but have shapes "
            f"{tuple(X.shape)} and {tuple(Y.shape)}. For one output try "
            "train_Y[:, None]; put several data sets in a ModelList."
        )
    check_same_device(train_X=X, train_Y=Y)
    check_same_length(train_X=X, train_Y=Y)
    check_same_dtype("train_Y", Y, X.dtype)
    check_finite(train_Y=Y)
    if variance is not None:
        check_tensor(train_Yvar=variance)
        check_positive(train_Yvar=variance)
        if variance.shape != (len(X), 1) or Y.shape[-1] != 1:
            raise ShapeError(
                f"train_Yvar must be ``n x 1`` with one output, but has shape "
                f"{tuple(variance.shape)} for train_Y {tuple(Y.shape)}. Outputs share "
                "one linear system; put one model per output in a ModelList."
            )


def check_parts(kernel: Kernel, likelihood: Likelihood, X: Tensor, m: int) -> None:
    """What does not share one linear system between m outputs is refused."""
    if not isinstance(kernel, Kernel):
        raise TypeError(
            "covar_module must be a gpytorch Kernel, but is "
            f"{type(kernel).__name__}. Try ScaleKernel(MaternKernel(nu=2.5))."
        )
    if not isinstance(likelihood, GAUSSIAN):
        raise TypeError(
            "likelihood must be a GaussianLikelihood or FixedNoiseGaussianLikelihood, "
            f"but is {type(likelihood).__name__}."
        )
    if isinstance(likelihood, GaussianLikelihood) and likelihood.noise.numel() != 1:
        raise ShapeError(
            "likelihood must have one noise variance, which all points and outputs "
            f"share, but has {likelihood.noise.numel()}. Put one model per output in a "
            "ModelList."
        )
    if isinstance(likelihood, FixedNoiseGaussianLikelihood):
        if m > 1 or likelihood.noise.shape != (len(X),):
            raise ShapeError(
                f"Fixed noise must be ``n`` variances for one output, but has shape "
                f"{tuple(likelihood.noise.shape)} with n = {len(X)} and m = {m}. Put "
                "one model per output in a ModelList."
            )
    if len(kernel.batch_shape):
        raise ShapeError(
            "covar_module must have no batch, but has batch_shape "
            f"{tuple(kernel.batch_shape)}. Outputs share one kernel here; put one "
            "model per output in a ModelList."
        )


def check_solver(solver: Solver | None) -> None:
    """An object, not its name or its class."""
    if solver is None or (isinstance(solver, Solver) and not isinstance(solver, type)):
        return
    raise TypeError(
        "solver must be an object of gpbridge.solvers, such as "
        f"SketchAndProject(tolerance=1e-3), but is {solver!r}."
    )


def check_further(
    X: Tensor, Y: Tensor, noise: Tensor | None, m: int, likelihood: Likelihood
) -> None:
    """Observations that join the data of a model with m outputs."""
    check_tensor(Y=Y)
    check_same_dtype("Y", Y, X.dtype)
    size = X.shape[-2]
    if Y.shape[-2:] != (size, m):
        raise ShapeError(
            f"Y must be ``... x {size} x {m}`` for X of shape {tuple(X.shape)}, but "
            f"has shape {tuple(Y.shape)}."
        )
    check_finite(Y=Y)
    if noise is None and isinstance(likelihood, FixedNoiseGaussianLikelihood):
        raise ValueError(
            "noise must be given: FixedNoiseGaussianLikelihood holds the noise of the "
            "training points only. Pass the variances of the new observations, "
            f"``... x {size} x 1``."
        )
