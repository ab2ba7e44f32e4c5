"""Softmax: exact fit and predictive of a digits CNN against the peer's full and kron.

p = 1898, ten classes, n = 1297, 500 test images, float32, prior precision 1, the plain
diagonal probit link on both sides, because it is the peer's default. The peer predicts
in batches of 100: its default backend needs about 17 GB for 500 images at once.
Run with ``python benchmarks/bench_softmax.py [--smoke]``; needs scikit-learn.
"""

from __future__ import annotations

import argparse

import peers
import problems
import timing
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gpbridge import LinearizedGP

IMAGE = (1, 8, 8)
PREDICT_BATCH = 100
KINDS = {  # Hessian structure, BackPACK, aim for the fit, aim for the predictive
    "full, default backend": ("full", False, 1.0, 1.0),
    "full, BackPACK": ("full", True, 1.0, 1.0),
    "kron, default backend": ("kron", False, None, 5.0),
    "kron, BackPACK": ("kron", True, None, None),
}


def problem(num_train: int, num_test: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A trained network, flat images, labels and flat test images."""
    X, y = load_digits(return_X_y=True)
    X, y = torch.tensor(X, dtype=torch.float32) / 16, torch.tensor(y)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    X, y = X[order], y[order]
    X_train, y_train = X[:num_train], y[:num_train]
    network = problems.small_cnn()
    problems.train(
        network, X_train.unflatten(-1, IMAGE), y_train, nn.CrossEntropyLoss(), 100
    )
    return network, X_train, y_train, X[num_train : num_train + num_test]


def our_fit(network: nn.Module, X: Tensor, y: Tensor) -> LinearizedGP:
    """Construction and the caches of the training side."""
    model = LinearizedGP(network, X, y, input_shape=IMAGE)
    with torch.no_grad():
        model.posterior(X[:1])
    return model


def our_probabilities(model: LinearizedGP, X: Tensor) -> Tensor:
    """Averaged class probabilities, ``n x 10``."""
    with torch.no_grad():
        return model.predict(X, link="probit").probs


def peer_fit(kind: str, network: nn.Module, X: Tensor, y: Tensor) -> object:
    """One of the peer's forms, fitted."""
    structure, backpack, *_ = KINDS[kind]
    fitted = peers.parametric(network, "classification", structure, backpack)
    fitted.fit(peers.loader(X.unflatten(-1, IMAGE), y))
    return fitted


def peer_probabilities(fitted: object, X: Tensor) -> Tensor:
    """Averaged class probabilities, ``n x 10``."""
    batches = X.unflatten(-1, IMAGE).split(PREDICT_BATCH)
    parts = [peers.predict(fitted, batch, link_approx="probit") for batch in batches]
    return torch.cat(parts).detach()


def times(num_train: int, num_test: int, repeats: int) -> None:
    """Fit and predictive of every form."""
    network, X, y, X_test = problem(num_train, num_test)
    model = our_fit(network, X, y)
    first = timing.seconds(lambda: our_probabilities(model, X_test))
    fitted = {}

    def fit_peer(kind: str) -> None:
        fitted[kind] = peer_fit(kind, network, X, y)

    fit = timing.interleave(
        {"ours": lambda: our_fit(network, X, y)}
        | {kind: lambda kind=kind: fit_peer(kind) for kind in KINDS},
        repeats,
    )
    predict = timing.interleave(
        {"ours": lambda: our_probabilities(model, X_test)}
        | {
            kind: lambda kind=kind: peer_probabilities(fitted[kind], X_test)
            for kind in KINDS
        },
        repeats,
    )
    rows = []
    for kind, (_, _, fit_target, predict_target) in KINDS.items():
        for work, measured, target in (
            (f"fit, n={num_train}", fit, fit_target),
            (f"predictive, {num_test} images", predict, predict_target),
        ):
            rows.append(
                timing.compare(work, kind, measured["ours"], measured[kind], target)
            )
    ours = our_probabilities(model, X_test)
    notes = [
        "Our first averaged prediction, which also compares the posterior with the "
        f"network on the training rows (`train_gap`): {timing.show_seconds(first)}."
    ]
    notes += ["Largest difference of the probabilities from ours (kron approximates):"]
    for kind in KINDS:
        difference = (peer_probabilities(fitted[kind], X_test) - ours).abs().max()
        notes.append(f"- {kind}: {difference:.1e}")
    timing.print_rows("Softmax, digits CNN", rows, notes)


def our_whole(num_train: int, num_test: int) -> None:
    """Fit and predict, for the memory."""
    network, X, y, X_test = problem(num_train, num_test)
    our_probabilities(our_fit(network, X, y), X_test)


def peer_whole(kind: str, num_train: int, num_test: int) -> None:
    """Fit and predict, for the memory."""
    network, X, y, X_test = problem(num_train, num_test)
    peer_probabilities(peer_fit(kind, network, X, y), X_test)


def memory(num_train: int, num_test: int, limit: int) -> None:
    """Peak memory of every form, training of the network included on all sides."""
    ours = timing.peak_memory(our_whole, num_train, num_test)
    rows = [
        timing.compare_memory(
            "fit and predictive",
            kind,
            ours,
            timing.peak_memory(peer_whole, kind, num_train, num_test, limit=limit),
        )
        for kind in KINDS
    ]
    timing.print_rows("Memory, digits CNN", rows)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    peers.require_laplace()
    timing.one_thread()
    if arguments.smoke:
        times(60, 20, 1)
        memory(60, 20, 12 * 2**30)
    else:
        times(1297, 500, arguments.repeats)
        memory(1297, 500, 12 * 2**30)


if __name__ == "__main__":
    main()
