"""A network and a likelihood that variational inference is tested on."""

from gpytorch.likelihoods import GaussianLikelihood
from torch import nn


def gaussian(noise=0.3, learn=False):
    likelihood = GaussianLikelihood().double()
    likelihood.noise = noise
    return likelihood.requires_grad_(learn)


def mlp(m=1):
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, m)).double()
