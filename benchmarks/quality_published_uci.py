"""The published protocol of subspace inference on boston and concrete, repeated.

Protocol (Izmailov et al., Subspace inference for Bayesian deep learning, UAI 2019,
supplement, and its scripts): 20 random 90/10 splits, everything standardised by all
rows, one hidden layer of 50, heteroscedastic head, SGD with momentum 0.9 and a constant
rate of 1e-3; snapshots once per epoch in the last part of the run, rank 20, 30 draws of
SWAG at scale 1/2, 60 draws of elliptical slice sampling in the principal subspace at
the scripts' temperature and prior variance e. Log likelihoods are of the normal with
the mixture's moments, as published, in the units of the data; that of the mixture
itself stands beside. Published rows are quoted, not run; ``ours earlier`` are an
independent reproduction of the same protocol.
Run with ``python benchmarks/quality_published_uci.py --data PATH``, PATH a folder with
``uci/boston.npz`` and ``uci/concrete.npz``.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import tabular_networks
import timing
import torch
from tabular_networks import LIKELIHOOD, HeteroscedasticMLP, Score, Splits
from torch import Tensor

from gpbridge.dnn import SWAG, Subspace, sample_subspace, train_replicas
from gpbridge.dnn.subspace_methods import EllipticalSliceSampling
from gpbridge.function_space import FunctionSpace
from gpbridge.functional import FunctionalNet
from gpbridge.likelihoods import log_prob
from gpbridge.types import Params
from gpbridge.weights import EmpiricalWeights, WeightPosterior

MEMBERS = 5


class Setting(NamedTuple):
    """Of the published scripts."""

    epochs: int
    batch_size: int
    weight_decay: float
    start: int
    temperature: float


SETTINGS = {
    "boston": Setting(300, 30, 0.1, 200, 0.1),
    "concrete": Setting(1000, 100, 0.01, 500, 1e4),
}
PUBLISHED = {  # mean and std over splits of RMSE, log likelihood, coverage
    "boston": {
        "SGD": (3.504, 0.975, -2.752, 0.132, 0.986),
        "SWAG, scale 1/2": (3.517, 0.981, -2.761, 0.132, 0.986),
        "subspace, ESS": (3.453, 0.953, -2.719, 0.132, 0.985),
    },
    "concrete": {
        "SGD": (5.194, 0.446, -3.178, 0.198, 0.864),
        "SWAG, scale 1/2": (5.233, 0.417, -3.013, 0.086, 0.933),
        "subspace, ESS": (5.194, 0.448, -3.007, 0.086, 0.941),
    },
}
EARLIER = {
    "boston": {
        "SGD": (3.286, -2.706, 0.985),
        "SWA": (3.292, -2.715, 0.986),
        "SWAG, scale 1/2": (3.291, -2.715, 0.986),
        "SWAG, linearised": (3.292, -2.715, 0.986),
        "subspace, ESS": (3.272, -2.661, 0.984),
        "deep ensemble": (3.272, -2.705, 0.985),
    },
    "concrete": {
        "SGD": (5.059, -3.063, 0.871),
        "SWA": (5.120, -3.022, 0.897),
        "SWAG, scale 1/2": (5.169, -3.011, 0.941),
        "SWAG, linearised": (5.120, -2.998, 0.945),
        "subspace, ESS": (5.222, -3.020, 0.927),
        "deep ensemble": (4.885, -2.904, 0.916),
    },
}


def mean_loss(outputs: Tensor, Y: Tensor) -> Tensor:
    """Negative log likelihood per datum of each copy, ``k``."""
    return -log_prob(LIKELIHOOD, outputs, Y).mean(-1)


def train(
    splits: Splits, setting: Setting, seed: int
) -> tuple[FunctionalNet, Tensor, list[SWAG]]:
    """Weights ``members x k x p`` of all splits in one run, moments of the first."""
    k, d = len(splits.X), splits.X.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        starts = [HeteroscedasticMLP(d).double() for _ in range(MEMBERS * k)]
    net = FunctionalNet(starts[0])
    initial = torch.stack(
        [net.flatten(dict(start.named_parameters())).detach() for start in starts]
    )
    trackers = [SWAG(starts[0], rank=20) for _ in range(k)]

    def collect(epoch: int, state: Params, entry: Params) -> None:
        if epoch >= setting.start:
            for s, tracker in enumerate(trackers):
                tracker.update({name: state[name][s] for name in net.names})

    fit = train_replicas(
        starts[0],
        initial,
        splits.X.repeat(MEMBERS, 1, 1),
        splits.Y.repeat(MEMBERS, 1, 1),
        mean_loss,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        optimizer="sgd",
        learning_rate=1e-3,
        momentum=0.9,
        weight_decay=setting.weight_decay,
        generator=torch.Generator().manual_seed(seed),
        callback=collect,
    )
    return net, fit.weights.unflatten(0, (MEMBERS, k)), trackers


def linearised(posterior: WeightPosterior, X: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of y: epistemic by the tangent kernel, noise at the mean."""
    with torch.no_grad():
        f = FunctionSpace(posterior, mode="linearized")(X)
        _, noise = LIKELIHOOD.moments(f.mean)
        return f.mean[:, :1], f.variance[:, :1] + noise


