"""Deep networks and posteriors over the weights of the nonlinear network."""

from gpbridge.dnn.dropout import MCDropout
from gpbridge.dnn.fit import fit_map
from gpbridge.dnn.gp_vae import GPPriorVAE
from gpbridge.dnn.gp_vae_fit import fit_gp_vae
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.dnn.vae import VAE, fit_vae
from gpbridge.types import FitResult

__all__ = [
    "SWA",
    "SWAG",
    "VAE",
    "FitResult",
    "GPPriorVAE",
    "LogPosterior",
    "MCDropout",
    "fit_gp_vae",
    "fit_map",
    "fit_vae",
]
