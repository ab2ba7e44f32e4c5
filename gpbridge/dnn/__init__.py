"""Deep networks and posteriors over the weights of the nonlinear network."""

from gpbridge.dnn.curve_training import fit_curve
from gpbridge.dnn.curves import BezierCurve, PolyChain
from gpbridge.dnn.dropout import MCDropout
from gpbridge.dnn.fit import fit_map
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.dnn.loss_surface import CurveLosses, curve_losses
from gpbridge.dnn.planes import (
    LossPlane,
    WeightPlane,
    loss_plane,
    plane_through,
    principal_plane,
)
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.types import FitResult

__all__ = [
    "SWA",
    "SWAG",
    "BezierCurve",
    "CurveLosses",
    "FitResult",
    "LogPosterior",
    "LossPlane",
    "MCDropout",
    "PolyChain",
    "WeightPlane",
    "curve_losses",
    "fit_curve",
    "fit_map",
    "loss_plane",
    "plane_through",
    "principal_plane",
]
