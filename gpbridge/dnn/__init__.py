"""Deep networks and posteriors over the weights of the nonlinear network."""

from gpbridge.dnn.chains import SGMCMC, sample_sgmcmc
from gpbridge.dnn.cyclical import CyclicalSchedule
from gpbridge.dnn.dropout import MCDropout
from gpbridge.dnn.fit import fit_map
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.dnn.sgmcmc import SGHMC, SGLD
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.dnn.variational import MeanFieldVI
from gpbridge.dnn.variational_fit import fit_mean_field, fit_variational
from gpbridge.types import FitResult

__all__ = [
    "SGHMC",
    "SGLD",
    "SGMCMC",
    "CyclicalSchedule",
    "SWA",
    "SWAG",
    "FitResult",
    "LogPosterior",
    "MCDropout",
    "MeanFieldVI",
    "fit_map",
    "fit_mean_field",
    "fit_variational",
    "sample_sgmcmc",
]
