"""Kronecker and diagonal posteriors: fit, predictive and memory against the peer's.

Networks: the digits MLP 64-64-64-10 (ReLU, p = 8970) on 1297 digits, an MLP
784-100-100-10 (p = 89,610) and a LeNet (p = 61,706) on 2,000 images of MNIST; float32,
prior precision 1, the plain diagonal probit link on both sides, because it is the
peer's default. Fit is construction and the curvature; predictive is the averaged
probabilities of 500 digits or 200 images, in batches of 100 where the peer needs them.
Run with ``python benchmarks/bench_structures.py --data PATH [--smoke]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peers
import problems
import timing
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gpbridge import LinearizedGP
from gpbridge.data import load_images
from gpbridge.linearized import Diagonal, Kronecker

BATCH = 100
STRUCTURES = {"kron": Kronecker(), "diag": Diagonal()}
BACKENDS = {"default backend": False, "BackPACK": True}
LIMIT = 12 * 2**30


class Work(NamedTuple):
    """A trained network with data; images are flat to us, whole to the peer."""

    network: nn.Module
    X: Tensor
    y: Tensor
    test: Tensor
    image: tuple[int, ...] | None


def digits_mlp(path: Path, smoke: bool) -> Work:
    X, y = load_digits(return_X_y=True)
    X, y = torch.tensor(X, dtype=torch.float32) / 16, torch.tensor(y)
    X, y = X[order(len(X))], y[order(len(X))]
    layers = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    network = seeded(lambda: nn.Sequential(*layers, nn.Linear(64, 10)))
    n, t = (60, 20) if smoke else (1297, 500)
    return trained(Work(network, X[:n], y[:n], X[n : n + t], None))


def mnist_mlp(path: Path, smoke: bool) -> Work:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(),
            nn.Linear(100, 10),
        )  # fmt: skip

    X, y, test = mnist(path, smoke)
    return trained(Work(seeded(build), X, y, test, None))


def lenet(path: Path, smoke: bool) -> Work:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, 10),
        )  # fmt: skip

    X, y, test = mnist(path, smoke)
    return trained(Work(seeded(build), X, y, test, (1, 28, 28)))


WORKS: dict[str, Callable[[Path, bool], Work]] = {
    "digits MLP": digits_mlp,
    "MNIST MLP": mnist_mlp,
    "MNIST LeNet": lenet,
}


def mnist(path: Path, smoke: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised flat images, labels, flat test images."""
    n, t = (60, 20) if smoke else (2000, 200)
    X, y, test, _ = load_images(path / "images", "mnist", num_train=n, num_test=t)
    center, scale = X.mean(), X.std()
    return ((X - center) / scale).flatten(1), y, ((test - center) / scale).flatten(1)


def order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def trained(work: Work) -> Work:
    shaped = work.X if work.image is None else work.X.unflatten(-1, work.image)
    problems.train(work.network, shaped, work.y, nn.CrossEntropyLoss(), 20)
    return work


def our_fit(work: Work, structure: str) -> LinearizedGP:
    """Construction and the curvature."""
    model = LinearizedGP(
        work.network,
        work.X,
        work.y,
        inference=STRUCTURES[structure],
        input_shape=work.image,
    )
    with torch.no_grad():
        _ = model.problem.curvature
    return model


def our_predict(model: LinearizedGP, X: Tensor) -> Tensor:
    with torch.no_grad():
        return model.predict(X, link="probit").probs


def peer_fit(work: Work, structure: str, backpack: bool) -> object:
    fitted = peers.parametric(work.network, "classification", structure, backpack)
    fitted.fit(peers.loader(peer_inputs(work, work.X), work.y))
    return fitted


def peer_inputs(work: Work, X: Tensor) -> Tensor:
    return X if work.image is None else X.unflatten(-1, work.image)


def peer_predict(fitted: object, work: Work) -> Tensor:
    batches = peer_inputs(work, work.test).split(BATCH)
    options = {"pred_type": "glm", "link_approx": "probit"}
    return torch.cat([peers.predict(fitted, x, **options).detach() for x in batches])


