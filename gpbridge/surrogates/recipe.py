r"""How a surrogate is fitted to the experiments made so far, and to the next ones.

In: a recipe's options, inputs and outcomes in the caller's units. Out: a BoTorch model
in the same units; with the next observations, another one, trained from where the last
stands. Next: the recipes, one file for each kind of posterior.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from botorch.exceptions.errors import ModelFittingError
from botorch.models.model import Model
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import Standardize
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Generator, Tensor, nn

from gpbridge.checks import (
    ReliabilityWarning,
    ShapeError,
    check_bounds,
    check_finite,
    check_inputs,
    check_same_device,
    check_same_length,
    warn_user,
)
from gpbridge.dnn.divergence import DivergedError
from gpbridge.dnn.training import isolated_randomness
from gpbridge.surrogates.encoding import check_categories, input_encoding

State = dict[str, Tensor]
NetworkBuilder = Callable[[int, int], nn.Module]
FAILURES = (DivergedError, ModelFittingError, NanError, NotPSDError)


def tanh_network(num_inputs: int, num_outputs: int) -> nn.Module:
    """The network of every recipe unless told otherwise: two layers of 64 tanh.

    Smooth, so that acquisition functions can be optimised by gradients.

    Args:
        num_inputs: Width d of the inputs.
        num_outputs: The number m of outputs.

    Returns:
        A network with random weights.
    """
    return nn.Sequential(
        *(nn.Linear(num_inputs, 64), nn.Tanh()),
        *(nn.Linear(64, 64), nn.Tanh()),
        nn.Linear(64, num_outputs),
    )


class SurrogateFit(NamedTuple):
    """What a recipe leaves at its model, as ``model.surrogate_fit``, for updates.

    Attributes:
        recipe: Which made it.
        input_transform: From the caller's inputs to the network's, the same in all
            updates.
        weights: States of the networks from which the next training starts.
    """

    recipe: Recipe
    input_transform: InputTransform
    weights: list[State]


class Experiments(NamedTuple):
    """What a recipe is fitted to, in the caller's units and as the network sees it.

    Attributes:
        X: Inputs ``n x d``.
        Y: Outcomes ``n x m``.
        Z: Inputs as the network sees them, ``n x d'``.
        targets: Standardised outcomes, ``n x m``.
        input_transform: From X to Z, fixed.
        build: Makes networks of so many outputs, each time the same.
        weights: States of the networks of the last fit; none in the first.
        generator: Source of all other randomness.
    """

    X: Tensor
    Y: Tensor
    Z: Tensor
    targets: Tensor
    input_transform: InputTransform
    build: Callable[[int], nn.Module]
    weights: list[State]
    generator: Generator

    @property
    def network(self) -> nn.Module:
        """Where training starts: at random weights, or those of the last fit."""
        network = self.build(self.Y.shape[-1])
        if self.weights:
            network.load_state_dict(self.weights[0])
        return network

    def outcome_transform(self) -> Standardize:
        """A fresh transform, which learns from the model's constructor."""
        return Standardize(self.Y.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    r"""Options of a surrogate; ``fit`` makes a BoTorch model of observations.

    A recipe has no state. What training continues from lies in the model that
    :meth:`fit` returned, of which :meth:`update` makes the next. All outcomes are
    standardised, inputs scaled to variance one over the search space.

    Args:
        network: Builds a network from its numbers of inputs and outputs; categories
            count as one input each. The same for every recipe.
        bounds: The search space, ``2 x d``. Default the range of the first inputs; pass
            it, so that the scale of inputs does not depend on where one has looked.
        categories: The number of categories of each column that holds some, as
            ``{column: number}``.
        epochs: Of training a network from random weights.
        update_epochs: Of training it further with more observations.
        learning_rate: Of the network, Adam's.
        weight_decay: Of the mean loss of a datum.
        seed: Of first weights, batches and draws.
        progress: Whether to show bars, if there is a terminal.
    """

    network: NetworkBuilder = tanh_network
    bounds: Tensor | None = field(default=None, repr=False)
    categories: Mapping[int, int] | None = None
    epochs: int = 300
    update_epochs: int = 100
    learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    seed: int = 0
    progress: bool = False

    @torch.enable_grad()
    def fit(self, train_X: Tensor, train_Y: Tensor) -> Model:
        """Fit a surrogate from scratch.

        Args:
            train_X: Inputs ``n x d``, at least two.
            train_Y: Outcomes ``n x m``, to be maximised or not: that is for the
                acquisition function to say.

        Returns:
            The model, in eval mode, in the units of the data.

        Raises:
            ShapeError: If the shapes are not those.
            ValueError: If there is one observation only, bounds are reversed, or a
                column of categories holds something else.
            DivergedError: If training diverges.

        Warns:
            ReliabilityWarning: If all outcomes are the same.
        """
        return self._finished(self._experiments(train_X, train_Y, None))

    @torch.enable_grad()
    def update(self, model: Model, train_X: Tensor, train_Y: Tensor) -> Model:
        """Fit a surrogate to all observations, starting from the last one.

        Args:
            model: What :meth:`fit` or :meth:`update` of this recipe returned; it is not
                changed.
            train_X: All inputs, old and new, ``n x d``.
            train_Y: All outcomes ``n x m``.

        Returns:
            The next model; the given one, if fitting fails.

        Raises:
            ShapeError: As in :meth:`fit`.
            TypeError: If the model is of another recipe.
            ValueError: As in :meth:`fit`.

        Warns:
            ReliabilityWarning: If fitting failed. The model that comes back then has
                not seen the new rows.
        """
        last = getattr(model, "surrogate_fit", None)
        if last is None or type(last.recipe) is not type(self):
            raise TypeError(
                f"model must be what {type(self).__name__}.fit or .update returned, "
                f"but is a {type(model).__name__} of something else. Call fit first."
            )
        experiments = self._experiments(train_X, train_Y, last)
        try:
            return self._finished(experiments)
        except FAILURES as error:
            warn_user(
                f"{type(self).__name__} could not be fitted to {len(train_X)} rows "
                f"({error}). The surrogate from before is kept; it has not seen the "
                "new rows. Fit anew with another seed, or a smaller learning rate.",
                ReliabilityWarning,
            )
            return model

    def with_seed(self, seed: int) -> Recipe:
        """The same recipe with other random numbers."""
        return replace(self, seed=seed)

    @abstractmethod
    def _fit(self, experiments: Experiments) -> tuple[Model, list[State]]:
        """The model, and from where training goes on the next time."""

    def _finished(self, experiments: Experiments) -> Model:
        model, weights = self._fit(experiments)
        weights = [{k: v.detach().clone() for k, v in w.items()} for w in weights]
        model.surrogate_fit = SurrogateFit(self, experiments.input_transform, weights)
        return model.eval()

    def _epochs(self, experiments: Experiments) -> int:
        return self.update_epochs if experiments.weights else self.epochs

    def _experiments(
        self, X: Tensor, Y: Tensor, last: SurrogateFit | None
    ) -> Experiments:
        check_inputs(X)
        check_inputs(Y, "train_Y")
        check_same_length(train_X=X, train_Y=Y)
        check_same_device(train_X=X, train_Y=Y)
        check_finite(train_Y=Y)
        if X.dim() != 2 or Y.dim() != 2:
            raise ShapeError(
                "train_X must be ``n x d`` and train_Y ``n x m``, but they have shapes "
                f"{tuple(X.shape)} and {tuple(Y.shape)}."
            )
        if len(X) < 2:
            raise ValueError(
                f"A surrogate needs at least 2 observations, but there are {len(X)}. "
                "Begin with a design, as botorch.utils.sampling.draw_sobol_samples."
            )
        if self.bounds is not None:
            check_bounds(self.bounds)
            if self.bounds.shape[-1] != X.shape[-1]:
                raise ShapeError(
                    f"bounds are of {self.bounds.shape[-1]} columns, but train_X has "
                    f"{X.shape[-1]}."
                )
        check_categories(X, self.categories or {})
        spread = Y.std(0)
        if bool((spread == 0).any()):
            column = int((spread == 0).nonzero()[0])
            warn_user(
                f"All {len(Y)} values of outcome {column} are {float(Y[0, column]):g}: "
                "they tell a surrogate nothing about where to look, nor how large "
                "outcomes may be. Observe elsewhere before you trust it.",
                ReliabilityWarning,
            )
        if last is None:
            transform = input_encoding(X, self.bounds, self.categories)
        else:
            transform = copy.deepcopy(last.input_transform)
        Z = transform(X)
        scale = torch.where(spread > 0, spread, torch.ones_like(spread))
        generator = torch.Generator().manual_seed(self.seed)
        first = int(torch.randint(2**62, (), generator=generator))

        def build(num_outputs: int) -> nn.Module:
            seeded = torch.Generator().manual_seed(first)
            with isolated_randomness(seeded, torch.device("cpu")):
                return self.network(Z.shape[-1], num_outputs).to(X)

        return Experiments(
            *(X.detach(), Y.detach(), Z.detach(), (Y - Y.mean(0)) / scale),
            transform,
            build,
            [] if last is None else last.weights,
            generator,
        )
