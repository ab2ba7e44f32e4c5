r"""Deep kernels, :math:`k(x, x') = k_0(g(x), g(x'))`: a kernel of a network's features.

In: a network and any gpytorch kernel. Out: a kernel for exact and variational GPs whose
network is trained beforehand, jointly, or not at all, and the parameter groups with
which an optimiser treats weights and hyperparameters differently.
Next: ``selection.deep_kernel`` fits one safely; ``pathwise`` draws its functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from botorch.sampling.pathwise.features.maps import FeatureMap
from botorch.sampling.pathwise.utils import ChainedTransform, TensorTransform
from gpytorch.kernels import Kernel
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

from gpbridge.checks import check_inputs, check_kind, check_positive, check_tensor
from gpbridge.kernels.batches import WrappingKernel
from gpbridge.kernels.compositions import (
    draw_feature_map,
    register_with_botorch,
    same_inputs,
)
from gpbridge.kernels.feature import NetworkMap

UNIT_CUBE_VARIANCE = 1 / 12  # of a uniform variable on [0, 1]


class DeepKernel(WrappingKernel):
    r"""Covariance of a kernel on the outputs of a network.

    .. math:: k(x, x') = k_0\bigl(c\, g(x),\, c\, g(x')\bigr)

    A forward pass of the network is all that it adds to the cost of the base kernel.
    Use it where the network's features carry over (pretrained, many data, images).

    **Trained features overfit.** The marginal likelihood of a deep kernel rises as g
    maps the training targets apart, and the noise learnt with it falls far below the
    test error. :func:`gpbridge.selection.fit_deep_kernel` stops early and takes the
    noise from validation data; ``freeze=True`` keeps g as it is.

    The network is copied; the caller's is never changed. The copy stays in eval mode,
    also while its weights are trained, so batch-norm statistics do not drift and
    dropout is off: a kernel is a function of two inputs, not of the batch or of chance.

    **Scale.** The lengthscale priors of botorch are made for the unit cube. With
    ``train_X``, features are multiplied by a constant c, such that their mean variance
    per dimension is 1/12, as in that cube. It is computed once and kept in the
    ``state_dict``. Rescaling by the extremes of the current batch, as gpytorch's
    ``ScaleToBounds`` does, gives another kernel for each batch, and clamps test points
    to the range of the training points, where the GP then is certain.

    Args:
        network: Any module that maps ``n x d`` (or ``n x input_shape``) to ``n x f``.
            For a trained classifier or regressor pass its :func:`network_body`.
        base_kernel: Any kernel on f columns. Its batch shape is that of the whole
            kernel; all its members share the network.
        freeze: Whether the weights are constants. If not, every optimiser of the
            kernel's hyperparameters moves them too.
        train_X: Inputs ``... x n x d`` that set the scale of the features, as the
            kernel will see them (after input transforms), and its dtype and device;
            default no rescaling.
        spectral_norm: Upper bound on the spectral norm of each Linear and Conv weight,
            which keeps distances from collapsing or exploding; see :class:`NetworkMap`.
        input_shape: Shape of one input, as (c, h, w).
        **kwargs: ``active_dims``, the input columns that the network sees.

    Raises:
        ValueError: If ``batch_shape`` is passed, or the features do not vary.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> kernel = DeepKernel(torch.nn.Linear(3, 2), RBFKernel())
        >>> kernel(torch.zeros(5, 3)).shape
        torch.Size([5, 5])

    References:
        Wilson et al., Deep kernel learning, AISTATS 2016, eq. (5). Ober, Rasmussen and
        van der Wilk, The promises and pitfalls of deep kernel learning, UAI 2021. Liu
        et al., Simple and principled uncertainty estimation with deterministic deep
        learning via distance awareness, NeurIPS 2020 (bounded spectral norm).
    """

    has_lengthscale = False

    def __init__(
        self,
        network: nn.Module,
        base_kernel: Kernel,
        *,
        freeze: bool = False,
        train_X: Tensor | None = None,
        spectral_norm: float | None = None,
        input_shape: Sequence[int] | None = None,
        **kwargs,
    ) -> None:
        if kwargs.get("batch_shape"):
            raise ValueError(
                "DeepKernel has the batch shape of its base_kernel, but got a batch "
                f"shape of {tuple(kwargs['batch_shape'])}. Pass it to base_kernel."
            )
        if not isinstance(base_kernel, Kernel):
            raise TypeError(
                "base_kernel must be a gpytorch kernel, but is "
                f"{type(base_kernel).__name__}. Try gpytorch.kernels.RBFKernel()."
            )
        super().__init__(**kwargs)
        self.network = NetworkMap(network, freeze, input_shape, spectral_norm)
        self.base_kernel = base_kernel
        if train_X is not None:
            check_tensor(train_X=train_X)
            self.to(train_X)
            self.set_feature_scale(train_X)

    def set_feature_scale(self, X: Tensor) -> None:
        """Fix the constant c so that the features of ``X`` spread as in the unit cube.

        Args:
            X: Inputs ``... x n x d``, all columns, at least two points.

        Raises:
            ValueError: If the network is random in eval mode, mixes rows, or its
                features are constant or not finite.
        """
        check_inputs(X, "train_X")
        rows = self._select(X).flatten(0, -2)
        with torch.no_grad():
            self.network.scale.fill_(1.0)
            features = self.network(rows)
            again, alone = self.network(rows), self.network(rows[:1])
        if not torch.isfinite(features).all():
            raise ValueError(
                "The network returns NaN or Inf on train_X. Check its weights and the "
                "scale of the inputs."
            )
        tolerance = 1e-3 * features.abs().max()
        if not torch.equal(features, again):
            raise ValueError(
                "The network returns different features for the same inputs in eval "
                "mode, so it draws fresh randomness per call. Fix the noise."
            )
        if (alone - features[:1]).abs().max() > tolerance:
            raise ValueError(
                "The network mixes rows: g(X)[0] differs from g(X[:1]). A kernel needs "
                "features that depend on their own row only."
            )
        spread = features.var(0, unbiased=False).mean()
        if not spread > 1e-12 * features.square().mean():
            raise ValueError(
                f"The features do not vary over the {len(rows)} rows of train_X, so "
                "they have no scale (dead units, or fewer than two distinct rows?)."
            )
        self.network.scale.copy_((UNIT_CUBE_VARIANCE / spread).sqrt())

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, **params
    ) -> Tensor | LinearOperator:
        """Covariance of all pairs, or of pairs of the same row if ``diag``."""
        if params.pop("last_dim_is_batch", False):
            raise NotImplementedError(
                "last_dim_is_batch is deprecated upstream and not supported. Add one "
                "kernel per input column, with active_dims."
            )
        features = self.network(x1)
        others = features if same_inputs(x1, x2) else self.network(x2)
        return self.base_kernel(features, others, diag=diag, **params)

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """That of the base kernel."""
        return self.base_kernel.num_outputs_per_input(x1, x2)

    def _select(self, X: Tensor) -> Tensor:
        if self.active_dims is None:
            return X
        return X.index_select(-1, self.active_dims)


def network_body(network: nn.Module) -> nn.Sequential:
    """A trained network without its head: everything but the last Linear layer.

    The layers are shared with ``network``, not copied.

    Args:
        network: A ``torch.nn.Sequential`` that ends with a ``torch.nn.Linear``.

    Returns:
        The layers before the last.

    Raises:
        TypeError: If ``network`` has another form.
    """
    layers = list(network.children()) if isinstance(network, nn.Sequential) else []
    if len(layers) < 2 or not isinstance(layers[-1], nn.Linear):
        found = type(layers[-1]).__name__ if layers else type(network).__name__
        raise TypeError(
            "network_body needs a torch.nn.Sequential of several layers that ends "
            f"with a torch.nn.Linear, but found {found}. Pass the part of the network "
            "that computes features to DeepKernel directly."
        )
    return nn.Sequential(*layers[:-1])


def parameter_groups(
    model: nn.Module, network_learning_rate: float, learning_rate: float
) -> list[dict]:
    """Groups for a torch optimiser: weights of deep kernels apart from all else.

    Args:
        model: A GP, a marginal log likelihood or a kernel, with deep kernels anywhere
            inside.
        network_learning_rate: For the trainable weights of the networks.
        learning_rate: For all other trainable parameters.

    Returns:
        One or two groups, ``{"params": [...], "lr": ...}``; empty ones are left out.

    Raises:
        ValueError: If a learning rate is not positive.
        TypeError: If the model is none.
    """
    check_kind(nn.Module, model=model)
    check_positive(
        network_learning_rate=network_learning_rate, learning_rate=learning_rate
    )
    weights = {
        id(p)
        for module in model.modules()
        if isinstance(module, DeepKernel)
        for p in module.network.parameters()
    }
    free = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in free if id(p) in weights], "lr": network_learning_rate},
        {"params": [p for p in free if id(p) not in weights], "lr": learning_rate},
    ]
    return [group for group in groups if group["params"]]


class _NetworkTransform(TensorTransform):
    # The kernel is held, not its parts, so that a path follows its device and dtype.
    def __init__(self, kernel: DeepKernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, values: Tensor) -> Tensor:
        return self.kernel.network(self.kernel._select(values))


@draw_feature_map.register
def _draw_deep(
    kernel: DeepKernel, num_inputs: int, num_features: int, generator=None
) -> FeatureMap:
    columns = num_inputs if kernel.active_dims is None else len(kernel.active_dims)
    with torch.no_grad():
        width = kernel.network(kernel.network.scale.new_zeros(1, columns)).shape[-1]
    feature_map = draw_feature_map(kernel.base_kernel, width, num_features, generator)
    feature_map.input_transform = ChainedTransform(
        feature_map.input_transform, _NetworkTransform(kernel)
    )
    return feature_map


register_with_botorch(DeepKernel)
