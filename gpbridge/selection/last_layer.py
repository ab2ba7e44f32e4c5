r"""Invariance of a network through a Gaussian process on its last layer.

The kernel is an ``InvariantKernel`` of a ``DeepKernel``: the features of a network,
compared over the orbits of two inputs. Weights and hyperparameters do not learn well
together: features that fit the data make the law look settled where it is. So phases
alternate: hyperparameters and law with the weights held, then weights with the law and
the hyperparameters held.

In: a GP, exact or sparse, with such a kernel, whose network was trained before. Out: a
fitted copy, the law, and a state to go on from.

References:
    Schwöbel, Jørgensen, Ober and van der Wilk, Last layer marginal likelihood for
    invariance learning, AISTATS 2022. Ober, Rasmussen and van der Wilk, The promises
    and pitfalls of deep kernel learning, UAI 2021.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from botorch.optim.utils import get_parameters_and_bounds
from gpytorch.mlls import MarginalLogLikelihood
from gpytorch.models import GP, ExactGP
from torch import Generator, Tensor, nn

from gpbridge.checks import (
    ReliabilityWarning,
    check_count,
    check_positive,
    warn_user,
)
from gpbridge.dnn.elbo_training import Callback, ascend_elbo
from gpbridge.kernels.deep import DeepKernel
from gpbridge.selection.elbo import OrbitVariationalELBO
from gpbridge.selection.gaussian_marginal import gaussian_marginal, log_density
from gpbridge.selection.invariance_gp import objective_of
from gpbridge.selection.law_starts import copy_of_model, free_laws, learnt_values
from gpbridge.selection.marginal_likelihood import log_evidence, log_prior
from gpbridge.selection.sparse_fit import checked_data

_EXPLOITED = 1.0  # nats per datum that the weights may take from the log determinant
_EXPLAINED = 0.1  # how near to one the misfit then is


@dataclass(frozen=True)
class LastLayerFit:
    r"""A GP on a network's features, and the law of its transformations.

    Attributes:
        model: The fitted copy, in eval mode.
        learnt: Free parameters of the law by name, in natural units.
        evidence: Total nats without hyperpriors; of a sparse GP its lower bound.
        history: ``elbo``, the objective per datum in each epoch, hyperpriors included.
        phases: What moved in each epoch, ``"hyperparameters"`` or ``"weights"``.
        misfit: Of an exact GP, :math:`y^\top C^{-1} y / n` of the residuals, about one
            where the evidence has its optimum in the scales; else None.
        log_det: Of an exact GP, :math:`\log\det C / n` before the weights moved and at
            the end; else None.
        state: Pass it as ``resume`` to go on as if there had been no pause.
    """

    model: GP
    learnt: dict[str, Tensor]
    evidence: float
    history: dict[str, list[float]]
    phases: tuple[str, ...]
    misfit: float | None
    log_det: tuple[float, float] | None
    state: dict[str, Any] = field(repr=False)


def learn_last_layer_invariance(
    model: GP | MarginalLogLikelihood,
    data: tuple[Tensor, Tensor] | None = None,
    *,
    cycles: int = 10,
    hyper_epochs: int = 20,
    weight_epochs: int = 10,
    learning_rate: float = 0.02,
    network_learning_rate: float = 1e-3,
    batch_size: int = 100,
    generator: Generator | None = None,
    resume: dict[str, Any] | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> LastLayerFit:
    r"""Learn an invariance and the features of a network in alternating phases.

    Each cycle moves hyperparameters, noise and law by the evidence or its bound, the
    features held, and then the weights of the network, everything else held. The
    distribution of the inducing variables and their places move in both. Adam, with
    moments of their own for each of these, inside the bounds of their constraints.

    The evidence has several optima in the law, and the draws of the law are fixed:
    compare ``evidence`` of several starts (``augmentation.bound = ...``), or scan the
    result with :func:`learn_kernel_invariance`, its network frozen.

    **Trained features overfit.** The misfit of a GP at the optimum of its scales is one
    per datum, whatever the features, so that weights can raise the evidence only by its
    log determinant, by pulling training points together. If they took more than a nat
    per datum from it, a warning says so. The evidence of the whole network
    (:func:`learn_invariance`) has no such freedom.

    Args:
        model: An exact GP with its data; a sparse GP, or its bound. It is copied. Its
            kernel contains an ``InvariantKernel`` of a ``DeepKernel`` with trainable
            weights, best of a network that was trained before, without its head.
        data: Inputs ``n x d`` and targets; for a sparse GP only.
        cycles: How often both phases take place, after those of ``resume``.
        hyper_epochs: Epochs of the first phase in each cycle.
        weight_epochs: Epochs of the second.
        learning_rate: Of hyperparameters, law and inducing variables.
        network_learning_rate: Of weights.
        batch_size: Rows per step of a sparse GP; an exact one takes all.
        generator: Source of all randomness; None is a fresh one with seed 0.
        resume: ``fit.state`` of a run before, with the same numbers of epochs.
        progress: Whether to show a bar, if there is a terminal.
        callback: Called after every epoch with (epoch, objective, entries of the
            history); True ends training.

    Returns:
        The fitted copy and the law.

    Raises:
        DivergedError: If the objective or a parameter is not finite.
        TypeError: If the model is neither exact nor sparse, or has natural gradients.
        ValueError: If the kernel has no free law or no trainable network.
        ShapeError: If targets do not fit the likelihood of a sparse GP.

    Warns:
        ReliabilityWarning: If the weights of an exact GP took the evidence from the log
            determinant.

    Example:
        >>> from botorch.models import SingleTaskGP
        >>> from gpytorch.kernels import RBFKernel
        >>> from gpbridge.augmentation import Rotation2d
        >>> from gpbridge.kernels import DeepKernel, InvariantKernel
        >>> X = torch.rand(10, 2, generator=Generator().manual_seed(0)).double()
        >>> body = nn.Sequential(nn.Linear(2, 5), nn.Tanh()).double()
        >>> kernel = InvariantKernel(DeepKernel(body, RBFKernel()), Rotation2d(4))
        >>> gp = SingleTaskGP(X, X.norm(dim=-1, keepdim=True), covar_module=kernel)
        >>> fit = learn_last_layer_invariance(gp, cycles=1, hyper_epochs=2)
        >>> fit.phases[1:3], fit.learnt["bound"].shape
        (('hyperparameters', 'weights'), torch.Size([1]))
    """
    check_count(cycles=cycles, hyper_epochs=hyper_epochs, weight_epochs=weight_epochs)
    check_positive(
        learning_rate=learning_rate, network_learning_rate=network_learning_rate
    )
    given = objective_of(model, data)
    free_laws(model if given is None else given.model)  # or an error
    exact = given is None
    own = copy_of_model(model if exact else given)
    gp = own if exact else own.model
    laws = free_laws(gp)
    groups = _groups(gp, own)
    if exact:
        # One row, all data, as the evidence has no terms for each datum.
        rows_of = (gp.train_inputs[0].unsqueeze(0), gp.train_targets.unsqueeze(0))
        rows_per_step, count = 1, gp.train_targets.numel()
    else:
        X, Y = checked_data(given, *data)
        rows_of, rows_per_step = (X, Y), batch_size

    def value(rows: Tensor, generator: Generator) -> Tensor:
        if exact:
            evidence = log_evidence(gp)
            return (evidence + log_prior(gp, evidence)).sum() / count
        if isinstance(own, OrbitVariationalELBO):
            return own(X[rows], Y[rows], generator=generator)
        return own(gp(X[rows]), Y[rows])

    before = None if resume is None else resume.get("log_det")

    def after_epoch(epoch: int, module: nn.Module, entry: dict[str, float]) -> object:
        nonlocal before
        if exact and before is None and epoch == hyper_epochs - 1:
            before = _misfit_and_log_det(gp)[1]
        return callback is not None and callback(epoch, module, entry)

    # BoTorch's noise has no transform: a step could make it negative.
    parameters, limits = get_parameters_and_bounds(own, requires_grad=True)
    bounds = {
        parameters[name]: [torch.as_tensor(end).to(parameters[name]) for end in limit]
        for name, limit in limits.items()
    }
    steps = math.ceil(len(rows_of[0]) / rows_per_step)
    optimizer = _Toggling(
        groups,
        (hyper_epochs * steps, weight_epochs * steps),
        learning_rate,
        network_learning_rate,
        bounds,
    )
    fit = ascend_elbo(
        own,
        value,
        rows_of,
        groups=[(groups[0], learning_rate)],
        epochs=cycles * (hyper_epochs + weight_epochs),
        batch_size=rows_per_step,
        generator=generator,
        resume=resume,
        progress=progress,
        callback=after_epoch,
        name="learn_last_layer_invariance",
        usual_rate=1e-2,
        optimizer=optimizer,
    )
    with torch.no_grad():
        arguments = () if exact else (X, Y, own.likelihood)
        evidence = float(log_evidence(gp, *arguments).sum())
    misfit, log_det = None, None
    if exact:
        misfit, now = _misfit_and_log_det(gp)
        log_det = (now if before is None else before, now)
        _warn_if_exploited(misfit, *log_det)
    period = hyper_epochs + weight_epochs
    phases = tuple(
        "hyperparameters" if epoch % period < hyper_epochs else "weights"
        for epoch in range(len(fit.history["elbo"]))
    )
    return LastLayerFit(
        gp,
        learnt_values(gp, laws),
        evidence,
        fit.history,
        phases,
        misfit,
        log_det,
        fit.state | {"log_det": before},
    )


def _groups(gp: GP, module: nn.Module) -> tuple[list[nn.Parameter], ...]:
    """Hyperparameters with the law, weights, and what belongs to inference."""
    weights = {
        id(p)
        for kernel in gp.modules()
        if isinstance(kernel, DeepKernel)
        for p in kernel.network.parameters()
        if p.requires_grad
    }
    if not weights:
        raise ValueError(
            "The kernel has no network to train: put a gpbridge.kernels.DeepKernel "
            "with freeze=False inside of the InvariantKernel, or call "
            "learn_kernel_invariance, which holds the features."
        )
    inference = set()
    if not isinstance(gp, ExactGP):
        strategy = gp.variational_strategy
        if any(name.endswith("natural_vec") for name, _ in strategy.named_parameters()):
            raise TypeError(
                "Natural gradients have no phases here. Make the sparse GP with "
                "distribution='cholesky'."
            )
        inference = {id(p) for p in strategy.parameters()}
    free = [p for p in module.parameters() if p.requires_grad]
    return (
        [p for p in free if id(p) not in weights | inference],
        [p for p in free if id(p) in weights],
        [p for p in free if id(p) in inference],
    )


@torch.no_grad()
def _misfit_and_log_det(gp: ExactGP) -> tuple[float, float]:
    """Of the noisy covariance, per target."""
    marginal = gaussian_marginal(gp)
    L = marginal.factor()
    log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    n = L.shape[-1]
    misfit = -2 * log_density(marginal, L) - log_det - n * math.log(2 * math.pi)
    return float(misfit.mean()) / n, float(log_det.mean()) / n


def _warn_if_exploited(misfit: float, before: float, now: float) -> None:
    if abs(misfit - 1) < _EXPLAINED and before - now > _EXPLOITED:
        warn_user(
            f"The weights lowered the log determinant by {before - now:.2g} nats per "
            f"datum, with a misfit of {misfit:.2g}: the features overfit, and neither "
            "noise nor law may be trusted. Lower network_learning_rate or "
            "weight_epochs, or take the evidence of the whole network "
            "(learn_invariance).",
            ReliabilityWarning,
        )


class _Toggling(torch.optim.Optimizer):
    """Adam for the parameters whose turn it is, and for those of inference always."""

    def __init__(
        self,
        groups: tuple[list[nn.Parameter], ...],
        lengths: tuple[int, int],
        rate: float,
        network_rate: float,
        bounds: dict[nn.Parameter, list[Tensor]],
    ) -> None:
        rates = (rate, network_rate, rate)
        self.parts = [
            torch.optim.Adam([{"params": group, "lr": lr}])
            for group, lr in zip(groups, rates, strict=True)
            if group
        ]
        self.lengths, self.bounds = lengths, bounds
        self.count = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        turn = int(self.count % sum(self.lengths) >= self.lengths[0])
        for part in (self.parts[turn], *self.parts[2:]):
            part.step()
        with torch.no_grad():
            for parameter, (low, high) in self.bounds.items():
                parameter.clamp_(low, high)
        self.count += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        parts = [part.state_dict() for part in self.parts]
        return {"parts": parts, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states = copy.deepcopy(state["parts"])
        for part, own in zip(self.parts, states, strict=True):
            part.load_state_dict(own)
        self.count = state["count"]
