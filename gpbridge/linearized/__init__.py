"""Linearised networks: a trained network conditioned as the Gaussian process it is."""

from gpbridge.linearized.calibration import Calibration, TrainGap
from gpbridge.linearized.continual import weight_posterior
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.inference import Exact, Sampled
from gpbridge.linearized.mean import TangentMean
from gpbridge.linearized.paths import TangentPath
from gpbridge.linearized.structures import Diagonal, Kronecker, LowRank
from gpbridge.linearized.subnetworks import largest_variance
from gpbridge.linearized.variational import Refinement

__all__ = [
    "Calibration",
    "Diagonal",
    "Exact",
    "Kronecker",
    "LinearizedGP",
    "LowRank",
    "Refinement",
    "Sampled",
    "TangentMean",
    "TangentPath",
    "TrainGap",
    "largest_variance",
    "weight_posterior",
]
