"""The methods of the weight-space table on images, as a user would call them.

In: images, a seed, how much effort. Out: frozen functions of each method. Next:
``quality_weight_space_images`` chooses, measures and prints.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from image_networks import BATCH, SHAPE, Images, cnn, held_out_nll, logits, train
from torch import Generator, Tensor, nn

from gpbridge import LinearizedGP
from gpbridge.dnn import (
    SWAG,
    EllipticalSliceSampling,
    FastGeometricEnsemble,
    MCDropout,
    Subspace,
    fit_mean_field,
    sample_sgmcmc,
    tune_scale,
    tune_subspace,
)
from gpbridge.dnn.priors import GaussianPrior, WeightPrior
from gpbridge.dnn.scale_tuning import ScaleTuning
from gpbridge.dnn.schedules import cyclical_factor

LIKELIHOOD = SoftmaxLikelihood(num_classes=10, mixing_weights=False)
RATE = 0.05  # of SGD, at the start
DRAWS = 30
SCALES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
Functions = Callable[[Tensor], Tensor]


class Effort(NamedTuple):
    """Numbers of images and epochs, and the candidates of every choice."""

    sizes: tuple[int, int, int] = (10_000, 1_000, 5_000)
    decays: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    epochs: tuple[int, ...] = (8, 16)
    collecting: int = 10
    swag_rates: tuple[float, ...] = (0.01, 0.03)
    dropout_rates: tuple[float, ...] = (0.1, 0.3)
    temperatures: tuple[float, ...] = (1.0, 0.1, 0.01)
    sampling: int = 12
    subspace_temperatures: tuple[float, ...] = (10.0, 100.0, 1000.0)
    subspace_draws: int = 15


class Study:
    """The methods on one seed's data; each returns frozen functions."""

    def __init__(self, images: Images, seed: int, effort: Effort) -> None:
        self.images, self.seed, self.effort = images, seed, effort
        self.steps = -(-len(images.X) // BATCH)  # per epoch

    def generator(self) -> Generator:
        """A source that is the same for every method."""
        return Generator().manual_seed(self.seed)

    def network(
        self, member: int, decay: float, epochs: int, rate: float = 0.0
    ) -> nn.Module:
        """A network trained from scratch, with a rate that falls as half a cosine."""
        own = 100 * self.seed + member
        network, total = cnn(own, rate), epochs * self.steps
        optimizer = torch.optim.SGD(
            network.parameters(), lr=RATE, momentum=0.9, weight_decay=decay
        )
        factor = cyclical_factor(total)
        return train(network, self.images, optimizer, factor, epochs, own)

    def swag(self, start: nn.Module, rate: float, decay: float, member: int) -> SWAG:
        """Moments at a constant rate, two snapshots per epoch."""
        network = copy.deepcopy(start)
        tracker = SWAG(network, rank=20, input_shape=SHAPE)
        half = max(1, self.steps // 2)

        def after(step: int, network: nn.Module) -> None:
            if step % half == 0:
                tracker.update(network)

        optimizer = torch.optim.SGD(
            network.parameters(), lr=rate, momentum=0.9, weight_decay=decay
        )
        own = 100 * self.seed + 50 + member
        epochs = self.effort.collecting
        train(network, self.images, optimizer, lambda step: 1.0, epochs, own, after)
        return tracker

    def tuned(self, tracker: SWAG) -> ScaleTuning:
        """The posterior at its best scale, with the table."""
        val = self.images.val_X, self.images.val_y
        return tune_scale(tracker, *val, LIKELIHOOD, SCALES, generator=self.generator())

    def fast_ensemble(self, start: nn.Module, decay: float) -> Functions:
        """Snapshots at the bottoms of a triangular rate, every two epochs."""
        network = copy.deepcopy(start)
        tracker = FastGeometricEnsemble(
            network, cycle=2 * self.steps, low=0.1, input_shape=SHAPE
        )
        optimizer = torch.optim.SGD(
            network.parameters(), lr=RATE, momentum=0.9, weight_decay=decay
        )
        train(
            *(network, self.images, optimizer, tracker.factor),
            *(self.effort.collecting, self.seed),
            after=lambda step, network: tracker.update(network),
        )
        return tracker.posterior().draw()

    def dropout(self, rate: float, epochs: int, decay: float) -> Functions:
        """Masks of a network of its own."""
        network = self.network(0, decay, epochs, rate)
        return MCDropout(network, input_shape=SHAPE).draw(DRAWS, self.generator())

    def sghmc(
        self, start: nn.Module, decay: float, temperature: float, cyclical: bool
    ) -> Functions:
        """Samples of a chain: of its last three quarters, or of four cycles' ends."""
        data, n = self.images, len(self.images.X)
        total = self.effort.sampling * self.steps
        posterior = sample_sgmcmc(
            *(start, data.X, data.y, LIKELIHOOD),
            learning_rate=RATE if cyclical else RATE / 5,
            cyclical=cyclical,
            num_cycles=4 if cyclical else 1,
            steps_per_cycle=total // 4 if cyclical else total,
            samples_per_cycle=3 if cyclical else 12,
            sampling_fraction=0.25 if cyclical else 0.75,
            batch_size=BATCH,
            prior=prior_of(decay, n, temperature),
            likelihood_temperature=temperature,
            input_shape=SHAPE,
            generator=self.generator(),
            progress=False,
        )
        return posterior.draw()

    def mean_field(
        self, start: nn.Module, decay: float, temperature: float
    ) -> Functions:
        """Independent normals under the prior that the decay is."""
        n = len(self.images.X)
        vi = fit_mean_field(
            start,
            *(self.images.X, self.images.y, LIKELIHOOD),
            epochs=self.effort.sampling,
            learning_rate=5e-3,
            input_shape=SHAPE,
            generator=self.generator(),
            progress=False,
            prior=prior_of(decay, n, temperature),
            likelihood_temperature=temperature,
        )
        return vi.draw(DRAWS, self.generator())

    def subspace(self, tracker: SWAG) -> Functions:
        """Elliptical slice sampling in five principal directions."""
        data = self.images
        found = tune_subspace(
            Subspace.pca(tracker, min(5, tracker.num_columns - 1)),
            *(data.X, data.y, data.val_X, data.val_y, LIKELIHOOD),
            temperatures=self.effort.subspace_temperatures,
            prior_stds=(1.0,),
            method=EllipticalSliceSampling(
                num_samples=self.effort.subspace_draws, num_chains=2, burn_in=3
            ),
            batch_size=500,
            generator=self.generator(),
            progress=False,
        )
        print(f"  subspace: T {found.temperature:g}, {found.table.flatten().tolist()}")
        return found.best.posterior.draw()

    def last_layer(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Log probabilities of the calibrated tangent model of the last layer."""
        data = self.images
        model = LinearizedGP(
            *(network, data.X, data.y), parameters="last_layer", input_shape=SHAPE
        )
        model.calibrate(data.val_X, data.val_y)
        return lambda X: model.predict(X).probs.log().to(X)[None]

    def nll(self, functions: Functions) -> float:
        """On the held-out images."""
        return held_out_nll(logits(functions, self.images.val_X), self.images.val_y)


def prior_of(decay: float, num_data: int, temperature: float) -> WeightPrior:
    """The prior of which the decay is the precision per datum, at any temperature."""
    return WeightPrior(GaussianPrior(temperature / (decay * num_data)))
