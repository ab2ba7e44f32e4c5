"""Small data sets under every likelihood, with what an oracle needs to know of them.

Networks have 2 inputs and p = 18 + 7 m random weights, data n = 12 points: function
space is the smaller one, and weight space can be forced.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import nn

from gpbridge import Exact, LinearizedGP
from gpbridge.likelihoods import LogisticLikelihood
from tests import oracles_likelihoods, oracles_linearized

N, D = 12, 2
PRIOR_VARIANCE = 0.4


class Problem(NamedTuple):
    """A likelihood, and its rules retyped."""

    m: int
    make: Callable[[], Likelihood]
    noise: Callable[[int], torch.Tensor] | None = None  # n to (n m) x (n m)
    log_density: Callable | None = None
    labels: Callable[[], list] | None = None  # for the Fisher information

    @property
    def gaussian(self):
        return self.noise is not None


def gaussian():
    likelihood = GaussianLikelihood().double()
    # A Python float would pass through float32.
    likelihood.noise = torch.tensor([0.03], dtype=torch.float64)
    return likelihood


def point_noise(n=N):
    return torch.linspace(0.01, 0.09, n, dtype=torch.float64)


def task_noise(n=N):
    return torch.tensor([0.02, 0.05], dtype=torch.float64).repeat(n).diag()


TASK_FACTOR = torch.tensor([[0.3], [-0.2]], dtype=torch.float64)


def multitask(rank=0, common=False):
    likelihood = MultitaskGaussianLikelihood(
        2, rank=rank, has_global_noise=common or rank > 0
    ).double()
    with torch.no_grad():
        if rank:
            likelihood.task_noise_covar_factor.copy_(TASK_FACTOR)
        else:
            likelihood.task_noises = torch.tensor([0.02, 0.05], dtype=torch.float64)
        if common or rank:
            likelihood.noise = torch.tensor([0.04], dtype=torch.float64)
    return likelihood


def correlated_noise(n=N):
    block = TASK_FACTOR @ TASK_FACTOR.T + 0.04 * torch.eye(2, dtype=torch.float64)
    return torch.block_diag(*[block] * n)


def binary_labels():
    return [torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]


PROBLEMS = {
    "gaussian": Problem(1, gaussian, lambda n: 0.03 * torch.eye(n).double()),
    "fixed_noise": Problem(
        1,
        lambda: FixedNoiseGaussianLikelihood(point_noise()),
        lambda n: point_noise(n).diag(),
    ),
    "multitask": Problem(2, multitask, task_noise),
    "multitask_common": Problem(
        2, lambda: multitask(common=True), lambda n: task_noise(n) + 0.04 * _eye(2 * n)
    ),
    "multitask_rank_1": Problem(2, lambda: multitask(rank=1), correlated_noise),
    "logistic": Problem(
        1, LogisticLikelihood, None, oracles_likelihoods.logistic_log_density
    ),
    "probit": Problem(
        1,
        BernoulliLikelihood,
        None,
        oracles_likelihoods.probit_log_density,
        binary_labels,
    ),
    "softmax": Problem(
        3,
        lambda: SoftmaxLikelihood(num_classes=3, mixing_weights=False),
        None,
        oracles_likelihoods.softmax_log_density,
    ),
}

every_likelihood = pytest.mark.parametrize("name", PROBLEMS)
gaussian_likelihoods = pytest.mark.parametrize(
    "name", [name for name, problem in PROBLEMS.items() if problem.gaussian]
)
label_likelihoods = pytest.mark.parametrize(
    "name", [name for name, problem in PROBLEMS.items() if not problem.gaussian]
)
both_spaces = pytest.mark.parametrize("space", ["function", "weight"])


def _eye(n):
    return torch.eye(n, dtype=torch.float64)


def network(m=1, scale=1.0, width=6, inputs=D):
    """A tanh network with fixed weights of size one."""
    net = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, m))
    net = net.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator).double())
    return net


def inputs(n=N, seed=0, d=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, d, generator=generator, dtype=torch.float64)


def targets(name, X, seed=1):
    """Targets that a smooth function and a little noise give at ``X``."""
    problem = PROBLEMS[name]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(X), problem.m, generator=generator, dtype=torch.float64)
    waves = torch.sin(6 * X.sum(-1, keepdim=True) + 2 * torch.arange(problem.m))
    values = waves + 0.3 * noise
    if problem.gaussian:
        return values
    if problem.m == 1:
        return (values > 0).double()
    return values.argmax(-1)


def build(name, space="auto", X=None, Y=None, net=None, loaded=False, **options):
    """A model of the problem at the prior variance of this file.

    If ``loaded``, X is a loader.
    """
    problem = PROBLEMS[name]
    X = inputs() if X is None else X
    Y = targets(name, X) if Y is None and not loaded else Y
    net = network(problem.m) if net is None else net
    if "inference" not in options:
        options["inference"] = Exact(space=space)
    options.setdefault("likelihood", problem.make())
    model = LinearizedGP(net, X, Y, **options)
    model.prior_variance = PRIOR_VARIANCE
    return model


def curvature(name, net, X):
    """Curvature of -log p at the network's outputs, for labels."""
    problem = PROBLEMS[name]
    with torch.no_grad():
        f = net(X)
    labels = None if problem.labels is None else problem.labels()
    return oracles_linearized.output_curvature(
        problem.log_density, targets(name, X), f, labels
    )
