r"""Weights of a linear model drawn again whenever data arrive, by optimisation.

Each chain has a prior draw :math:`\omega_0` and noise :math:`\xi_i` for every datum,
both fixed, and minimises in whitened units

.. math:: \tfrac12 \sum_{i \in \text{seen}} \|r_i + \xi_i - \phi_i \omega\|^2
          + \tfrac12 \|\omega - \omega_0\|^2 .

The minimum is a draw from the posterior given what was seen. When data arrive the
solver goes on from the last minimum, as training does.

In: a linearised network or a linear model, and a solver. Out: log densities of each
block of arriving data at the weights of every chain. Next: ``speed_bound``.

References:
    Matthews, Hron, Turner, Ghahramani, Sample-then-optimize posterior sampling for
    Bayesian linear models, 2017. Lyle, Schut, Ru, Gal, van der Wilk, A Bayesian
    perspective on training speed and model selection, NeurIPS 2020, algorithm 1.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from gpbridge.data_features import DataFeatures, PrecisionOperator
from gpbridge.functional import FunctionalNet
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.sampling import solve_within
from gpbridge.randomness import standard_normal
from gpbridge.selection.prefix_posteriors import LinearModel
from gpbridge.types import Solver

_ERROR = 0.03  # of any prediction of a chain, in posterior standard deviations


@torch.no_grad()
def arriving_log_densities(
    model: LinearizedGP | LinearModel,
    order: Tensor,
    num_chains: int,
    block_size: int,
    solver: Solver,
    generator: Generator,
    progress: bool,
) -> Tensor:
    """Log densities of arriving blocks at weights that have seen those before.

    Memory is p and n m numbers per chain, and what products with the Jacobian take. A
    block costs one system, of all chains, on the data before it. Features are formed
    for twice as many data whenever those held are used up: 3 n points in all at most.

    Args:
        model: A checked model.
        order: Row numbers, ``n``.
        num_chains: The number s of chains.
        block_size: Data that arrive together.
        solver: Of the systems in the weights.
        generator: Of prior draws and noise.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        Nats per block and chain, ``blocks x s``.
    """
    net, X, root, std, misfit = _parts(model)
    X, root = X[order], root[order]
    target = root.mT @ misfit[order][..., None]  # n x m x 1, whitened
    scale = torch.linalg.slogdet(root).logabsdet
    (n, m), p = misfit.shape, len(std)
    prior = standard_normal((p, num_chains), generator, target)
    noise = standard_normal((n, m, num_chains), generator, target)
    omega, limit = prior, target.new_tensor(_ERROR)
    found = []
    bar = tqdm(
        range(0, n, block_size),
        desc="training_speed_bound",
        leave=False,
        disable=None if progress else True,
    )
    size = 0  # of the data whose features are held: seen, new, and some to come
    for start in bar:
        stop = min(start + block_size, n)
        if stop > size:
            size = min(max(2 * size, stop), n)
            data = DataFeatures(net, X[:size])
        if start:
            seen = root[:size].clone()
            seen[start:] = 0.0  # what has not arrived says nothing
            operator = PrecisionOperator(seen, std, data)
            rhs = prior + operator.to_weights(target[:size] + noise[:size])
            omega = solve_within(solver, operator, rhs, lambda _: limit, omega).value
        new = slice(start, stop)
        values = data.matmul(std[:, None] * omega)[new]
        off = target[new] - root[new].mT @ values  # b x m x s
        constant = scale[new].sum() - 0.5 * math.log(2 * math.pi) * off[..., 0].numel()
        found.append(constant - 0.5 * off.square().sum((0, 1)))
    return torch.stack(found)


def _parts(model: LinearizedGP | LinearModel) -> tuple:
    """Network, inputs, roots, prior deviations, and targets less their prior mean."""
    if isinstance(model, LinearizedGP):
        problem = model.problem
        std = problem.flat_prior_std(model.prior_variance)
        misfit = problem.Y - problem.prior_mean
        return problem.net, problem.X, problem.root().detach(), std, misfit
    # A layer without bias is linear in its weights, and its Jacobian is its input.
    X, y = model.features.double(), model.targets.double()[:, None]
    f = X.shape[1]
    net = FunctionalNet(nn.Linear(f, 1, bias=False, dtype=X.dtype, device=X.device))
    net.probe(X)
    noise, prior = (
        torch.as_tensor(value, dtype=X.dtype, device=X.device).reshape(1)
        for value in (model.noise_variance, model.prior_variance)
    )
    root = noise.rsqrt().expand(len(X))[:, None, None]
    return net, X, root, prior.sqrt().expand(f), y
