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
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timing
from image_networks import SHAPE, Row, load, logits, print_table, score
from image_posteriors import DRAWS, LIKELIHOOD, Effort, Functions, Study
from torch import nn

from gpbridge import metrics
from gpbridge.dnn import DeepEnsemble
from gpbridge.weights import EmpiricalWeights, MixtureWeights

MEMBERS = 5
SMOKE = Effort(
    sizes=(500, 100, 100),
    decays=(3e-3,),
    epochs=(2,),
    collecting=2,
    swag_rates=(0.01,),
    dropout_rates=(0.25,),
    temperatures=(1.0,),
    sampling=12,
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
    ensemble = DeepEnsemble(members, input_shape=SHAPE).draw()
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
