r"""Deep Gaussian processes that train: means, variances, inducing points to start at.

At the start every hidden layer passes its inputs on, by a fixed linear map and almost
without noise, so that the model is a sparse GP of a linear map of its inputs. Without
that the signal drowns in the first layers: their prior functions are not injective.
In: inputs, widths, kernels. Out: a :class:`~gpbridge.dnn.deep_gp.DeepGaussianProcess`.
Next: ``deep_gp_fit``.

References:
    Salimbeni, Deisenroth, Doubly stochastic variational inference for deep Gaussian
    processes, NeurIPS 2017, section 3 (fixed maps) and the supplement (small variance).
    Dutordoir et al., GPflux: a library for deep Gaussian processes, 2021, for values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import (
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
)
from gpytorch.means import ConstantMean
from torch import Generator, Size, Tensor

from gpbridge.centroids import centroids
from gpbridge.checks import (
    ReliabilityWarning,
    ShapeError,
    check_count,
    check_generator,
    check_inputs,
    check_not_empty,
    check_number,
    check_positive,
    check_sequence,
    warn_user,
)
from gpbridge.dnn.deep_gp import DeepGaussianProcess
from gpbridge.dnn.deep_gp_layer import FixedLinearMean, InducingLayer
from gpbridge.frozen import copy_without_hooks
from gpbridge.inducing_covariances import has_own_domain, inducing_width
from gpbridge.inducing_points import initial_inducing_points
from gpbridge.likelihoods import outputs_of

KernelFactory = Callable[[int], Kernel]
"""Makes a layer's kernel, given the number of the layer's inputs."""

WIDEST = 30  # hidden outputs by default, as Salimbeni and Deisenroth
LENGTHSCALE = 2.0
NOISE_FLOOR = 1e-6
_ROWS = 100  # whose prior variance is looked at


def build_deep_gp(
    train_X: Tensor,
    likelihood: Likelihood | None = None,
    *,
    num_outputs: int | None = None,
    depth: int = 2,
    width: int | Sequence[int] | None = None,
    num_inducing: int = 100,
    kernels: KernelFactory | Sequence[KernelFactory | None] | None = None,
    inducing_points: Sequence[Tensor | None] | None = None,
    hidden_variance: float = 1e-6,
    hidden_std: float = 1e-5,
    noise_variance: float = 1e-2,
    generator: Generator | None = None,
) -> DeepGaussianProcess:
    r"""Build a deep GP with initial values from which it trains.

    ===================  ==========================================================
    hidden mean          fixed: identity; for fewer outputs the projection on the
                         first principal components; for more, identity and zeros
    last mean            a constant for each output, trained
    kernel               squared exponential, a lengthscale of 2 for each input
    variance             1e-6 in hidden layers, 1 in the last
    q(v)                 standard deviation 1e-5 in hidden layers, the prior in the
                         last
    inducing points      k-means of the inputs, pushed through the fixed maps; random
                         patches or elements of orbits for kernels that have them
    noise                1e-2, at least 1e-6
    ===================  ==========================================================

    These are for inputs and targets with mean zero and variance one.

    Args:
        train_X: Inputs ``n x d``; they say dtype and device.
        likelihood: Gaussian, multitask Gaussian without correlations, softmax without
            mixing weights, probit or logistic; shared, as in gpytorch, and moved to the
            dtype and device of the inputs. Default Gaussian noise.
        num_outputs: The number m of outputs; default what the likelihood says, or 1.
        depth: The number of layers; 1 is a sparse variational GP.
        width: Outputs of the hidden layers, or of each; default d, at most 30.
        num_inducing: Inducing points of each layer; fewer where the inputs hold no more
            distinct ones.
        kernels: A factory ``num_inputs -> Kernel`` for all layers, or one for each,
            None for the default. What it returns, with empty batch shape or one kernel
            for each output, is copied and scaled by a trained variance, such that the
            mean prior variance at the inducing points is that of the table; at the
            inputs where these are no inducing points. A ``ConvolutionalKernel`` or
            ``InvariantKernel`` has its patches or elements of orbits for these.
        inducing_points: First points ``M x d`` of each layer, or None for the rule.
        hidden_variance: Prior variance of hidden layers around their maps.
        hidden_std: Of the whitened inducing values of hidden layers.
        noise_variance: Of the default likelihood.
        generator: Source of the centroids; None is a fresh one with seed 0.

    Returns:
        The model, untrained.

    Raises:
        ShapeError: If numbers of outputs, widths or kernels do not fit the depth.
        ValueError: If an option is out of range.
        TypeError: If a factory returns no kernel.

    Warns:
        ReliabilityWarning: If inputs are far from standardised and the kernel is the
            default.

    Example:
        >>> X = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
        >>> model = build_deep_gp(X, depth=3, width=2, num_inducing=10)
        >>> model(X, num_samples=5).mean.shape
        torch.Size([5, 50])
    """
    check_inputs(train_X)
    check_not_empty(train_X=train_X)
    if train_X.dim() != 2:
        raise ShapeError(
            f"train_X must be ``n x d``, but has shape {tuple(train_X.shape)}. For "
            "images try train_X.flatten(1)."
        )
    check_count(depth=depth, num_inducing=num_inducing)
    check_number(
        hidden_variance=hidden_variance,
        hidden_std=hidden_std,
        noise_variance=noise_variance,
    )
    check_positive(
        hidden_variance=hidden_variance,
        hidden_std=hidden_std,
        noise_variance=noise_variance,
    )
    generator = (
        Generator(train_X.device).manual_seed(0) if generator is None else generator
    )
    check_generator(generator, train_X.device)
    likelihood, m = _likelihood(likelihood, num_outputs, noise_variance, train_X)
    widths = [train_X.shape[1], *_widths(width, depth, train_X.shape[1]), m]
    factories = _one_each("kernels", kernels, depth)
    points = _one_each("inducing_points", inducing_points, depth)
    if factories[0] is None:
        _warn_of_scales(train_X)

    X = train_X.detach()
    centers = centroids(X, num_inducing, generator)
    layers = []
    for number in range(depth):
        d, h = widths[number], widths[number + 1]
        last = number == depth - 1
        kernel = _kernel(factories[number], d, h, X)
        Z = points[number]
        if Z is None and has_own_domain(kernel):
            Z = initial_inducing_points(kernel, X, num_inducing, generator)
        elif Z is None:
            Z = centers
        else:
            check_inputs(Z, "inducing_points", None if has_own_domain(kernel) else d)
        Z = Z.to(X)
        e = inducing_width(kernel, d)
        if Z.shape[-1] != e:
            raise ShapeError(
                f"Inducing points of layer {number} must have {e} columns, what the "
                f"base kernel of its {type(kernel.base_kernel).__name__} sees of {d} "
                f"inputs, but have {Z.shape[-1]}. Pass inducing_points of that width."
            )
        scale = 1.0 if last else hidden_variance
        if last:
            mean = ConstantMean(batch_shape=Size([h])).to(X)
        else:
            mean = FixedLinearMean(linear_map(X, h))
        std = 1.0 if last else hidden_std
        layer = InducingLayer(kernel, mean, Z, d, h, std)
        _set_variance(layer, scale, X)
        layers.append(layer)
        if not last:
            X, centers = mean(X).mT, mean(centers).mT
    return DeepGaussianProcess(layers, likelihood)


def linear_map(X: Tensor, num_outputs: int) -> Tensor:
    """The fixed map of a hidden layer with inputs ``n x d``, weights ``h x d``.

    Identity, padded with zeros for more outputs than inputs; for fewer the first
    principal directions of the inputs, each with a positive largest entry.
    """
    d = X.shape[-1]
    if num_outputs >= d:
        return torch.eye(num_outputs, d).to(X)
    centered = (X - X.mean(0)).double()
    # Of the d x d covariance: n may be large.
    directions = torch.linalg.eigh(centered.mT @ centered).eigenvectors.mT
    directions = directions.flip(0)[:num_outputs]
    largest = directions.abs().argmax(-1, keepdim=True)
    return (directions * directions.gather(-1, largest).sign()).to(X)


def _kernel(factory: KernelFactory | None, d: int, h: int, like: Tensor) -> ScaleKernel:
    if factory is None:
        base = RBFKernel(ard_num_dims=d)
        base.lengthscale = LENGTHSCALE
    else:
        if isinstance(factory, Kernel):
            raise TypeError(
                "kernels must be factories, since each layer has its own kernel, but "
                f"one is a {type(factory).__name__}. Try kernels=lambda num_inputs: "
                f"{type(factory).__name__}(ard_num_dims=num_inputs)."
            )
        if not callable(factory):
            raise TypeError(
                "kernels must be functions of the number of inputs, or None for the "
                f"default, but one is {factory!r}. Try kernels=lambda num_inputs: "
                "MaternKernel(ard_num_dims=num_inputs)."
            )
        base = factory(d)
        if not isinstance(base, Kernel):
            raise TypeError(
                "A factory in kernels must return a gpytorch Kernel, but returned a "
                f"{type(base).__name__}. Try kernels=lambda num_inputs: "
                "MaternKernel(ard_num_dims=num_inputs)."
            )
        base = copy_without_hooks(base)
    if base.batch_shape not in (Size(), Size([h])):
        raise ShapeError(
            f"A kernel of a layer with {h} outputs must have an empty batch_shape, or "
            f"({h},), but has {tuple(base.batch_shape)}."
        )
    return ScaleKernel(base, batch_shape=base.batch_shape).to(like)


@torch.no_grad()
def _set_variance(layer: InducingLayer, variance: float, X: Tensor) -> None:
    kernel = layer.covar_module
    kernel.outputscale = torch.ones_like(kernel.outputscale)
    if has_own_domain(kernel):
        # An average of a function varies less than the function.
        at_points = kernel(X[:_ROWS], diag=True).mean(-1)
    else:
        at_points = layer.inducing_covariance().diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool((at_points > 0).all()):
        raise ValueError(
            "A layer's kernel has variance zero at its inducing points. Give it a "
            "constant part, as a bias or a sum with another kernel."
        )
    kernel.outputscale = variance / at_points


def _likelihood(
    likelihood: Likelihood | None,
    num_outputs: int | None,
    noise_variance: float,
    like: Tensor,
) -> tuple[Likelihood, int]:
    if num_outputs is not None:
        check_count(num_outputs=num_outputs)
    if likelihood is None:
        m = num_outputs or 1
        floor = GreaterThan(NOISE_FLOOR)
        if m == 1:
            made = GaussianLikelihood(noise_constraint=floor)
            made.noise = max(noise_variance, 2 * NOISE_FLOOR)
        else:
            made = MultitaskGaussianLikelihood(
                m, rank=0, noise_constraint=floor, has_global_noise=False
            )
            made.task_noises = torch.full((m,), max(noise_variance, 2 * NOISE_FLOOR))
        return made.to(like), m
    m = outputs_of(likelihood)
    if m is None and num_outputs is None:
        raise ValueError(
            f"The number of outputs that a {type(likelihood).__name__} needs is not "
            "known. Pass num_outputs."
        )
    if None not in (m, num_outputs) and m != num_outputs:
        raise ShapeError(
            f"{type(likelihood).__name__} is of {m} outputs, but num_outputs is "
            f"{num_outputs}. Leave num_outputs out."
        )
    return likelihood.to(like), m or num_outputs


def _widths(width: int | Sequence[int] | None, depth: int, d: int) -> list[int]:
    if width is None:
        width = min(d, WIDEST)
    if not isinstance(width, Sequence):
        check_count(width=width)
        width = [width] * (depth - 1)
    widths = list(width)
    for one in widths:
        check_count(width=one)
    if len(widths) != depth - 1:
        raise ShapeError(
            f"width must be a number, or one for each of {depth - 1} hidden layers, "
            f"but there are {len(widths)}: {widths}."
        )
    return widths


def _one_each(name: str, given: object, depth: int) -> list:
    if given is None or callable(given):
        return [given] * depth
    check_sequence(**{name: given})
    if len(given) != depth:
        raise ShapeError(
            f"{name} must have one entry for each of {depth} layers, but has "
            f"{len(given)}. Put None where a layer has the default."
        )
    return list(given)


def _warn_of_scales(X: Tensor) -> None:
    std = X.std(0, correction=0)
    std = std[std > 0]
    if len(X) > 1 and bool(((std < 0.1) | (std > 10)).any()):
        warn_user(
            f"Columns of train_X have standard deviations from {std.min():.3g} to "
            f"{std.max():.3g}, but first lengthscales of {LENGTHSCALE:g} are for "
            "standardised inputs. Try gpbridge.data.standardize(train_X).",
            ReliabilityWarning,
        )
