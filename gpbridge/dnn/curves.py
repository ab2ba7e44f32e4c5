r"""Curves of low loss between two trained networks.

Two networks that were trained independently lie in valleys that a straight line between
their weights leaves. A curve with fixed ends and one or more free control points,
trained on the loss at uniform times, usually does not.

In: two modules of one architecture. Out: a curve :math:`\phi(t)` of weights for any
module, since ``functional_call`` evaluates it at them. Next: ``curve_training`` fits
the control points, ``loss_surface`` measures the loss along it.

References:
    Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, Loss surfaces, mode connectivity,
    and fast ensembling of DNNs, NeurIPS 2018, sections 3.1 to 3.3.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn

from gpbridge.batch_norm import norm_layers
from gpbridge.checks import ShapeError, check_count, check_tensor
from gpbridge.dnn.curve_ends import check_same_network
from gpbridge.draws import WeightDraws
from gpbridge.functional import FunctionalNet, Parameters
from gpbridge.randomness import fresh
from gpbridge.types import Params

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""A mean loss of outputs ``n x m`` and targets, as those of torch.nn.functional."""


class WeightCurve(nn.Module):
    r"""A curve :math:`\phi(t) = \sum_b c_b(t) w_b` with the ends :math:`w_0, w_{B-1}`.

    The base of :class:`BezierCurve` and :class:`PolyChain`, which have the
    coefficients. The control points between the ends are the only parameter, ``bends``,
    and start on the straight line; the ends are buffers. Owns a copy of the first
    module; neither module is changed. Memory B p.

    As a posterior over weights it is the uniform distribution over times.

    Args:
        start_network: The module at t = 0.
        end_network: A module of the same architecture, at t = 1.
        num_bends: The number B of control points, the ends included; 2 is the line.
        parameters: Which weights move, as in
            :class:`~gpbridge.functional.FunctionalNet`. All others, and all buffers but
            the running statistics of batch norm, must agree at the ends.
        input_shape: Shape of one input, to unflatten the ``d`` columns.

    Raises:
        ValueError: If the modules differ in their architecture or in a weight that does
            not move, or there are fewer than two control points.
    """

    def __init__(
        self,
        start_network: nn.Module,
        end_network: nn.Module,
        num_bends: int = 3,
        parameters: Parameters = "all",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_count(num_bends=num_bends)
        if num_bends < 2:
            raise ValueError(
                f"num_bends counts the ends, so it must be at least 2, but is "
                f"{num_bends}. A curve with one free point has 3."
            )
        self.net = FunctionalNet(start_network, parameters, input_shape)
        check_same_network(start_network, end_network, set(self.net.names))
        start = self.net.flatten(self.net.params).detach()
        end = self.net.flatten(dict(end_network.named_parameters())).detach()
        self.register_buffer("start", start)
        self.register_buffer("end", end)
        times = torch.linspace(0, 1, num_bends, dtype=torch.float64).to(start)[
            1:-1, None
        ]
        self.bends = nn.Parameter(start + times * (end - start))

    @property
    def num_bends(self) -> int:
        """The number B of control points, the ends included."""
        return len(self.bends) + 2

    @property
    def control_points(self) -> Tensor:
        """All control points in order, ``B x p``."""
        return torch.cat([self.start[None], self.bends, self.end[None]])

    def coefficients(self, t: Tensor) -> Tensor:
        """The share of each control point at times ``s``, ``s x B``."""
        raise NotImplementedError

    def weights(self, t: float | Tensor) -> Tensor:
        """Points of the curve, differentiable in the bends and in the times.

        Args:
            t: A time in [0, 1], or ``s`` of them.

        Returns:
            Weights ``p``, or ``s x p``; at 0 and 1 exactly those of the two modules.

        Raises:
            ValueError: If a time is not in [0, 1].
        """
        # A Python float would be rounded to float32.
        dtype = None if isinstance(t, Tensor) else torch.float64
        t = torch.as_tensor(t, dtype=dtype).to(self.start)
        # Written so that NaN fails too.
        if t.dim() > 1 or not bool(((t >= 0) & (t <= 1)).all()):
            shown = t.tolist() if t.numel() <= 8 else f"of shape {tuple(t.shape)}"
            raise ValueError(
                f"t must be a time in [0, 1] or a vector of them, but is {shown}. The "
                "curve ends at its end points."
            )
        return self._weights(t.reshape(-1)).reshape(*t.shape, -1)

    def _weights(self, t: Tensor) -> Tensor:
        # Scaled rows and no matrix product: at the ends it is exact in every precision
        # that a matrix product may be set to.
        shares = self.coefficients(t)[..., None]
        total = shares[:, 0] * self.start + shares[:, -1] * self.end
        for b, bend in enumerate(self.bends, start=1):
            total = total + shares[:, b] * bend
        return total

    def forward(self, X: Tensor, t: float | Tensor) -> Tensor:
        """Outputs at one time, for training: batch norm normalises by this batch.

        Everything else is in eval mode, without dropout. To evaluate a point of the
        curve take :meth:`draw_at`.

        Args:
            X: Inputs ``b x d``, or ``b x input_shape``.
            t: One time.

        Returns:
            Outputs ``b x m``, differentiable in the bends.

        Raises:
            ShapeError: If there are several times.
        """
        weights = self.weights(t)
        if weights.dim() > 1:
            raise ShapeError(
                f"t must be one time, but has shape {tuple(weights.shape[:-1])}. "
                "Networks at several are draw_at(t)."
            )
        return self._outputs(X, weights)

    def _outputs(self, X: Tensor, weights: Tensor) -> Tensor:
        net = self.net
        with batch_statistics(net.network) as buffers:
            params = {**net.unflatten(weights), **buffers}
            return net.apply_network(params, rows_for(net, X))

    def loss(
        self,
        loss_function: LossFunction,
        X: Tensor,
        Y: Tensor,
        *,
        weight_decay: float = 0.0,
        generator: Generator | None = None,
    ) -> Tensor:
        r"""One term of the training loss, at a uniform time.

        .. math:: \ell(f(X, \phi(t)), Y) + \tfrac12 \lambda \|\phi(t)\|^2,
                  \quad t \sim U(0, 1)

        Its mean over times and batches is what training minimises. The decay is of the
        point on the curve and not of the bends: leave that of the optimizer at zero.

        Args:
            loss_function: A mean over the batch, as ``torch.nn.functional``'s.
            X: Inputs ``b x d``, or ``b x input_shape``.
            Y: Targets in the form of the loss.
            weight_decay: :math:`\lambda`, for a loss that is a mean over data.
            generator: Source of t.

        Returns:
            A scalar.
        """
        generator = fresh(generator, self.start.device)
        t = torch.rand(1, generator=generator, device=generator.device)
        weights = self._weights(t.to(self.start))[0]
        value = loss_function(self._outputs(X, weights), Y)
        if weight_decay:
            value = value + 0.5 * weight_decay * weights.square().sum()
        return value

    def draw_at(self, t: float | Tensor) -> WeightDraws:
        """The networks at given times as frozen functions, evaluated in one pass.

        A network with batch norm has the statistics of the first module until
        :func:`gpbridge.batch_norm.refresh_batch_norm` gives each draw its own.

        Args:
            t: A time, or ``s`` of them.

        Returns:
            The functions, one for each time.
        """
        weights = self.weights(t).detach()
        return WeightDraws(self.net, weights.reshape(-1, len(self.start)))

    def draw(self, num_samples: int, generator: Generator | None = None) -> WeightDraws:
        """Freeze functions at uniform times."""
        check_count(num_samples=num_samples)
        generator = fresh(generator, self.start.device)
        t = torch.rand(num_samples, generator=generator, device=generator.device)
        return self.draw_at(t)

    def extra_repr(self) -> str:
        """The number of control points."""
        return f"control points: {self.num_bends}, the ends included"


class BezierCurve(WeightCurve):
    r"""A smooth curve, pulled towards its control points.

    .. math:: \phi(t) = \sum_b \tbinom{B-1}{b} (1-t)^{B-1-b} t^b \, w_b

    With three control points :math:`(1-t)^2 w_0 + 2 t (1-t) \theta + t^2 w_2`.
    Arguments as for :class:`WeightCurve`.

    Example:
        >>> curve = BezierCurve(nn.Linear(2, 1), nn.Linear(2, 1))
        >>> curve.weights(torch.linspace(0, 1, 5)).shape
        torch.Size([5, 3])
        >>> curve.draw(4)(torch.zeros(6, 2)).shape
        torch.Size([4, 6, 1])

    References:
        Garipov et al., NeurIPS 2018, section 3.2, and its supplement for B > 3.
    """

    def coefficients(self, t: Tensor) -> Tensor:
        """Bernstein polynomials at times ``s``, ``s x B``."""
        top = self.num_bends - 1
        b = torch.arange(top + 1, device=t.device)
        ways = [math.comb(top, k) for k in range(top + 1)]
        binomial = torch.tensor(ways, dtype=t.dtype, device=t.device)
        t = t[..., None]
        return binomial * (1 - t) ** (top - b) * t**b


class PolyChain(WeightCurve):
    r"""Straight pieces through the control points; with two of them, the line.

    .. math:: \phi(t) = \sum_b \max(0, 1 - |t (B - 1) - b|) \, w_b

    Arguments as for :class:`WeightCurve`.

    Example:
        >>> start, end = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(start.weight, 0), nn.init.constant_(end.weight, 1)
        >>> PolyChain(start, end, num_bends=2).weights(0.25).item()
        0.25

    References:
        Garipov et al., NeurIPS 2018, section 3.2.
    """

    def coefficients(self, t: Tensor) -> Tensor:
        """Hat functions at times ``s``, ``s x B``."""
        b = torch.arange(self.num_bends, device=t.device)
        gap = (t[..., None] * (self.num_bends - 1) - b).abs()
        return (1 - gap).clamp_min(0)


def image_net(net: FunctionalNet, X: Tensor) -> FunctionalNet:
    """The network, for inputs ``n x c x ...`` as rows if it has no shape of its own."""
    if net.input_shape is None and isinstance(X, Tensor) and X.dim() > 2:
        net = copy.copy(net)  # with the same weights
        net.input_shape = X.shape[1:]
    return net


def rows_for(net: FunctionalNet, X: Tensor, name: str = "X") -> Tensor:
    """Inputs ``b x d`` or ``b x input_shape`` as rows of ``d`` columns.

    Raises:
        TypeError: If they are not of the dtype of the network.
    """
    check_tensor(**{name: X})
    if X.dtype != net.dtype:
        raise TypeError(
            f"{name} must be {net.dtype} as the weights are, but is {X.dtype}. Try "
            f"{name}.to({net.dtype}), or .to({X.dtype}) on the networks."
        )
    shape = net.input_shape
    return X.flatten(1) if shape is not None and X.shape[1:] == shape else X


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[Params]:
    """Let batch norm normalise by the batch.

    Yields:
        Buffers for it to move. Pass them to ``functional_call``: then the network's own
        stay as they are.
    """
    norms = norm_layers(network)
    modes = {name: module.training for name, module in norms.items()}
    try:
        for module in norms.values():
            module.train()
        yield {
            f"{name}.{kind}".lstrip("."): value.clone()
            for name, module in norms.items()
            for kind, value in module.named_buffers()
        }
    finally:
        for name, module in norms.items():
            module.train(modes[name])
