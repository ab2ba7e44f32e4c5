"""Every posterior over weights on the standard splits of six regression sets.

Protocol: the splits that come with the data (20, protein 5), standardised by the
training part; one hidden layer of 50 (protein 100), ReLU, heteroscedastic head; a tenth
of the training part is held out, and every choice is made on it by the log density of
the mixture: weight decay with the number of epochs (a heteroscedastic network that is
trained too long is certain of what it has memorised), dropout rate, scale of SWAG,
temperature of the subspace, of SGHMC and of variational inference. Nothing is refitted
after that, so that every method has seen the same nine tenths. Adam, 5e-3 falling to
1e-3, where it stays while snapshots are taken once per epoch. The linearised GP has a
network of the same size with one output and squared loss, and learns its noise by
evidence on all of the training part. Scores are of the test parts, in the units of the
data; log likelihoods are of the mixture in nats per point. Published rows are quoted,
not run.
Run with ``python benchmarks/quality_weight_space.py --data PATH [--sets boston ...]
[--splits 5]``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tabular_networks
import timing
import torch
from tabular_networks import LIKELIHOOD, HeteroscedasticMLP, Score, Splits
from torch import Tensor, nn

from gpbridge import LinearizedGP
from gpbridge.dnn import (
    SGHMC,
    SWAG,
    MCDropout,
    Subspace,
    fit_mean_field,
    train_replicas,
    tune_scale,
    tune_subspace,
)
from gpbridge.dnn.priors import GaussianPrior
from gpbridge.dnn.schedules import swa_factor, triangular_factor
from gpbridge.dnn.subspace_methods import EllipticalSliceSampling
from gpbridge.function_space import FunctionSpace
from gpbridge.functional import FunctionalNet
from gpbridge.likelihoods import log_prob
from gpbridge.predictive_mixture import predictive
from gpbridge.selection import fit_evidence
from gpbridge.types import FunctionDraws, Params
from gpbridge.weights import EmpiricalWeights, GaussianWeights, MixtureWeights

MEMBERS, DRAWS = 5, 60
DECAYS = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4)
RATES = (0.01, 0.05, 0.1)
TEMPERATURES = (1.0, 0.1, 0.01)  # of Markov chains and variational inference


class Setting(NamedTuple):
    """Size of a run, and the numbers of epochs to choose from."""

    epochs: int
    choices: tuple[int, ...]
    batch_size: int = 100
    splits: int = 20
    hidden: int = 50


SETTINGS = {
    "boston": Setting(400, (40, 100, 400), 32),
    "concrete": Setting(400, (40, 100, 400), 32),
    "energy": Setting(400, (40, 100, 400), 32),
    "naval": Setting(150, (40, 150)),
    "power": Setting(100, (30, 100)),
    "protein": Setting(40, (15, 40), splits=5, hidden=100),
}
PUBLISHED = {  # RMSE and log likelihood; std error for Gal, std for the other two
    "boston": ("2.97 ± .85, -2.46 ± .25", "2.90 ± .18, -2.40 ± .04", "3.28, -2.41"),
    "concrete": ("5.23 ± .53, -3.04 ± .09", "4.82 ± .16, -2.93 ± .02", "6.03, -3.06"),
    "energy": ("1.66 ± .19, -1.99 ± .09", ".54 ± .06, -1.21 ± .01", "2.09, -1.38"),
    "naval": (".01, 3.80 ± .05", ".00, 4.45 ± .00", ".00, 5.63"),
    "power": ("4.02 ± .18, -2.80 ± .01", "4.01 ± .04, -2.80 ± .01", "4.11, -2.79"),
    "protein": ("4.36 ± .04, -2.89 ± .01", "4.27 ± .02, -2.87 ± .00", "4.71, -2.83"),
}


class Parts(NamedTuple):
    """One split: fitted on, held out, and tested on."""

    X: Tensor
    Y: Tensor
    val_X: Tensor
    val_Y: Tensor
    test_X: Tensor
    test_Y: Tensor
    unit: Tensor


def held_out(splits: Splits) -> Parts:
    """Hold out a tenth of each training part, ``k x ...``."""
    n = splits.X.shape[1]
    inner = n // 10
    order = [
        torch.randperm(n, generator=torch.Generator().manual_seed(s))
        for s in range(len(splits.X))
    ]
    fit = torch.stack([rows[inner:] for rows in order])
    val = torch.stack([rows[:inner] for rows in order])
    each = torch.arange(len(fit))[:, None]
    return Parts(
        splits.X[each, fit],
        splits.Y[each, fit],
        splits.X[each, val],
        splits.Y[each, val],
        *splits[2:],
    )


def mean_loss(outputs: Tensor, Y: Tensor) -> Tensor:
    """Negative log likelihood per datum of each copy, ``k``."""
    return -log_prob(LIKELIHOOD, outputs, Y).mean(-1)


def square_loss(outputs: Tensor, Y: Tensor) -> Tensor:
    """Half the squared error per datum of each copy, ``k``."""
    return 0.5 * (outputs - Y).square().sum(-1).mean(-1)


def starts(build: Callable[[], nn.Module], count: int, seed: int) -> list[nn.Module]:
    """Networks as torch initialises them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [build().double() for _ in range(count)]


