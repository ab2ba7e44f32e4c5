"""What a linearised GP is made of, and what is computed from it once and kept.

In: the attributes that the constructor sets. Out: :class:`TangentState`, the data, the
hyperparameters and the posterior at their present values, remade when one of them
changes. Next: ``persistence`` copies and loads it, ``gp`` answers from it.
"""

from __future__ import annotations

from functools import partial

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from gpytorch.means import Mean
from torch import Size, Tensor

from gpbridge.checks import (
    check_choice,
    check_inputs,
    check_same_device,
    check_same_dtype,
    check_tensor,
    warn_user,
)
from gpbridge.functional import FunctionalNet, Parameters
from gpbridge.kernels.tangent import NeuralTangentKernel
from gpbridge.likelihoods import is_gaussian, noise_covariance
from gpbridge.linearized.calibration import Calibration, TrainGap
from gpbridge.linearized.conditioning import NewData, Update
from gpbridge.linearized.curvature_state import (
    pack_results,
    saved_weights,
    unpack_curvature,
)
from gpbridge.linearized.inference import Inference
from gpbridge.linearized.mode import Mode
from gpbridge.linearized.noise import (
    initial_noise,
    observation_noise,
    release_noise,
    set_noise,
)
from gpbridge.linearized.posterior import TangentPosterior
from gpbridge.linearized.problem import TangentProblem
from gpbridge.linearized.structured_weights import StructuredWeights
from gpbridge.linearized.variational import Refinement
from gpbridge.tracing import ordinary_tensors
from gpbridge.types import FitResult

# Every attribute that is no module, parameter or buffer, by what becomes of it.
BUILT_WITH = (
    *("inference", "select", "offset", "g_prior", "parameters_option"),
    *("fit_result", "_num_outputs", "previous"),
)
FOUND = ("diagnostics", "validation_nll")  # by fit_evidence, about its last run
SAVED = ("mean", "noise", "fitted", "calibration", "output_indices", "_froze_noise")
MOVED = ("_new", "refinement")  # and saved, as tensors
KEPT = ("_saved",)  # tensors that save computing anew what they fit
CACHES = ("_problem", "_built_from", "_posterior", "_update", "_mode", "_gap")


