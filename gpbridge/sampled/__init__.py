"""GPs at any number of points: a posterior mean and samples, by iterative solves."""

from gpbridge.sampled import paths
from gpbridge.sampled.gp import SampledGP

__all__ = ["SampledGP", "paths"]
