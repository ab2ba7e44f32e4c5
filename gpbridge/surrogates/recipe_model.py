r"""A recipe where BoTorch and Ax expect a class of models.

In: a data set and a recipe. Out: a model that fits itself when it is constructed, by
the convention ``Class(**Class.construct_inputs(data, **options))``.
"""

from __future__ import annotations

from typing import Any

from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.posteriors import Posterior
from botorch.utils.datasets import SupervisedDataset
from torch import Size, Tensor

from gpbridge.checks import warn_user
from gpbridge.surrogates.recipe import Recipe, SurrogateFit


class RecipeModel(Model):
    r"""What a recipe makes of data, as a model class with ``construct_inputs``.

    The model is fitted here, so nothing is left to fit: its marginal likelihood must
    not be maximised once more, which would undo held-out noise. It is therefore not a
    ``GPyTorchModel``. Ax fits every model that it constructs and asks for a rule; the
    one for this class does nothing::

        ModelConfig(
            botorch_model_class=RecipeModel,
            model_options={"recipe": LinearizedSurrogate(bounds=bounds)},
            input_transform_classes=None,  # a recipe has its own
        )

        @fit_botorch_model.register(RecipeModel)
        def _(model, mll_class, mll_options=None):
            pass

    Args:
        train_X: Inputs ``n x d``.
        train_Y: Outcomes ``n x m``.
        recipe: How to fit.
        previous: An earlier model of the same recipe, from which training goes on.

    Attributes:
        model: What the recipe returned; all calls go to it.

    Raises:
        TypeError: If ``recipe`` is none, or ``previous`` of another one.
        ValueError: As for :meth:`Recipe.fit`.

    Example:
        >>> import torch
        >>> from gpbridge.surrogates import EnsembleSurrogate
        >>> X = torch.rand(12, 2).double()
        >>> data = SupervisedDataset(
        ...     X, X[:, :1], feature_names=["a", "b"], outcome_names=["y"]
        ... )
        >>> inputs = RecipeModel.construct_inputs(data, EnsembleSurrogate(epochs=5))
        >>> RecipeModel(**inputs).posterior(X[:3]).mean.shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        train_X: Tensor,
        train_Y: Tensor,
        recipe: Recipe,
        previous: Model | None = None,
    ) -> None:
        super().__init__()
        _check_recipe(recipe)
        if isinstance(previous, RecipeModel):
            previous = previous.model
        if previous is None:
            self.model = recipe.fit(train_X, train_Y)
        else:
            self.model = recipe.update(previous, train_X, train_Y)
        self.eval()

    @classmethod
    def construct_inputs(
        cls,
        training_data: SupervisedDataset,
        recipe: Recipe | None = None,
        previous: Model | None = None,
    ) -> dict[str, Any]:
        """Constructor arguments from a data set.

        Args:
            training_data: Inputs and outcomes of one task.
            recipe: How to fit.
            previous: An earlier model, from which training goes on.

        Returns:
            Keyword arguments of the class.

        Raises:
            NotImplementedError: If the data are of several tasks, of comparisons, or of
                another special kind.
            TypeError: If it is no data set, or there is no recipe.

        Warns:
            UserWarning: If there are known noise variances: recipes learn the noise.
        """
        inputs = super().construct_inputs(training_data)
        if type(training_data) is not SupervisedDataset:
            raise NotImplementedError(
                "Recipes take a botorch SupervisedDataset, inputs and outcomes of one "
                f"task, but training_data is a {type(training_data).__name__}. Use "
                "botorch's own model for it, as MultiTaskGP for several tasks."
            )
        _check_recipe(recipe)
        if inputs.pop("train_Yvar", None) is not None:
            warn_user(
                "The known noise variances (Yvar) are not used: recipes learn the "
                "noise. For known noise use gpbridge.LinearizedGP or SingleTaskGP."
            )
        return {**inputs, "recipe": recipe, "previous": previous}

    @property
    def surrogate_fit(self) -> SurrogateFit:
        """From where an update goes on, so that ``recipe.update`` takes this model."""
        return self.model.surrogate_fit

    @property
    def num_outputs(self) -> int:
        """The number m of outputs."""
        return self.model.num_outputs

    @property
    def batch_shape(self) -> Size:
        """That of the model, empty."""
        return self.model.batch_shape

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """Posterior of the model at ``batch_shape x q x d``, in the caller's units."""
        return self.model.posterior(
            X, output_indices, observation_noise, posterior_transform, **kwargs
        )

    def subset_output(self, idcs: list[int]) -> Model:
        """The model of some of its outputs."""
        return self.model.subset_output(idcs)

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Model:
        """The model given more observations, where its kind can; else an error."""
        return self.model.condition_on_observations(X, Y, **kwargs)

    def fantasize(self, X: Tensor, sampler: Any, **kwargs: Any) -> Model:
        """The model given simulated observations, where its kind can; else an error."""
        return self.model.fantasize(X, sampler, **kwargs)

    def transform_inputs(self, X: Tensor, input_transform: Any = None) -> Tensor:
        """Nothing: the model transforms its inputs by itself."""
        return X if input_transform is None else input_transform(X)

    def _set_transformed_inputs(self) -> None:
        """Left to the model."""

    def _revert_to_original_inputs(self) -> None:
        """Left to the model."""


def _check_recipe(recipe: object) -> None:
    if not isinstance(recipe, Recipe):
        raise TypeError(
            "recipe must be a recipe of gpbridge.surrogates, as LinearizedSurrogate(), "
            f"but is {recipe!r}. Pass it by model_options={{'recipe': ...}}."
        )
