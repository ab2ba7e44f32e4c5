r"""Training a network and learning its prior and noise, in one run.

In: a network, data. Out: an :class:`OnlineFit`, a trained copy that is the MAP under
prior variances and a noise that the evidence chose while it was trained, without
validation data. Next: ``OnlineFit.model`` makes a Gaussian process of it.

References:
    Immer, Bauer, Fortuin, Rätsch, Khan, Scalable marginal likelihood estimation for
    model selection in deep learning, ICML 2021, algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor, nn

from gpbridge.checks import (
    ReliabilityWarning,
    check_count,
    check_positive,
    warn_user,
)
from gpbridge.dnn.divergence import DivergedError
from gpbridge.dnn.training import USUAL_RATE
from gpbridge.kernels.tangent import Groups
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.inference import Exact, Inference
from gpbridge.linearized.structures import Kronecker
from gpbridge.selection.online_evidence import OnlineStructure
from gpbridge.selection.online_run import (
    check_folder,
    diverged_message,
    final_evidence,
    run_epochs,
)
from gpbridge.selection.online_training import (
    NonFiniteError,
    OnlineStep,
    OnlineTraining,
)
from gpbridge.selection.training_batches import Data, TrainingBatches
from gpbridge.selection.weight_optimizer import OptimizerFactory
from gpbridge.types import Evidence


@dataclass(frozen=True)
class OnlineFit:
    """A network trained under hyperparameters that were learnt with it.

    Attributes:
        network: The trained copy, in eval mode.
        likelihood: With the noise that was learnt.
        groups: Names of the weights that share a prior variance.
        prior_variance: One per group.
        noise_variance: One per output, of Gaussian noise; else None.
        evidence: At the end, in total nats; None of a run that diverged.
        losses: Mean negative log likelihood of each epoch, in nats per datum.
        steps: Hyperparameters and evidence after each update.
        input_shape: Shape of one input, if not a row.
    """

    network: nn.Module
    likelihood: Likelihood
    groups: list[list[str]]
    prior_variance: Tensor
    noise_variance: Tensor | None
    evidence: Evidence | None
    losses: list[float]
    steps: list[OnlineStep]
    input_shape: tuple[int, ...] | None

    @property
    def history(self) -> dict[str, Tensor]:
        """One row per update of each entry of a step, and ``loss`` per epoch."""
        found = {"loss": torch.tensor(self.losses, dtype=torch.float64)}
        for name in self.steps[0]._fields if self.steps else ():
            values = [getattr(step, name) for step in self.steps]
            if values[0] is not None:
                dtype = torch.long if name == "epoch" else torch.float64
                found[name] = torch.tensor(values, dtype=dtype)
        return found

    def model(
        self,
        train_X: Tensor,
        train_Y: Tensor,
        *,
        inference: Inference = Exact(),
        **options: Any,
    ) -> LinearizedGP:
        """The Gaussian process of the network's tangent, with these hyperparameters.

        Args:
            train_X: Inputs ``n x d``, or in the shape of the network.
            train_Y: Targets.
            inference: How its posterior is computed.
            **options: Of :class:`~gpbridge.LinearizedGP`.

        Returns:
            The model; for classification call its ``calibrate`` with held-out data.

        Warns:
            UserWarning: If a prior variance is outside of the model's bounds, to which
                it is moved.
        """
        model = LinearizedGP(
            self.network,
            train_X.flatten(1),
            train_Y,
            copy.deepcopy(self.likelihood),
            groups=self.groups,
            inference=inference,
            input_shape=self.input_shape,
            **options,
        )
        bounds = model.covar_module.raw_prior_variance_constraint
        low, high = float(bounds.lower_bound), float(bounds.upper_bound)
        value = self.prior_variance.clamp(low * (1 + 1e-4), high * (1 - 1e-4))
        if not torch.equal(value, self.prior_variance):
            warn_user(
                f"Prior variances {self.prior_variance.tolist()} leave the bounds of "
                f"the model, [{low:.3g}, {high:.3g}], and are moved to them. A group "
                "far below them is pruned: fewer groups, groups='all', are safer."
            )
        model.prior_variance = value.to(model.prior_variance)
        model.fitted = "online evidence"
        return model

    def __repr__(self) -> str:
        """Sizes and hyperparameters."""
        noise = self.noise_variance
        shown = "" if noise is None else f", noise variance {_short(noise)}"
        value = "unknown"
        if self.evidence is not None:
            value = f"{float(self.evidence.value):.5g} nats"
        return (
            f"{type(self).__name__}({type(self.network).__name__}, {len(self.losses)} "
            f"epochs, {len(self.steps)} updates, prior variance "
            f"{_short(self.prior_variance)}{shown}; evidence {value})"
        )


def fit_online(
    network: nn.Module,
    data: Data,
    likelihood: Likelihood | None = None,
    *,
    groups: Groups = "all",
    structure: OnlineStructure = Kronecker(),
    prior_variance: float = 1.0,
    epochs: int = 100,
    burn_in: int = 0,
    every: int = 4,
    hyper_steps: int = 10,
    hyper_learning_rate: float = 0.1,
    learning_rate: float = USUAL_RATE,
    batch_size: int = 100,
    optimizer: OptimizerFactory | None = None,
    schedule: Callable[[int], float] | None = None,
    input_shape: Sequence[int] | None = None,
    generator: Generator | None = None,
    checkpoint: str | PathLike | None = None,
    checkpoint_every: int = 10,
    callback: Callable[[OnlineTraining], object] | None = None,
    progress: bool = True,
) -> OnlineFit:
    r"""Train a copy of a network, its prior variances and its noise together.

    .. math::
        E = \log p(y \mid f(w)) - \tfrac12 w^\top S^{-1} w
            - \tfrac12 \log\det(I + S^{1/2} M S^{1/2}),
        \qquad M = \sum_n J_n^\top R_n R_n^\top J_n .

    Weights descend on minus the first two terms, by minibatches; S, one variance per
    group of weights, and the noise ascend E at the weights of the moment. There the
    norm of the trained weights is the right one in E, unlike after training under
    another decay, because they are the MAP under S itself. How the optimum moves with S
    is left out of the gradient. For classification all is as for a
    :class:`~gpbridge.LinearizedGP`: Laplace's approximation, no bound. Returned is the
    last epoch, not the one of the largest evidence, which would pick noise.

    An update costs one forward and m backward passes per datum (one with
    ``Kronecker(curvature="monte_carlo")`` on labels), an eigendecomposition per layer,
    and ``hyper_steps`` evaluations of O(p). With the defaults 100 epochs take 25 of
    them. See ``benchmarks/bench_online.py`` for ratios to plain training.

    Args:
        network: Maps ``n x d`` (or ``n x input_shape``) to ``n x m`` or ``n``. Weights
            with ``requires_grad=False`` stay fixed and have no prior. It is copied,
            never changed; batch norm trains in train mode, its statistics are fixed
            where the curvature is taken.
        data: A pair (X, Y) of tensors as for :func:`gpbridge.dnn.fit_map`, or a loader
            that gives such pairs of batches and can be iterated over again and again.
        likelihood: Gaussian (one noise variance per output), softmax or binary; copied.
            Its noise is where learning starts, and stays if it has no gradient.
            Default: what the targets suggest.
        groups: Weights that share a prior variance, ``"all"``, ``"layer"``,
            ``"tensor"`` or lists of names. Many groups prune layers.
        structure: Of M: ``Kronecker()``, ``Diagonal()``, or ``Exact()``, which holds
            all ``p x p`` of it and factorises it at each of the ``hyper_steps``.
        prior_variance: Where learning starts.
        epochs: Passes over the data.
        burn_in: Epochs before hyperparameters move.
        every: Epochs from one update to the next.
        hyper_steps: Steps of Adam in an update.
        hyper_learning_rate: Of these, for the logarithms.
        learning_rate: Of the default optimiser of the weights, Adam.
        batch_size: Rows per step, where data are tensors.
        optimizer: Function of a list of parameters that returns their optimiser.
        schedule: Factor of the learning rate of an epoch, as in
            :mod:`gpbridge.dnn.schedules`.
        input_shape: Shape of one input, to unflatten the columns of X.
        generator: Source of all randomness; None is a fresh one with seed 0. A loader
            without a generator of its own shuffles by it, too.
        checkpoint: A file, written every ``checkpoint_every`` epochs and at the end. If
            it exists, training continues from it, to the same bits (with a loader: if
            its order does not depend on a generator of its own); the other arguments
            must be those of before, and ``epochs`` may be larger. Of a loader the
            targets of a pass must be the same in any order: no ``drop_last``.
        checkpoint_every: Epochs.
        callback: Called after each epoch with the state of the run; True ends it.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        Network, hyperparameters, and their history.

    Raises:
        DivergedError: If a loss, a weight or an evidence is not finite; its
            ``last_good`` is the fit as it was an epoch before.
        ShapeError: If data do not fit together, or a loader changes its length.
        TypeError: If data are none of both, or a loader can be used once only.
        ValueError: If an option is out of range, the optimiser has a weight decay of
            its own, or the checkpoint is of another run.
        NotImplementedError: If the likelihood has another kind of noise.
        FileNotFoundError: If the folder of the checkpoint does not exist.
        KeyboardInterrupt: If it comes before the first epoch has ended.

    Warns:
        UserWarning: If a group holds only weights whose scale a normalisation removes.
        ReliabilityWarning: If there were too few epochs to learn a hyperparameter.
        RuntimeWarning: If it is interrupted from the keyboard after its first epoch.

    Example:
        >>> X = torch.linspace(-1, 1, 40)[:, None]
        >>> fit = fit_online(nn.Linear(1, 1), (X, 3 * X), epochs=60, learning_rate=0.1)
        >>> len(fit.steps), fit.losses[-1] < fit.losses[0]
        (15, True)

    References:
        Immer, Bauer, Fortuin, Rätsch, Khan, Scalable marginal likelihood estimation for
        model selection in deep learning, ICML 2021, algorithm 1.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"network must be a torch.nn.Module, but is {type(network).__name__}."
        )
    check_count(
        epochs=epochs,
        every=every,
        hyper_steps=hyper_steps,
        batch_size=batch_size,
        checkpoint_every=checkpoint_every,
    )
    if isinstance(burn_in, bool) or not isinstance(burn_in, int) or burn_in < 0:
        raise ValueError(f"burn_in must be a number of epochs, but is {burn_in!r}.")
    check_positive(
        prior_variance=prior_variance,
        hyper_learning_rate=hyper_learning_rate,
        learning_rate=learning_rate,
    )
    check_folder(checkpoint)
    batches = TrainingBatches(data, network, likelihood, batch_size, input_shape)
    training = OnlineTraining(
        network,
        batches,
        groups,
        structure,
        prior_variance,
        burn_in,
        every,
        hyper_steps,
        hyper_learning_rate,
        learning_rate,
        optimizer,
        schedule,
        generator,
    )
    try:
        run_epochs(
            training,
            epochs,
            "fit_online",
            checkpoint,
            checkpoint_every,
            callback,
            progress,
        )
        evidence = final_evidence(training)
    except NonFiniteError as error:
        raise DivergedError(
            diverged_message(training, error, learning_rate, USUAL_RATE),
            _result(training, None),
        ) from error
    if burn_in < epochs < burn_in + every and not training.steps:
        warn_user(
            f"In {epochs} epochs prior variances and noise never moved: the first "
            f"update is after epoch {burn_in + every}. Choose more epochs, or a "
            "smaller every= or burn_in=.",
            ReliabilityWarning,
        )
    return _result(training, evidence)


def _result(training: OnlineTraining, evidence: Evidence | None) -> OnlineFit:
    return OnlineFit(
        training.network,
        training.trained_likelihood(),
        training.groups,
        training.prior_variance,
        training.noise_variance,
        evidence,
        training.losses,
        training.steps,
        training.batches.input_shape,
    )


def _short(values: Tensor) -> str:
    return ", ".join(f"{value:.3g}" for value in values.tolist())
