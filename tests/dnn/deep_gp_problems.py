"""Deep GPs far from their initial values, for tests."""

import torch
from gpytorch.kernels import RBFKernel

from gpbridge.dnn import build_deep_gp


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def kernel(num_inputs):
    made = RBFKernel(ard_num_dims=num_inputs)
    made.lengthscale = 0.8
    return made


@torch.no_grad()
def moved(model, seed=1):
    """A deep copy is not made: its variational parameters are drawn."""
    generator = seeded(seed)
    for layer in model.layers:
        q = layer.variational_strategy.distribution
        like = q.variational_mean
        size = like.shape
        draw = torch.randn(size, generator=generator, dtype=torch.float64)
        q.variational_mean.copy_(draw)
        M = size[-1]
        draw = torch.randn(size[0], M, M, generator=generator, dtype=torch.float64)
        q.chol_variational_covar.copy_(0.2 * draw.tril() + 0.3 * torch.eye(M))
    return model


def problem(depth=2, n=12, d=2, m=1, seed=0, **options):
    """A model and data; hidden layers bend their inputs strongly."""
    X = normal(n, d, seed=seed)
    Y = X.sum(-1, keepdim=True).sin().expand(n, m) + 0.1 * normal(n, m, seed=seed + 1)
    given = {"num_inducing": 6, "kernels": kernel, "hidden_variance": 0.5}
    given["num_outputs"] = None if "likelihood" in options else m
    model = build_deep_gp(X, depth=depth, **{**given, **options})
    return moved(model), X, Y
