r"""Fitting a deep kernel so that its noise is believed only where data confirm it.

In: a network and data. Out: a botorch ``SingleTaskGP`` with a trained
:class:`~gpbridge.kernels.DeepKernel`, conditioned on all data. The marginal likelihood
trains the features; held-out data say when to stop and how large the noise is, since
features that were fitted to the targets make the learnt noise far too small.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import Standardize
from botorch.optim.fit import fit_gpytorch_mll_scipy
from botorch.utils.constraints import LogTransformedInterval
from gpytorch.kernels import Kernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.settings import lazily_evaluate_kernels, max_cholesky_size
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Generator, Tensor, nn
from tqdm import tqdm

from gpbridge.checks import (
    NotConvergedWarning,
    ShapeError,
    check_inputs,
    check_not_empty,
    check_positive,
    check_same_length,
    warn_user,
)
from gpbridge.kernels.deep import DeepKernel, parameter_groups
from gpbridge.kernels.matern import dimension_scaled_matern
from gpbridge.models import NetworkKernelGP
from gpbridge.selection.evidence import ALWAYS_CHOLESKY

NOISE_BOUNDS = (1e-6, 4.0)  # in units of the variance of the targets
ADOPTED = 1.0  # standard errors by which trained features must be better
FAR_BELOW = 4.0  # learnt noise this many times below that of validation data warns


class DeepKernelFit(NamedTuple):
    """How a deep kernel was fitted; noise in units of the variance of the targets.

    ``epoch`` is the one adopted, 0 if training the features did not help.
    ``learnt_noise_variance`` is what the marginal likelihood believed there,
    ``noise_variance`` what validation data support. ``history`` holds the mean
    validation NLL of each check, at the noise best for it.
    """

    epoch: int
    learnt_noise_variance: float
    noise_variance: float
    validation_rows: Tensor
    history: list[float]


class HeldOut(NamedTuple):
    """Negative log density of each held-out point, ``v``, at the noise best for all."""

    nll: Tensor
    noise_variance: float


def held_out_noise(
    model: SingleTaskGP, X: Tensor, Y: Tensor, lowest: float = NOISE_BOUNDS[0]
) -> HeldOut:
    r"""Noise variance that maximises the predictive density of held-out points.

    With :math:`K = Q \Lambda Q^\top` on the training inputs and :math:`A = K_{*X} Q`,
    the predictive distribution under every noise s is at hand,

    .. math:: \mu_* = m_* + A (\Lambda + s)^{-1} Q^\top (y - m), \qquad
        v_* = k_{**} - \mathrm{diag}\, A (\Lambda + s)^{-1} A^\top + s ,

    so that a grid costs less than the decomposition. Points are scored one by one:
    their joint density would choose noise on its floor. The latent variance is counted
    beside s: the plain residual variance would count it twice.

    Args:
        model: An exact GP; its noise is ignored.
        X: Inputs of the held-out points as the kernel sees them, ``v x d``.
        Y: Their targets as the likelihood sees them, ``v``.
        lowest: Smallest noise variance considered.

    Returns:
        The log scores at the best noise, and that noise.
    """
    train_X, train_Y = model.train_inputs[0], model.train_targets
    with torch.no_grad(), lazily_evaluate_kernels(False):
        kernel = model.covar_module
        values, vectors = torch.linalg.eigh(kernel(train_X).to_dense().double())
        A = kernel(X, train_X).to_dense().double() @ vectors  # v x n
        own = kernel(X, diag=True).double()[:, None]
        residual = vectors.mT @ (train_Y - model.mean_module(train_X)).double()
        highest = max(NOISE_BOUNDS[1] * float(train_Y.var()), lowest)
        log_grid = torch.linspace(
            math.log(lowest), math.log(highest), 200, dtype=A.dtype, device=A.device
        )
        grid = log_grid.exp()
        shrink = 1 / (values.clamp_min(0.0)[:, None] + grid)  # n x 200
        mean = model.mean_module(X).double()[:, None] + A @ (residual[:, None] * shrink)
        variance = (own - A.square() @ shrink).clamp_min(0.0) + grid  # v x 200
        squares = (Y.double()[:, None] - mean).square() / variance
        nll = 0.5 * (squares + variance.log() + math.log(2 * math.pi))
    best = int(nll.mean(0).argmin())
    return HeldOut(nll[:, best], float(grid[best]))


def fit_deep_kernel(
    network: nn.Module,
    train_X: Tensor,
    train_Y: Tensor,
    *,
    base_kernel: Kernel | None = None,
    validation_rows: Tensor | None = None,
    freeze: bool = False,
    spectral_norm: float | None = None,
    input_shape: Sequence[int] | None = None,
    input_transform: InputTransform | None = None,
    network_learning_rate: float = 1e-3,
    learning_rate: float = 1e-2,
    max_epochs: int = 1000,
    check_every: int = 10,
    patience: int = 10,
    progress: bool = True,
    generator: Generator | None = None,
) -> SingleTaskGP:
    r"""A GP whose kernel is learnt through a network, with noise from validation data.

    1. The hyperparameters of a GP on the given features are learnt by evidence.
    2. From there Adam maximises the evidence in all weights and hyperparameters, full
       batch. At intervals the held-out rows are scored at the noise best for them, not
       below the learnt one (:func:`held_out_noise`).
    3. The best check is adopted if it beats step 1 by one standard error of the
       difference; otherwise the features stay as they were given. Its noise is set, and
       the model is conditioned on all rows.

    Starting from a GP that is already fitted is what keeps small, noisy data safe:
    jointly from the beginning, features overfit before the noise has been found.

    Time n³ per epoch, memory n². Features are those of the network's last layer: pass a
    ``body``, not a regressor, and standardised inputs.

    Args:
        network: Maps ``n x d`` to ``n x f`` features, untrained or trained; see
            :class:`~gpbridge.kernels.DeepKernel`. It is copied.
        train_X: Inputs ``n x d``.
        train_Y: Targets ``n x 1``; standardised inside.
        base_kernel: Kernel on the features; default a scaled Matérn-5/2 with one
            lengthscale under the prior of ``SingleTaskGP``.
        validation_rows: Row numbers held out for steps 2 and 3; default a tenth of the
            data, drawn at random, but 20 where there are enough.
        freeze: Skip training the features: steps 1 and 3 only.
        spectral_norm: Bound on the spectral norm of the layers.
        input_shape: Shape of one input, as (c, h, w).
        input_transform: As for ``SingleTaskGP``; the network sees transformed inputs.
        network_learning_rate: Adam's, for the weights.
        learning_rate: Adam's, for the hyperparameters.
        max_epochs: Limit of full-batch steps.
        check_every: Epochs between checks.
        patience: Checks without improvement before training stops.
        progress: Show a progress bar, if there is a terminal.
        generator: Source of the default validation rows; None is one with seed 0.

    Returns:
        The model in eval mode. Its ``deep_kernel_fit`` attribute is a
        :class:`DeepKernelFit`.

    Raises:
        ShapeError: If the shapes are not ``n x d`` and ``n x 1``.
        ValueError: If fewer than two rows remain on either side.

    Warns:
        UserWarning: If the learnt noise is less than a quarter of what validation data
            support: the features overfit, and the evidence of this model means little.
        NotConvergedWarning: If training broke down, or ran out of epochs.

    References:
        Ober, Rasmussen and van der Wilk, The promises and pitfalls of deep kernel
        learning, UAI 2021.
    """
    check_inputs(train_X)
    check_inputs(train_Y, "train_Y")
    check_not_empty(train_X=train_X)
    check_same_length(train_X=train_X, train_Y=train_Y)
    check_positive(max_epochs=max_epochs, check_every=check_every, patience=patience)
    if train_X.dim() != 2 or train_Y.shape != (len(train_X), 1):
        raise ShapeError(
            "train_X must be ``n x d`` and train_Y ``n x 1``, but they have shapes "
            f"{tuple(train_X.shape)} and {tuple(train_Y.shape)}. Fit one model per "
            "output and join them in a ModelListGP."
        )
    rows = _held_out_rows(len(train_X), validation_rows, generator)
    held = torch.zeros(len(train_X), dtype=torch.bool, device=train_X.device)
    held[rows] = True

    X = train_X if input_transform is None else input_transform(train_X)
    Y = Standardize(m=1)(train_Y)[0]
    X, Y = X.detach(), Y.detach()
    kernel = DeepKernel(
        network,
        base_kernel or MaternKernel(nu=2.5),
        freeze=freeze,
        train_X=X[~held],
        spectral_norm=spectral_norm,
        input_shape=input_shape,
    )
    if base_kernel is None:
        kernel.base_kernel = _default_base(kernel.network(X[:1]).shape[-1])
    model = SingleTaskGP(
        X[~held],
        Y[~held],
        likelihood=GaussianLikelihood(
            noise_constraint=LogTransformedInterval(*NOISE_BOUNDS, initial_value=0.1)
        ),
        covar_module=kernel,
        outcome_transform=None,
    )
    _fit_hyperparameters(model)
    initial = _check(model, X[held], Y[held, 0], 0)
    best, history = initial, [float(initial.score.nll.mean())]
    if not freeze:
        optimizer = torch.optim.Adam(
            parameter_groups(model, network_learning_rate, learning_rate)
        )
        best, history = _train(
            model,
            optimizer,
            initial,
            lambda epoch: _check(model, X[held], Y[held, 0], epoch),
            range(1, max_epochs + 1),
            check_every,
            patience,
            progress,
        )
        gain = initial.score.nll - best.score.nll
        if not gain.mean() > ADOPTED * gain.std() / len(gain) ** 0.5:
            best = initial
    model.load_state_dict(best.state)
    noise_variance = best.score.noise_variance
    if noise_variance > FAR_BELOW * best.learnt:
        warn_user(
            f"The marginal likelihood learnt a noise variance of {best.learnt:.2g}, "
            f"but validation data support {noise_variance:.2g} (in units of the "
            "variance of the targets): the features overfit. The larger one is used. A "
            "smaller network, spectral_norm or freeze=True would overfit less.",
        )
    model.likelihood.noise = noise_variance
    fitted = NetworkKernelGP(
        train_X,
        train_Y,
        likelihood=model.likelihood,
        covar_module=model.covar_module,
        mean_module=model.mean_module,
        input_transform=input_transform,
    )
    fitted.deep_kernel_fit = DeepKernelFit(
        best.epoch, best.learnt, noise_variance, rows, history
    )
    return fitted.eval()


class _Check(NamedTuple):
    epoch: int
    score: HeldOut
    learnt: float
    state: dict[str, Tensor]


def _check(model: SingleTaskGP, X: Tensor, Y: Tensor, epoch: int) -> _Check:
    learnt = float(model.likelihood.noise.detach())
    score = held_out_noise(model, X, Y, lowest=max(learnt, NOISE_BOUNDS[0]))
    return _Check(epoch, score, learnt, copy.deepcopy(model.state_dict()))


def _fit_hyperparameters(model: SingleTaskGP) -> None:
    weights = {id(p) for p in model.covar_module.network.parameters()}
    mll = ExactMarginalLogLikelihood(model.likelihood, model).train()
    free = {
        name: p
        for name, p in mll.named_parameters()
        if p.requires_grad and id(p) not in weights
    }
    with max_cholesky_size(ALWAYS_CHOLESKY):
        fit_gpytorch_mll_scipy(mll, parameters=free, options={"maxiter": 200})


def _train(
    model, optimizer, initial, check, epochs, check_every, patience, progress
) -> tuple[_Check, list[float]]:
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    best, since = initial, 0
    history = [float(initial.score.nll.mean())]
    # disable=None silences the bar where there is no terminal.
    bar = tqdm(epochs, desc="deep kernel", disable=None if progress else True)
    for epoch in bar:
        model.train()
        optimizer.zero_grad()
        try:
            with max_cholesky_size(ALWAYS_CHOLESKY):
                loss = -mll(model(*model.train_inputs), model.train_targets)
                loss.backward()
            optimizer.step()
            now = check(epoch) if epoch % check_every == 0 else None
        except (NotPSDError, NanError) as error:
            warn_user(
                f"Training the deep kernel broke down at epoch {epoch} ({error}); the "
                f"state of epoch {best.epoch} is kept. Lower network_learning_rate.",
                NotConvergedWarning,
            )
            return best, history
        if now is None:
            continue
        history.append(float(now.score.nll.mean()))
        since += 1
        if history[-1] < float(best.score.nll.mean()):
            best, since = now, 0
        bar.set_postfix(validation_nll=f"{history[-1]:.3f}", epoch_kept=best.epoch)
        if since >= patience:
            return best, history
    if since == 0 and best is not initial:
        warn_user(
            f"The validation score still improved at epoch {best.epoch}, the last. "
            "Raise max_epochs.",
            NotConvergedWarning,
        )
    return best, history


def _held_out_rows(
    n: int, validation_rows: Tensor | None, generator: Generator | None
) -> Tensor:
    if validation_rows is None:
        if generator is None:
            generator = Generator().manual_seed(0)
        order = torch.randperm(n, generator=generator, device=generator.device).cpu()
        validation_rows = order[: max(round(0.1 * n), min(20, n // 4))]
    rows = torch.as_tensor(validation_rows).unique()
    if len(rows) < 2 or n - len(rows) < 2:
        raise ValueError(
            f"validation_rows must leave two rows on either side, but holds {len(rows)}"
            f" of {n}. With so few data use a GP without a network."
        )
    return rows


def _default_base(width: int) -> Kernel:
    matern = dimension_scaled_matern(torch.ones(1), width)
    bounds = LogTransformedInterval(1e-4, 1e3, initial_value=1.0)
    return ScaleKernel(matern, outputscale_constraint=bounds)
