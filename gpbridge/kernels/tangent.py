r"""The neural tangent kernel of a network, :math:`k(x, x') = J(x) S J(x')^\top`.

In: a network, trained or not, and a prior covariance S of its weights. Out: a gpytorch
kernel, usable wherever a kernel is, alone or in sums and products, whose matrix is
represented in weight space, in function space, or by products only.
Next: ``linearized`` conditions the tangent model of a trained network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from botorch.utils.constraints import LogTransformedInterval
from gpytorch.constraints import Interval
from linear_operator import to_linear_operator
from linear_operator.operators import (
    DiagLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
)
from torch import Tensor, nn

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_kind,
    check_memory,
    check_number,
    check_positive,
    check_sequence,
    checked_shape,
)
from gpbridge.features import TangentFeatures, dense_features, flat_std
from gpbridge.functional import FunctionalNet, Parameters
from gpbridge.kernels.batches import BatchKernel
from gpbridge.kernels.buffers import CovarianceBuffers, Stamp
from gpbridge.kernels.compositions import (
    ExactFeatureMap,
    draw_feature_map,
    register_with_botorch,
    same_inputs,
)
from gpbridge.kernels.feature_gram import FeatureGramOperator, feature_gram
from gpbridge.layer_gram import METHODS, tangent_features
from gpbridge.operators import JacobianOperator

REPRESENTATIONS = ("auto", "weight", "function", "matrix_free")
VARIANCE_BOUNDS = (1e-12, 1e12)

Groups = str | Sequence[Sequence[str]]


class NeuralTangentKernel(BatchKernel):
    r"""Covariance of the tangent model of a network with Gaussian weights.

    .. math::
        k(x, x') = J(x) S J(x')^\top, \qquad
        J(x) = \partial f(x, w) / \partial w \,|_{w^*},

    with :math:`S = \operatorname{diag}(s_g)`, one prior variance for each group of
    weights, or a given covariance. For m outputs the matrix has ``n m`` rows,
    point-major, output fastest.

    With an untrained network this is a prior like any other, and adds well to a Matérn
    kernel. With a network trained on the same targets the evidence is blind to
    overfitting: use :class:`gpbridge.LinearizedGP`, which takes the safe form.

    Cost of the matrix of n points: ``n² (width)`` per linear layer in function space,
    ``n m p²`` for a solve in weight space, one forward and one backward pass per
    product if matrix-free.

    Args:
        network: The network, copied and frozen (see
            :class:`gpbridge.functional.FunctionalNet`), or such a copy to share.
        parameters: Which weights are random.
        groups: Weights that share a prior variance: ``"all"``, ``"layer"``,
            ``"tensor"``, or lists of names that together cover all random weights.
        weight_covariance: A ``p x p`` covariance S instead of a diagonal one; the prior
            variance then multiplies it. Its tensors are shared, as buffers: they are
            saved and move with the kernel.
        input_shape: Shape of one input, as (c, h, w), for networks on images.
        representation: ``"weight"`` returns low-rank roots, ``"function"`` dense Gram
            matrices, ``"matrix_free"`` products of Jacobians; ``"auto"`` takes the
            smaller of the first two.
        method: How Gram matrices are formed, see
            :func:`gpbridge.layer_gram.tangent_features`.
        freeze: False makes the weights hyperparameters: every optimiser of the kernel
            moves them.
        prior_variance_constraint: Bounds of the prior variances.
        memory_budget: Bytes for dense features ``(n m) x p``, which low-rank roots and
            a given covariance need; beyond it they are refused.
        **kwargs: ``batch_shape`` and ``active_dims``, as for any gpytorch kernel. All
            kernels of a batch share the network.

    Raises:
        ValueError: If the groups do not partition the random weights.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh())
        >>> NeuralTangentKernel(net)(torch.zeros(3, 2)).shape
        torch.Size([24, 24])

    References:
        Jacot, Gabriel, Hongler, Neural Tangent Kernel, NeurIPS 2018, eq. (4).
    """

    has_lengthscale = False

    def __init__(
        self,
        network: nn.Module,
        parameters: Parameters = "all",
        groups: Groups = "all",
        weight_covariance: LinearOperator | Tensor | None = None,
        input_shape: Sequence[int] | None = None,
        *,
        representation: str = "auto",
        method: str = "auto",
        freeze: bool = True,
        prior_variance_constraint: Interval | None = None,
        memory_budget: float = 4 * 2**30,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("representation", representation, REPRESENTATIONS)
        check_choice("method", method, METHODS)
        check_number(memory_budget=memory_budget)
        check_positive(memory_budget=memory_budget)
        input_shape = checked_shape("input_shape", input_shape)
        if prior_variance_constraint is not None:
            check_kind(Interval, prior_variance_constraint=prior_variance_constraint)
        if not isinstance(network, FunctionalNet):
            network = FunctionalNet(network, parameters, input_shape, freeze)
        self.functional = network
        self.groups = weight_groups(network, groups)
        self.representation = representation
        self.method = method
        self.memory_budget = memory_budget
        self.covariance_buffers: CovarianceBuffers | None = None
        if weight_covariance is not None:
            self.weight_covariance = _checked_covariance(network, weight_covariance)
        first = next(iter(network.params.values()))
        shape = (*self._batch_shape, len(self.groups))
        self.register_parameter(
            "raw_prior_variance", nn.Parameter(torch.zeros(shape).to(first.detach()))
        )
        if prior_variance_constraint is None:
            prior_variance_constraint = LogTransformedInterval(*VARIANCE_BOUNDS)
        self.register_constraint("raw_prior_variance", prior_variance_constraint)
        self.prior_variance = 1.0
        self._forget()

    @property
    def weight_covariance(self) -> LinearOperator | None:
        """The covariance S of the weights, or None if it is diagonal."""
        buffers = self.covariance_buffers
        return None if buffers is None else buffers.operator()

    @weight_covariance.setter
    def weight_covariance(self, value: LinearOperator | Tensor | None) -> None:
        if value is not None:
            value = CovarianceBuffers(_checked_covariance(self.functional, value))
        self.covariance_buffers = value

    @property
    def prior_variance(self) -> Tensor:
        """Prior variance of the weights, ``batch_shape x (number of groups)``."""
        return self.raw_prior_variance_constraint.transform(self.raw_prior_variance)

    @prior_variance.setter
    def prior_variance(self, value: float | Tensor) -> None:
        raw = self.raw_prior_variance
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
        check_positive(prior_variance=value)
        constraint = self.raw_prior_variance_constraint
        lower, upper = constraint.lower_bound, constraint.upper_bound
        if bool(((value < lower) | (value > upper)).any()):
            raise ValueError(
                f"prior_variance must lie in [{float(lower):.3g}, {float(upper):.3g}], "
                f"but is {value.tolist()}. Scale the targets, or set other bounds with "
                'register_constraint("raw_prior_variance", ..., replace=True).'
            )
        raw = constraint.inverse_transform(value)
        self.initialize(raw_prior_variance=raw.expand_as(self.raw_prior_variance))

    @property
    def has_custom_exact_prediction(self) -> bool:
        """Upstream's default prediction strategy serves these matrices."""
        return False

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """The number m of rows that each point has in the matrix."""
        self._probe(x1 if x1.numel() else x2)
        return self.functional.num_outputs

    def unit_std(self, group: int | None = None) -> dict[str, Tensor]:
        """A prior of variance one for the weights of a group, default of all."""
        names = (
            [n for group_names in self.groups for n in group_names]
            if group is None
            else self.groups[group]
        )
        chosen = set(names)
        params, scale = self.functional.params, self.functional.weight_scale
        if scale is not None:
            parts = self.functional.unflatten(scale)
            return {name: parts[name] for name in params if name in chosen}
        one = next(iter(params.values())).detach().new_ones(())
        return {name: one for name in params if name in chosen}

    def features(self, x: Tensor) -> Tensor:
        r"""Features :math:`J(x) S^{1/2}` of a network with one output, ``... x n x p``.

        Args:
            x: Inputs ``... x n x d``, the columns already selected.

        Returns:
            Features; ``batch_shape`` comes first if the kernel has one.

        Raises:
            ShapeError: If the network has several outputs.
        """
        self._probe(x)
        if self.functional.num_outputs > 1:
            raise ShapeError(
                "Features of one row per point need a network with one output, but "
                f"this one has {self.functional.num_outputs}. Draw from the posterior "
                "at fixed points, or use LinearizedGP.draw."
            )
        return self._rows(x)

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, **params
    ) -> Tensor | LinearOperator:
        """Covariance of all pairs, or of pairs of the same row if ``diag``."""
        if params.get("last_dim_is_batch", False):
            raise NotImplementedError(
                "last_dim_is_batch is deprecated upstream and not supported. Add one "
                "kernel per input column, with active_dims."
            )
        self._probe(x1 if x1.numel() else x2)
        same = same_inputs(x1, x2)
        if diag:
            return self._diagonal(x1, x2, same)
        kind = self._representation(x1, x2)
        if kind == "matrix_free":
            left = self._matrix_free_root(x1)
            right = left if same else self._matrix_free_root(x2)
            if same:
                return FeatureGramOperator(left)
            return MatmulLinearOperator(left, right.mT)
        if kind == "weight":
            left = self._rows(x1)
            return feature_gram(left, None if same else self._rows(x2))
        grams = self._unit_grams(x1, x2, same)  # one per group
        variance = self.prior_variance.to(grams[0])
        total = variance[..., 0, None, None] * grams[0]
        for g, gram in enumerate(grams[1:], start=1):
            total = total + variance[..., g, None, None] * gram
        return to_linear_operator(total)

    def train(self, mode: bool = True) -> NeuralTangentKernel:
        """Set the mode; the network stays in eval mode."""
        super().train(mode)
        return self

    def __getstate__(self) -> dict:
        """Copies and pickles leave the cached Gram matrices behind."""
        return {**self.__dict__, "_cache": None, "_train": None}

    def _apply(self, *args, **kwargs) -> NeuralTangentKernel:
        """What is kept does not move or change its dtype with the kernel."""
        super()._apply(*args, **kwargs)
        self._forget()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def _forget(self) -> None:
        self._cache: tuple | None = None  # Gram matrices of one set of inputs
        self._train: tuple | None = None  # features of one set of inputs

    def _probe(self, x: Tensor) -> None:
        if self.functional._num_outputs is None:
            self.functional.probe(x)

    def _representation(self, x1: Tensor, x2: Tensor) -> str:
        if self.representation != "auto":
            return self.representation
        rows = max(x1.shape[-2], x2.shape[-2]) * self.functional.num_outputs
        return "weight" if self.functional.num_params < rows else "function"

    def _rows(self, x: Tensor) -> Tensor:
        """Dense features with the prior folded in, ``batch x (n m) x p``."""
        rows = self._unit_rows(x)
        if self.weight_covariance is not None:
            rows = rows @ self._covariance_root()
            scale = self.prior_variance.sqrt()[..., None]
        else:
            std = self.prior_variance.sqrt()
            per_weight = {
                n: std[..., g, None]
                for g, names in enumerate(self.groups)
                for n in names
            }
            parts = [
                per_weight[n].expand(*std.shape[:-1], p.numel())
                for n, p in self.functional.params.items()
            ]
            scale = torch.cat(parts, -1)[..., None, :]  # batch x 1 x p
        return (rows * scale.to(rows)).to(x.dtype)

    def _unit_rows(self, x: Tensor) -> Tensor:
        """Dense features at prior variance one, if there is room for them."""
        net = self.functional
        rows = x.shape[:-1].numel() * net.num_outputs
        check_memory(
            f"The features of {rows} outputs in {net.num_params} random weights",
            2 * rows * net.num_params * net.dtype.itemsize,  # and a scaled copy
            self.memory_budget,
            "Choose representation='matrix_free', fewer weights by parameters=, or a "
            "larger memory_budget.",
        )
        return dense_features(net, x.to(net.dtype), self.unit_std()).matrix

    def _covariance_root(self) -> Tensor:
        root = self.weight_covariance.root_decomposition().root
        return root.to_dense()

    def _diagonal(self, x1: Tensor, x2: Tensor, same: bool) -> Tensor:
        if not same or self.weight_covariance is not None:
            left = self._rows(x1)
            return (left * (left if same else self._rows(x2))).sum(-1)
        total = 0.0
        variance = self.prior_variance.to(x1)
        for g, features in enumerate(self._group_features(x1)):
            blocks = features.blocks()
            diagonal = blocks.diagonal(dim1=-2, dim2=-1).flatten(-2).to(x1.dtype)
            total = total + variance[..., g, None] * diagonal
        return total

    def _features(self, x: Tensor, group: int) -> TangentFeatures:
        net = self.functional
        return tangent_features(net, x.to(net.dtype), self.unit_std(group), self.method)

    def _group_features(self, x: Tensor) -> Iterator[TangentFeatures]:
        """Features in the weights of each group, made as they are asked for."""
        return (self._features(x, g) for g in range(len(self.groups)))

    def _kept_features(self, x: Tensor) -> Iterable[TangentFeatures]:
        """Features of the second argument, which in prediction are the training data.

        Kept as long as the same values come back, with the same weights.
        """
        if x.requires_grad or not self.functional.freeze:
            return self._group_features(x)
        while x.dim() > 2 and (x.stride(0) == 0 or x.shape[0] == 1):
            x = x[0]  # an expanded batch repeats the same points
        if not self._seen(self._train, x):
            with _kept_for_gradients():
                x = x.clone()
                kept = list(self._group_features(x))
            self._train = (self._stamp(), x, kept)
        return self._train[2]

    def _stamp(self) -> Stamp:
        """Of the weights, all buffers of the network, and their covariance."""
        tensors = [*self.functional.parameters(), *self.functional.buffers()]
        if self.covariance_buffers is not None:
            tensors += self.covariance_buffers.buffers()
        return Stamp(tensors)

    def _seen(self, cache: tuple | None, x: Tensor) -> bool:
        """Whether a cache is of the same values, dtype and weights.

        Values are compared: memory can change without a trace, as that of an array.
        """
        if cache is None or cache[0] != self._stamp():
            return False
        return cache[1].dtype == x.dtype and torch.equal(cache[1], x)

    def _unit_grams(self, x1: Tensor, x2: Tensor, same: bool) -> list[Tensor]:
        """Gram matrices of each group at prior variance one.

        While hyperparameters are learnt the inputs do not move: one set is kept as long
        as the same values come back, with the same weights.
        """
        covariance = self.weight_covariance
        fixed = self.functional.freeze and not (
            x1.requires_grad or (covariance is not None and covariance.requires_grad)
        )
        if not (same and fixed):
            return self._form_grams(x1, x2, same)
        if not self._seen(self._cache, x1):
            with _kept_for_gradients():
                x1 = x1.clone()
                grams = self._form_grams(x1, x1, same=True)
            self._cache = (self._stamp(), x1, grams)
        return self._cache[2]

    def _form_grams(self, x1: Tensor, x2: Tensor, same: bool) -> list[Tensor]:
        if self.weight_covariance is not None:
            left = self._unit_rows(x1)
            right = left if same else self._unit_rows(x2)
            grams = [left @ (self.weight_covariance @ right.mT)]
        elif same:
            grams = [features.gram() for features in self._group_features(x1)]
        else:
            pairs = zip(self._group_features(x1), self._kept_features(x2), strict=True)
            grams = [mine.gram(theirs) for mine, theirs in pairs]
        return [gram.to(x1.dtype) for gram in grams]

    def _matrix_free_root(self, x: Tensor) -> LinearOperator:
        if self.weight_covariance is not None or len(self._batch_shape):
            raise NotImplementedError(
                "The matrix-free representation needs a kernel without batch_shape and "
                "with a diagonal prior. Choose representation='function'."
            )
        net = self.functional
        std = self.prior_variance.sqrt()
        by_name = {n: std[g] for g, names in enumerate(self.groups) for n in names}
        unit = self.unit_std()
        scale = flat_std(net, {name: by_name[name] * unit[name] for name in net.params})
        jacobian = JacobianOperator(x.to(net.dtype), net=net)
        return MatmulLinearOperator(jacobian, DiagLinearOperator(scale))


