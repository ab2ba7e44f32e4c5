"""Exact linearised posterior: fit, repeated prediction and memory against the peer.

MLP 8-50-50-1 (p = 3051) in float32, n = 1000, 1000 test points, prior variance 1 per
weight and the same noise on both sides. Both fill caches at the first prediction, so a
fit is timed with the prediction of one point; the peer's fit is listed without it, too,
against ours with it. Run with ``python benchmarks/bench_posterior.py [--smoke]``.
"""

from __future__ import annotations

import argparse

import peers
import problems
import timing
import torch
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor, nn

from gpbridge import LinearizedGP

NOISE_VARIANCE = 0.04
WIDTHS = (8, 50, 50, 1)
CHUNK = 5000


def problem(num_train: int, num_test: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A trained network, its data and test inputs."""
    X, Y, X_test, _ = problems.smooth_regression(num_train, num_test)
    network = problems.train(problems.mlp(WIDTHS), X, Y, nn.MSELoss())
    return network, X, Y, X_test


def our_fit(network: nn.Module, X: Tensor, Y: Tensor) -> LinearizedGP:
    """Construction and the caches of the training side."""
    likelihood = GaussianLikelihood()
    likelihood.noise = NOISE_VARIANCE
    model = LinearizedGP(network, X, Y, likelihood)
    our_variance(model, X[:1])
    return model


def our_variance(model: LinearizedGP, X: Tensor) -> Tensor:
    """Marginal variances of the latent function."""
    with torch.no_grad():
        return model.predict(X).variance.reshape(-1) - model.noise_variance


def peer_fit(kind: str, network: nn.Module, X: Tensor, Y: Tensor) -> object:
    """One of the peer's three forms, fitted."""
    if kind == "FunctionalLaplace":
        fitted = peers.functional(network, len(X), NOISE_VARIANCE)
    else:
        backpack = kind == "full, BackPACK"
        fitted = peers.parametric(
            network, "regression", "full", backpack, NOISE_VARIANCE
        )
    fitted.fit(peers.loader(X, Y))
    return fitted


def peer_variance(kind: str, fitted: object, X: Tensor) -> Tensor:
    """Marginal variances of the latent function."""
    options = {"pred_type": "gp"} if kind == "FunctionalLaplace" else {}
    return peers.predict(fitted, X, **options)[1].reshape(-1).detach()


def dense_variance(network: nn.Module, X: Tensor, X_test: Tensor) -> Tensor:
    """The answer in float64 by one backward pass per point, in weight space."""
    J, J_test = (_jacobian(network, inputs) for inputs in (X, X_test))
    precision = J.T @ J / NOISE_VARIANCE + torch.eye(J.shape[1], dtype=J.dtype)
    root = torch.linalg.solve_triangular(
        torch.linalg.cholesky(precision), J_test.T, upper=False
    )
    return root.square().sum(0)


def _jacobian(network: nn.Module, X: Tensor) -> Tensor:
    params = {name: p.detach().double() for name, p in network.named_parameters()}

    def output(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(network, params, (x,)).squeeze()

    blocks = torch.func.vmap(torch.func.jacrev(output), (None, 0))(params, X.double())
    return torch.cat([block.flatten(1) for block in blocks.values()], -1)


def times(num_train: int, num_test: int, repeats: int) -> None:
    """Rows 1 and 2: time of fit and of repeated prediction, and the accuracy."""
    network, X, Y, X_test = problem(num_train, num_test)
    model = our_fit(network, X, Y)
    kinds = {
        "full, default backend": (50, 50),
        "full, BackPACK": (5, 50),
        "FunctionalLaplace": (2.5, 3),
    }
    fitted = {}

    def fit_peer(kind: str) -> None:
        fitted[kind] = peer_fit(kind, network, X, Y)

    def ask_peer(kind: str) -> None:
        fit_peer(kind)
        peer_variance(kind, fitted[kind], X[:1])

    fit = timing.interleave(
        {"ours": lambda: our_fit(network, X, Y)}
        | {kind: lambda kind=kind: fit_peer(kind) for kind in kinds},
        repeats,
    )
    ask = timing.interleave(
        {"ours": lambda: our_fit(network, X, Y)}
        | {kind: lambda kind=kind: ask_peer(kind) for kind in kinds},
        repeats,
    )
    predict = timing.interleave(
        {"ours": lambda: our_variance(model, X_test)}
        | {
            kind: lambda kind=kind: peer_variance(kind, fitted[kind], X_test)
            for kind in kinds
        },
        repeats,
    )
    rows = []
    for kind, (fit_target, predict_target) in kinds.items():
        for work, measured, target in (
            (f"fit and first prediction, n={num_train}", ask, fit_target),
            (f"the same against the peer's fit alone, n={num_train}", fit, fit_target),
            (f"repeated predict of {num_test} points", predict, predict_target),
        ):
            rows.append(
                timing.compare(work, kind, measured["ours"], measured[kind], target)
            )
    exact = dense_variance(network, X, X_test)
    error = {"ours": our_variance(model, X_test)}
    error |= {kind: peer_variance(kind, fitted[kind], X_test) for kind in kinds}
    notes = ["Relative error of the variances against dense float64, median / largest:"]
    for side, variance in error.items():
        relative = (variance.double() / exact - 1).abs()
        notes.append(f"- {side}: {relative.median():.1e} / {relative.max():.1e}")
    timing.print_rows("Exact linearised posterior, MLP 8-50-50-1", rows, notes)


def our_large_prediction(num_train: int, num_test: int) -> None:
    """Predict many points in chunks."""
    network, X, Y, X_test = problem(num_train, num_test)
    model = our_fit(network, X, Y)
    for chunk in X_test.split(CHUNK):
        our_variance(model, chunk)


def peer_large_prediction(num_train: int, num_test: int) -> None:
    """Predict many points by the default backend, in one call."""
    network, X, Y, X_test = problem(num_train, num_test)
    kind = "full, default backend"
    peer_variance(kind, peer_fit(kind, network, X, Y), X_test)


def memory(num_train: int, sizes: tuple[int, int], limit: int) -> None:
    """Row 3: peak memory of a Jacobian-based prediction, and its growth."""
    small, large = sizes
    ours = timing.peak_memory(our_large_prediction, num_train, small)
    theirs = timing.peak_memory(peer_large_prediction, num_train, small, limit=limit)
    many = timing.peak_memory(our_large_prediction, num_train, large)
    rows = [
        timing.compare_memory(
            f"predict {small} points", "full, default backend", ours, theirs
        )
    ]
    notes = [
        f"Ours, {large} points in chunks of {CHUNK}: {timing.show_memory(many)}, "
        f"{many.seconds:.3g} s, training of the network included.",
        "Resident peak of the whole process; in parentheses its growth in the work.",
        "One array of the peer's batched Jacobian takes 4 n^2 h bytes: 3.2 GB at "
        "n = 4000, about 15 GB in all.",
    ]
    timing.print_rows("Memory of the predictive", rows, notes)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    peers.require_laplace()
    timing.one_thread()
    if arguments.smoke:
        times(50, 40, 1)
        memory(50, (40, 200), 8 * 2**30)
    else:
        times(1000, 1000, arguments.repeats)
        memory(1000, (4000, 100_000), 12 * 2**30)


if __name__ == "__main__":
    main()
