r"""Functions drawn from a Gaussian process before any data.

In: a kernel with a feature map. Out: :math:`f_s(x) = \phi(x) w_s` with normal weights,
functions that are differentiable in x and stay what they are. Exact where the kernel
has finitely many features, as that of a network's tangent model; Fourier features stand
for its stationary parts. Next: ``posterior_draws`` conditions them on data.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from botorch.sampling.pathwise.features.maps import FeatureMap, KernelFeatureMap
from gpytorch.kernels import Kernel
from torch import Generator, Tensor, nn

from gpbridge.checks import ShapeError, check_positive
from gpbridge.kernels.compositions import (
    SumFeatureMap,
    amplitude,
    draw_feature_map,
    is_fourier,
    sine_cosine,
)
from gpbridge.randomness import fresh, standard_normal

TILE_BYTES = 2**26  # of features or covariances at a time
WAVES = {"cpu": 2**17, "cuda": 2**26}
"""Numbers at a time by type of device: what stays in the cache, or what fills a GPU."""

_ROWS = {"cpu": 64, "cuda": 4096}  # enough for a matrix product to be fast
NUM_FEATURES = 512


class PriorDraw(nn.Module):
    r"""Frozen functions :math:`f_s(x) = \phi_s(x) w_s` with the covariance of a kernel.

    Args:
        kernel: The kernel, whose hyperparameters the features follow.
        maps: Feature maps whose products with their weights are added. They return
            ``n x f`` features, or ``s x n x f`` if each draw has features of its own.
        weights: For each map, standard normals ``f x s x m``.
        num_inputs: The number d of input columns.
    """

    def __init__(
        self,
        kernel: Kernel,
        maps: Sequence[FeatureMap],
        weights: Sequence[Tensor],
        num_inputs: int,
    ) -> None:
        super().__init__()
        self.kernel, self.maps = kernel, nn.ModuleList(maps)
        self.num_inputs = num_inputs
        self.weights = nn.ParameterList(
            nn.Parameter(w, requires_grad=False) for w in weights
        )

    @property
    def num_samples(self) -> int:
        """The number s of functions."""
        return self.weights[0].shape[1]

    @property
    def num_outputs(self) -> int:
        """The number m of independent outputs of each function."""
        return self.weights[0].shape[2]

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate all draws, ``... x n x d`` to ``s x ... x n x m``."""
        check_points(X, self.num_inputs)
        rows = X.reshape(-1, X.shape[-1]).to(self.weights[0])
        values = sum(
            _in_tiles(feature_map, w, rows)
            for feature_map, w in zip(self.maps, self.weights, strict=True)
        )
        values = values.to(X.dtype).reshape(
            *X.shape[:-1], self.num_samples, self.num_outputs
        )
        return values.movedim(-2, 0)

    def each(self, X: Tensor) -> Tensor:
        """Evaluate each draw at inputs of its own, ``s x ... x n x d`` likewise."""
        check_points(X, self.num_inputs, self.num_samples)
        rows = X.flatten(1, -2).to(self.weights[0])
        values = 0.0
        for feature_map, w in zip(self.maps, self.weights, strict=True):
            if _own_frequencies(feature_map):
                x = feature_map.input_transform(rows)
                values = values + _waves(feature_map, w, x, feature_map.weight)
            else:
                phi = feature_map(rows)  # s x rows x f
                values = values + (phi @ w.movedim(1, 0)).transpose(0, 1)
        shape = *X.shape[:-1], self.num_outputs
        return values.transpose(0, 1).reshape(shape).to(X.dtype)

    def take(self, samples: Tensor) -> PriorDraw:
        """Some of the functions, by number."""
        maps = [_take(feature_map, samples) for feature_map in self.maps]
        weights = [w[:, samples] for w in self.weights]
        return PriorDraw(self.kernel, maps, weights, self.num_inputs)

    def take_outputs(self, outputs: Sequence[int]) -> PriorDraw:
        """Some of the outputs of all functions."""
        weights = [w[..., list(outputs)] for w in self.weights]
        return PriorDraw(self.kernel, self.maps, weights, self.num_inputs)


