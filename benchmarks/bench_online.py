"""Online evidence: 100 epochs of ``fit_online`` against plain training and the peer.

MLP 8-50-50-1 (tanh, n = 2000) on a synthetic regression and MLP 64-64-64-10 (ReLU,
n = 1297) on digits; Adam, batches of 256, the same initial weights on all sides. The
peer is laplace-torch's ``marglik_training`` with its defaults (Kronecker, an evidence
every epoch, 10 hyperparameter steps), one prior precision. It trains from a DataLoader,
so that its ratio is to plain training from one; ours is to plain training on tensors,
which is faster. By default ours measures the evidence every fourth epoch and predicts a
regression by the exact posterior of the linear model, the peer by its Kronecker one;
the rows "every epoch" and "Kronecker" are at the peer's frequency and by its kind of
posterior. Without the peer only our rows are printed. Run with
``python benchmarks/bench_online.py [--smoke]``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import peers
import problems
import timing
import torch
from quality_classification import digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gpbridge.linearized import Exact, Kronecker
from gpbridge.linearized.inference import Inference
from gpbridge.metrics import gaussian_nll
from gpbridge.selection import OnlineFit, fit_online

BATCH = 256


class Task(NamedTuple):
    """Data, network and learning rate of one comparison."""

    name: str
    network: nn.Module
    X: Tensor
    Y: Tensor
    test_X: Tensor
    test_Y: Tensor
    rate: float

    @property
    def is_regression(self) -> bool:
        """Whether targets are floats."""
        return self.Y.is_floating_point()

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Of plain training."""
        return F.mse_loss if self.is_regression else F.cross_entropy


def regression(seed: int, smoke: bool) -> Task:
    """The synthetic regression."""
    n = 200 if smoke else 2000
    parts = problems.smooth_regression(n, 1000, seed=seed)
    network = problems.mlp((8, 50, 50, 1), seed=seed)
    return Task(f"regression, n = {n}", network, *parts, 1e-2)


def digit_classes(seed: int, smoke: bool) -> Task:
    """The digits of scikit-learn."""
    n = 200 if smoke else 1297
    data = digits(seed, (n, 500))
    network = problems.mlp((64, 64, 64, 10), nn.ReLU, seed=seed)
    return Task(f"digits, n = {n}", network, *data[:4], 5e-3)


def loader(task: Task) -> DataLoader:
    """Shuffled batches, as the peer wants them."""
    return DataLoader(TensorDataset(task.X, task.Y), BATCH, shuffle=True)


def plain(task: Task, epochs: int, from_loader: bool) -> nn.Module:
    """Adam on the mean loss, without decay."""
    network = copy.deepcopy(task.network)
    optimizer = torch.optim.Adam(network.parameters(), lr=task.rate, fused=True)
    batches = loader(task) if from_loader else None
    for _ in range(epochs):
        order = torch.randperm(len(task.X)).split(BATCH)
        for X, Y in batches or ((task.X[rows], task.Y[rows]) for rows in order):
            optimizer.zero_grad()
            task.loss(network(X), Y).backward()
            optimizer.step()
    return network.eval()


def ours(task: Task, epochs: int, **options: int) -> OnlineFit:
    """The default recipe."""
    return fit_online(
        task.network,
        (task.X, task.Y),
        epochs=epochs,
        **options,
        learning_rate=task.rate,
        batch_size=BATCH,
        progress=False,
    )


def theirs(task: Task, epochs: int) -> object:
    """The peer's default recipe, with one prior precision as ours."""
    fitted, *_ = peers.laplace.marglik_training(
        copy.deepcopy(task.network),
        loader(task),
        "regression" if task.is_regression else "classification",
        prior_structure="scalar",
        optimizer_kwargs={"lr": task.rate},
        n_epochs=epochs,
    )
    return fitted


def plain_nll(task: Task, network: nn.Module) -> float:
    """The network with the variance of its training residuals, or its softmax."""
    with torch.no_grad():
        outputs, fitted = network(task.test_X), network(task.X)
        if not task.is_regression:
            return F.cross_entropy(outputs, task.test_Y).item()
        variance = (task.Y - fitted).square().mean().expand_as(outputs)
        return gaussian_nll(outputs, variance, task.test_Y).item()


