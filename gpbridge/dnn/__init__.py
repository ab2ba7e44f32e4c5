"""Deep networks and posteriors over the weights of the nonlinear network."""

from gpbridge.dnn.dropout import MCDropout
from gpbridge.dnn.ensemble_fit import EnsembleFit, fit_ensemble
from gpbridge.dnn.fit import fit_map
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.dnn.replicas import train_replicas
from gpbridge.dnn.stacked_training import DivergedError, ReplicaFit
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.types import FitResult

__all__ = [
    "SWA",
    "SWAG",
    "DivergedError",
    "EnsembleFit",
    "FitResult",
    "LogPosterior",
    "MCDropout",
    "ReplicaFit",
    "fit_ensemble",
    "fit_map",
    "train_replicas",
]
