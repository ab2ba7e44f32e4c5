r"""Learning which transformations a network is invariant to, while it is trained.

In: a network, data, an augmentation. Out: an
:class:`~gpbridge.selection.invariance_fit.InvarianceFit`: a trained network, averaged
over orbits whose widths the evidence chose, without validation data. Next:
``InvarianceFit.model`` makes a Gaussian process of it; ``invariance_starts`` runs it
from several starts.

References:
    Immer, van der Ouderaa, Rätsch, Fortuin, van der Wilk, Invariance learning in deep
    neural networks with differentiable Laplace approximations, NeurIPS 2022.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from os import PathLike

from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor, nn

from gpbridge.augmentation.averaged import AveragedNetwork
from gpbridge.augmentation.base import Augmentation, check_elements
from gpbridge.checks import check_choice, check_count, check_positive, warn_user
from gpbridge.dnn.divergence import DivergedError
from gpbridge.frozen import copy_without_hooks
from gpbridge.functional import FunctionalNet
from gpbridge.kernels.tangent import Groups, weight_groups
from gpbridge.linearized.inference import Exact
from gpbridge.selection.invariance_fit import InvarianceFit, invariance_fit
from gpbridge.selection.invariance_timetable import PHASES
from gpbridge.selection.invariance_training import ORBITS, InvarianceTraining
from gpbridge.selection.online_run import (
    check_folder,
    diverged_message,
    final_evidence,
    run_epochs,
)
from gpbridge.selection.online_training import NonFiniteError
from gpbridge.selection.orbit_curvature import OrbitStructure
from gpbridge.selection.training_batches import TrainingBatches
from gpbridge.selection.weight_optimizer import OptimizerFactory

_USUAL_RATE = 5e-3


def learn_invariance(
    network: nn.Module,
    data: tuple[Tensor, Tensor],
    augmentation: Augmentation,
    likelihood: Likelihood | None = None,
    *,
    groups: Groups = "all",
    structure: OrbitStructure = Exact(),
    prior_structure: OrbitStructure | None = None,
    prior_every: int = 1,
    orbit: str = "per_datum",
    phases: str = "online",
    prior_variance: float = 1.0,
    epochs: int = 300,
    burn_in: int = 0,
    every: int = 1,
    hyper_steps: int = 1,
    hyper_learning_rate: float = 0.1,
    augmentation_learning_rate: float = 0.05,
    final_augmentation_learning_rate: float = 1e-3,
    learning_rate: float = _USUAL_RATE,
    batch_size: int = 100,
    optimizer: OptimizerFactory | None = None,
    schedule: Callable[[int], float] | None = None,
    input_shape: Sequence[int] | None = None,
    generator: Generator | None = None,
    checkpoint: str | PathLike | None = None,
    checkpoint_every: int = 10,
    callback: Callable[[InvarianceTraining], object] | None = None,
    progress: bool = True,
) -> InvarianceFit:
    r"""Train a network averaged over orbits, and the law of the orbits, by evidence.

    .. math::
        \bar f(x) = \tfrac1s \sum_a f(T_a x; w), \qquad
        E = \log p(y \mid \bar f(w)) - \tfrac12 w^\top S^{-1} w
            - \tfrac12 \log\det(I + S^{1/2} M S^{1/2}),

    with the curvature M of the averaged network. Weights descend on minus the first two
    terms, the augmentation held; prior variances S and noise ascend E with M held; the
    augmentation's parameters with ``requires_grad`` ascend E by its gradient through
    M, which is what keeps them from ignoring the invariance. How the optimal weights
    depend on any of these is left out. All as in :func:`fit_online` where it is not
    said otherwise.

    E has several optima in the parameters: compare the evidence of several starts
    (:func:`gpbridge.selection.learn_invariance_from`). M is differentiated twice
    through the network, so that smooth activations (tanh, softplus, GELU) are right and
    ReLU almost.

    An epoch of training costs s times one of the plain network. An update costs one
    forward and m backward passes over all orbits, differentiated once more; with
    ``TangentBlocks(outputs="sampled", num_blocks=k)`` one backward pass over k blocks.

    Two orders of events go wrong. A network that is trained with a narrow law for long
    stays near its optimum when the law widens: start the law early (``burn_in``), or
    train anew with the law that was learnt, which stays what it is after
    ``fit.augmentation.requires_grad_(False)``. A prior that moves before the network
    fits anything, or by small blocks, falls to zero, and the network with it: let it
    move late (``prior_every``) and by ``prior_structure``. What served images of 312
    rows and 200 epochs was
    ``TangentBlocks(block_size=78, outputs="sampled", num_blocks=1)`` with
    ``prior_structure=Kronecker(), burn_in=10, every=2, prior_every=20,
    hyper_steps=40, augmentation_learning_rate=0.2``, and a ``schedule`` by which the
    weights' rate falls in the second half.

    Args:
        network: Maps ``n x d`` (or ``n x input_shape``) to ``n x m`` or ``n``. It is
            copied, never changed.
        data: Inputs ``n x d``, or in the shape of the network, and targets.
        augmentation: Of flat inputs ``n x d``; copied. If nothing of it requires a
            gradient, it stays, and this is training with a fixed augmentation.
        likelihood: As for :func:`fit_online`.
        groups: Weights that share a prior variance, as there.
        structure: Of M: ``Exact()`` by weights or by data, whichever are fewer;
            :class:`TangentBlocks`, lower bounds; ``Kronecker()``, no bound;
            ``Diagonal()``, a lower bound. Precision of Jacobians is that of its
            ``jacobian_dtype``, None that of the network. The gradient of ``Kronecker``
            holds the basis: with unequal noise of several outputs it is up to some per
            cent off that of its evidence.
        prior_structure: Of M where prior and noise take steps, and for the evidence of
            the end; None is ``structure``. Few and small blocks are good enough for the
            direction of the law, but bias the prior so much that a network may do worse
            than a constant: take ``Kronecker()``, or ``Exact()`` for few data.
        prior_every: Updates of the law to each that moves prior and noise, too.
        orbit: ``"per_datum"`` draws an orbit of its own for every row and step,
            ``"resampled"`` one for all rows per epoch, ``"fixed"`` keeps that of the
            augmentation, so that nothing is random but the batches.
        phases: ``"online"`` updates after every ``every``-th epoch of training;
            ``"toggle"`` alternates ``every`` epochs of training and as many updates.
        prior_variance: Where learning starts.
        epochs: Passes over the data; with ``"toggle"`` the updates count as such.
        burn_in: Epochs before anything but the weights moves.
        every: Epochs from one update to the next.
        hyper_steps: Steps of Adam for prior and noise when they move. The augmentation
            takes one.
        hyper_learning_rate: Of these, for the logarithms.
        augmentation_learning_rate: Of Adam for the augmentation's raw parameters, at
            the start.
        final_augmentation_learning_rate: At the end; between them a cosine.
        learning_rate: Of the default optimiser of the weights, Adam.
        batch_size: Rows per step.
        optimizer: Function of a list of parameters that returns their optimiser.
        schedule: Factor of the learning rate of an epoch.
        input_shape: Shape of one input of the network; default that of the rows of X,
            or of the augmentation's images where X has more than two dimensions.
        generator: Source of all randomness; None is a fresh one with seed 0.
        checkpoint: A file from which, if it exists, the run continues to the same bits.
            ``epochs`` must be that of before while an augmentation is learnt.
        checkpoint_every: Epochs.
        callback: Called after each epoch with the state of the run; True ends it.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        The averaged network, hyperparameters, and their history.

    Warns:
        UserWarning: If the data determine less than one direction of the weights.
        ReliabilityWarning: If law, or prior and noise, never move in these epochs.

    Raises:
        DivergedError: If a loss, a weight, an evidence or a gradient is not finite; its
            ``last_good`` is the fit as it was an epoch before.
        ShapeError: If data, network and augmentation do not fit together.
        TypeError: If data are not a pair of tensors, or an argument is of another type.
        ValueError: If an option is out of range, the checkpoint is of another run, or
            orbits that stay have the identity as their only element.
        NotImplementedError: If the likelihood has another kind of noise, or orbits
            cannot be drawn per datum.
        MemoryError: If the structure does not fit into its budget.
        FileNotFoundError: If the folder of the checkpoint does not exist.

    Example:
        >>> import torch
        >>> from gpbridge.augmentation import Rotation2d
        >>> angle, label = torch.linspace(0, 6, 20), torch.tensor([0, 1] * 10)
        >>> X = torch.stack([angle.cos(), angle.sin()], -1) * (1 + label[:, None])
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> fit = learn_invariance(net, (X, label), Rotation2d(4), epochs=3)
        >>> sorted(fit.learnt), len(fit.steps)
        (['bound'], 3)

    References:
        Immer, van der Ouderaa, Rätsch, Fortuin, van der Wilk, Invariance learning in
        deep neural networks with differentiable Laplace approximations, NeurIPS 2022,
        algorithm 1. Immer, van der Ouderaa, van der Wilk, Rätsch, Schölkopf, Stochastic
        marginal likelihood gradients using neural tangent kernels, ICML 2023.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"network must be a torch.nn.Module, but is {type(network).__name__}."
        )
    if not isinstance(augmentation, Augmentation):
        raise TypeError(
            "augmentation must be a gpbridge.augmentation.Augmentation, but is "
            f"{type(augmentation).__name__}."
        )
    X, Y, input_shape = _rows(data, augmentation, input_shape)
    check_choice("orbit", orbit, ORBITS)
    check_choice("phases", phases, PHASES)
    if orbit == "fixed":
        check_elements(augmentation)
    check_count(
        epochs=epochs,
        every=every,
        prior_every=prior_every,
        hyper_steps=hyper_steps,
        batch_size=batch_size,
        checkpoint_every=checkpoint_every,
    )
    if isinstance(burn_in, bool) or not isinstance(burn_in, int) or burn_in < 0:
        raise ValueError(f"burn_in must be a number of epochs, but is {burn_in!r}.")
    check_positive(
        prior_variance=prior_variance,
        hyper_learning_rate=hyper_learning_rate,
        augmentation_learning_rate=augmentation_learning_rate,
        final_augmentation_learning_rate=final_augmentation_learning_rate,
        learning_rate=learning_rate,
    )
    check_folder(checkpoint)
    own = FunctionalNet(network, input_shape=input_shape)
    names = [[f"network.{n}" for n in group] for group in weight_groups(own, groups)]
    averaged = AveragedNetwork(
        copy_without_hooks(network), copy.deepcopy(augmentation), input_shape
    )
    # Weights alone are random: the augmentation has parameters, too.
    frozen = copy.deepcopy(averaged)
    frozen.augmentation.requires_grad_(False)
    batches = TrainingBatches((X, Y), frozen, likelihood, batch_size, None)
    training = InvarianceTraining(
        averaged,
        batches,
        names,
        structure,
        prior_structure,
        prior_every,
        orbit,
        phases,
        epochs,
        (augmentation_learning_rate, final_augmentation_learning_rate),
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
    training.timetable.warn_if_idle(epochs)
    try:
        run_epochs(
            training,
            epochs,
            "learn_invariance",
            checkpoint,
            checkpoint_every,
            callback,
            progress,
        )
        evidence = final_evidence(training)
    except NonFiniteError as error:
        raise DivergedError(
            diverged_message(training, error, learning_rate, _USUAL_RATE),
            invariance_fit(training, None),
        ) from error
    if float(evidence.effective_dimension) < 1:
        priors = ", ".join(f"{value:.2g}" for value in training.prior_variance.tolist())
        warn_user(
            "The evidence prefers a constant network: at prior variances of "
            f"{priors} the data determine {float(evidence.effective_dimension):.2g} "
            "directions of its weights. Let the weights fit before the prior moves, by "
            "a larger burn_in or prior_every, or pass prior_structure=Kronecker() in "
            "place of small blocks."
        )
    return invariance_fit(training, evidence)


def _rows(
    data: object, augmentation: Augmentation, input_shape: Sequence[int] | None
) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
    """Flat inputs, targets, and the shape of one input of the network."""
    pair = isinstance(data, tuple | list) and len(data) == 2
    if not pair or not all(isinstance(part, Tensor) for part in data):
        raise TypeError(
            "data must be a pair of tensors (X, Y), but is "
            f"{type(data).__name__}. Blocks and orbits need all rows at hand."
        )
    X, Y = data
    if input_shape is None and X.dim() > 2:
        input_shape = getattr(augmentation, "output_shape", X.shape[1:])
    shape = None if input_shape is None else tuple(input_shape)
    return (X.flatten(1) if X.dim() > 2 else X), Y, shape
