"""Deep networks and posteriors over the weights of the nonlinear network."""

from gpbridge.dnn.dropout import MCDropout
from gpbridge.dnn.ensemble_fit import EnsembleFit, fit_ensemble
from gpbridge.dnn.ensembles import DeepEnsemble
from gpbridge.dnn.fast_geometric import FastGeometricEnsemble
from gpbridge.dnn.fit import fit_map
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.dnn.multi_swag import MultiSWAG
from gpbridge.dnn.replica_fit import DivergedError, ReplicaFit
from gpbridge.dnn.replicas import train_replicas
from gpbridge.dnn.snapshots import Snapshots
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.types import FitResult

__all__ = [
    "SWA",
    "SWAG",
    "DeepEnsemble",
    "DivergedError",
    "EnsembleFit",
    "FastGeometricEnsemble",
    "FitResult",
    "LogPosterior",
    "MCDropout",
    "MultiSWAG",
    "ReplicaFit",
    "Snapshots",
    "fit_ensemble",
    "fit_map",
    "train_replicas",
]
