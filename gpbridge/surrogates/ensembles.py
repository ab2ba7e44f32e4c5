r"""Deep ensembles and dropout as surrogates.

In: observations. Out: a :class:`~gpbridge.surrogates.WeightSpaceModel` of functions,
each trained on the data, over which acquisition functions average exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from botorch.models.model import Model
from torch import nn

from gpbridge.checks import check_count
from gpbridge.dnn.dropout import MCDropout
from gpbridge.dnn.ensemble_fit import fit_ensemble
from gpbridge.dnn.ensembles import DeepEnsemble
from gpbridge.surrogates.recipe import Experiments, Recipe, State
from gpbridge.surrogates.training import held_out_share, judged_noise, noise_of, train
from gpbridge.surrogates.weight_space import WeightSpaceModel


@dataclass(frozen=True, kw_only=True)
class EnsembleSurrogate(Recipe):
    r"""Networks trained from different random weights, equally likely.

    All train at once, see :func:`~gpbridge.dnn.fit_ensemble`; an update trains each
    further. Noise for predictions is the mean squared residual of the rows held out, or
    of all rows below 50.

    Args:
        num_members: Of the ensemble.
        **options: Of every :class:`~gpbridge.surrogates.recipe.Recipe`.
    """

    num_members: int = 5

    def _fit(self, experiments: Experiments) -> tuple[Model, list[State]]:
        initial = None
        if experiments.weights:
            initial = [
                experiments.build(experiments.Y.shape[-1]) for _ in experiments.weights
            ]
            for network, state in zip(initial, experiments.weights, strict=True):
                network.load_state_dict(state)
        fit = fit_ensemble(
            experiments.build(experiments.Y.shape[-1]),
            experiments.Z,
            experiments.targets,
            self.num_members if initial is None else len(initial),
            epochs=self._epochs(experiments),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            validation_fraction=held_out_share(len(experiments.Z)),
            initial=initial,
            generator=experiments.generator,
            progress=self.progress,
        )
        variances = fit.residual_variances
        if len(fit.validation_rows):
            variances = fit.validation_variances
        model = WeightSpaceModel(
            DeepEnsemble(fit),
            experiments.X,
            experiments.Y,
            num_samples=len(fit),
            likelihood=noise_of(variances.mean(0)),
            input_transform=experiments.input_transform,
            outcome_transform=experiments.outcome_transform(),
        )
        return model, [network.state_dict() for network in fit.networks]


@dataclass(frozen=True, kw_only=True)
class DropoutSurrogate(Recipe):
    r"""A network trained with dropout, whose masks are its posterior.

    See :class:`~gpbridge.dnn.MCDropout`. A network without dropout layers is given one
    before every linear layer but the first.

    Args:
        rate: Of the dropout that is added.
        num_samples: Sets of masks.
        **options: Of every :class:`~gpbridge.surrogates.recipe.Recipe`.
    """

    rate: float = 0.1
    num_samples: int = 64

    def _fit(self, experiments: Experiments) -> tuple[Model, list[State]]:
        check_count(num_samples=self.num_samples)
        network = with_dropout(experiments.build(experiments.Y.shape[-1]), self.rate)
        if experiments.weights:
            network.load_state_dict(experiments.weights[0])
        fit = train(self, experiments, network=network)
        model = WeightSpaceModel(
            MCDropout(fit.network),
            experiments.X,
            experiments.Y,
            num_samples=self.num_samples,
            likelihood=judged_noise(fit),
            input_transform=experiments.input_transform,
            outcome_transform=experiments.outcome_transform(),
            generator=experiments.generator,
        )
        return model, [fit.network.state_dict()]


def with_dropout(network: nn.Module, rate: float) -> nn.Module:
    """A network with dropout before every linear layer but the first.

    Args:
        network: With dropout layers of its own, which comes back as it is, or a
            ``torch.nn.Sequential``, whose layers are shared.
        rate: The share of units that is dropped.

    Returns:
        The network.

    Raises:
        TypeError: If it is neither.
        ValueError: If the rate is not between 0 and 1.
    """
    if any(isinstance(layer, nn.Dropout) for layer in network.modules()):
        return network
    if not isinstance(network, nn.Sequential):
        raise TypeError(
            "network must have dropout layers, or be a torch.nn.Sequential into which "
            f"they can be put, but is a {type(network).__name__} without any."
        )
    if not 0 < rate < 1:
        raise ValueError(f"rate must be between 0 and 1, but is {rate}.")
    layers: list[nn.Module] = []
    for layer in network:
        if isinstance(layer, nn.Linear) and layers:
            layers.append(nn.Dropout(rate))
        layers.append(layer)
    return nn.Sequential(*layers)