def fit_copies(
    networks: list[nn.Module],
    parts: Parts,
    setting: Setting,
    decay: Tensor,
    loss: Callable = mean_loss,
    callback: Callable | None = None,
    **options: object,
) -> tuple[FunctionalNet, Tensor, Tensor]:
    """Train copies of all splits, several of each; weights at the best and the end."""
    net = FunctionalNet(networks[0])
    rounds = len(networks) // len(parts.X)
    initial = [net.flatten(dict(n.named_parameters())).detach() for n in networks]
    last: dict[str, Tensor] = {}

    def each(epoch: int, state: Params, entry: Params) -> None:
        last["weights"] = torch.cat(
            [state[name].detach().flatten(1) for name in net.names], 1
        ).clone()
        if callback is not None:
            callback(epoch, state)

    options = {
        "epochs": setting.epochs,
        "schedule": swa_factor(int(0.7 * setting.epochs), 0.2),
        "learning_rate": 5e-3,
        **options,
    }
    fit = train_replicas(
        networks[0],
        torch.stack(initial),
        parts.X.repeat(rounds, 1, 1),
        parts.Y.repeat(rounds, 1, 1),
        loss,
        batch_size=setting.batch_size,
        weight_decay=decay,
        validation=(parts.val_X.repeat(rounds, 1, 1), parts.val_Y.repeat(rounds, 1, 1)),
        generator=torch.Generator().manual_seed(0),
        callback=each,
        **options,
    )
    return net, fit.weights, last["weights"]


def held_out_density(draws: FunctionDraws, parts: Parts) -> float:
    """Mean log density of the mixture on the held-out rows."""
    with torch.no_grad():
        outputs = draws(parts.val_X)
        density = predictive(LIKELIHOOD, outputs).log_prob(parts.val_Y).mean()
    return float(density) if density.isfinite() else -math.inf


def best(candidates: list[FunctionDraws], parts: Parts) -> FunctionDraws:
    """The draws that are best on the held-out rows."""
    return max(candidates, key=lambda draws: held_out_density(draws, parts))


def chosen_training(parts: Parts, setting: Setting) -> tuple[Tensor, Tensor]:
    """Epochs and weight decay of each split, ``k`` both, at the end of training."""
    k, d = len(parts.X), parts.X.shape[-1]
    candidates = list(itertools.product(setting.choices, DECAYS))
    decays = torch.tensor(DECAYS, dtype=torch.float64).repeat_interleave(k)
    scores = torch.empty(len(candidates), k)
    for i, epochs in enumerate(setting.choices):
        networks = starts(lambda: HeteroscedasticMLP(d, setting.hidden), k, 1)
        net, _, last = fit_copies(
            networks * len(DECAYS), parts, setting._replace(epochs=epochs), decays
        )
        for j, weights in enumerate(last.unflatten(0, (len(DECAYS), k))):
            for s in range(k):
                draws = EmpiricalWeights(net, weights[s, None]).draw()
                own = Parts(*(p[s] for p in parts))
                scores[i * len(DECAYS) + j, s] = held_out_density(draws, own)
    best_of = [candidates[int(i)] for i in scores.argmax(0)]
    epochs, decay = zip(*best_of, strict=True)
    return torch.tensor(epochs), torch.tensor(decay, dtype=torch.float64)


