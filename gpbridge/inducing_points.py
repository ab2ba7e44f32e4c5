"""Where inducing points start: at centroids, random patches or elements of orbits.

In: a kernel and training inputs. Out: distinct points in the space of the base kernel.
Next: ``inducing_gp``, and layers of deep GPs.
"""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from torch import Generator, Tensor

from gpbridge.centroids import centroids
from gpbridge.checks import check_count, check_inputs, check_not_empty
from gpbridge.inducing_covariances import has_orbits, inducing_width
from gpbridge.randomness import fresh

SPREAD = 1e-3  # of what is added: uniform below it
_ROWS = 64  # whose orbits are formed at a time
_ROUNDS = 8  # of candidates, before the inputs are taken to hold no more


@torch.no_grad()
def initial_inducing_points(
    kernel: Kernel,
    train_X: Tensor,
    num_inducing: int,
    generator: Generator | None = None,
) -> Tensor:
    """Distinct points that represent the training inputs as the base kernel sees them.

    Random patches for a ``ConvolutionalKernel``, random elements of orbits for an
    ``InvariantKernel``; a composition takes those of its first kernel with orbits. Each
    is drawn from a random row and a random element. Equal ones count once (most images
    have many empty patches), and a number uniform on [0, 0.001] is added to each entry.
    Other kernels have centroids of the rows by k-means, at up to 30 n m d.

    There are fewer points than asked for where the inputs hold no more distinct ones:
    all of them are inducing points then, and a further one would add nothing. Of
    patches and orbits those count that 16 m draws find.

    Args:
        kernel: The kernel of the model.
        train_X: Training inputs ``n x d``.
        num_inducing: The largest number m of points.
        generator: Source of randomness. Without one, draws differ in each call.

    Returns:
        Points ``m x d'``.

    Example:
        >>> from gpytorch.kernels import RBFKernel, ScaleKernel
        >>> from gpbridge.kernels import ConvolutionalKernel
        >>> kernel = ScaleKernel(ConvolutionalKernel(RBFKernel(), (8, 8), (3, 3)))
        >>> initial_inducing_points(kernel, torch.rand(10, 64), 20).shape
        torch.Size([20, 9])

    References:
        van der Wilk, Rasmussen and Hensman, Convolutional Gaussian processes, NeurIPS
        2017, section 5. Salimbeni and Deisenroth, Doubly stochastic variational
        inference for deep Gaussian processes, NeurIPS 2017 (k-means).
    """
    check_inputs(train_X)
    check_not_empty(train_X=train_X)
    check_count(num_inducing=num_inducing)
    inducing_width(kernel, train_X.shape[-1])  # refuses parts that disagree
    generator = fresh(generator, train_X.device)
    inner = next((k for k in kernel.modules() if has_orbits(k)), None)
    if inner is None:
        return centroids(train_X, num_inducing, generator)
    X = train_X
    if inner.active_dims is not None:
        X = X.index_select(-1, inner.active_dims)
    found = X.new_zeros(0, inner.augmentation.output_width(X.shape[-1]))
    for _ in range(_ROUNDS):
        new = _random_elements(inner.augmentation, X, 2 * num_inducing, generator)
        found = _distinct(torch.cat([found, new]), generator)
        if len(found) >= num_inducing:
            break
    found = found[:num_inducing]
    shape, device = found.shape, generator.device
    shift = torch.rand(shape, generator=generator, dtype=found.dtype, device=device)
    return found + SPREAD * shift.to(found.device)


def _distinct(points: Tensor, generator: Generator) -> Tensor:
    """Rows that differ, in random order."""
    points = points.unique(dim=0)
    order = torch.randperm(len(points), generator=generator, device=generator.device)
    return points[order.to(points.device)]


def _random_elements(
    augmentation: torch.nn.Module, X: Tensor, count: int, generator: Generator
) -> Tensor:
    """One random element of the orbit of each of ``count`` random rows."""
    device = generator.device
    drawn = []
    rows = torch.randint(len(X), (count,), generator=generator, device=device)
    for part in rows.to(X.device).split(_ROWS):
        orbits = augmentation(X[part])  # b x s x d'
        size = (len(part),)
        index = torch.randint(
            orbits.shape[-2], size, generator=generator, device=device
        ).to(X.device)
        drawn.append(orbits[torch.arange(len(part), device=X.device), index])
    return torch.cat(drawn)
