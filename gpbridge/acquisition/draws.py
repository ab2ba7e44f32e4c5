r"""One function of a posterior as a model, whose maximiser is a Thompson sample.

In: a posterior, or a model that draws. Out: a deterministic BoTorch model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from botorch.models.deterministic import DeterministicModel
from botorch.models.model import Model
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from torch import Generator, Size, Tensor

from gpbridge.acquisition.gp_draws import draw_functions
from gpbridge.batch_norm import inputs_of
from gpbridge.checks import check_count
from gpbridge.function_draws import evaluate, freeze, refreshed
from gpbridge.types import WeightPosterior


class ThompsonDraw(DeterministicModel):
    r"""One function of a posterior, as a model without uncertainty.

    Its maximiser is a Thompson sample: ``optimize_acqf(PosteriorMean(draw), ...)``. A
    batch of them costs less by :func:`~gpbridge.acquisition.thompson_sample`.

    Args:
        posterior: As for :func:`~gpbridge.acquisition.draw_functions`: a posterior over
            weights, or a model, whose draws are in the caller's units already.
        num_outputs: The number m of outputs.
        generator: Source of the draw. Without one it is fresh.
        input_transform: A botorch transform, fitted, under which the network of a
            posterior over weights was trained.
        outcome_transform: Likewise, of the targets.
        batches: Training inputs ``b x d`` in the caller's units, for the batch-norm
            statistics of the draw.

    Raises:
        TypeError: If nothing can be drawn.
        ValueError: If the posterior is a model with transforms of its own, and others
            are passed.

    Warns:
        ReliabilityWarning: If batch norm has the statistics of other weights.

    Example:
        >>> import torch
        >>> from gpbridge.functional import FunctionalNet
        >>> from gpbridge.weights import GaussianWeights
        >>> net = FunctionalNet(torch.nn.Linear(2, 1))
        >>> weights = GaussianWeights(net, torch.zeros(3), variance=torch.ones(3))
        >>> ThompsonDraw(weights).posterior(torch.zeros(4, 2)).mean.shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        posterior: WeightPosterior | Model,
        num_outputs: int = 1,
        generator: Generator | None = None,
        *,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
        batches: Iterable[Tensor | Sequence[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        check_count(num_outputs=num_outputs)
        passed = input_transform is not None or outcome_transform is not None
        if isinstance(posterior, Model) and passed:
            raise ValueError(
                f"posterior is a {type(posterior).__name__}, whose draws are in the "
                "caller's units already. Leave out input_transform and "
                "outcome_transform."
            )
        self._num_outputs = num_outputs
        # Under upstream's names they would be applied twice.
        self.before = None if input_transform is None else input_transform.eval()
        self.after = None if outcome_transform is None else outcome_transform.eval()
        if batches is not None:
            batches = map(self._prepared, inputs_of(batches))
        if batches is None:
            self.draws = draw_functions(posterior, 1, generator)
        else:
            self.draws = refreshed(freeze(posterior, 1, generator), batches)

    @property
    def batch_shape(self) -> Size:
        """None: one function."""
        return Size()

    def forward(self, X: Tensor) -> Tensor:
        """The function, ``... x n x d`` to ``... x n x m``, in the caller's units."""
        Z = self._prepared(X)
        values = evaluate(self.draws, Z)[0]
        return values if self.after is None else self.after.untransform(values, X=Z)[0]

    def _prepared(self, X: Tensor) -> Tensor:
        return X if self.before is None else self.before(X)
