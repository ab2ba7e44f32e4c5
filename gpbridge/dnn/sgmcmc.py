r"""Stochastic-gradient Langevin and Hamiltonian dynamics as ordinary optimizers.

Both sample :math:`p(\theta) \propto \exp(-U(\theta) / T)` in the limit of small steps,
where the loss given to ``backward`` is the energy *per datum*, :math:`U / N`, a mean
over the batch. With U the negative log posterior, T = 1 is the Bayesian posterior. The
data set enters twice, as the mean of the loss and as the 1 / N of the noise, and
nowhere else.

In: parameters and their gradients. Out: parameters that move. Next: ``cyclical`` sets
rate and noise, ``chains`` collects samples.

References:
    Welling and Teh, Bayesian learning via stochastic gradient Langevin dynamics, ICML
    2011, eq. (4). Chen, Fox and Guestrin, Stochastic gradient Hamiltonian Monte Carlo,
    ICML 2014, eq. (15) with the estimate of the gradient noise left at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from gpbridge.checks import check_count, check_generator, check_positive
from gpbridge.randomness import fresh, standard_normal

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]]


class _NoisyOptimizer(Optimizer):
    """What the two samplers share: options, a generator in the state, gradients."""

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], generator: Generator | None
    ) -> None:
        super().__init__(params, defaults)
        for group in self.param_groups:
            self._check_group(group)
        device = self.param_groups[0]["params"][0].device
        self.generator = fresh(generator, device)
        check_generator(self.generator, device)

    def _check_group(self, group: dict[str, Any]) -> None:
        if isinstance(group["lr"], Tensor):
            raise TypeError(
                "lr must be a number, but is a tensor: the scale of the noise would "
                "be read from the device at every step. Try lr.item()."
            )
        check_positive(lr=group["lr"])
        check_count(num_data=group["num_data"])
        for name in ("temperature", "prior_precision"):
            if not 0 <= group[name] < float("inf"):
                raise ValueError(
                    f"{name} must be finite and not negative, but is {group[name]}."
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own."""
        super().add_param_group(param_group)
        if hasattr(self, "generator"):  # else the constructor checks
            try:
                self._check_group(self.param_groups[-1])
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Make one step with the gradients of the loss per datum.

        Args:
            closure: Evaluates the loss anew and returns it; optional.

        Returns:
            The loss of the closure, or None without one.

        Raises:
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            if any(g.is_sparse for g in gradients):
                raise RuntimeError(
                    "Gradients must be dense: noise moves every weight. Build the "
                    "embedding with sparse=False."
                )
            if group["prior_precision"]:
                decay = group["prior_precision"] / group["num_data"]
                gradients = torch._foreach_add(gradients, params, alpha=decay)
            self._move(params, gradients, group)
        return loss

    def _move(
        self, params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> None:
        raise NotImplementedError

    def _add_noise(
        self, values: list[Tensor], group: dict[str, Any], variance: float
    ) -> None:
        """Add normals of ``variance`` times T / N."""
        std = (variance * group["temperature"] / group["num_data"]) ** 0.5
        if group["noise"] and std:
            normals = [standard_normal(v.shape, self.generator, v) for v in values]
            torch._foreach_add_(values, normals, alpha=std)

    def state_dict(self) -> dict[str, Any]:
        """As upstream, with the state of the generator."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a run was left: the same numbers follow."""
        super().load_state_dict(state_dict)
        self.generator.set_state(state_dict["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        # Upstream's keeps three attributes only.
        return {**super().__getstate__(), "generator": self.generator}


class SGLD(_NoisyOptimizer):
    r"""Stochastic-gradient Langevin dynamics.

    .. math::
        \theta \leftarrow \theta - \eta g + \sqrt{2 \eta T / N} \, \xi, \qquad
        g = \nabla \tfrac1N U(\theta) + \tfrac{\lambda}{N} \theta

    On a quadratic loss of curvature h the stationary variance is
    :math:`T / (N h (1 - \eta h / 2))`: too wide by :math:`\eta h / 2`, plus what the
    noise of minibatches adds. Rate, temperature and the switch of the noise are read
    from the group at every step, so that schedulers of torch work as they are.

    Args:
        params: Parameters, or groups of them with options of their own.
        lr: The step size :math:`\eta` on the loss per datum, below 2 / h.
        num_data: N, the number of data, not of batches.
        temperature: T, of the whole energy, prior included. To temper the likelihood
            alone, p(D|w)^(1/T) p(w), multiply ``prior_precision`` by T as well.
        prior_precision: :math:`\lambda` of a prior N(0, 1 / lambda), for a loss that is
            the negative log likelihood per datum; 0 if the loss has the prior in it.
        noise: False for plain gradient descent, as in the exploration of a cycle.
        generator: Source of the noise, on the device of the parameters; its state is
            part of the state of the optimizer.

    Raises:
        ValueError: If an option is out of its range.
        TypeError: If the rate is a tensor.

    Example:
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> sampler = SGLD([theta], lr=0.1, num_data=100)
        >>> (0.5 * theta.square().sum()).backward()
        >>> sampler.step()
        >>> bool((theta != 0).all())
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        num_data: int,
        *,
        temperature: float = 1.0,
        prior_precision: float = 0.0,
        noise: bool = True,
        generator: Generator | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "num_data": num_data,
            "temperature": temperature,
            "prior_precision": prior_precision,
            "noise": noise,
        }
        super().__init__(params, defaults, generator)

    def _move(
        self, params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> None:
        torch._foreach_add_(params, gradients, alpha=-group["lr"])
        self._add_noise(params, group, 2 * group["lr"])


class SGHMC(_NoisyOptimizer):
    r"""Stochastic-gradient Hamiltonian Monte Carlo: gradient descent with momentum.

    .. math::
        v \leftarrow (1 - \alpha) v - \eta g + \sqrt{2 \eta \alpha T / N} \, \xi,
        \qquad \theta \leftarrow \theta + v

    Without noise it is momentum :math:`1 - \alpha` as in ``torch.optim.SGD``, and with
    :math:`\alpha = 1` it is :class:`SGLD`. A step moves about :math:`1 / \alpha` times
    as far as one of SGLD at the same rate, and the error of the stationary variance for
    small rates is of the order :math:`\eta h`, as there.

    Args:
        params: Parameters, or groups of them with options of their own.
        lr: The step size :math:`\eta` on the loss per datum, below
            :math:`(4 - 2 \alpha) / h` for a curvature h.
        num_data: N, the number of data.
        friction: :math:`\alpha`, one minus the momentum, in (0, 1].
        temperature: T, as for :class:`SGLD`.
        prior_precision: As for :class:`SGLD`.
        noise: As for :class:`SGLD`.
        generator: As for :class:`SGLD`.

    Raises:
        ValueError: If an option is out of its range.
        TypeError: If the rate is a tensor.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        num_data: int,
        *,
        friction: float = 0.1,
        temperature: float = 1.0,
        prior_precision: float = 0.0,
        noise: bool = True,
        generator: Generator | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "num_data": num_data,
            "friction": friction,
            "temperature": temperature,
            "prior_precision": prior_precision,
            "noise": noise,
        }
        super().__init__(params, defaults, generator)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not 0 < group["friction"] <= 1:
            raise ValueError(
                f"friction must lie in (0, 1], but is {group['friction']}. It is one "
                "minus the momentum: for a momentum of 0.9 pass 0.1."
            )

    def _move(
        self, params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> None:
        for p in params:
            if "velocity" not in self.state[p]:
                self.state[p]["velocity"] = torch.zeros_like(p)
        velocities = [self.state[p]["velocity"] for p in params]
        torch._foreach_mul_(velocities, 1 - group["friction"])
        torch._foreach_add_(velocities, gradients, alpha=-group["lr"])
        self._add_noise(velocities, group, 2 * group["lr"] * group["friction"])
        torch._foreach_add_(params, velocities)