def dropout_draws(
    parts: Parts, setting: Setting, decay: Tensor
) -> list[list[FunctionDraws]]:
    """For each split, draws under each dropout rate."""
    k, d = len(parts.X), parts.X.shape[-1]
    found: list[list[FunctionDraws]] = [[] for _ in range(k)]
    for rate in RATES:
        networks = starts(lambda p=rate: HeteroscedasticMLP(d, setting.hidden, p), k, 2)
        net, _, last = fit_copies(networks, parts, setting, decay)
        for s in range(k):
            own = copy.deepcopy(networks[0])
            own.load_state_dict(net.unflatten(last[s]), strict=False)
            generator = torch.Generator().manual_seed(s)
            found[s].append(MCDropout(own).draw(DRAWS, generator))
    return found


def chain_draws(
    net: FunctionalNet, start: Tensor, parts: Parts, setting: Setting, decay: Tensor
) -> list[list[FunctionDraws]]:
    """For each split, draws of SGHMC at each temperature and rate, all splits at once.

    From the trained weights; a fifth of the run is left out. A chain that diverged is
    left out, too.
    """
    k, n = parts.X.shape[:2]
    forward = torch.func.vmap(net.apply_network)
    found: list[list[FunctionDraws]] = [[] for _ in range(k)]
    for temperature, rate in itertools.product(TEMPERATURES, (1e-3, 1e-4)):
        theta = start.clone().requires_grad_()
        generator = torch.Generator().manual_seed(0)
        sampler = SGHMC(
            [theta], rate, n, friction=0.1, temperature=temperature, generator=generator
        )
        steps = max(setting.choices) // 2 * -(-n // setting.batch_size)
        kept, every = [], max(steps * 4 // 5 // DRAWS, 1)
        for step in range(steps):
            rows = torch.randint(n, (setting.batch_size,), generator=generator)
            sampler.zero_grad()
            outputs = forward(net.unflatten(theta), parts.X[:, rows])
            penalty = 0.5 * decay * theta.square().sum(-1)
            (mean_loss(outputs, parts.Y[:, rows]) + penalty).sum().backward()
            sampler.step()
            if step >= steps // 5 and step % every == 0:
                kept.append(theta.detach().clone())
        for s, own in enumerate(torch.stack(kept, 1)):
            if own.isfinite().all():
                found[s].append(EmpiricalWeights(net, own).draw())
    return found


def mean_field_draws(
    network: nn.Module, parts: Parts, decay: Tensor, generator: torch.Generator
) -> list[FunctionDraws]:
    """Draws of a mean-field posterior at each temperature."""
    n = len(parts.X)
    batch = min(500, n)
    found = []
    for temperature in TEMPERATURES[:2]:
        vi = fit_mean_field(
            network,
            parts.X,
            parts.Y,
            LIKELIHOOD,
            epochs=max(1200 // -(-n // batch), 1),
            batch_size=batch,
            learning_rate=1e-2,
            prior=GaussianPrior(float(1 / (decay * n))),
            likelihood_temperature=temperature,
            generator=generator,
            progress=False,
        )
        found.append(vi.draw(DRAWS, generator))
    return found


def linearized_networks(parts: Parts, setting: Setting) -> list[nn.Module]:
    """Networks with one output and squared loss, stopped early, one per split."""
    k, d = len(parts.X), parts.X.shape[-1]

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(d, setting.hidden), nn.ReLU(), nn.Linear(setting.hidden, 1)
        )

    networks = starts(build, k, 3)
    decay = torch.full((k,), 1e-4, dtype=torch.float64)
    longest = setting._replace(epochs=max(setting.choices))
    net, weights, _ = fit_copies(networks, parts, longest, decay, square_loss)
    for network, own in zip(networks, weights, strict=True):
        network.load_state_dict(net.unflatten(own))
    return networks


def linearized_score(network: nn.Module, parts: Parts) -> Score:
    """LinearizedGP as it comes, conditioned on fitted and held-out rows."""
    X, Y = torch.cat([parts.X, parts.val_X]), torch.cat([parts.Y, parts.val_Y])
    model = LinearizedGP(network.eval(), X, Y)
    fit_evidence(model)
    with torch.no_grad():
        y = model.predict(parts.test_X)
    mean, variance = y.mean.reshape(-1, 1), y.variance.reshape(-1, 1)
    return tabular_networks.gaussian_score(
        mean, variance, parts.test_Y, parts.unit, None
    )


def linearised_score(posterior: GaussianWeights, parts: Parts) -> Score:
    """SWAG seen by the tangent kernel; the noise is that of the mean weights."""
    space, found = FunctionSpace(posterior, mode="linearized"), []
    with torch.no_grad():
        for X in parts.test_X.split(500):  # a joint covariance is not needed
            f = space(X)
            noise = LIKELIHOOD.moments(f.mean)[1]
            found.append((f.mean[:, :1], f.variance[:, :1] + noise))
    mean, variance = (torch.cat(column) for column in zip(*found, strict=True))
    return tabular_networks.gaussian_score(
        mean, variance, parts.test_Y, parts.unit, None
    )


def run(
    splits: Splits, setting: Setting, clock: Callable[[str], None]
) -> dict[str, list[Score]]:
    """All methods on all splits of one set."""
    parts = held_out(splits)
    epochs, decay = chosen_training(parts, setting)
    clock("epochs and weight decay")
    chosen = sorted(set(epochs.tolist()))
    print(
        f"epochs: { {e: int((epochs == e).sum()) for e in chosen} }; decay: "
        f"{ {d: int((decay == d).sum()) for d in sorted(set(decay.tolist()))} }",
        flush=True,
    )
    results: dict[str, list[Score]] = {}
    for number in chosen:
        rows = (epochs == number).nonzero().flatten()
        some = Parts(*(part[rows] for part in parts))
        own = setting._replace(epochs=number)
        for name, scores in run_some(some, own, decay[rows], clock).items():
            results.setdefault(name, []).extend(scores)
    return results


def run_some(
    parts: Parts, setting: Setting, decay: Tensor, clock: Callable[[str], None]
) -> dict[str, list[Score]]:
    """All methods on splits that are trained equally long."""
    k, d = len(parts.X), parts.X.shape[-1]

    def build() -> nn.Module:
        return HeteroscedasticMLP(d, setting.hidden)

    networks = starts(build, MEMBERS * k, 0)
    trackers = [SWAG(networks[0], rank=20) for _ in networks]

    def collect(epoch: int, state: Params) -> None:
        if epoch >= int(0.7 * setting.epochs):
            for r, tracker in enumerate(trackers):
                tracker.update({name: state[name][r] for name in state})

    net, stopped, last = fit_copies(
        networks, parts, setting, decay.repeat(MEMBERS), callback=collect
    )
    clock("ensemble with SWAG")
    members, stopped = (w.unflatten(0, (MEMBERS, k)) for w in (last, stopped))
    snapshots: list[Tensor] = []  # of a fast geometric ensemble

    def snapshot(epoch: int, state: Params) -> None:
        if epoch % 10 == 5:
            snapshots.append(
                torch.cat([state[n].detach().flatten(1) for n in net.names], 1).clone()
            )

    resumed = starts(build, k, 0)
    for network, own in zip(resumed, members[0], strict=True):
        network.load_state_dict(net.unflatten(own))
    fit_copies(
        resumed,
        parts,
        setting,
        decay,
        callback=snapshot,
        epochs=50,
        schedule=triangular_factor(10, 0.1),
    )
    clock("fast geometric ensemble")
    chains = chain_draws(net, members[0], parts, setting, decay)
    clock("SGHMC")
    dropped = dropout_draws(parts, setting, decay)
    clock("dropout")
    plain = linearized_networks(parts, setting)
    clock("networks to linearise")

    results: dict[str, list[Score]] = {}
    for s in range(k):
        own = Parts(*(part[s] for part in parts))
        n = len(own.X)
        generator = torch.Generator().manual_seed(s)
        held = own.val_X, own.val_Y
        scales = [
            tune_scale(trackers[m * k + s], *held, LIKELIHOOD, generator=generator)
            for m in range(MEMBERS)
        ]
        clock("scale of SWAG")
        tracker = trackers[s]
        subspace = tune_subspace(
            Subspace.pca(tracker, min(20, tracker.num_columns)),
            own.X,
            own.Y,
            *held,
            LIKELIHOOD,
            temperatures=(1.0, 10.0, 100.0, n / 20),
            prior_stds=(1.0,),
            method=EllipticalSliceSampling(num_samples=DRAWS // 2, num_chains=2),
            generator=generator,
            progress=False,
        )
        clock("subspace")
        network = build().double()
        network.load_state_dict(net.unflatten(members[0, s]))
        fields = mean_field_draws(network, own, decay[s], generator)
        clock("variational inference")
        draws = {
            "network": EmpiricalWeights(net, members[0, s, None]).draw(),
            "network, stopped early": EmpiricalWeights(net, stopped[0, s, None]).draw(),
            "SWA": EmpiricalWeights(net, tracker.mean[None]).draw(),
            "SWAG": scales[0].posterior.draw(DRAWS, generator),
            "MultiSWAG": MixtureWeights([f.posterior for f in scales]).draw(
                DRAWS, generator
            ),
            "subspace, ESS": subspace.best.posterior.draw(),
            "MC dropout": best(dropped[s], own),
            "fast geometric ensemble": EmpiricalWeights(
                net, torch.stack([w[s] for w in snapshots])
            ).draw(),
            "SGHMC": best(chains[s], own),
            "variational inference": best(fields, own),
            "deep ensemble": EmpiricalWeights(net, members[:, s]).draw(),
            "deep ensemble, stopped early": EmpiricalWeights(net, stopped[:, s]).draw(),
        }
        for name, function in draws.items():
            with torch.no_grad():
                outputs = function(own.test_X)
            found = tabular_networks.score(outputs, own.test_Y, own.unit)
            results.setdefault(name, []).append(found)
        if scales[0].scale > 0:
            found = linearised_score(scales[0].posterior, own)
        else:
            found = results["SWA"][-1]
        results.setdefault("SWAG, linearised", []).append(found)
        clock("scores")
        found = linearized_score(plain[s], own)
        results.setdefault("LinearizedGP", []).append(found)
        clock("LinearizedGP")
        print(f"split {s}: done", file=sys.stderr, flush=True)
    return results


def print_table(name: str, results: dict[str, list[Score]]) -> None:
    """Mean and standard error over splits."""
    for method, scores in results.items():
        table = torch.tensor(scores, dtype=torch.float64)
        error = (table.std(0) / math.sqrt(max(len(table), 1))).tolist()
        mean = table.mean(0).tolist()
        print(
            f"| {name} | {method} | {mean[0]:.4g} ± {error[0]:.2g} "
            f"| {mean[2]:.3f} ± {error[2]:.3f} | {mean[3]:.3f} |",
            flush=True,
        )
    kinds = "MC dropout 2016", "MC dropout, 4000 epochs", "deep ensemble 2017"
    for kind, quoted in zip(kinds, PUBLISHED[name], strict=True):
        rmse, log_likelihood = quoted.split(", ")
        print(f"| {name} | published {kind} | {rmse} | {log_likelihood} | |")


def main() -> None:
    """One table, set by set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--sets", nargs="+", choices=tuple(SETTINGS), default=SETTINGS)
    parser.add_argument("--splits", type=int, help="only the first of the splits")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two splits")
    arguments = parser.parse_args()
    timing.one_thread()
    if arguments.data is None:
        print("The sets need --data PATH with uci/<name>.npz.")
        return
    warnings.simplefilter("ignore")
    print("| set | method | RMSE | log likelihood | coverage of 95% |")
    print("|---|---|---|---|---|")
    for name in ["boston"] if arguments.smoke else arguments.sets:
        setting = SETTINGS[name]
        if arguments.smoke:
            setting = setting._replace(epochs=20, choices=(10, 20), splits=2)
        elif arguments.splits:
            setting = setting._replace(splits=arguments.splits)
        spent: dict[str, float] = {}
        last = time.process_time()

        def clock(part: str, spent: dict[str, float] = spent) -> None:
            nonlocal last
            now = time.process_time()
            spent[part], last = spent.get(part, 0.0) + now - last, now

        splits = tabular_networks.standard_splits(arguments.data, name, setting.splits)
        print_table(name, run(splits, setting, clock))
        print(f"CPU seconds: { ({k: round(v) for k, v in spent.items()}) }", flush=True)


if __name__ == "__main__":
    main()