def draw_prior(
    kernel: Kernel,
    num_inputs: int,
    num_samples: int = 1,
    *,
    num_outputs: int = 1,
    num_features: int = NUM_FEATURES,
    generator: Generator | None = None,
    follow: bool = False,
) -> PriorDraw:
    r"""Draw functions from a Gaussian process with mean zero.

    .. math:: f_s(x) = \phi(x) w_s, \qquad w_s \sim N(0, I)

    Exact for kernels with finitely many features, so for networks:
    :math:`\phi(x) w = J(x) w_0` with :math:`w_0 \sim N(0, S)`. Stationary parts are
    replaced by Fourier features. Each draw has frequencies of its own, so that the
    covariance of a draw is the kernel's, without bias, for any number of features. With
    the same frequencies for all it would err by :math:`f^{-1/2}`, and a small posterior
    variance by much more, however many draws there are. (The factors of a product of
    kernels do share theirs; there are s times as many.) Memory f s m; a call on n
    points costs n f s m.

    Args:
        kernel: A gpytorch kernel without batch; copied, unless ``follow``.
        num_inputs: The number d of input columns.
        num_samples: The number s of functions.
        num_outputs: Independent outputs m of each function.
        num_features: Fourier features of each draw and of each part that needs them, an
            even number.
        generator: Source of all randomness. Without one, draws are fresh on each call;
            the global random state is left alone in either case.
        follow: Whether the functions change with the hyperparameters of ``kernel``:
            the same base draws, at other lengthscales.

    Returns:
        A function of X, ``... x n x d`` to ``s x ... x n x m``.

    Raises:
        NotImplementedError: If the kernel has no feature map.
        ShapeError: If the kernel has a batch shape.
        ValueError: If a number is not positive, or ``num_features`` odd.

    Example:
        >>> from gpytorch.kernels import MaternKernel
        >>> draw = draw_prior(MaternKernel(1.5), 2, 5)
        >>> draw(torch.rand(3, 4, 2)).shape
        torch.Size([5, 3, 4, 1])
    """
    check_positive(
        num_inputs=num_inputs,
        num_samples=num_samples,
        num_outputs=num_outputs,
        num_features=num_features,
    )
    if num_features % 2:
        raise ValueError(
            "num_features must be even, a sine and a cosine per frequency, but is "
            f"{num_features}. Try {num_features + 1}."
        )
    if len(kernel.batch_shape):
        raise ShapeError(
            "kernel must have no batch, but has batch_shape "
            f"{tuple(kernel.batch_shape)}. Draw from kernel[0], kernel[1] and so on."
        )
    generator = fresh(generator)
    if not follow:
        kernel = copy.deepcopy(kernel).requires_grad_(False)
    feature_map = draw_feature_map(
        kernel, num_inputs, num_samples * num_features, generator
    )
    maps = list(feature_map.maps) if _is_plain_sum(feature_map) else [feature_map]
    like = next(kernel.parameters(), torch.ones(())).detach()
    weights = []
    for part in maps:
        _separate(part, num_samples)
        size = (part.num_outputs, num_samples, num_outputs)
        weights.append(standard_normal(size, generator, like))
    return PriorDraw(kernel, maps, weights, num_inputs)


def check_points(X: Tensor, width: int, num_samples: int | None = None) -> None:
    """Require inputs ``... x n x d`` of the right width, or ``s x ... x n x d``.

    Shapes only: values are the kernel's business, and draws are also traced.

    Raises:
        ShapeError: If they have another shape.
    """
    wanted = "... x n" if num_samples is None else f"{num_samples} x ... x n"
    least = 2 if num_samples is None else 3
    fits = X.dim() >= least and X.shape[-1] == width
    if not fits or num_samples not in (None, X.shape[0]):
        remedy = "For one point try X[None]." if X.shape == (width,) else ""
        raise ShapeError(
            f"X must be ``{wanted} x {width}``, with columns as the draws were made "
            f"for, but has shape {tuple(X.shape)}. {remedy}".strip()
        )


