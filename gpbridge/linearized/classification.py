"""What a linearised GP does under labels: predict, calibrate and refine.

In: a model whose likelihood observes labels. Out: the mixin :class:`Classification`,
which keeps on the model what ``calibration`` and ``variational`` find, and predicts by
it. Next: ``gp``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution

from gpbridge.checks import check_finite, check_not_empty
from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.calibration import (
    Calibration,
    TrainGap,
    calibrated_variance,
    check_calibratable,
    check_held_out,
    find_calibration,
    link_and_temperature,
    still_valid,
    temper_refinement,
    training_gap,
    warn_about_gap,
)
from gpbridge.linearized.labels import label_distribution
from gpbridge.linearized.variational import (
    Refinement,
    check_refinable,
    refine,
    warn_about_refinement,
)
from gpbridge.targets import check_targets
from gpbridge.tracing import ordinary_tensors


class Classification:
    """Probabilities of a linearised GP and what repairs them, for labels."""

    def _predict_labels(self, X: Tensor, link: str | None) -> Distribution:
        if self.output_indices is not None:
            raise NotImplementedError(
                "Probabilities need all classes. Call predict on the model that was "
                "subset, or posterior(X) for latent values."
            )
        bounds = self.covar_module.raw_prior_variance_constraint
        refined = self._refined() is not None  # first: it may drop the calibration
        calibration = still_valid(self.calibration, self.prior_variance, bounds)
        if calibration is None and link not in (None, "plugin"):
            warn_about_gap(link, self.train_gap)
        link, temperature = link_and_temperature(link, calibration, refined)
        if link == "plugin" and self.mean == "network":
            mean = self.functional(self.transform_inputs(X).to(self.functional.dtype))
            blocks = mean.new_zeros(*mean.shape, mean.shape[-1])
        else:
            mean, blocks = self.marginals(X)
        check_finite(**{"the network's output at X": mean.flatten(0, -2)})
        return label_distribution(
            self.likelihood, mean, blocks, link, temperature, X.dtype
        )

    @ordinary_tensors()
    def calibrate(self, X_val: Tensor, Y_val: Tensor) -> Calibration | None:
        """Choose prior variance and a temperature on held-out data, if that helps.

        The only rule measured to be safe for classification: a joint choice by held-out
        NLL, adopted if better than the network's own probabilities by one standard
        error. Afterwards ``predict`` uses the pairwise link; else the model is
        unchanged, an earlier calibration included, and a warning gives the numbers.
        After ``refine`` the temperature of the refined prediction alone is chosen; if
        that is not better, the refinement is dropped.

        Args:
            X_val: Inputs ``n' x d`` that neither training nor this model has seen; a
                tenth of the data is enough. The validation rows of a training run will
                do for a model built with ``from_fit(..., rows="fit")``.
            Y_val: Their labels.

        Returns:
            What was adopted, or None.

        Raises:
            TypeError: If the model is a regression.
            ValueError: If the mean is not the network's output, there are several
                prior groups, or this model was conditioned on most of these rows.
        """
        check_calibratable(self.likelihood, self.mean)
        self._check_new_inputs(X_val, "X_val")
        check_not_empty(X_val=X_val)
        n, m, dtype = len(X_val), self._num_outputs, X_val.dtype
        labels = check_targets(self.likelihood, Y_val, m, n, dtype, "Y_val")
        check_held_out(X_val, labels, self._train_X, self._targets)
        self.eval()
        with torch.no_grad():
            Z = self.transform_inputs(X_val)
        problem = self.problem  # first: it may drop the refinement
        if self._refined() is not None:
            return self._temper(Z, X_val, labels)
        found = find_calibration(problem, Z, labels, self.prior_variance.detach())
        if found is not None:
            self.calibration, self.fitted = found, "calibrate"
            if found.prior_variance > 0:
                bounds = self.covar_module.raw_prior_variance_constraint
                self.prior_variance = calibrated_variance(found, bounds)
        return found

    def _temper(self, Z: Tensor, X: Tensor, labels: Tensor) -> Calibration | None:
        found = temper_refinement(
            self.problem, Z, labels, *self.marginals(X), self.prior_variance.detach()
        )
        if found is None:
            self.refinement = None
        self.calibration = found
        return found

    @ordinary_tensors()
    def refine(
        self,
        *,
        max_steps: int = 1,
        tolerance: float = 1e-3,
        num_pairs: int = 40,
        seed: int = 0,
        progress: bool = True,
    ) -> Refinement | None:
        r"""Refine a classifier's posterior by the variational bound; no held-out data.

        Laplace's posterior of a confident network contradicts the labels it was
        conditioned on. This one has the expected gradient and curvature of its own
        logits: mean and covariance both change, ``posterior``, ``predict`` (link
        ``"pairwise"``) and ``draw`` use them together, and a further call goes on from
        there. Changing a prior variance drops it, with a warning.

        It repairs strongly overconfident networks and makes calibrated ones somewhat
        underconfident: a risk that ``calibrate`` on held-out data removes, before or
        after. Use the prior variance of the training, ``1 / (n weight_decay)``, or 1: a
        small one cannot reach the labels, and is given up.

        Each step costs one factorisation of the smaller matrix, and a few passes over
        the data where their features are not held. See
        :func:`gpbridge.linearized.variational.refine` for the formulas.

        Args:
            max_steps: Steps at most. The bound goes on rising after one, but held-out
                NLL may not: for overconfident networks one is the safer number.
            tolerance: Stop once a step raises the bound by less, in nats per point.
            num_pairs: Antithetic pairs of draws that average over the logits.
            seed: Of these draws, below 2^31.
            progress: Whether to show a bar.

        Returns:
            The refinement with its bounds and losses, also as ``refinement``; None if
            it was given up, which leaves the model as it is and warns.

        Raises:
            TypeError: If the model is a regression.
            ValueError: If the mean is not the network's output.
            NotImplementedError: If ``inference`` is not dense and exact.
            MemoryError: If the factor needs more than the memory budget.
        """
        check_refinable(self.likelihood, self.mean, self.inference)
        problem, kept = self.problem, self.refinement
        if kept is not None and not kept.fits(self.prior_variance, self.mean):
            self.refinement = self.calibration = kept = None
        found = refine(
            problem,
            self.prior_variance.detach(),
            kept,
            max_steps=max_steps,
            tolerance=tolerance,
            num_pairs=num_pairs,
            seed=seed,
            progress=progress,
        )
        warn_about_refinement(found)
        if found is not None:
            self.refinement, self.calibration = found, None
        return found

    @property
    @ordinary_tensors()
    def train_gap(self) -> TrainGap:
        """How far predictions contradict the training labels; classification only.

        Raises:
            TypeError: If the model is a regression.
        """
        if is_gaussian(self.likelihood):
            raise TypeError("train_gap is for classification.")
        problem, key = self.problem, self._key()  # in this order: it may forget
        if self._gap is None or self._gap[0] != key:
            moments = self.marginals(self._train_X)
            self._gap = (key, training_gap(problem, *moments))
        return self._gap[1]