class TangentState:
    """Data, hyperparameters and caches of a linearised GP, beside botorch's model."""

    # Modules and buffers, which torch copies, saves and moves.
    likelihood: Likelihood
    covar_module: NeuralTangentKernel
    mean_module: Mean
    _train_X: Tensor  # n x d, untransformed
    _targets: Tensor  # transformed, in the likelihood's form

    # BUILT_WITH: whoever loads a state builds the model with the same.
    inference: Inference
    select: str | None
    offset: bool
    g_prior: bool | int
    parameters_option: Parameters
    fit_result: FitResult | None
    _num_outputs: int  # of the network
    previous: StructuredWeights | None

    # FOUND: there once fit_evidence has run.
    diagnostics: tuple
    validation_nll: dict[str, float]

    # SAVED: part of the state_dict as plain values.
    mean: str
    noise: str | float | Tensor
    fitted: str | None  # what fitted the hyperparameters
    calibration: Calibration | None
    output_indices: list[int] | None  # of the outputs, those that are seen
    _froze_noise: bool  # whether the option noise fixed the likelihood's

    # MOVED: tensors outside of torch's own lists.
    _new: NewData | None  # conditioned on since
    refinement: Refinement | None  # by refine, at one prior variance

    # KEPT: of the state that was loaded, or of the model that this is a copy of.
    _saved: dict[str, Tensor] | None  # by name, what a structure computed

    # CACHES: computed anew where they are missing or out of date.
    _problem: TangentProblem | None
    _built_from: tuple | None  # what the problem does not read at every call
    _posterior: tuple[tuple, TangentPosterior] | None  # beside what it depends on
    _update: Update | None
    _mode: Mode | None  # where the next evidence starts
    _gap: tuple[tuple, TrainGap] | None

    # -- what it is ------------------------------------------------------------------

    @property
    def functional(self) -> FunctionalNet:
        """The frozen network."""
        return self.covar_module.functional

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
        if self._new is not None:
            new = self._new.Y
            if self.output_indices is not None:
                Y = Y[..., self.output_indices]
            Y = torch.cat([Y.expand(*new.shape[:-2], -1, -1), new], -2)
        return Y.squeeze(-1) if Y.dim() > 1 and Y.shape[-1] == 1 else Y

    @property
    def num_outputs(self) -> int:
        """The number m of outputs."""
        if self.output_indices is not None:
            return len(self.output_indices)
        return self._num_outputs

    @property
    def _supports_cache_root(self) -> bool:
        # Read by botorch's noisy acquisitions: low-rank updates of a cached root need
        # outputs that are independent, and those of one network are not.
        return self.num_outputs == 1

    @property
    def batch_shape(self) -> Size:
        """Empty, or the batch of the observations conditioned on."""
        if self._new is None:
            return Size()
        return torch.broadcast_shapes(self._new.X.shape[:-2], self._new.Y.shape[:-2])

    @property
    def prior_variance(self) -> Tensor:
        """Prior variance of the weights, one per group."""
        return self.covar_module.prior_variance

    @prior_variance.setter
    def prior_variance(self, value: float | Tensor) -> None:
        self.covar_module.prior_variance = value

    @property
    def noise_variance(self) -> Tensor:
        """Noise variances, ``m``, or ``n x m`` if fixed per point, in squared units.

        Raises:
            TypeError: If the likelihood is not Gaussian.
        """
        if not is_gaussian(self.likelihood):
            # Not an AttributeError, which torch's modules replace by their own.
            raise TypeError(f"{type(self.likelihood).__name__} has no noise variance.")
        blocks = noise_covariance(self.likelihood, self._targets.double()).detach()
        diagonal = blocks.double().diagonal(dim1=-2, dim2=-1)
        fixed = isinstance(self.likelihood, FixedNoiseGaussianLikelihood)
        return (diagonal if fixed else diagonal[0]).to(self._train_X.dtype)

    def __repr__(self) -> str:
        """Sizes, and whether hyperparameters were fitted."""
        n, net = len(self._train_X), self.functional
        how = "not fitted" if self.fitted is None else f"fitted by {self.fitted}"
        if self.refinement is not None:
            how += f", refined in {len(self.refinement.bounds) - 1} steps"
        return (
            f"{type(self).__name__}(n={n}, num_outputs={self.num_outputs}, random "
            f"weights={net.num_params}, {type(self.likelihood).__name__}, "
            f"mean={self.mean!r}, inference={type(self.inference).__name__}, "
            f"{'' if self.previous is None else 'after a previous posterior, '}"
            f"hyperparameters {how})"
        )

    def _check_new_inputs(self, X: Tensor, name: str = "X") -> None:
        check_tensor(**{name: X})
        check_same_device(**{name: X, "train_X": self._train_X})
        check_inputs(X, name, self._train_X.shape[-1])
        check_same_dtype(name, X, self._train_X.dtype)

    def check_all_data_is_training_data(self, what: str) -> None:
        """Refuse what would silently ignore observations conditioned on later."""
        if self._new is not None:
            raise NotImplementedError(
                f"{what} is that of the {len(self._train_X)} training points only, but "
                f"the model was conditioned on {self._new.X.shape[-2]} further ones. "
                "Build a LinearizedGP on all data."
            )

    def check_prior_of_its_own(self, what: str) -> None:
        """Refuse what is not there for a prior that came from other data."""
        if self.previous is not None:
            raise NotImplementedError(
                f"{what} is not there for a model whose prior is a previous posterior: "
                "the prior variances are part of it. Choose them on the first data."
            )

    @ordinary_tensors()
    def use_mean(self, mean: str, noise: str | float) -> None:
        """Change mean and noise together, as in the constructor (Gaussian noise)."""
        check_choice("mean", mean, ("linear_model", "network"))
        self.mean, self.noise = mean, noise
        if noise == "learn" and self._froze_noise:
            release_noise(self.likelihood)
            self._froze_noise = False
        self._apply_noise_option(self.problem.Y - self.problem.outputs)

    def _apply_noise_option(self, misfit: Tensor) -> None:
        variance = initial_noise(
            self.noise,
            self.mean,
            self.parameters_option,
            self.fit_result,
            misfit,
            self.likelihood,
        )
        if variance is not None:
            set_noise(self.likelihood, variance)
            self._froze_noise = True

    # -- what is kept ----------------------------------------------------------------

    def _results(self) -> dict[str, Tensor] | None:
        """What a structure computed, to be saved; what was loaded if nothing since."""
        problem = self._problem
        if problem is None or problem._curvature is None:
            return self._saved
        if self._built_from != self._ingredients():  # of another network by now
            return None
        return pack_results(problem, self._posterior)

    def _forget(self) -> None:
        for cache in CACHES:
            setattr(self, cache, None)

    def _ingredients(self) -> tuple:
        """What a problem is built from; values of hyperparameters are in ``_key``."""
        weights = self.functional.state_dict(keep_vars=True).values()
        versions = [
            (id(w), w.data_ptr(), 0 if w.is_inference() else w._version)
            for w in weights
            if isinstance(w, Tensor)
        ]
        groups = self.covar_module.groups
        return (
            *(self.likelihood, self.offset, self.inference, self.previous),
            *(groups, versions),
        )

    @property
    @ordinary_tensors()
    def problem(self) -> TangentProblem:
        """The linear model with its caches at unit prior variance.

        Made anew where the likelihood, an option or the network was replaced.
        """
        ingredients = self._ingredients()
        if self._problem is not None and self._built_from != ingredients:
            self._drop_refinement("the network, the likelihood or an option")
            self._forget()
        if self._problem is None:
            with torch.no_grad():
                Z = self.transform_inputs(self._train_X)
            floating = self._targets.is_floating_point()
            self._problem = TangentProblem(
                self.functional,
                Z.to(self.functional.dtype),
                self._targets.double() if floating else self._targets,
                self.likelihood,
                self.covar_module.groups,
                self.covar_module.unit_std(),
                self.offset,
                self.inference,
            )
            self._problem.previous = self.previous
            self._built_from = ingredients
            if self._saved is not None:
                self._problem.recall = partial(
                    unpack_curvature, self._problem, self._saved
                )
        return self._problem

    def _key(self) -> tuple:
        noise = [p.detach().flatten().tolist() for p in self.likelihood.parameters()]
        if isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            noise.append(self.likelihood.noise_covar.noise.flatten().tolist())
        refined = self._refined()
        refined = None if refined is None else id(refined)  # alive in the posterior
        return (self.prior_variance.detach().tolist(), noise, self.mean, refined)

    def _refined(self) -> Refinement | None:
        """The refinement, unless what it was found for was changed since."""
        found = self.refinement
        if found is not None and not found.fits(self.prior_variance, self.mean):
            self._drop_refinement("the prior variance or the mean")
        return self.refinement

    def _drop_refinement(self, changed: str) -> None:
        if self.refinement is not None:
            # The temperature was that of the refined prediction.
            self.refinement = self.calibration = None
            warn_user(
                f"The refinement is dropped, since {changed} was changed: the "
                "posterior is Laplace's again and probabilities are the network's own. "
                "Call refine() again."
            )

    @ordinary_tensors()
    def _conditioned(self) -> TangentPosterior:
        """The posterior, kept as long as no hyperparameter changes its value.

        Values are compared, not tensor versions: gpytorch's ``initialize`` writes to
        ``.data``.
        """
        problem, key = self.problem, self._key()  # in this order: it may forget
        if self._posterior is None or self._posterior[0] != key:
            weights = saved_weights(problem, self._saved, key)
            made = TangentPosterior(
                problem,
                self.prior_variance.detach(),
                self.mean,
                self.refinement,
                weights,
            )
            self._posterior, self._update = (key, made), None
        return self._posterior[1]

    def _observed(self) -> NewData | None:
        """Further observations, with the likelihood's noise as it is now."""
        new = self._new
        if new is None or not new.own_noise.any():
            return new
        own = self._noise_at(new.Y.double())
        mask = new.own_noise[:, None, None]
        return new._replace(noise=torch.where(mask, own, new.noise.double()))

    def _updated(self) -> Update | None:
        base, kept = self._conditioned(), self._update
        if self._new is None:
            return None
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in self._new)
        if kept is not None and not wanted:
            return kept
        new = self._observed()
        update = base.update(
            new._replace(X=self.transform_inputs(new.X)), self.output_indices
        )
        if not update.innovation.requires_grad:  # a graph serves one backward pass
            self._update = update
        return update

    def _joint(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        update = self._updated()
        return self._conditioned().joint(Z, self.output_indices, update)

    @ordinary_tensors()
    def marginals(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Latent moments of each point in transformed units, float64.

        Args:
            X: Inputs ``... x n x d``.

        Returns:
            Mean ``... x n x m`` and covariance ``... x n x m x m``.
        """
        if len(self.batch_shape):
            raise NotImplementedError(
                "Marginals of a model with a batch of fantasies are not supported. Ask "
                "posterior(X) for joint moments."
            )
        rows = self.transform_inputs(X).reshape(-1, X.shape[-1])
        update = self._updated()
        mean, blocks = self._conditioned().marginals(
            rows, self.output_indices, update, X.dtype == torch.float32
        )
        m, shape = self.num_outputs, X.shape[:-1]
        return mean.reshape(*shape, m), blocks.reshape(*shape, m, m)

    def _noise_at(self, mean: Tensor, asked: bool | Tensor = True) -> Tensor:
        return observation_noise(
            self.likelihood, asked, mean, self._targets, self.output_indices
        )

    def _untransform(self, values: Tensor, Z: Tensor) -> Tensor:
        if hasattr(self, "outcome_transform"):
            values, _ = self.outcome_transform.untransform(values, X=Z)
        return values
