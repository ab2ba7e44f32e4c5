"""Every posterior over weights on Fashion-MNIST, with MNIST as other data.

A small CNN without batch norm (p = 20,522) trains on 10,000 images by SGD with
momentum. 1,000 held-out images make every choice: those that need runs of their own
(decay and epochs of the network, rate of SWAG, of dropout, temperature of the samplers
and of variational inference) on the first seed, the cheap ones (temperature of the
softmax, scale of SWAG, temperature of the subspace, calibration) on each. The first
5,000 test images are seen once. Doubt is one minus the largest probability, the entropy
of the prediction, or the mutual information of label and draw, as a score of MNIST
against Fashion-MNIST. CPU seconds have the training of all networks that a method
starts from, without the choices of the first seed; prediction is of 10,000 images.

Run with ``python benchmarks/quality_weight_space_images.py --data PATH``, PATH a folder
with ``images/fashion_mnist.npz`` and ``images/mnist.npz``.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timing
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from image_networks import (
    BATCH,
    SHAPE,
    Images,
    Row,
    cnn,
    held_out_nll,
    load,
    logits,
    print_table,
    score,
    train,
)
from torch import Generator, Tensor, nn

from gpbridge import LinearizedGP, metrics
from gpbridge.dnn import (
    SGHMC,
    SWAG,
    EllipticalSliceSampling,
    MCDropout,
    Subspace,
    fit_mean_field,
    tune_scale,
    tune_subspace,
)
from gpbridge.dnn.priors import GaussianPrior
from gpbridge.dnn.schedules import cyclical_factor, triangular_factor
from gpbridge.functional import FunctionalNet
from gpbridge.weights import EmpiricalWeights, MixtureWeights

LIKELIHOOD = SoftmaxLikelihood(num_classes=10, mixing_weights=False)
RATE = 0.05  # of SGD, at the start
MEMBERS, DRAWS = 5, 30
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


SMOKE = Effort(
    sizes=(500, 100, 100),
    decays=(3e-3,),
    epochs=(2,),
    collecting=2,
    swag_rates=(0.01,),
    dropout_rates=(0.25,),
    temperatures=(1.0,),
    sampling=4,
    subspace_temperatures=(100.0,),
    subspace_draws=3,
)


class Choices(NamedTuple):
    """What the held-out images of the first seed decided."""

    decay: float
    epochs: int
    swag_rate: float
    dropout_rate: float
    dropout_epochs: int
    sghmc: float
    cyclical: float
    mean_field: float


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

    def tuned(self, tracker: SWAG):
        """The posterior at its best scale, with the table."""
        val = self.images.val_X, self.images.val_y
        return tune_scale(tracker, *val, LIKELIHOOD, SCALES, generator=self.generator())

    def fast_ensemble(self, start: nn.Module, decay: float) -> Functions:
        """Snapshots at the bottoms of a triangular rate, every two epochs."""
        cycle, found = 2 * self.steps, []
        network = copy.deepcopy(start)
        net = FunctionalNet(network, input_shape=SHAPE)

        def after(step: int, network: nn.Module) -> None:
            if step % cycle == cycle // 2:
                found.append(weights_of(net, network))

        optimizer = torch.optim.SGD(
            network.parameters(), lr=RATE, momentum=0.9, weight_decay=decay
        )
        epochs = max(2, self.effort.collecting)
        factor = triangular_factor(cycle, 0.1)
        train(network, self.images, optimizer, factor, epochs, self.seed, after)
        return EmpiricalWeights(net, torch.stack(found)).draw()

    def dropout(self, rate: float, epochs: int, decay: float) -> Functions:
        """Masks of a network of its own."""
        network = self.network(0, decay, epochs, rate)
        return MCDropout(network, input_shape=SHAPE).draw(DRAWS, self.generator())

    def sghmc(
        self, start: nn.Module, decay: float, temperature: float, cyclical: bool
    ) -> Functions:
        """Snapshots of a chain: all along, or at the ends of four cycles."""
        network, n = copy.deepcopy(start), len(self.images.X)
        net, found = FunctionalNet(network, input_shape=SHAPE), []
        epochs = self.effort.sampling
        total = epochs * self.steps
        cycle = total // 4
        optimizer = SGHMC(
            network.parameters(),
            lr=RATE if cyclical else RATE / 5,
            num_data=n,
            alpha=0.1,
            temperature=temperature,
            # The decay is the precision per datum, of a posterior at temperature one.
            prior_precision=decay * n,
            noise=not cyclical,
            generator=self.generator(),
        )

        def after(step: int, network: nn.Module) -> None:
            place = (step - 1) % cycle + 1
            if cyclical:
                optimizer.param_groups[0]["noise"] = place % cycle >= 0.75 * cycle
                keep = place in {round(cycle * q) for q in (0.9, 0.95, 1.0)}
            else:
                keep = step > total // 4 and step % max(1, total // 32) == 0
            if keep:
                found.append(weights_of(net, network))

        factor = cyclical_factor(cycle) if cyclical else lambda step: 1.0
        train(network, self.images, optimizer, factor, epochs, self.seed, after)
        return EmpiricalWeights(net, torch.stack(found)).draw()

    def mean_field(
        self, start: nn.Module, decay: float, temperature: float
    ) -> Functions:
        """Independent normals under the prior that the decay is."""
        n = len(self.images.X)
        vi = fit_mean_field(
            start,
            *(self.images.X, self.images.y, LIKELIHOOD),
            epochs=self.effort.sampling,
            learning_rate=2e-3,
            input_shape=SHAPE,
            generator=self.generator(),
            progress=False,
            prior=GaussianPrior(temperature / (decay * n)),
            likelihood_temperature=temperature,
            initial_std=0.01,
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


def weights_of(net: FunctionalNet, network: nn.Module) -> Tensor:
    """A flat copy of the present weights."""
    return net.flatten(dict(network.named_parameters())).detach().clone()


def of_network(network: nn.Module) -> Functions:
    """A single function."""
    return lambda X: network(X.unflatten(-1, SHAPE))[None]


def best(name: str, scored: dict) -> object:
    """The candidate of the lowest held-out NLL."""
    chosen = min(scored, key=scored.get)
    shown = ", ".join(f"{key}: {value:.4f}" for key, value in scored.items())
    print(f"  {name}: {chosen} of {shown}", flush=True)
    return chosen


def choose(study: Study) -> Choices:
    """Runs with every candidate, on the data of the first seed."""
    effort = study.effort
    networks = {
        (decay, epochs): study.network(0, decay, epochs)
        for decay in effort.decays
        for epochs in effort.epochs
    }
    decay, epochs = best(
        "decay, epochs",
        {key: study.nll(of_network(value)) for key, value in networks.items()},
    )
    start = networks[decay, epochs]
    rates = {
        rate: -float(study.tuned(study.swag(start, rate, decay, 0)).scores.max())
        for rate in effort.swag_rates
    }
    # Dropout regularises too: it may train for longer.
    dropped = {
        (rate, times * epochs): study.nll(study.dropout(rate, times * epochs, decay))
        for rate in effort.dropout_rates
        for times in (1, 2)
    }
    cold = {
        cyclical: {
            t: study.nll(study.sghmc(start, decay, t, cyclical))
            for t in effort.temperatures
        }
        for cyclical in (False, True)
    }
    variational = {
        t: study.nll(study.mean_field(start, decay, t)) for t in effort.temperatures
    }
    return Choices(
        decay,
        epochs,
        best("rate of SWAG", rates),
        *best("dropout, epochs", dropped),
        best("T of SGHMC", cold[False]),
        best("T of cyclical SGHMC", cold[True]),
        best("T of mean field", variational),
    )


def run(study: Study, given: Choices) -> dict[str, tuple[Row, float, float]]:
    """Every method, with CPU seconds before and during prediction."""
    images, decay = study.images, given.decay
    result: dict[str, tuple[Row, float, float]] = {}
    clock = time.process_time()

    def lap() -> float:
        nonlocal clock
        spent, clock = time.process_time() - clock, time.process_time()
        return spent

    def keep(name: str, functions: Functions, seconds: float) -> None:
        lap()
        parts = [logits(functions, X) for X in (images.test_X, images.other_X)]
        took = lap()
        row = score(*parts, LIKELIHOOD, images)
        result[name] = row, seconds, took
        shown = ", ".join(f"{value:.4f}" for value in row)
        print(f"  {name}: {shown} ({seconds:.0f} and {took:.0f} s)", flush=True)
        lap()

    members, spent = [], []
    for member in range(MEMBERS):
        members.append(study.network(member, decay, given.epochs))
        spent.append(lap())
    start, base = members[0], spent[0]
    keep("MAP", of_network(start), base)
    log_probs = logits(of_network(start), images.val_X)[0].log_softmax(-1)
    temperature = metrics.fit_temperature(log_probs, images.val_y, bounds=(0.5, 10.0))
    cooled = of_network(start)
    keep("MAP + temperature", lambda X: cooled(X) / temperature, base + lap())
    net = FunctionalNet(start, input_shape=SHAPE)
    weights = torch.stack([weights_of(net, each) for each in members])
    ensemble = EmpiricalWeights(net, weights).draw()
    keep("deep ensemble (5)", ensemble, sum(spent))

    trackers, tuned, more = [], [], []
    for member, network in enumerate(members):
        trackers.append(study.swag(network, given.swag_rate, decay, member))
        tuned.append(study.tuned(trackers[-1]))
        more.append(lap())
    print("  scales:", [each.scale for each in tuned])
    mean = EmpiricalWeights(trackers[0].net, trackers[0].mean[None]).draw()
    keep("SWA", mean, base + more[0])
    posteriors = [each.posterior for each in tuned]
    draws = posteriors[0].draw(DRAWS, study.generator())
    keep("SWAG, tuned scale", draws, base + more[0])
    draws = MixtureWeights(posteriors).draw(DRAWS, study.generator())
    keep("MultiSWAG (5)", draws, sum(spent) + sum(more))

    later: dict[str, tuple[Callable[[], Functions], float]] = {
        "fast geometric ensemble (5)": (
            lambda: study.fast_ensemble(start, decay),
            base,
        ),
        "MC dropout": (
            lambda: study.dropout(given.dropout_rate, given.dropout_epochs, decay),
            0.0,
        ),
        "subspace PCA + ESS": (lambda: study.subspace(trackers[0]), base + more[0]),
        "SGHMC": (lambda: study.sghmc(start, decay, given.sghmc, False), base),
        "cyclical SGHMC": (
            lambda: study.sghmc(start, decay, given.cyclical, True),
            base,
        ),
        "mean-field VI": (
            lambda: study.mean_field(start, decay, given.mean_field),
            base,
        ),
        "LinearizedGP, last layer": (lambda: study.last_layer(start), base),
    }
    for name, (make, before) in later.items():
        lap()
        functions = make()
        keep(name, functions, before + lap())
    return result


def main() -> None:
    """Choose on the first seed, run all, print a table after every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one seed")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("it needs --data PATH with images/<name>.npz")
    timing.one_thread()
    effort, seeds = Effort(), arguments.seeds
    if arguments.smoke:
        effort, seeds = SMOKE, 1
    results, choices = [], None
    for seed in range(seeds):
        images = load(Path(arguments.data) / "images", seed, effort.sizes)
        study = Study(images, seed, effort)
        if choices is None:
            begin = time.process_time()
            choices = choose(study)
            print(f"{choices} ({time.process_time() - begin:.0f} s)", flush=True)
        results.append(run(study, choices))
        print_table(results)


if __name__ == "__main__":
    main()
