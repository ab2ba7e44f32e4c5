"""Deep networks and posteriors over the weights of the nonlinear network."""

from gpbridge.dnn.dropout import MCDropout
from gpbridge.dnn.fit import fit_map
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.dnn.sgmcmc import SGHMC, SGLD
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.types import FitResult

__all__ = [
    "SGHMC",
    "SGLD",
    "SWA",
    "SWAG",
    "FitResult",
    "LogPosterior",
    "MCDropout",
    "fit_map",
]
