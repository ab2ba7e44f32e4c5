"""Linearised networks: a trained network conditioned as the Gaussian process it is."""

from gpbridge.linearized.calibration import Calibration, TrainGap
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.inference import Exact
from gpbridge.linearized.mean import TangentMean
from gpbridge.linearized.paths import TangentPath

__all__ = [
    "Calibration",
    "Exact",
    "LinearizedGP",
    "TangentMean",
    "TangentPath",
    "TrainGap",
]
