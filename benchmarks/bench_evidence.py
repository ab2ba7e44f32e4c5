"""ML-II: learning prior and noise variance, against the peer's evidence loop.

MLP 8-50-50-1 (p = 3051), n = 1000, float32 data. The peer takes gradient steps on
``log_marginal_likelihood``, each with the log determinant of a p x p matrix; it is
timed for a few steps and extrapolated to 100, which its constant cost per step allows.
Ours counts construction, eigendecomposition and search. Our evidence is that of the
linear model's own optimum, the peer's that at the trained weights, so the optima
differ. Run with ``python benchmarks/bench_evidence.py [--smoke]``.
"""

from __future__ import annotations

import argparse

import peers
import problems
import timing
import torch
from torch import Tensor, nn

from gpbridge import LinearizedGP
from gpbridge.selection import fit_evidence

STEPS = 100


def our_search(network: nn.Module, X: Tensor, Y: Tensor) -> LinearizedGP:
    """The shipped recipe, from construction to its optimum."""
    model = LinearizedGP(network, X, Y)
    fit_evidence(model)
    return model


def our_steps(network: nn.Module, X: Tensor, Y: Tensor, steps: int) -> LinearizedGP:
    """Literal Adam steps on ``log_evidence``, as the peer's users write them."""
    model = LinearizedGP(network, X, Y)
    optimizer = torch.optim.Adam(
        [value for value in model.parameters() if value.requires_grad], lr=0.1
    )
    for _ in range(steps):
        optimizer.zero_grad()
        (-model.log_evidence()).backward()
        optimizer.step()
    return model


def peer_steps(fitted: object, steps: int) -> tuple[float, float, float]:
    """Adam steps on prior precision and noise; the fit is not counted."""
    log_precision = torch.zeros(1, requires_grad=True)
    log_std = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([log_precision, log_std], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        evidence = fitted.log_marginal_likelihood(log_precision.exp(), log_std.exp())
        (-evidence).backward()
        optimizer.step()
    return evidence.item(), log_precision.exp().item(), log_std.exp().item() ** 2


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-steps", type=int, default=3)
    arguments = parser.parse_args()
    peers.require_laplace()
    timing.one_thread()
    num_train = 50 if arguments.smoke else 1000
    repeats = 1 if arguments.smoke else arguments.repeats
    X, Y, *_ = problems.smooth_regression(num_train, 1)
    network = problems.train(problems.mlp((8, 50, 50, 1)), X, Y, nn.MSELoss())
    fitted = peers.parametric(network, "regression", "full", backpack=True)
    fitted.fit(peers.loader(X, Y))
    times = timing.interleave(
        {
            "search": lambda: our_search(network, X, Y),
            "steps": lambda: our_steps(network, X, Y, STEPS),
            "full": lambda: peer_steps(fitted, arguments.peer_steps),
        },
        repeats,
    )
    scale = STEPS / arguments.peer_steps
    peer = "laplace-torch full, log_marginal_likelihood"
    rows = [
        timing.compare(work, peer, times[name], times["full"], target, scale)
        for work, name, target in (
            (f"fit_evidence to convergence, n={num_train}", "search", 100.0),
            (f"{STEPS} Adam steps on log_evidence", "steps", 100.0),
        )
    ]
    model = our_search(network, X, Y)
    prior, noise = model.prior_variance, model.noise_variance
    notes = [
        f"The peer ran {arguments.peer_steps} steps, times {scale:.3g}; its fit is not "
        "counted, our construction and eigendecomposition are.",
        f"Ours reached {model.log_evidence().item():.2f} nats at prior variance "
        f"{prior.reshape(-1).tolist()}, noise variance {noise.reshape(-1).tolist()}.",
    ]
    timing.print_rows("Marginal likelihood", rows, notes)


if __name__ == "__main__":
    main()
