"""Linearised networks: a trained network conditioned as the Gaussian process it is."""

from gpbridge.linearized.calibration import Calibration, TrainGap
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.inference import Exact, Sampled
from gpbridge.linearized.mean import TangentMean
from gpbridge.linearized.paths import TangentPath
from gpbridge.linearized.variational import Refinement

__all__ = [
    "Calibration",
    "Exact",
    "Sampled",
    "LinearizedGP",
    "Refinement",
    "TangentMean",
    "TangentPath",
    "TrainGap",
]
