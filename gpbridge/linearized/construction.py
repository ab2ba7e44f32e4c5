"""What the constructor of a linearised GP measures, chooses and refuses.

In: the user's network, data, transforms. Out: a frozen network in the working
precision, transformed inputs, targets and their likelihood, bounds of the prior
variance. Next: ``gp``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.utils.constraints import LogTransformedInterval
from gpytorch.likelihoods import Likelihood
from torch import Size, Tensor, nn

from gpbridge.checks import (
    ShapeError,
    check_finite,
    check_inputs,
    check_not_empty,
    check_same_device,
    check_same_dtype,
    check_tensor,
)
from gpbridge.features import flat_std
from gpbridge.functional import FunctionalNet, Parameters
from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.g_prior import feature_squares
from gpbridge.linearized.inference import Inference
from gpbridge.linearized.low_rank import LowRankCurvature
from gpbridge.linearized.structured_weights import StructuredWeights
from gpbridge.linearized.structures import Diagonal, Kronecker, LowRank, Structure
from gpbridge.targets import check_targets, default_likelihood, warn_if_one_hot
from gpbridge.types import FitResult

_ROWS = 200  # derivatives by which the size of the kernel is measured,
_POINTS = 20  # and the fewest points that they are taken at


def check_data(network: nn.Module, train_X: Tensor, train_Y: Tensor) -> None:
    """Require a module and finite tensors of one data set, on one device.

    Raises:
        TypeError: If the arguments come in another order.
        ShapeError: If the inputs have a batch, or are images.
    """
    if isinstance(network, FitResult):
        raise TypeError(
            "network must be a torch.nn.Module, but is a FitResult. Use "
            "LinearizedGP.from_fit(fit_result, train_X, train_Y)."
        )
    if isinstance(network, Tensor):
        raise TypeError(
            "network must be a torch.nn.Module, but is a Tensor. The network comes "
            "first: LinearizedGP(network, train_X, train_Y)."
        )
    check_inputs(train_X)
    check_not_empty(train_X=train_X)
    check_tensor(train_Y=train_Y)
    check_same_device(train_X=train_X, train_Y=train_Y)
    check_finite(train_Y=train_Y)  # before a transform spreads NaN to all rows
    if train_X.dim() != 2:
        image = tuple(train_X.shape[1:])
        raise ShapeError(
            f"train_X must be ``n x d``, but has shape {tuple(train_X.shape)}. If its "
            f"rows are images, try train_X.flatten(1) with input_shape={image}; if it "
            "holds several data sets, build one model each, in a ModelListGP."
        )


def freeze_network(
    network: nn.Module,
    parameters: Parameters,
    input_shape: Sequence[int] | None,
    X: Tensor,
    inference: Inference,
) -> FunctionalNet:
    """Copy the network to the working precision: float64 on the CPU.

    Raises:
        ValueError: If network and inputs are on different devices.
    """
    if isinstance(network, nn.Module):
        devices = {p.device for p in network.parameters()}
        if devices and devices != {X.device}:
            raise ValueError(
                f"The network is on {', '.join(map(str, devices))}, but train_X is on "
                f"{X.device}. Move one of them with .to(...)."
            )
    net = FunctionalNet(network, parameters, input_shape)
    return net.to(working_dtype(inference, X))


def check_previous(
    previous: StructuredWeights, model: Any, groups: list[list[str]]
) -> None:
    """Require a posterior of the same weights, groups and structure.

    Raises:
        TypeError: If it is something else, or the structures differ.
        ValueError: If weights or groups differ, or options do not go with it.
    """
    if not isinstance(previous, StructuredWeights):
        raise TypeError(
            "previous must be what gpbridge.linearized.weight_posterior gives, but is "
            f"{type(previous).__name__}."
        )
    inference, params = model.inference, model.functional.params
    basis = not isinstance(previous.curvature, LowRankCurvature) and any(
        q is not None for basis in previous.curvature.bases for q in basis
    )
    kind = LowRank if isinstance(previous.curvature, LowRankCurvature) else Diagonal
    kind = Kronecker if basis else kind
    if not isinstance(inference, kind):
        raise TypeError(
            f"The previous posterior is that of {kind.__name__}(...), but inference is "
            f"{type(inference).__name__}. Pass the same structure."
        )
    own = {name: value.shape for name, value in params.items()}
    if list(own.items()) != list(previous.sizes.items()):  # flat vectors have an order
        raise ValueError(
            f"The previous posterior is over {_shown(previous.sizes)}, but the random "
            f"weights are {_shown(own)}. Pass the same architecture and parameters=."
        )
    entries = model.functional.entries
    known = previous.entries
    if set(entries) != set(known) or not all(
        torch.equal(places.cpu(), known[name].cpu()) for name, places in entries.items()
    ):
        raise ValueError(
            "The previous posterior is over other single entries of the weights. Pass "
            "the same masks as parameters=."
        )
    number = {name: g for g, names in enumerate(groups) for name in names}
    flat = torch.cat([torch.full(own[n], number[n]).reshape(-1) for n in own])
    if not torch.equal(flat, previous.groups.cpu()):
        raise ValueError(
            "The previous posterior has other groups of weights. Pass the same groups=."
        )
    if model.g_prior:
        raise ValueError(
            "g_prior=True scales weights by these data, which the previous posterior "
            "does not know of. Pass g_prior=False."
        )
    if not model.offset and model.mean == "linear_model":
        raise ValueError(
            "A previous posterior is one of the weights themselves: the linear model's "
            "mean needs Gaussian noise and offset=True. Pass mean='network'."
        )


def _shown(sizes: Mapping[str, Size]) -> str:
    return ", ".join(f"{name} {tuple(size)}" for name, size in sizes.items())


def working_dtype(inference: Inference, X: Tensor) -> torch.dtype:
    """The dtype of network and Jacobians for data like X, where none was asked for."""
    if inference.jacobian_dtype is not None:
        return inference.jacobian_dtype
    if isinstance(inference, Structure):
        return X.dtype
    return torch.float64 if X.device.type == "cpu" else X.dtype


def fixed_inputs(transform: InputTransform | None, X: Tensor) -> Tensor:
    """Transform the inputs once; the transform reads its bounds from them here.

    Raises:
        ValueError: If the transform has parameters to learn.
    """
    if transform is None:
        return X
    if any(p.requires_grad for p in transform.parameters()):
        raise ValueError(
            f"{type(transform).__name__} has learnable parameters, but the network was "
            "trained on fixed inputs. Pass a transform without them, or warp the "
            "inputs in the network."
        )
    with torch.no_grad():
        Z = transform(X)
    transform.eval()
    return Z


@torch.no_grad()
def outputs_at(net: FunctionalNet, Z: Tensor) -> Tensor:
    """Probe the network with its transformed training inputs and evaluate it there."""
    Z = Z.to(net.dtype)
    net.probe(Z)
    outputs = net(Z)
    check_finite(**{"network(train_X)": outputs})
    return outputs


def prepare_targets(
    likelihood: Likelihood | None,
    train_Y: Tensor,
    transform: OutcomeTransform | None,
    shape: Size,
    Z: Tensor,
    dtype: torch.dtype,
) -> tuple[Likelihood, Tensor]:
    """Transform and check the targets; choose the likelihood that they suggest.

    Args:
        likelihood: The user's, or None.
        train_Y: Targets as the user passed them.
        transform: Of the targets; it learns from them here.
        shape: Of the network's outputs, ``n x m``.
        Z: The transformed training inputs.
        dtype: Of the inputs before.

    Returns:
        The likelihood, and the targets in the form that it expects.

    Raises:
        ValueError: If labels meet a transform.
    """
    n, num_outputs = shape
    if likelihood is None:
        warn_if_one_hot(train_Y)
    targets = train_Y
    if transform is not None:
        labels = not train_Y.is_floating_point()
        if labels or not (likelihood is None or is_gaussian(likelihood)):
            kind = "integer labels" if labels else type(likelihood).__name__
            raise ValueError(
                "outcome_transform needs a Gaussian likelihood and float targets, but "
                f"came with {kind}. Leave it out for classification."
            )
        targets, _ = transform(train_Y, X=Z)
    if likelihood is None:
        likelihood = default_likelihood(targets, num_outputs, dtype)
    targets = check_targets(likelihood, targets, num_outputs, n, dtype=dtype)
    if is_gaussian(likelihood):
        check_same_dtype("train_Y", train_Y, dtype)
    return likelihood, targets


@torch.no_grad()
def prior_variance_bounds(
    net: FunctionalNet,
    Z: Tensor,
    unit_std: dict[str, Tensor],
    targets: Tensor | None,
    g_prior: bool | int,
) -> LogTransformedInterval:
    """Bounds in units of the targets' power over the kernel's mean diagonal.

    Args:
        net: The network, probed.
        Z: Inputs ``n x d``.
        unit_std: Prior standard deviations at unit variance.
        targets: Of Gaussian noise, else None.
        g_prior: A number estimates the diagonal by as many probes, as the g-prior.

    Returns:
        The bounds.

    Raises:
        ValueError: If the kernel vanishes on the data.
    """
    variance = flat_std(net, unit_std).double().square()
    for points in (max(_POINTS, _ROWS // net.num_outputs), _ROWS):
        rows = Z[:: max(1, len(Z) // points)]
        squares = feature_squares(net, rows, None, g_prior, float("inf"))
        size = float(squares @ variance) / (len(rows) * net.num_outputs)
        if size > 0:  # else look at more points before it is refused
            break
    if not size > 0:
        raise ValueError(
            "The tangent kernel is zero on the training inputs: every random weight "
            "has zero derivative there. Check for dead units, or select other "
            "parameters."
        )
    power = 1.0 if targets is None else max(float(targets.square().mean()), 1e-30)
    scale = power / size
    bounds = LogTransformedInterval(min(2e-9 * scale, 1e-3), max(2.2e4 * scale, 1e3))
    return bounds.to(Z.device)