@contextmanager
def _kept_for_gradients() -> Iterator[None]:
    """Compute constants that later gradients may meet, also in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def weight_groups(net: FunctionalNet, groups: Groups) -> list[list[str]]:
    """Partition the random weights into groups that share a prior variance.

    Args:
        net: The network.
        groups: ``"all"``, ``"layer"`` (one per module that owns weights), ``"tensor"``,
            or lists of names.

    Returns:
        Names by group, in the order of the weights.

    Raises:
        ValueError: If lists do not name every random weight exactly once.
    """
    names = list(net.params)
    if isinstance(groups, str):
        check_choice("groups", groups, ("all", "layer", "tensor"))
        if groups == "all":
            return [names]
        if groups == "tensor":
            return [[name] for name in names]
        layers: dict[str, list[str]] = {}
        for name in names:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        return list(layers.values())
    check_sequence(groups=groups)
    groups = list(groups)
    for number, group in enumerate(groups):
        check_sequence(**{f"groups[{number}]": group})
    lists = [list(group) for group in groups]
    named = [name for group in lists for name in group]
    if sorted(named) != sorted(names):
        missing = sorted(set(names) - set(named))
        extra = sorted(set(named) - set(names))
        raise ValueError(
            "groups must name every random weight exactly once, but miss "
            f"{missing} and name {extra} besides. The random weights are {names}."
        )
    return lists


def _checked_covariance(
    net: FunctionalNet, covariance: LinearOperator | Tensor
) -> LinearOperator:
    p = net.num_params
    if not isinstance(covariance, LinearOperator | Tensor):
        raise TypeError(
            "weight_covariance must be a tensor or a linear operator, but is "
            f"{type(covariance).__name__}."
        )
    if tuple(covariance.shape) != (p, p):
        raise ShapeError(
            f"weight_covariance must be ``p x p`` with p = {p} random weights, but has "
            f"shape {tuple(covariance.shape)}."
        )
    return to_linear_operator(covariance)


@draw_feature_map.register
def _exact_features(
    kernel: NeuralTangentKernel, num_inputs: int, num_features: int, generator=None
) -> ExactFeatureMap:
    return ExactFeatureMap(kernel, kernel.functional.num_params)


register_with_botorch(NeuralTangentKernel)