def our_nll(
    task: Task,
    fit: OnlineFit,
    link: str | None = None,
    inference: Inference | None = None,
) -> float:
    """Test nats of the linearised model; for digits of the network, or of a link."""
    if inference is None:
        inference = Exact() if task.is_regression else Kronecker()
    model = fit.model(task.X, task.Y, inference=inference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.predict(task.test_X, link=link)
    if task.is_regression:
        return gaussian_nll(found.mean, found.variance, task.test_Y).item()
    return -found.log_prob(task.test_Y).mean().item()


def their_nll(task: Task, fitted: object) -> float:
    """Test nats of the peer's predictive; probit for digits, its default."""
    # A hundred at a time: its default Jacobian is quadratic in the batch.
    parts = [fitted(X) for X in task.test_X.split(100)]
    if not task.is_regression:
        found = torch.cat(parts)
        rows = found[torch.arange(len(found)), task.test_Y]
        return -rows.log().mean().item()
    mean, variance = (torch.cat(side) for side in zip(*parts, strict=True))
    variance = variance.flatten(1) + fitted.sigma_noise**2
    return gaussian_nll(mean.detach(), variance.detach(), task.test_Y).item()


def timed(task: Callable[[], object]) -> tuple[float, object]:
    """CPU seconds, and the result."""
    start = time.process_time()
    result = task()
    return time.process_time() - start, result


def compare(make: Callable[[int, bool], Task], arguments: argparse.Namespace) -> None:
    """Print the rows of one problem."""
    epochs = 12 if arguments.smoke else 100
    sides: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(arguments.seeds):
        task = make(seed, arguments.smoke)
        torch.manual_seed(seed)
        if seed == 0:  # warm up
            plain(task, 2, False), ours(task, 2)
        base, network = timed(lambda t=task: plain(t, epochs, False))
        seconds, fit = timed(lambda t=task: ours(t, epochs))
        found = {
            "plain, tensors": (base, 1.0, plain_nll(task, network)),
            "fit_online": (seconds, seconds / base, our_nll(task, fit)),
        }
        own = seconds, seconds / base
        seconds, often = timed(lambda t=task: ours(t, epochs, every=1))
        same = seconds, seconds / base
        if task.is_regression:
            nll = our_nll(task, fit, inference=Kronecker())
            found["fit_online, Kronecker"] = (*own, nll)
            found["fit_online, every epoch"] = (*same, our_nll(task, often))
            nll = our_nll(task, often, inference=Kronecker())
            found["fit_online, every epoch, Kronecker"] = (*same, nll)
        else:
            found["fit_online, probit"] = (*own, our_nll(task, fit, "probit"))
            nll = our_nll(task, often, "probit")
            found["fit_online, every epoch, probit"] = (*same, nll)
        if peers.laplace is not None:
            base, network = timed(lambda t=task: plain(t, epochs, True))
            seconds, fitted = timed(lambda t=task: theirs(t, epochs))
            found["plain, DataLoader"] = (base, 1.0, plain_nll(task, network))
            nll = their_nll(task, fitted)
            found["laplace-torch marglik_training"] = (seconds, seconds / base, nll)
        for name, row in found.items():
            sides.setdefault(name, []).append(row)
    for name, rows in sides.items():
        spent, ratio, nll = zip(*rows, strict=True)
        shown = timing.show_seconds(statistics.median(spent))
        print(
            f"| {task.name} | {name} | {shown} | {statistics.median(ratio):.2f}x "
            f"({min(ratio):.2f} to {max(ratio):.2f}) | {statistics.mean(nll):.3f} "
            f"({min(nll):.3f} to {max(nll):.3f}) |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, 12 epochs")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    timing.one_thread()
    print("\n### Online evidence\n")
    print("| problem | training | CPU | of its plain training | test NLL |")
    print("|---|---|---|---|---|")
    for make in (regression, digit_classes):
        compare(make, arguments)
    if peers.laplace is None:
        print(f"\nWithout the peer's rows. {peers.INSTALL}")


if __name__ == "__main__":
    main()