def _own_frequencies(feature_map: FeatureMap) -> bool:
    return is_fourier(feature_map) and feature_map.weight.dim() == 3


def _own_features(feature_map: FeatureMap) -> bool:
    maps = (m for m in feature_map.modules() if isinstance(m, KernelFeatureMap))
    return any(part.weight.dim() == 3 for part in maps)


def _in_tiles(feature_map: FeatureMap, w: Tensor, rows: Tensor) -> Tensor:
    """Values of all draws, ``n x d`` to ``n x s x m``."""
    if _own_frequencies(feature_map):
        W, x = feature_map.weight, feature_map.input_transform(rows)
        kind = rows.device.type
        height = _ROWS.get(kind, _ROWS["cuda"])
        numbers = WAVES.get(kind, WAVES["cuda"])
        few = max(1, numbers // (height * W.shape[1]))  # draws at a time
        parts = [
            torch.cat([_waves(feature_map, v, z, V) for z in x.split(height)])
            for V, v in zip(W.split(few), w.split(few, 1), strict=True)
        ]
        return torch.cat(parts, 1)
    copies = w.shape[1] if _own_features(feature_map) else 1
    step = max(1, TILE_BYTES // (8 * len(w) * copies))
    parts = []
    for x in rows.split(step):
        phi = feature_map(x)
        if phi.dim() == 2:
            parts.append((phi @ w.flatten(1)).unflatten(-1, w.shape[1:]))
        else:
            parts.append((phi @ w.movedim(1, 0)).movedim(0, 1))
    return torch.cat(parts)


def _waves(feature_map: FeatureMap, w: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """Sums over frequencies ``s x l x d`` at scaled inputs, ``n x s x m``.

    The inputs are ``n x d``, or ``s x n x d`` of each draw's own.
    """
    if x.dim() == 2:
        phase = (x @ W.flatten(0, 1).mT).unflatten(-1, W.shape[:2])
    else:
        phase = (x @ W.mT).transpose(0, 1)  # n x s x l
    # With frequencies of its own, a sin t + b cos t is one cosine: half the work.
    a, b = w.movedim(0, -1).tensor_split(2, dim=-1)  # s x m x l
    shift, size = torch.atan2(a, b), torch.hypot(a, b)
    sums = [
        ((phase - shift[:, o]).cos() * size[:, o]).sum(-1) for o in range(w.shape[2])
    ]
    scale = amplitude(feature_map) / W.shape[1] ** 0.5
    return torch.stack(sums, -1) * scale.squeeze()


def _is_plain_sum(feature_map: FeatureMap) -> bool:
    if not isinstance(feature_map, SumFeatureMap):
        return False
    around = (feature_map.input_transform, feature_map.output_transform)
    return all(isinstance(transform, nn.Identity) for transform in around)


def _separate(feature_map: FeatureMap, num_samples: int) -> None:
    """Deal the frequencies of a map, and of the terms of a sum, to the draws."""
    if isinstance(feature_map, SumFeatureMap):
        for part in feature_map.maps:
            _separate(part, num_samples)
    elif is_fourier(feature_map):
        feature_map.weight = feature_map.weight.unflatten(0, (num_samples, -1))
        sines = sine_cosine(feature_map)
        sines.scale = sines.scale * num_samples**0.5


def _take(feature_map: FeatureMap, samples: Tensor) -> FeatureMap:
    # The kernel inside belongs to the draw, and frequencies are replaced, not changed.
    chosen = copy.deepcopy(feature_map)
    for part in chosen.modules():
        if isinstance(part, KernelFeatureMap) and part.weight.dim() == 3:
            part.weight = part.weight[samples]
    return chosen
