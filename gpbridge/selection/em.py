r"""Prior variances and noise from posterior draws, where no matrix of the data fits.

The evidence is stationary in the prior variance s of a group of p weights where

.. math::
    \gamma = \frac{\|\hat w\|^2}{s}, \qquad
    \gamma = \mathbb{E} \sum_i \| R_i^\top J_i w \|^2 ,

with the optimum :math:`\hat w` of the linear model and posterior draws w around zero:
:math:`\gamma` is the effective dimension, in function space, where it is a sum of
squares and not the difference of large numbers that it is in weight space. One step
solves for optimum and draws at the current hyperparameters and moves to
:math:`s = \|\hat w\|^2 / \gamma`; under Gaussian noise to
:math:`\sigma_j^2 = \|y_j - \hat f_j\|^2 / (n - \gamma_j)` as well, with the part of the
sum of squares that output j has in :math:`\gamma`.

In: a :class:`~gpbridge.LinearizedGP` with ``Sampled`` inference. Out: the same model
with hyperparameters learnt, and the history. Next: ``model.calibrate`` for labels.

References:
    MacKay, Bayesian interpolation, Neural Computation 1992, section 4.2. Antorán,
    Padhy, Barbano, Nalisnick, Janz, Hernández-Lobato, Sampling-based inference for
    large linear models, with application to linearised Laplace, ICLR 2023, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from gpytorch.constraints import Interval
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from torch import Tensor, nn
from tqdm import tqdm

from gpbridge.checks import check_positive, warn_user
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.inference import Sampled
from gpbridge.linearized.noise import check_noise_is_known
from gpbridge.linearized.problem import TangentProblem
from gpbridge.linearized.sampled_mode import SampledMode
from gpbridge.linearized.sampling import SampledWeights, rescale
from gpbridge.types import Solution


class EMStep(NamedTuple):
    """Hyperparameters that a step started from, and what it found there.

    ``std_error`` is that of the effective dimension over the draws, per group.
    """

    prior_variance: list[float]
    noise_variance: list[float] | None  # one, or one per output, if it is learnt
    effective_dimension: list[float]
    std_error: list[float]
    residual: float  # relative, of the draws
    passes: float


class SampleBasedEM:
    r"""Learn the hyperparameters of a sampled posterior, step by step.

    The noise of s draws moves the prior variance by a relative
    :math:`\sqrt{2 / (s \gamma)}`. Draws and optimum of one step start the solves of the
    next. Gaussian noise is learnt where it is one variance, or one per output and none
    in common; where it is fixed only the prior variances move, and so they do, with a
    warning, where outputs are correlated or share a part of it.

    Args:
        model: The model, fitted in place.

    Raises:
        TypeError: If the model is another, or its inference is not ``Sampled``.
        ValueError: If the noise would be learnt around the network's output.

    Warns:
        UserWarning: If the likelihood has a noise to learn that no step moves.

    Example:
        >>> from gpbridge.linearized import Sampled
        >>> X = torch.linspace(0, 1, 20).unsqueeze(-1).double()
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(),
        ...                           torch.nn.Linear(16, 1)).double()
        >>> model = LinearizedGP(net, X, torch.sin(6 * X), inference=Sampled(32))
        >>> history = SampleBasedEM(model).run(1, progress=False)
        >>> len(history)
        1
    """

    def __init__(self, model: LinearizedGP) -> None:
        if not isinstance(model, LinearizedGP):
            raise TypeError(
                "SampleBasedEM needs a gpbridge.LinearizedGP, but model is "
                f"{type(model).__name__}. For a SampledGP use fit_iterative."
            )
        if not isinstance(model.inference, Sampled):
            raise TypeError(
                "SampleBasedEM needs inference=Sampled(...), but the model has "
                f"{type(model.inference).__name__}. Call fit_evidence(model) instead, "
                "which is exact."
            )
        model.check_all_data_is_training_data("What SampleBasedEM maximises")
        check_noise_is_known(model.likelihood, model.mean)
        self.model = model
        free = [n for n, p in model.likelihood.named_parameters() if p.requires_grad]
        if free and self._noise() is None:
            warn_user(
                f"SampleBasedEM leaves {', '.join(free)} of "
                f"{type(model.likelihood).__name__} as they are: it learns one noise "
                "variance, or one per output without a part in common. Try "
                "MultitaskGaussianLikelihood(rank=0, has_global_noise=False)."
            )
        self.history: list[EMStep] = []
        self._omega: Tensor | None = None  # the optimum in scaled weights
        self._std: Tensor | None = None  # the deviations it was found for

    @property
    def _problem(self) -> TangentProblem:
        return self.model.problem

    def run(
        self, num_steps: int = 10, tolerance: float = 0.05, progress: bool = True
    ) -> list[EMStep]:
        """Step until no hyperparameter moves by more than ``tolerance`` in its log.

        Args:
            num_steps: At most so many.
            tolerance: Largest change of a log hyperparameter that ends the run.
            progress: Whether to show a bar in a terminal.

        Returns:
            The history, steps of earlier runs included.
        """
        check_positive(num_steps=num_steps, tolerance=tolerance)
        bar = tqdm(
            range(num_steps),
            desc="sample-based EM",
            leave=False,
            disable=None if progress else True,
        )
        for _ in bar:
            moved = self.step()
            bar.set_postfix(prior_variance=self.model.prior_variance.tolist())
            if moved <= tolerance:
                break
        bar.close()
        return self.history

    @torch.no_grad()
    def step(self) -> float:
        """One step; returns the largest change of a log hyperparameter."""
        model, problem = self.model, self._problem
        before = model.prior_variance.detach().double().clone()
        std = problem.flat_prior_std(before)
        mode = problem.mode_by_products(before, self._start(std))
        self._omega, self._std = mode.omega, std
        draws = problem.draws(before)
        per_output = self._squares_seen(draws)  # m x s
        dimension = self._dimensions(draws, per_output)  # groups x s
        gamma = self._limited(dimension.mean(-1))
        noise = self._noise_variance()
        error = torch.full_like(gamma, math.inf)  # of one draw nothing is known
        if dimension.shape[-1] > 1:
            error = dimension.std(-1) / dimension.shape[-1] ** 0.5
        self.history.append(
            EMStep(
                before.tolist(),
                noise,
                gamma.tolist(),
                error.tolist(),
                draws.solution.residual_norm,
                draws.solution.passes,
            )
        )
        after = self._clamped(before * self._squares(mode.omega) / gamma)
        changes = (after / before).log().abs()
        model.prior_variance = after.to(model.prior_variance)
        moved = float(changes.max())
        if noise is not None:
            moved = max(moved, self._move_noise(mode, per_output.mean(-1)))
        model.fitted, model.calibration = "sample-based EM", None
        return moved

    def _start(self, std: Tensor) -> Tensor | None:
        if self._omega is None:
            return None
        nothing = Solution(self._omega, 0.0, 0, True)
        old = SampledWeights(self._omega[:, None], self._std, nothing)
        return rescale(old, std)[:, 0]

    def _squares(self, omega: Tensor) -> Tensor:
        """Squared norm of each group, ``p x ...`` to ``groups x ...``."""
        problem = self._problem
        one = torch.eye(len(problem.groups), dtype=torch.bool, device=omega.device)
        members = torch.stack([problem.expand(row) for row in one]).to(omega)
        return members @ omega.square()

    def _squares_seen(self, draws: SampledWeights) -> Tensor:
        """The effective dimension that each draw estimates, per output, ``m x s``."""
        problem = self._problem
        moved = problem.data.matmul(draws.std[:, None] * draws.omega)
        return (problem.root().detach().mT @ moved).square().sum(0)

    def _dimensions(self, draws: SampledWeights, per_output: Tensor) -> Tensor:
        """The same per group, ``groups x s``; one draw may be beyond the limit."""
        problem, omega = self._problem, draws.omega
        total = per_output.sum(0)[None]  # 1 x s
        if len(problem.groups) == 1:
            return total
        # No sum of squares tells groups apart: what the draws of each group lost.
        sizes = self._squares(torch.ones_like(omega[:, :1]))
        lost = sizes - self._squares(omega)
        share = lost.mean(-1, keepdim=True).clamp(min=1e-3)
        share = torch.minimum(share, sizes)
        return share / share.sum() * total

    def _limited(self, dimension: Tensor) -> Tensor:
        """Within what the data can determine."""
        problem = self._problem
        limit = min(problem.num_params, problem.outputs.numel())
        total = dimension.sum()
        return dimension * (total.clamp(1e-6, limit) / total.clamp_min(1e-300))

    def _clamped(self, variance: Tensor) -> Tensor:
        bounds = self.model.covar_module.raw_prior_variance_constraint
        # A value on the bound of a transformed parameter is at infinity.
        lower = float(bounds.lower_bound) * (1 + 1e-4)
        return variance.clamp(lower, float(bounds.upper_bound) * (1 - 1e-4))

    def _noise(self) -> tuple[str, nn.Parameter, Interval] | None:
        """The property of the likelihood that holds the noise which is learnt."""
        likelihood = self.model.likelihood
        if isinstance(likelihood, GaussianLikelihood):
            held = likelihood.noise_covar
            found = "noise", held.raw_noise, held.raw_noise_constraint
        elif not isinstance(likelihood, MultitaskGaussianLikelihood):
            return None
        elif likelihood.has_task_noise == likelihood.has_global_noise:
            return None
        elif likelihood.has_global_noise:
            found = "noise", likelihood.raw_noise, likelihood.raw_noise_constraint
        elif likelihood.rank > 0:
            return None
        else:
            raw = likelihood.raw_task_noises
            found = "task_noises", raw, likelihood.raw_task_noises_constraint
        return found if found[1].requires_grad else None

    def _noise_variance(self) -> list[float] | None:
        found = self._noise()
        if found is None:
            return None
        return getattr(self.model.likelihood, found[0]).detach().reshape(-1).tolist()

    def _set_noise(self, variance: Tensor) -> None:
        name, raw, bounds = self._noise()
        lower = float(bounds.lower_bound) * (1 + 1e-4) + 1e-12
        variance = variance.clamp(lower, float(bounds.upper_bound) * (1 - 1e-4))
        setattr(self.model.likelihood, name, variance.to(raw))

    def _move_noise(self, mode: SampledMode, gamma: Tensor) -> float:
        """Move to the misfit over what is left of the data, per output."""
        problem, before = self._problem, self._noise_variance()
        misfit = (problem.Y.double() - mode.values).square().sum(0)  # m
        left = len(problem.Y) - gamma
        if len(before) == 1:
            misfit, left = misfit.sum(), left.sum()
        self._set_noise(misfit / left.clamp_min(1e-3))
        ratios = zip(self._noise_variance(), before, strict=True)
        return max(abs(math.log(after / old)) for after, old in ratios)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as plain tensors and numbers."""
        model, draws = self.model, self._problem._draws
        return {
            "prior_variance": model.prior_variance.detach().clone(),
            "noise_variance": self._noise_variance(),
            "history": [list(step) for step in self.history],
            "mode": (self._omega, self._std),
            "draws": None if draws is None else (draws.omega, draws.std),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another run on the same model stopped, to the same numbers.

        Raises:
            ValueError: If the dictionary is not a state of this class.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(
                f"state lacks {', '.join(missing)}: it must be what state_dict() of a "
                "SampleBasedEM returned."
            )
        self.model.prior_variance = state["prior_variance"]
        if state["noise_variance"] is not None:
            noise = torch.tensor(state["noise_variance"], dtype=torch.float64)
            self._set_noise(noise)
        self.history = [EMStep(*step) for step in state["history"]]
        self._omega, self._std = state["mode"]
        if state["draws"] is not None:
            omega, std = state["draws"]
            kept = SampledWeights(omega, std, Solution(omega, math.nan, 0, False))
            self._problem._draws = kept
