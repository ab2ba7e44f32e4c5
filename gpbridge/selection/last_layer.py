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

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from botorch.optim.utils import get_parameters_and_bounds
from gpytorch.mlls import MarginalLogLikelihood
from gpytorch.models import GP, ExactGP
from torch import Generator, Tensor, nn

from gpbridge.checks import (
    check_count,
    check_positive,
)
from gpbridge.dnn.divergence import DivergedError, rate_advice
from gpbridge.dnn.elbo_training import Callback, ascend_elbo
from gpbridge.dnn.run_key import check_same_run
from gpbridge.dnn.training import adam
from gpbridge.kernels.deep import DeepKernel
from gpbridge.selection.elbo import OrbitVariationalELBO
from gpbridge.selection.gaussian_marginal import gaussian_marginal, log_density
from gpbridge.selection.invariance_gp import objective_of
from gpbridge.selection.law_starts import copy_of_model, free_laws, learnt_values
from gpbridge.selection.marginal_likelihood import log_evidence
from gpbridge.selection.mll import log_prior
from gpbridge.selection.sparse_fit import checked_data

_PHASES = ("hyperparameters", "weights")
_USUAL_RATE, _USUAL_NETWORK_RATE = 0.02, 1e-3


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
            where the evidence has its optimum in the scales and no prior holds them;
            else None.
        log_det: Of an exact GP, :math:`\log\det C / n`; else None. The evidence per
            datum is minus half of both, less a constant.
        state: Pass it as ``resume`` to go on as if there had been no pause.
    """

    model: GP
    learnt: dict[str, Tensor]
    evidence: float
    history: dict[str, list[float]]
    phases: tuple[str, ...]
    misfit: float | None
    log_det: float | None
    state: dict[str, Any] = field(repr=False)


def learn_last_layer_invariance(
    model: GP | MarginalLogLikelihood,
    data: tuple[Tensor, Tensor] | None = None,
    *,
    cycles: int = 10,
    hyper_epochs: int = 20,
    weight_epochs: int = 10,
    learning_rate: float = _USUAL_RATE,
    network_learning_rate: float = _USUAL_NETWORK_RATE,
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
    per datum, whatever the features, so that weights raise the evidence in the end by
    its log determinant, by pulling training points together. Features that fit noise do
    so as well as good ones: ``misfit`` and ``log_det`` say where the evidence comes
    from, and only rows held out whether the features may be trusted. The evidence of
    the whole network (:func:`learn_invariance`) has no such freedom.

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
        resume: ``fit.state`` of a run before, with the same lengths of both phases.
        progress: Whether to show a bar, if there is a terminal.
        callback: Called after every epoch with (epoch, objective, entries of the
            history); True ends training.

    Returns:
        The fitted copy and the law.

    Raises:
        DivergedError: If the objective or a parameter is not finite; its ``last_good``
            is an :class:`~gpbridge.dnn.elbo_training.ELBOFit`, with the state.
        TypeError: If the model is neither exact nor sparse, or has natural gradients.
        ValueError: If the kernel has no free law or no trainable network, or ``resume``
            is of other data, another model or other lengths.
        ShapeError: If targets do not fit the likelihood of a sparse GP.

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
    rates = (learning_rate, network_learning_rate, learning_rate)
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

    def before_epoch(epoch: int) -> None:
        turn = _turn(epoch, hyper_epochs, weight_epochs)
        # Adam passes over what has no gradient, and keeps its moments.
        for number, group in enumerate(groups[:2]):
            for parameter in group:
                parameter.requires_grad_(number == turn)

    try:
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
            callback=callback,
            name="learn_last_layer_invariance",
            usual_rate=_USUAL_RATE,
            optimizer=_optimizer(
                own,
                list(zip(groups, rates, strict=True)),
                {"hyper_epochs": hyper_epochs, "weight_epochs": weight_epochs},
            ),
            before_epoch=before_epoch,
        )
    except DivergedError as error:
        advice = rate_advice(network_learning_rate, _USUAL_NETWORK_RATE)
        raise DivergedError(
            f"{error} The weights have a rate of their own: try network_{advice}.",
            error.last_good,
        ) from error
    finally:
        for parameter in (*groups[0], *groups[1]):
            parameter.requires_grad_(True)
    with torch.no_grad():
        arguments = () if exact else (X, Y, own.likelihood)
        evidence = float(log_evidence(gp, *arguments).sum())
    misfit, log_det = _misfit_and_log_det(gp) if exact else (None, None)
    phases = tuple(
        _PHASES[_turn(epoch, hyper_epochs, weight_epochs)]
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
        fit.state,
    )


def _turn(epoch: int, hyper_epochs: int, weight_epochs: int) -> int:
    """Which group moves; of the epoch alone, as batches may change in between."""
    return int(epoch % (hyper_epochs + weight_epochs) >= hyper_epochs)


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


def _optimizer(
    module: nn.Module,
    groups: list[tuple[list[nn.Parameter], float]],
    lengths: dict[str, int],
) -> torch.optim.Adam:
    """Adam inside the bounds; its state refuses phases of other lengths."""
    optimizer = adam(groups)
    parameters, limits = get_parameters_and_bounds(module, requires_grad=True)
    bounds = {
        parameters[name]: [torch.as_tensor(end).to(parameters[name]) for end in limit]
        for name, limit in limits.items()
    }

    @torch.no_grad()
    def stay_inside(*_: object) -> None:
        # BoTorch's noise has no transform: a step could make it negative.
        for parameter, (low, high) in bounds.items():
            parameter.clamp_(low, high)

    def check_lengths(_: object, state: dict[str, Any]) -> None:
        remedy = "Pass the numbers of epochs of the run before, or start anew."
        check_same_run(state, lengths, remedy)

    optimizer.register_step_post_hook(stay_inside)
    optimizer.register_state_dict_post_hook(lambda _, state: state | lengths)
    optimizer.register_load_state_dict_pre_hook(check_lengths)
    return optimizer