def run(splits: Splits, setting: Setting, seed: int) -> dict[str, list[Score]]:
    """All methods on all splits."""
    net, weights, trackers = train(splits, setting, seed)
    results: dict[str, list[Score]] = {}
    for s, tracker in enumerate(trackers):
        X, Y, test_X, test_Y, unit = (part[s] for part in splits)
        generator = torch.Generator().manual_seed(s)
        chain = sample_subspace(
            Subspace.pca(tracker, 20),
            X,
            Y,
            LIKELIHOOD,
            method=EllipticalSliceSampling(num_samples=60, num_chains=1, burn_in=0),
            temperature=setting.temperature,
            prior_std=torch.e**0.5,
            generator=generator,
            progress=False,
        )
        swag = tracker.posterior(0.5)
        draws = {
            "SGD": EmpiricalWeights(net, weights[0, s, None]).draw(),
            "SWA": EmpiricalWeights(net, tracker.mean[None]).draw(),
            "SWAG, scale 1/2": swag.draw(30, generator),
            "subspace, ESS": chain.posterior.draw(),
            "deep ensemble": EmpiricalWeights(net, weights[:, s]).draw(),
        }
        with torch.no_grad():
            found = {
                name: tabular_networks.score(function(test_X), test_Y, unit)
                for name, function in draws.items()
            }
        found["SWAG, linearised"] = tabular_networks.gaussian_score(
            *linearised(swag, test_X), test_Y, unit, None
        )
        for name, value in found.items():
            results.setdefault(name, []).append(value)
    return results


def print_table(results: dict[str, dict[str, list[Score]]]) -> None:
    """Mean and standard deviation over splits, with what was published."""
    print(
        "\n| set | method | RMSE | log likelihood | of the mixture | coverage "
        "| published RMSE, LL, coverage | earlier RMSE, LL, coverage | LL - earlier |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, methods in results.items():
        for method, scores in methods.items():
            table = torch.tensor(scores, dtype=torch.float64)
            mean, std = table.mean(0).tolist(), table.std(0).tolist()
            quoted, earlier = PUBLISHED[name].get(method), EARLIER[name][method]
            shown = ""
            if quoted is not None:
                shown = f"{quoted[0]} ± {quoted[1]}, {quoted[2]} ± {quoted[3]}, "
                shown += f"{quoted[4]}"
            print(
                f"| {name} | {method} | {mean[0]:.3f} ± {std[0]:.3f} "
                f"| {mean[1]:.3f} ± {std[1]:.3f} | {mean[2]:.3f} ± {std[2]:.3f} "
                f"| {mean[3]:.3f} | {shown} | {', '.join(map(str, earlier))} "
                f"| {mean[1] - earlier[1]:+.3f} |"
            )


def main() -> None:
    """Run both sets and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two splits")
    arguments = parser.parse_args()
    timing.one_thread()
    if arguments.data is None:
        print("The sets need --data PATH with uci/boston.npz and uci/concrete.npz.")
        return
    results = {}
    for name, setting in SETTINGS.items():
        count = 2 if arguments.smoke else arguments.splits
        if arguments.smoke:
            setting = setting._replace(epochs=30, start=5)
        splits = tabular_networks.published_splits(arguments.data, name, count)
        clock = time.process_time()
        results[name] = run(splits, setting, arguments.seed)
        print(f"{name}: {time.process_time() - clock:.0f} CPU s", flush=True)
    print_table(results)


if __name__ == "__main__":
    main()
