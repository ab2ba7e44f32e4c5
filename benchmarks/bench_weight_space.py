"""Posteriors over weights: collection, draws, ensembles, batch-norm statistics.

Four questions. What SWAG adds to a training loop of which it sees each epoch, both
measured within one run: the peer is that loop without it. Thirty draws of the weights
at ten points, against a Python loop over ``functional_call`` and over thirty modules.
Five members trained by ``fit_ensemble`` against five runs of ``fit_map`` from the same
weights with the same batches. Batch-norm statistics of thirty draws against thirty
passes of ``torch.optim.swa_utils.update_bn``.
Run with ``python benchmarks/bench_weight_space.py [--smoke]``.
"""

from __future__ import annotations

import argparse
import copy
import time

import problems
import timing
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.dnn import SWAG, fit_ensemble, fit_map
from gpbridge.functional import FunctionalNet
from gpbridge.weights import GaussianWeights

RANK = 20
DRAWS = 30


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: nn.Module,
    X: Tensor,
    Y: Tensor,
    generator: torch.Generator,
) -> None:
    """One pass of a usual training loop."""
    for rows in torch.randperm(len(X), generator=generator).split(100):
        optimizer.zero_grad()
        loss(network(X[rows]), Y[rows]).backward()
        optimizer.step()


def collection(kind: str, smoke: bool, repeats: int) -> tuple[timing.Row, str]:
    """SWAG once per epoch, and the bytes that it holds."""
    n = 200 if smoke else 5000
    if kind == "2x256 MLP":
        width = 16 if smoke else 256
        network = problems.mlp((8, width, width, 1), nn.ReLU)
        X, Y, *_ = problems.smooth_regression(n, 1)
        loss = nn.MSELoss()
    else:
        network, loss = problems.small_cnn(), nn.CrossEntropyLoss()
        X = torch.randn(n, 1, 8, 8, generator=seeded())
        Y = torch.randint(10, (n,), generator=seeded(1))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.9)
    tracker, generator = SWAG(network, rank=RANK), seeded(2)
    with_swag, without = [], []
    for count in range(-2, 3 * repeats):
        start = time.process_time()
        epoch(network, optimizer, loss, X, Y, generator)
        trained = time.process_time()
        tracker.update(network)
        end = time.process_time()
        if count >= 0:  # after a warm-up
            without.append(trained - start)
            with_swag.append(end - start)
    p = sum(q.numel() for q in network.parameters())
    held = sum(b.numel() * b.element_size() for b in tracker.buffers())
    row = timing.compare(
        f"SWAG, an epoch of a {kind}", "without SWAG", with_swag, without, 1 / 1.03
    )
    return row, (
        f"- {kind}, p = {p:,}: SWAG adds {100 * (1 / row.ratio - 1):.2f}% of time; its "
        f"buffers are {held / 4 / p:.3f} p numbers for K = {RANK}, and its copy of the "
        "network is one p more"
    )


def draws(smoke: bool, repeats: int) -> tuple[list[timing.Row], str]:
    """Thirty draws at ten points."""
    width, rounds = (8, 2) if smoke else (50, 40)
    network = problems.mlp((8, width, width, 1)).eval()
    net = FunctionalNet(network)
    mean = net.flatten(net.params).detach()
    posterior = GaussianWeights(net, mean, variance=0.01 * torch.ones_like(mean))
    functions = posterior.draw(DRAWS, seeded())
    X = torch.randn(10, 8, generator=seeded(1))
    each = [net.unflatten(weights) for weights in functions.weights]
    modules = [copy.deepcopy(network) for _ in each]
    for module, params in zip(modules, each, strict=True):
        module.load_state_dict(params)

    def ours() -> Tensor:
        return functions(X)

    def by_call() -> Tensor:
        return torch.stack([functional_call(network, p, (X,)) for p in each])

    def by_module() -> Tensor:
        return torch.stack([module(X) for module in modules])

    tasks = {"ours": ours, "functional_call": by_call, "modules": by_module}
    with torch.no_grad():
        error = max(float((ours() - f()).abs().max()) for f in (by_call, by_module))
        times = timing.interleave(
            {
                name: lambda task=task: [task() for _ in range(rounds)]
                for name, task in tasks.items()
            },
            repeats,
        )
    work = f"{DRAWS} draws, 10 points, {rounds} times"
    rows = [
        timing.compare(work, f"loop over {peer}", times["ours"], times[peer], target)
        for peer, target in (("functional_call", 4.0), ("modules", 4.0))
    ]
    return rows, f"- draws: largest difference {error:.1e}"


