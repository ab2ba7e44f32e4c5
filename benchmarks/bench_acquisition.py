"""Acquisition: qLogEI value and gradient on the linearised network and on a Matérn GP.

n = 1000, d = 8, t-batch 10, q = 1, 64 samples, float64, models as shipped and with
fixed hyperparameters: only evaluation is timed, as an optimiser calls it thousands of
times. Run with ``python benchmarks/bench_acquisition.py [--smoke]``.
"""

from __future__ import annotations

import argparse

import problems
import timing
import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.models import SingleTaskGP
from botorch.models.model import Model
from botorch.sampling.normal import SobolQMCNormalSampler
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor, nn

from gpbridge import LinearizedGP

NOISE_VARIANCE = 0.04
NETWORKS = {"p = 3051": ((8, 50, 50, 1), 1 / 3.5), "p = 277": ((8, 12, 12, 1), 1.0)}


def matern(X: Tensor, Y: Tensor) -> Model:
    """The stock surrogate with a Matérn-5/2 kernel and one lengthscale per input."""
    model = SingleTaskGP(
        X,
        Y,
        likelihood=_likelihood(),
        covar_module=ScaleKernel(MaternKernel(2.5, ard_num_dims=X.shape[-1])),
        outcome_transform=None,
    )
    model.covar_module.base_kernel.lengthscale = 2.0
    return model


def linearized(widths: tuple[int, ...], X: Tensor, Y: Tensor) -> Model:
    """The linearised network with the same noise."""
    network = problems.train(problems.mlp(widths).to(X), X, Y, nn.MSELoss())
    return LinearizedGP(network, X, Y, _likelihood())


def _likelihood() -> GaussianLikelihood:
    likelihood = GaussianLikelihood().double()
    likelihood.noise = NOISE_VARIANCE
    return likelihood


def acquisition(model: Model, best: Tensor, samples: int) -> qLogExpectedImprovement:
    """QLogEI with its base samples fixed; the first call has filled the caches."""
    sampler = SobolQMCNormalSampler(torch.Size([samples]), seed=0)
    return qLogExpectedImprovement(model, best_f=best, sampler=sampler)


def value_and_gradient(function: qLogExpectedImprovement, X: Tensor) -> Tensor:
    """What one step of the optimiser asks for."""
    X = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(X).sum(), X)
    return gradient


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    timing.one_thread()
    num_train = 50 if arguments.smoke else 1000
    repeats = 1 if arguments.smoke else arguments.repeats
    X, Y, X_test, _ = problems.smooth_regression(num_train, 10, torch.float64)
    candidates = X_test.unsqueeze(-2)  # 10 x 1 x 8
    models = {"matern": matern(X, Y)}
    models |= {name: linearized(NETWORKS[name][0], X, Y) for name in NETWORKS}
    functions = {
        name: acquisition(model, Y.max(), 64) for name, model in models.items()
    }
    times = timing.interleave(
        {
            name: lambda function=function: value_and_gradient(function, candidates)
            for name, function in functions.items()
        },
        repeats,
    )
    rows = [
        timing.compare(
            f"qLogEI and gradient, n={num_train}, {name}",
            "Matérn SingleTaskGP",
            times[name],
            times["matern"],
            target,
        )
        for name, (_, target) in NETWORKS.items()
    ]
    timing.print_rows(
        "Acquisition",
        rows,
        ["Targets: at most 3.5 times the Matérn's time, and no more than it if p < n."],
    )


if __name__ == "__main__":
    main()