def times(
    name: str, path: Path, smoke: bool, repeats: int, backends: list[str]
) -> None:
    """Fit and predictive of every structure, all sides interleaved."""
    work = WORKS[name](path, smoke)
    rows = []
    for structure in STRUCTURES:
        fits = {"ours": lambda s=structure: our_fit(work, s)}
        model, fitted = our_fit(work, structure), {}
        our_predict(model, work.test[:2])  # which also measures the training gap once
        predicts = {"ours": lambda m=model: our_predict(m, work.test)}
        for backend in backends:
            backpack = BACKENDS[backend]
            fits[backend] = lambda s=structure, b=backpack: peer_fit(work, s, b)
            fitted[backend] = peer_fit(work, structure, backpack)
            predicts[backend] = lambda f=fitted[backend]: peer_predict(f, work)
        fit, predict = (timing.interleave(t, repeats) for t in (fits, predicts))
        for backend in backends:
            default = backend == "default backend"
            aim = 20 if name == "digits MLP" and structure == "kron" else 5
            for task, measured, target in (
                ("fit", fit, 1 / 1.2),
                ("predictive", predict, aim if default else 1.0),
            ):
                row = f"{structure}, {task}"
                ours, theirs = measured["ours"], measured[backend]
                rows.append(timing.compare(row, backend, ours, theirs, target))
    n, t = len(work.X), len(work.test)
    timing.print_rows(f"{name}, n={n}, {t} test points", rows)


def prior_updates(path: Path, smoke: bool, repeats: int) -> None:
    """100 new prior variances after one factorisation, against one for each."""
    problem = our_fit(WORKS["MNIST LeNet"](path, smoke), "kron").problem
    root, steps = problem.outputs.new_ones(1), 100
    factors = []  # up to a scale: eigenvalues of a block are products of both sides'
    curvature = problem.curvature
    for basis, values in zip(curvature.bases, curvature.eigenvalues, strict=True):
        for Q, side in zip(basis, (values[0].sum(1), values[0].sum(0)), strict=True):
            factors += [] if Q is None else [(Q * side.to(Q)) @ Q.mT]

    def update() -> None:
        variance = root.clone().requires_grad_()
        curvature = problem.curvature
        torch.autograd.grad(curvature.logdet(variance, root), variance)
        curvature.effective_dimension(variance.detach(), root)

    def shifted() -> None:
        for _ in range(steps):
            update()

    def refactorised() -> None:
        # The part that a prior would change is the eigendecomposition.
        for factor in factors:
            torch.linalg.eigh(factor)
        update()

    measured = timing.interleave({"ours": shifted, "new": refactorised}, repeats)
    work, peer = f"kron, {steps} prior variances", "an eigendecomposition for each"
    row = timing.compare(work, peer, measured["ours"], measured["new"], scale=steps)
    timing.print_rows("Prior updates, MNIST LeNet, p=61,706", [row])


def our_whole(name: str, path: Path, smoke: bool) -> None:
    """Predict after a fit, for the memory."""
    work = WORKS[name](path, smoke)
    our_predict(our_fit(work, "kron"), work.test)


def peer_whole(name: str, path: Path, smoke: bool) -> None:
    """The same, default backend, all test points at once, as a user would."""
    work = WORKS[name](path, smoke)
    fitted = peer_fit(work, "kron", False)
    peers.predict(fitted, peer_inputs(work, work.test), link_approx="probit")


def nothing(name: str, path: Path, smoke: bool) -> None:
    """Data and training alone: what both sides start from."""
    WORKS[name](path, smoke)


def memory(path: Path, smoke: bool) -> None:
    """Peaks of the digits MLP, beyond those of training the network."""
    name = "digits MLP"
    base = timing.peak_memory(nothing, name, path, smoke)
    ours = timing.peak_memory(our_whole, name, path, smoke)
    theirs = timing.peak_memory(peer_whole, name, path, smoke, limit=LIMIT)

    def beyond(side: timing.Memory) -> timing.Memory:
        return side._replace(peak=max(side.peak - base.peak, 2**20))

    row = timing.compare_memory(
        "kron, fit and predictive", "default backend", beyond(ours), beyond(theirs), 10
    )
    timing.print_rows("Memory beyond training, digits MLP", [row])


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    arguments = parser.parse_args()
    peers.require_laplace()
    timing.one_thread()
    repeats = 1 if arguments.smoke else arguments.repeats
    for name in arguments.works:
        times(name, arguments.data, arguments.smoke, repeats, arguments.backends)
    prior_updates(arguments.data, arguments.smoke, repeats)
    memory(arguments.data, arguments.smoke)


if __name__ == "__main__":
    main()
