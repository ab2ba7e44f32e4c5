"""What a sampled GP is made of, and the solution that it keeps, copies and saves.

In: the attributes that the constructor sets. Out: :class:`SampledState`, the data and
the solved system at the present hyperparameters, solved again from the old solution
when one of them changes. Next: ``gp`` answers from it.
"""

from __future__ import annotations

import copy
from typing import Self

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from torch import Generator, Size, Tensor

from gpbridge.checks import (
    check_inputs,
    check_positive,
    check_same_device,
    check_same_dtype,
    check_tensor,
)
from gpbridge.prior_draws import PriorDraw, draw_prior
from gpbridge.representers import (
    Correction,
    Data,
    Representers,
    correct,
    solve_representers,
)
from gpbridge.sampled.observations import NewData, shared_noise
from gpbridge.types import Solution, Solver


class SampledState:
    """Data, hyperparameters and solution of a sampled GP, beside botorch's model."""

    # Modules and buffers, which torch copies, saves and moves.
    covar_module: Kernel
    mean_module: Mean
    likelihood: Likelihood
    _train_X: Tensor  # n x d, untransformed
    _targets: Tensor  # n x m, transformed
    _seed: Tensor  # of all randomness

    # Options.
    solver: Solver | None
    num_samples: int
    num_features: int
    compute_dtype: torch.dtype | None
    output_indices: list[int] | None  # of the outputs, those that are seen

    _new: NewData | None  # conditioned on since, and not part of the system

    # Computed when needed. Copies carry the solution, a state_dict the seed instead.
    _solved: tuple[list[Tensor], Representers] | None  # beside what it depends on
    _options: tuple | None  # that it was solved with
    _initial: Tensor | None  # where the next solve starts, if nothing is solved
    _correction: Correction | None  # for the new data

    # -- what it is ------------------------------------------------------------------

    @property
    def train_inputs(self) -> tuple[Tensor]:
        """All inputs conditioned on, untransformed, ``batch_shape x n x d``."""
        if self._new is None:
            return (self._train_X,)
        X = self._new.X
        return (torch.cat([self._train_X.expand(*X.shape[:-2], -1, -1), X], -2),)

    @property
    def train_targets(self) -> Tensor:
        """All targets conditioned on, transformed, ``n`` if there is one output."""
        Y = self._targets
        if self.output_indices is not None:
            Y = Y[..., self.output_indices]
        if self._new is not None:
            new = self._new.Y
            Y = torch.cat([Y.expand(*new.shape[:-2], -1, -1), new], -2)
        return Y.squeeze(-1) if Y.shape[-1] == 1 else Y

    @property
    def num_outputs(self) -> int:
        """The number m of outputs."""
        if self.output_indices is not None:
            return len(self.output_indices)
        return self._targets.shape[-1]

    @property
    def batch_shape(self) -> Size:
        """Empty, or the batch of the observations conditioned on."""
        if self._new is None:
            return Size()
        return torch.broadcast_shapes(self._new.X.shape[:-2], self._new.Y.shape[:-2])

    @property
    def noise_variance(self) -> Tensor:
        """Noise variances of the training points, ``n``."""
        noise = self.likelihood.noise
        return noise.reshape(-1).expand(len(self._train_X))

    @property
    def has_batch_data(self) -> bool:
        """Whether observations were added that are not among the solved ones."""
        return self._new is not None

    @property
    def seed(self) -> int:
        """Of all randomness of the model."""
        return int(self._seed)

    @property
    def solution(self) -> Solution | None:
        """What is known about the last solve, None before the first one."""
        return None if self._solved is None else self._solved[1].solution

    @property
    def _supports_cache_root(self) -> bool:
        # Read by botorch's noisy acquisitions, which update a root of full rank.
        return False

    def __repr__(self) -> str:
        """Sizes, and how well the system is solved."""
        n, facts = len(self._train_X), self.solution
        solver = "default" if self.solver is None else type(self.solver).__name__
        how = "not solved yet"
        if facts is not None:
            verb = "converged" if facts.converged else "NOT converged"
            how = (
                f"{verb}, relative residual {facts.residual_norm:.1e} after "
                f"{facts.passes:.4g} passes"
            )
        return (
            f"{type(self).__name__}(n={n}, num_outputs={self.num_outputs}, "
            f"{type(self.covar_module).__name__}, {type(self.likelihood).__name__}, "
            f"num_samples={self.num_samples}, {solver} solver: {how})"
        )

    def _noise_at(self, asked: bool | Tensor, mean: Tensor) -> Tensor:
        if isinstance(asked, Tensor):
            noise = asked.to(mean)
            if noise.shape[-1] != mean.shape[-1]:
                noise = noise.unsqueeze(-1)
            check_positive(noise=noise)
            return noise.expand(mean.shape)
        # At other points than those of training: the average noise, as in botorch.
        return self.likelihood.noise.detach().to(mean).mean().expand(mean.shape)

    def _check_new_inputs(self, X: Tensor) -> None:
        check_tensor(X=X)
        check_same_device(X=X, train_X=self._train_X)
        check_inputs(X, "X", self._train_X.shape[-1])
        check_same_dtype("X", X, self._train_X.dtype)

    # -- what is kept ----------------------------------------------------------------

    def _draw_prior(
        self, num_samples: int, generator: Generator, kernel: Kernel
    ) -> PriorDraw:
        with torch.no_grad():
            width = self.transform_inputs(self._train_X[:1]).shape[-1]
        return draw_prior(
            kernel,
            width,
            num_samples,
            num_outputs=self._targets.shape[-1],
            num_features=self.num_features,
            generator=generator,
            follow=True,
        )

    def system(self, kernel: Kernel, mean: Mean) -> tuple[PriorDraw, Data]:
        """The system at the current hyperparameters, from the same base draws."""
        generator = Generator().manual_seed(self.seed)
        prior = self._draw_prior(self.num_samples, generator, kernel)
        with torch.no_grad():
            Z = self.transform_inputs(self._train_X).double()
        noise = self.noise_variance.detach().double()
        return prior, Data(Z, self._targets.double(), noise)

    def _key(self) -> list[Tensor]:
        """Everything that the solution depends on, by value.

        Values are compared, not tensor versions: gpytorch's ``initialize`` writes to
        ``.data``.
        """
        key = [self._train_X, self._targets, self._seed, self.noise_variance]
        for module in (self.covar_module, self.mean_module):
            key += [*module.parameters(), *module.buffers()]
        if hasattr(self, "input_transform"):
            key += self.input_transform.buffers()
        return [value.detach() for value in key]

    def _solve_options(self) -> tuple:
        return self.solver, self.num_samples, self.num_features, self.compute_dtype

    def _solve(self) -> Representers:
        """The solved system, kept as long as nothing it depends on has changed."""
        key, options = self._key(), self._solve_options()
        if self._solved is not None and self._options == options:
            if _same(self._solved[0], key):
                return self._solved[1]
        with torch.no_grad():
            kernel = copy.deepcopy(self.covar_module).double().requires_grad_(False)
            mean = copy.deepcopy(self.mean_module).double().requires_grad_(False)
            prior, data = self.system(kernel, mean)
            solved = solve_representers(
                prior,
                mean,
                data,
                self.seed,
                self.solver,
                self.warm_start(),
                self.compute_dtype,
            )
        self._solved = [value.clone() for value in key], solved
        self._options = options
        self._initial, self._correction = None, None
        return solved

    def warm_start(self) -> Tensor | None:
        """The last solution, with zeros for points that have come since."""
        old = self._initial
        if self._solved is not None:
            old = self._solved[1].columns()
        columns = (1 + self.num_samples) * self._targets.shape[-1]
        if old is None or len(old) > len(self._train_X) or old.shape[-1] != columns:
            return None
        old = old.to(self._train_X.device)
        grown = old.new_zeros(len(self._train_X), old.shape[-1])
        grown[: len(old)] = old
        return grown

    def start_from(self, solution: Tensor | None) -> None:
        """Give up what is solved; the next solve starts from these columns."""
        self._forget()
        self._initial = solution

    def _base(self) -> Representers:
        """The solved system of the outputs that are kept."""
        base = self._solve()
        if self.output_indices is None:
            return base
        return base.take_outputs(self.output_indices)

    def _correct(self, base: Representers) -> Correction:
        new = self._new
        Z = self.transform_inputs(new.X).double()
        data = Data(Z, new.Y.double(), new.noise.double())
        return correct(base, data, self.solver, self.compute_dtype)

    def _corrected(self, base: Representers) -> Correction | None:
        if self._new is None:
            return None
        kept = self._correction
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in self._new)
        if kept is None or (wanted and not kept.mean_weights.requires_grad):
            self._correction = self._correct(base)
        return self._correction

    def _moments(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        base = self._base()
        correction = self._corrected(base)
        if correction is None:
            return base.moments(Z.double())
        return correction.moments(base, Z.double())

    def _columns(self, values: Tensor) -> Tensor:
        if self.output_indices is None:
            return values
        return values[..., self.output_indices]

    def _grown(self, X: Tensor, Y: Tensor, noise: Tensor | None) -> Self:
        warm = self.warm_start()
        grown = self._share()
        grown._train_X = torch.cat([self._train_X, X.detach()])
        grown._targets = torch.cat([self._targets, Y.detach()])
        if noise is not None:
            # Without a second noise, which is learnt and not per point.
            own = self.likelihood.noise_covar.noise
            grown.likelihood = copy.deepcopy(self.likelihood)
            both = torch.cat([own, shared_noise(noise, X)])
            grown.likelihood.noise_covar.noise = both
        grown.start_from(warm)
        return grown

    def _forget(self) -> None:
        self._solved, self._options, self._correction = None, None, None


def _same(kept: list[Tensor], key: list[Tensor]) -> bool:
    return len(kept) == len(key) and all(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        and torch.equal(a, b)
        for a, b in zip(kept, key, strict=True)
    )
