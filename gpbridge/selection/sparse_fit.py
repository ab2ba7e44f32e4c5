r"""Fitting a sparse variational GP by minibatches of its lower bound.

In: a bound (gpytorch's, or ``OrbitVariationalELBO``) and all data. Out: its model and
likelihood, trained in place, with the history and a state to go on from.
Next: the likelihood at the model's posterior predicts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from gpytorch.likelihoods import MultitaskGaussianLikelihood
from gpytorch.mlls import MarginalLogLikelihood
from gpytorch.optim import NGD
from gpytorch.variational import (
    NaturalVariationalDistribution,
    TrilNaturalVariationalDistribution,
)
from torch import Generator, Tensor, nn

from gpbridge.checks import (
    check_finite,
    check_floating,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_device,
    check_same_dtype,
    check_same_length,
    check_tensor,
)
from gpbridge.dnn.elbo_training import ELBOFit, ascend_elbo
from gpbridge.dnn.training import Callback, adam
from gpbridge.gpytorch_targets import check_target_labels, check_target_shape
from gpbridge.likelihoods import is_gaussian, outputs_of
from gpbridge.selection.elbo import OrbitVariationalELBO

_NATURAL = (NaturalVariationalDistribution, TrilNaturalVariationalDistribution)


def fit_sparse_gp(
    elbo: MarginalLogLikelihood,
    train_X: Tensor,
    train_Y: Tensor,
    *,
    epochs: int = 50,
    batch_size: int = 100,
    learning_rate: float = 1e-2,
    natural_rate: float = 0.1,
    generator: Generator | None = None,
    resume: dict[str, Any] | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> ELBOFit:
    r"""Maximise a variational lower bound, in hyperparameters and inducing points too.

    Adam moves all parameters of the model and the likelihood, except those of a
    natural variational distribution: they take natural gradient steps of size
    ``natural_rate``, which for Gaussian noise, all data in one batch and rate one is
    the optimum in one step. Model and likelihood are those of ``elbo``, trained in
    place, as gpytorch's are, and left in eval mode.

    Args:
        elbo: ``gpytorch.mlls.VariationalELBO``, ``PredictiveLogLikelihood`` or
            :class:`gpbridge.selection.OrbitVariationalELBO`, made with ``num_data`` the
            number of rows below.
        train_X: Inputs ``n x d``.
        train_Y: Labels or targets ``n``, or ``n x m`` for m outputs; ``n x 1`` for one.
            Targets with Gaussian noise have the dtype of the inputs, as for
            :func:`fit_online`; they are not converted.
        epochs: Passes over the data, after those of ``resume``.
        batch_size: Rows per step.
        learning_rate: Of Adam.
        natural_rate: Of natural gradients, where the distribution takes them.
        generator: Source of all randomness; None is a fresh one with seed 0.
        resume: ``fit.state`` of a run before, of the same data and structure of the
            bound: as if there had been no pause. Public attributes of its modules must
            be the same. What they count as they are called belongs in a buffer, or
            behind an underscore.
        progress: Whether to show a bar, if there is a terminal.
        callback: Called after every epoch with (epoch, elbo, entries of the history);
            True ends training.

    Returns:
        The bound, whose ``model`` and ``likelihood`` are trained, the history ``elbo``
        in nats per datum, and the state.

    Raises:
        DivergedError: If the bound or a parameter is not finite; all is then as it was
            after the last good epoch, which ``last_good`` of the error holds.
        ValueError: If an option is out of range, the number of rows is not that of
            ``elbo``, nothing can be trained, or ``resume`` is of another run.
        InputDataError: If inputs or targets are NaN or infinite, or labels are not
            those of the likelihood.
        ShapeError: If targets have another shape.
        TypeError: If class labels are no integers, inputs have another dtype than the
            model, or targets of Gaussian noise another one than inputs; or if a model
            came in place of its bound.

    Warns:
        NotConvergedWarning: If the bound still rises at the last epoch, by more than
            its noise (:mod:`gpbridge.convergence`).
        RuntimeWarning: If training is interrupted from the keyboard.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> from gpytorch.mlls import VariationalELBO
        >>> from gpbridge.inducing_gp import SparseGP
        >>> X = torch.linspace(0, 1, 50)[:, None]
        >>> Y = torch.sin(6 * X[:, 0])
        >>> model = SparseGP(RBFKernel(), X[::10])
        >>> elbo = VariationalELBO(model.likelihood, model, num_data=50)
        >>> history = fit_sparse_gp(elbo, X, Y, epochs=20, learning_rate=0.1).history
        >>> history["elbo"][-1] > history["elbo"][0]
        True

    References:
        Hensman, Fusi and Lawrence, Gaussian processes for big data, UAI 2013.
        Salimbeni, Eleftheriadis and Hensman, Natural gradients in practice, AISTATS
        2018.
    """
    if not isinstance(elbo, MarginalLogLikelihood):
        raise TypeError(
            "elbo must be a bound, which knows model, likelihood and number of data, "
            f"but is {type(elbo).__name__}. Try fit_sparse_gp(VariationalELBO("
            f"model.likelihood, model, num_data={len(train_X)}), train_X, train_Y)."
        )
    check_positive(natural_rate=natural_rate, learning_rate=learning_rate)
    train_X, train_Y = checked_data(elbo, train_X, train_Y)
    n = len(train_X)

    def bound(rows: Tensor, generator: Generator) -> Tensor:
        x, y = train_X[rows], train_Y[rows]
        if isinstance(elbo, OrbitVariationalELBO):
            return elbo(x, y, generator=generator)
        return elbo(elbo.model(x), y)

    natural = list(_natural_parameters(elbo))
    chosen = set(map(id, natural))
    # A model that owns its likelihood shows its parameters twice, but once each here.
    others = [p for p in elbo.parameters() if id(p) not in chosen and p.requires_grad]
    optimizer = None
    if natural:
        optimizer = _NaturalAndAdam(natural, others, n, natural_rate, learning_rate)
    return ascend_elbo(
        elbo,
        bound,
        (train_X, train_Y),
        groups=[(others, learning_rate)],
        epochs=epochs,
        batch_size=batch_size,
        generator=generator,
        resume=resume,
        progress=progress,
        callback=callback,
        name="fit_sparse_gp",
        usual_rate=1e-2,
        optimizer=optimizer,
        warn_rising=True,
    )


def checked_data(
    elbo: MarginalLogLikelihood, train_X: Tensor, train_Y: Tensor
) -> tuple[Tensor, Tensor]:
    """Inputs and targets as :func:`fit_sparse_gp` takes them, without a graph.

    Args:
        elbo: The bound that they are for.
        train_X: Inputs ``n x d``.
        train_Y: Labels or targets ``n``, or ``n x m`` for m outputs; ``n x 1`` for one.

    Returns:
        Both, targets ``n`` or ``n x m``.

    Raises:
        InputDataError: If values are not finite, or labels not those of the likelihood.
        ShapeError: If targets have another shape.
        ValueError: If the number of rows is not that of the bound.
        TypeError: If class labels are no integers, or targets of Gaussian noise have
            another dtype than the inputs.
    """
    check_inputs(train_X)
    check_tensor(train_Y=train_Y)
    check_not_empty(train_X=train_X)
    check_same_length(train_X=train_X, train_Y=train_Y)
    check_same_device(train_X=train_X, train_Y=train_Y)
    check_finite(train_Y=train_Y)
    train_X, train_Y, n = train_X.detach(), train_Y.detach(), len(train_X)
    single = outputs_of(elbo.likelihood) == 1
    multitask = isinstance(elbo.likelihood, MultitaskGaussianLikelihood)
    if single and not multitask and train_Y.shape == (n, 1):
        train_Y = train_Y[:, 0]  # as BoTorch has them
    check_target_shape(elbo.likelihood, train_Y, n)
    if is_gaussian(elbo.likelihood):
        check_floating(train_Y=train_Y)
        check_same_dtype("train_Y", train_Y, train_X.dtype)
    check_target_labels(elbo.likelihood, train_Y)
    if getattr(elbo, "num_data", n) != n:
        raise ValueError(
            f"elbo was made for num_data={elbo.num_data}, but there are {n} rows: the "
            f"KL divergence would have the wrong weight. Make it with num_data={n}."
        )
    return train_X, train_Y


def _natural_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    for part in module.modules():
        if isinstance(part, _NATURAL):
            yield from (p for p in part.parameters() if p.requires_grad)


class _NaturalAndAdam(torch.optim.Optimizer):
    """Natural gradients for some parameters and Adam for others, as one optimiser."""

    def __init__(
        self,
        natural: list[nn.Parameter],
        others: list[nn.Parameter],
        num_data: int,
        natural_rate: float,
        learning_rate: float,
    ) -> None:
        self.parts = [NGD(natural, num_data=num_data, lr=natural_rate)]
        if others:
            self.parts.append(adam([(others, learning_rate)]))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states = copy.deepcopy(state["parts"])
        for part, own in zip(self.parts, states, strict=True):
            part.load_state_dict(own)
