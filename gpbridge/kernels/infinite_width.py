r"""Kernels of infinitely wide networks: the Gaussian process of a random network, and
the tangent kernel of its training.

In: a list of layers, or a ``torch.nn.Sequential`` to read them from. Out: a gpytorch
kernel whose hyperparameters are the variances of the weights and biases of each layer.
Next: any GP; ``linearized`` has the tangent kernel of a network of finite width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from botorch.utils.constraints import LogTransformedInterval
from gpytorch.constraints import Interval
from gpytorch.kernels import Kernel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_count,
    check_memory,
    check_positive,
)
from gpbridge.kernels.compositions import same_inputs, unbatched_buffers
from gpbridge.kernels.tiled_gram import tile_rows, tiled_gram
from gpbridge.kernels.wide_convolutions import needs_pairs
from gpbridge.kernels.wide_layers import (
    Layer,
    LayerCovariance,
    RecordedVariances,
    Signal,
    Values,
    Variances,
    apply_all,
    every_layer,
    trace_all,
)
from gpbridge.kernels.wide_modules import layers_of

KINDS = ("nngp", "ntk")
GROUPS = ("weight_variance", "bias_variance", "tap_lengthscale")
BOUNDS = (1e-8, 1e8)
KEPT = 6  # tensors of a tile that one layer keeps for its gradient


class InfiniteWidthKernel(Kernel):
    r"""Covariance of a randomly initialised network as its layers grow wide.

    ``kind="nngp"`` is the covariance of the outputs over random weights,
    :math:`k(x, x') = E\, f(x) f(x')`: the prior of a Bayesian network. ``kind="ntk"``
    is the limit of the Gram matrix of Jacobians,
    :math:`E\, \nabla_w f(x) \cdot \nabla_w f(x')`: the GP that gradient descent on all
    weights follows.
    Layers come from :mod:`gpbridge.kernels.wide_layers` and
    :mod:`gpbridge.kernels.wide_convolutions`; each with weights has a variance of its
    weights and of its biases, learned by marginal likelihood. Without biases, ReLU
    networks depend on the product of the weight variances only.

    Inputs are divided by the square root of their number in the first layer: scale
    them to mean zero and variance one. Deep ReLU networks make all inputs alike:
    use float64, and biases.

    Cost of n² entries: one arc tangent per pair and ReLU layer; images multiply it by
    the number P of pixels, and pooling or correlated filters by P² (a convolutional
    network of 8 x 8 images with pooling costs 4096 times a dense one). Memory is the
    matrix itself and one tile of pairs, also in the backward pass, which computes the
    tile again.

    Args:
        layers: The layers, the last one with weights or a pooling of such.
        kind: ``"nngp"`` or ``"ntk"``.
        input_shape: (channels, height, width) for images, whose columns ``d`` are then
            the flattened pixels.
        variance_constraint: Bounds of weight and bias variances.
        lengthscale_constraint: Bounds of the lengthscales of correlated filters.
        memory_budget: Bytes for one tile; networks that need more for a single pair of
            inputs are refused.
        **kwargs: ``batch_shape`` and ``active_dims``, as for any gpytorch kernel.

    Attributes:
        weight_variance: ``batch_shape x (layers with weights)``, in their order, a
            residual branch before its shortcut.
        bias_variance: The same for layers with biases; absent without any.
        tap_lengthscale: The same for convolutions with correlated filters.

    Example:
        >>> from gpbridge.kernels.wide_layers import Dense, ReLU
        >>> kernel = InfiniteWidthKernel([Dense(), ReLU(), Dense()], kind="ntk")
        >>> kernel(torch.randn(4, 3)).shape
        torch.Size([4, 4])

    References:
        Lee et al., Deep neural networks as Gaussian processes, ICLR 2018; Jacot,
        Gabriel, Hongler, Neural tangent kernel, NeurIPS 2018, theorem 1; Arora et al.,
        On exact computation with an infinitely wide neural net, NeurIPS 2019.
    """

    has_lengthscale = False

    def __init__(
        self,
        layers: Sequence[Layer],
        kind: str = "nngp",
        *,
        input_shape: Sequence[int] | None = None,
        variance_constraint: Interval | None = None,
        lengthscale_constraint: Interval | None = None,
        memory_budget: float = 4 * 2**30,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("kind", kind, KINDS)
        check_positive(memory_budget=memory_budget)
        self.layers, self.kind = tuple(layers), kind
        self.input_shape = _checked_shape(input_shape)
        self.memory_budget = memory_budget
        image = None if self.input_shape is None else self.input_shape[1:]
        last = trace_all(self.layers, Signal(image), "layers")
        if not (last.gaussian and last.random and last.image is None):
            raise ValueError(
                "The network must end in Gaussian outputs, but its last layer is "
                f"{self.layers[-1] if self.layers else None}. Add Dense() at the end."
            )
        flat = list(every_layer(self.layers))
        self._pairs = image is not None and any(map(needs_pairs, flat))
        for group in GROUPS:
            initial = [layer.initial().get(group) for layer in flat]
            initial = [value for value in initial if value is not None]
            if not initial:
                continue
            given = variance_constraint
            if group == "tap_lengthscale":
                given = lengthscale_constraint
            initial = torch.tensor(initial).expand(*self._batch_shape, -1)
            name = f"raw_{group}"
            self.register_parameter(name, nn.Parameter(torch.zeros_like(initial)))
            constraint = LogTransformedInterval(*BOUNDS) if given is None else given
            self.register_constraint(name, constraint)
            self._set(group, initial)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        kind: str = "nngp",
        *,
        weight_variance: float = 2.0,
        bias_variance: float = 0.01,
        **kwargs,
    ) -> InfiniteWidthKernel:
        """The kernel of a network's architecture; its weights are not read.

        Args:
            module: A ``torch.nn.Sequential``, nested or not, of modules with a limit.
            kind: ``"nngp"`` or ``"ntk"``.
            weight_variance: Initial variance of the weights of every layer.
            bias_variance: Initial variance of the biases, where a module has some.
            **kwargs: As for the class; ``input_shape`` for images.

        Returns:
            The kernel.

        Raises:
            ValueError: For modules without a limit, named by their path.

        Example:
            >>> net = nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.Linear(50, 1))
            >>> InfiniteWidthKernel.from_module(net).weight_variance.shape
            torch.Size([2])
        """
        check_positive(weight_variance=weight_variance, bias_variance=bias_variance)
        layers = layers_of(module, weight_variance, bias_variance)
        return cls(layers, kind, **kwargs)

    @property
    def weight_variance(self) -> Tensor:
        """Variances of the weights, ``batch_shape x (layers with weights)``."""
        return self._get("weight_variance")

    @weight_variance.setter
    def weight_variance(self, value: float | Tensor) -> None:
        self._set("weight_variance", value)

    @property
    def bias_variance(self) -> Tensor | None:
        """Variances of the biases, or None in a network without any."""
        return self._get("bias_variance")

    @bias_variance.setter
    def bias_variance(self, value: float | Tensor) -> None:
        self._set("bias_variance", value)

    @property
    def tap_lengthscale(self) -> Tensor | None:
        """Lengthscales of correlated filters in pixels, or None without any."""
        return self._get("tap_lengthscale")

    @tap_lengthscale.setter
    def tap_lengthscale(self, value: float | Tensor) -> None:
        self._set("tap_lengthscale", value)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:
        """Covariance of all pairs, or of pairs of the same row if ``diag``."""
        if params.get("last_dim_is_batch", False):
            raise NotImplementedError(
                "last_dim_is_batch is deprecated upstream and not supported. Add one "
                "kernel per input column, with active_dims."
            )
        self._check_width(x1)
        same = same_inputs(x1, x2)
        x2 = x1 if same else x2
        values = [self._get(group) for group in GROUPS]
        values = [None if value is None else value.to(x1) for value in values]
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], self._batch_shape)
        per_pair = self._numbers_per_pair() * batch.numel()
        rows = min(tile_rows(per_pair), max(x1.shape[-2], x2.shape[-2], 1))
        self._check_memory(per_pair, rows, x1)
        rows1 = x1, *self._point_variances(x1, values, rows**2)
        rows2 = rows1
        if not same:
            rows2 = x2, *self._point_variances(x2, values, rows**2)
        matched = None
        if diag or same:
            matched = self._matched(rows1, rows2, values, rows**2)
        if diag:
            return matched
        return tiled_gram(self._block, rows1, rows2, values, matched, rows)

    def expand_batch(self, *sizes) -> Kernel:
        """Expand the batch of hyperparameters."""
        with unbatched_buffers(self):
            kernel = super().expand_batch(*sizes)
        kernel.active_dims = self.active_dims
        return kernel

    def __getitem__(self, index) -> Kernel:
        """Index the batch of hyperparameters."""
        with unbatched_buffers(self):
            kernel = super().__getitem__(index)
        kernel.active_dims = self.active_dims
        return kernel

    def _get(self, group: str) -> Tensor | None:
        raw = self._parameters.get(f"raw_{group}")
        if raw is None:
            return None
        return getattr(self, f"raw_{group}_constraint").transform(raw)

    def _set(self, group: str, value: float | Tensor) -> None:
        raw = self._parameters.get(f"raw_{group}")
        if raw is None:
            raise AttributeError(
                f"This network has no {group}: none of its layers was given one."
            )
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
        check_positive(**{group: value})
        constraint = getattr(self, f"raw_{group}_constraint")
        if not constraint.check(value):
            lower, upper = constraint.lower_bound, constraint.upper_bound
            raise ValueError(
                f"{group} must lie in [{float(lower):.3g}, {float(upper):.3g}], but is "
                f"{value.tolist()}. Give the kernel other bounds, by a constraint."
            )
        raw_value = constraint.inverse_transform(value).expand_as(raw)
        self.initialize(**{f"raw_{group}": raw_value})

    def _run(
        self,
        k: Tensor,
        variances: Variances | RecordedVariances,
        values: Sequence[Tensor | None],
        aligned: bool,
        tangent: bool,
    ) -> Tensor:
        """The covariance, or tangent kernel, of the outputs from that of the inputs."""
        space = 0 if self.input_shape is None else 4 if self._pairs else 2
        state = LayerCovariance(k, None, variances, space, aligned, tangent)
        held = Values(**dict(zip(GROUPS, values, strict=True)))
        state = apply_all(self.layers, state, held)
        return state.theta if tangent else state.k

    def _point_variances(
        self, x: Tensor, values: Sequence[Tensor | None], rows: int
    ) -> list[Tensor]:
        """Variances of single points at every nonlinearity, each ``... x n x P``."""

        def record(x: Tensor, *values: Tensor | None) -> tuple[Tensor, ...]:
            variances = Variances()
            self._run(self._matched_products(x, x), variances, values, True, False)
            return tuple(variances.recorded)

        return self._by_rows(record, [x], values, rows)

    def _matched(
        self,
        rows1: Sequence[Tensor],
        rows2: Sequence[Tensor],
        values: Sequence[Tensor | None],
        rows: int,
    ) -> Tensor:
        """Covariance of pairs of the same row, ``... x n``."""
        count = len(rows1)

        def matched(*tensors: Tensor | None) -> tuple[Tensor]:
            (x1, *first), (x2, *second) = tensors[:count], tensors[count : 2 * count]
            k = self._matched_products(x1, x2)
            variances = RecordedVariances(first, second)
            held = tensors[2 * count :]
            return (self._run(k, variances, held, True, self.kind == "ntk"),)

        return self._by_rows(matched, [*rows1, *rows2], values, rows)[0][..., 0]

    def _by_rows(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        tensors: Sequence[Tensor],
        values: Sequence[Tensor | None],
        rows: int,
    ) -> list[Tensor]:
        """A function of matched rows, which for pairs of pixels keeps few at a time."""
        if not self._pairs or tensors[0].shape[-2] <= rows:
            return list(function(*tensors, *values))
        splits = zip(*(t.split(rows, -2) for t in tensors), strict=True)
        parts = [
            checkpoint(function, *part, *values, use_reentrant=False) for part in splits
        ]
        return [torch.cat(found, -2) for found in zip(*parts, strict=True)]

    def _block(
        self,
        rows1: Sequence[Tensor],
        rows2: Sequence[Tensor],
        values: Sequence[Tensor | None],
    ) -> Tensor:
        """One block of the matrix, ``... x n1 x n2``."""
        (x1, *first), (x2, *second) = rows1, rows2
        if self.input_shape is None:
            k = (x1 / x1.shape[-1]) @ x2.mT
        else:
            c, h, w = self.input_shape
            a, b = x1.unflatten(-1, (c, h, w)) / c, x2.unflatten(-1, (c, h, w))
            formula = (
                "ichw,...jcuv->...ijhwuv" if self._pairs else "ichw,...jchw->...ijhw"
            )
            k = torch.einsum("..." + formula, a, b).contiguous()
        variances = RecordedVariances(first, second)
        return self._run(k, variances, values, False, self.kind == "ntk")

    def _matched_products(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Inner products of matched inputs, divided by their number."""
        if self.input_shape is None:
            return (x1 * x2).sum(-1, keepdim=True) / x1.shape[-1]
        c, h, w = self.input_shape
        a, b = x1.unflatten(-1, (c, h, w)) / c, x2.unflatten(-1, (c, h, w))
        if self._pairs:
            k = torch.einsum("...chw,...cuv->...hwuv", a, b)
            return k.unsqueeze(-5)
        return (a * b).sum(-3).unsqueeze(-3)

    def _numbers_per_pair(self) -> int:
        if self.input_shape is None:
            return 1
        pixels = self.input_shape[1] * self.input_shape[2]
        return pixels**2 if self._pairs else pixels

    def _check_width(self, x: Tensor) -> None:
        if self.input_shape is None:
            return
        c, h, w = self.input_shape
        if x.shape[-1] != c * h * w:
            raise ShapeError(
                f"Images of input_shape {self.input_shape} have {c * h * w} columns, "
                f"but the inputs have {x.shape[-1]} (shape {tuple(x.shape)}). Flatten "
                "images to ``... x n x d``, or give their input_shape."
            )

    def _check_memory(self, per_pair: int, rows: int, x: Tensor) -> None:
        if self.input_shape is None:
            return
        depth = sum(1 for _ in every_layer(self.layers))
        kept = 4 + KEPT * depth if torch.is_grad_enabled() else 4 + KEPT
        needed = per_pair * x.element_size() * kept
        needed *= rows * rows + 2 * rows  # pairs, and inputs with themselves
        c, h, w = self.input_shape
        pairs = "all pairs of pixels" if self._pairs else "all pixels"
        check_memory(
            f"One tile of {rows} x {rows} inputs with {pairs} of {h} x {w} images",
            needed,
            self.memory_budget,
            "Use smaller images, Flatten() in place of pooling and filters without a "
            "tap_lengthscale (then pixels need no pairs), or a larger memory_budget.",
        )


def _checked_shape(shape: Sequence[int] | None) -> tuple[int, int, int] | None:
    if shape is None:
        return None
    shape = tuple(shape)
    if len(shape) != 3:
        raise ShapeError(
            f"input_shape must be (channels, height, width), but is {shape}. For a "
            "grey image try (1, height, width)."
        )
    for name, side in zip(("channels", "height", "width"), shape, strict=True):
        check_count(**{f"input_shape's {name}": side})
    return shape