def ensemble(
    width: int, batch_size: int, smoke: bool, repeats: int
) -> tuple[timing.Row, str]:
    """Five members in one run and in five."""
    n, epochs, k = (40, 2, 5) if smoke else (400, 15, 5)
    X, Y, *_ = problems.smooth_regression(n, 1, torch.float64)
    initial = [
        problems.mlp((8, width, width, 1), seed=seed).double() for seed in range(k)
    ]
    options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "validation_rows": torch.arange(0, n, 10),
        "progress": False,
    }
    results: dict = {}

    def ours() -> None:
        results["ours"] = fit_ensemble(
            initial[0], X, Y, k, initial=initial, generator=seeded(), **options
        )

    def theirs() -> None:
        seeds = results["ours"].seeds
        results["theirs"] = [
            fit_map(module, X, Y, generator=seeded(seed), **options)
            for module, seed in zip(initial, seeds, strict=True)
        ]

    times = timing.interleave({"ours": ours, "theirs": theirs}, repeats)
    error = 0.0
    for name in ("train_loss", "validation_loss"):
        single = [fit.history[name] for fit in results["theirs"]]
        found = results["ours"].history[name].T - torch.tensor(
            single, dtype=torch.float64
        )
        error = max(error, float(found.abs().max()))
    work = f"5 MLPs of 2x{width}, batches of {batch_size}, float64"
    row = timing.compare(
        work, "five runs of fit_map", times["ours"], times["theirs"], 2.5
    )
    return row, f"- {work}: losses of all epochs differ by {error:.1e} at most"


def batch_norm(smoke: bool, repeats: int) -> tuple[timing.Row, str]:
    """Statistics of thirty draws."""
    n, width = (40, 8) if smoke else (2000, 50)
    network = nn.Sequential(
        *(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU()),
        *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
        nn.Linear(width, 1),
    )
    net = FunctionalNet(network)
    mean = net.flatten(net.params).detach()
    posterior = GaussianWeights(net, mean, variance=0.01 * torch.ones_like(mean))
    functions = posterior.draw(DRAWS, seeded())
    X = torch.randn(n, 8, generator=seeded(1))
    batches = X.split(n // 20)
    modules = [copy.deepcopy(network) for _ in range(DRAWS)]
    for module, weights in zip(modules, functions.weights, strict=True):
        module.load_state_dict(net.unflatten(weights), strict=False)
    passes = {"ours": 0, "theirs": 0}

    def loader(side: str):
        passes[side] += 1
        yield from batches

    def ours() -> None:
        passes["ours"] = 0
        refresh_batch_norm(functions, loader("ours"))

    def theirs() -> None:
        passes["theirs"] = 0
        for module in modules:
            torch.optim.swa_utils.update_bn(loader("theirs"), module)

    times = timing.interleave({"ours": ours, "theirs": theirs}, repeats)
    error = 0.0
    for name, values in functions.statistics.items():
        for value, module in zip(values, modules, strict=True):
            other = module.state_dict()[name]
            difference = (value - other).abs() / other.abs().clamp_min(1.0)
            error = max(error, float(difference.max()))
    work = f"batch norm of {DRAWS} draws, n={n}, 20 batches"
    row = timing.compare(work, "update_bn", times["ours"], times["theirs"])
    return row, (
        f"- {work}: {passes['ours']} data pass against {passes['theirs']}; statistics "
        f"differ by {error:.1e} at most, relative where above 1"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    timing.one_thread()
    smoke, repeats = arguments.smoke, 1 if arguments.smoke else arguments.repeats
    rows, notes = [], []
    for kind in ("2x256 MLP", "small CNN"):
        row, note = collection(kind, smoke, repeats)
        rows.append(row)
        notes.append(note)
    found, note = draws(smoke, repeats)
    rows += found
    notes.append(note)
    for width, batch_size in ((20, 32), (50, 32), (50, 100)):
        row, note = ensemble(width, batch_size, smoke, repeats)
        rows.append(row)
        notes.append(note)
    row, note = batch_norm(smoke, repeats)
    timing.print_rows("Posteriors over weights", [*rows, row], [*notes, note])


if __name__ == "__main__":
    main()
