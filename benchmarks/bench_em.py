"""Sample-based EM against the exact evidence, and on MNIST where nothing dense fits.

Digits: a CNN with every weight random (p = 1898, n m = 12970); prior precision and test
NLL (probit link) against ``fit_evidence`` by dense algebra, the NLL from draws of the
same seed that are solved to 1e-8 at the exact precision. MNIST: LeNet (p = 61706,
n m = 100000), where no matrix of the data fits; the network, the network with a
temperature, and the sampled posterior before and after ``calibrate`` on 1000 held-out
images; scores on the 10000 test images, AUROC of the largest probability against
Fashion-MNIST. Run with ``python benchmarks/bench_em.py --data PATH [--device cuda]``,
PATH a folder with ``images/mnist.npz`` and ``images/fashion_mnist.npz``; without it,
digits only.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import time
import warnings
from pathlib import Path

import problems
import timing
import torch
from quality_classification import digits, scores
from torch import Tensor, nn

from gpbridge import LinearizedGP, metrics
from gpbridge.data import load_images
from gpbridge.linearized import Sampled
from gpbridge.selection import SampleBasedEM, fit_evidence
from gpbridge.solvers import ConjugateGradients

IMAGE = (1, 28, 28)


def small_digits(seed: int, num_samples: int) -> None:
    """One row: the exact optimum, and what the draws find."""
    problem = digits(seed, (1297, 500))
    network = problems.small_cnn(seed)
    problems.train(
        network,
        problem.X.unflatten(-1, (1, 8, 8)),
        problem.y,
        nn.CrossEntropyLoss(),
        100,
    )
    options = {"input_shape": (1, 8, 8)}
    exact = LinearizedGP(network, problem.X, problem.y, **options)
    seconds = []
    clock = time.process_time()
    fit_evidence(exact)
    seconds.append(time.process_time() - clock)
    solver = ConjugateGradients(tolerance=1e-2)
    clock = time.process_time()
    sampled = LinearizedGP(
        network,
        problem.X,
        problem.y,
        inference=Sampled(num_samples, solver),
        **options,
    )
    history = SampleBasedEM(sampled).run(10, 0.01, progress=False)
    seconds.append(time.process_time() - clock)
    found = [float(1 / model.prior_variance) for model in (exact, sampled)]
    same_draws = LinearizedGP(
        network,
        problem.X,
        problem.y,
        inference=Sampled(num_samples, ConjugateGradients(tolerance=1e-8)),
        **options,
    )
    same_draws.prior_variance = exact.prior_variance.detach()
    nll = []
    for model in (same_draws, sampled, exact):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probabilities = model.predict(problem.test_X, link="probit").probs
        nll.append(float(metrics.categorical_nll(probabilities, problem.test_y)))
    print(
        f"| {seed} | {found[0]:.4g} | {found[1]:.4g} | {found[1] / found[0] - 1:+.1%} "
        f"| {nll[0]:.4f} | {nll[1]:.4f} | {nll[1] / nll[0] - 1:+.1%} | {nll[2]:.4f} "
        f"| {len(history)} | {seconds[0]:.1f} | {seconds[1]:.1f} |",
        flush=True,
    )


def lenet(seed: int) -> nn.Sequential:
    """Two convolutions and three linear layers, p = 61706."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )


def train_lenet(
    network: nn.Module, X: Tensor, y: Tensor, epochs: int, seed: int
) -> nn.Module:
    """Adam with one cycle of the learning rate, minibatches of 100."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    steps = epochs * -(-len(X) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(X), generator=generator).split(100):
            rows = rows.to(X.device)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                network(X[rows].unflatten(-1, IMAGE)), y[rows]
            )
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def mnist(data: Path, device: str, smoke: bool, seed: int = 0) -> None:
    """The table of scores, and the time of each part."""
    X, y, test_X, test_y = load_images(data / "images", "mnist")
    _, _, other_X, _ = load_images(data / "images", "fashion_mnist", num_train=1)
    n, held, t = (10_000, 1000, 10_000) if not smoke else (200, 100, 100)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    rows, held_out = order[:n], order[n : n + held]
    X, test_X, other_X = (part.flatten(1).to(device) for part in (X, test_X, other_X))
    y, test_y = y.to(device), test_y.to(device)
    test_X, test_y, other_X = test_X[:t], test_y[:t], other_X[:t]
    network = train_lenet(
        lenet(seed).to(device), X[rows], y[rows], 1 if smoke else 12, seed
    )

    def logits(X: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [network(x.unflatten(-1, IMAGE)) for x in X.split(1000)]
        return torch.cat(parts)

    clock, walls = time.perf_counter(), {}

    def lap(name: str) -> None:
        nonlocal clock
        walls[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    solver = ConjugateGradients(
        tolerance=1e-2, preconditioner_rank=100, max_iterations=200
    )
    model = LinearizedGP(
        network,
        X[rows],
        y[rows],
        input_shape=IMAGE,
        inference=Sampled(16, solver, jacobian_dtype=torch.float32),
    )
    model.prior_variance = 1e-2
    history = SampleBasedEM(model).run(2 if smoke else 5, 0.05)
    lap("EM")
    uncalibrated = copy.deepcopy(model)
    model.calibrate(X[held_out], y[held_out])
    lap("calibrate")
    temperature = metrics.fit_temperature(
        logits(X[held_out]).log_softmax(-1), y[held_out], bounds=(0.5, 10.0)
    )
    parts = test_X, other_X

    def averaged(model: LinearizedGP, link: str | None) -> list[Tensor]:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [
                torch.cat([model.predict(x, link=link).probs for x in X.split(1000)])
                for X in parts
            ]

    table = {
        "network": [logits(X).softmax(-1) for X in parts],
        "network + temperature": [(logits(X) / temperature).softmax(-1) for X in parts],
        "sampled, not calibrated, probit": averaged(uncalibrated, "probit"),
        "sampled, not calibrated, Monte Carlo": averaged(uncalibrated, "monte_carlo"),
        "sampled, calibrated": averaged(model, None),
    }
    lap("predictions")
    print("\n### MNIST, LeNet, 16 draws\n")
    print("| model | accuracy | NLL | ECE | AUROC against Fashion-MNIST |")
    print("|---|---|---|---|---|")
    for name, (probabilities, other) in table.items():
        score = scores(probabilities.cpu(), other.cpu(), test_y.cpu())
        print(
            f"| {name} | {score.accuracy:.4f} | {score.nll:.4f} | {score.ece:.4f} "
            f"| {score.auroc:.4f} |"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\nn = {n}, p = {model.functional.num_params}. EM found the prior variances "
        f"{[round(step.prior_variance[0], 6) for step in history]} and an effective "
        f"dimension of {history[-1].effective_dimension[0]:.0f} +- "
        f"{history[-1].std_error[0]:.0f}; calibration: {model.calibration}. Wall "
        f"seconds: { ({k: round(v) for k, v in walls.items()}) }; peak memory of the "
        f"process {peak:.2f} GiB.\n"
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("GPBRIDGE_DATA"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    timing.one_thread()
    print("### Digits, CNN: precision and probit NLL, exact and by draws\n")
    print(
        "| seed | precision | by EM | difference | NLL, same draws | by EM "
        "| difference | NLL, exact covariance | steps | exact s | EM s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for seed in range(1 if arguments.smoke else arguments.seeds):
        small_digits(seed, 8 if arguments.smoke else arguments.samples)
    if arguments.data is None:
        print("\nOnly digits: MNIST needs --data PATH with images/mnist.npz.")
    else:
        mnist(Path(arguments.data), arguments.device, arguments.smoke)


if __name__ == "__main__":
    main()
