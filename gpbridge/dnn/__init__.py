"""Deep networks and posteriors over the weights of the nonlinear network."""

from gpbridge.dnn.chains import SGMCMC, sample_sgmcmc
from gpbridge.dnn.curve_training import fit_curve
from gpbridge.dnn.curves import BezierCurve, PolyChain
from gpbridge.dnn.cyclical import CyclicalSchedule
from gpbridge.dnn.deep_gp import DeepGaussianProcess
from gpbridge.dnn.deep_gp_build import build_deep_gp
from gpbridge.dnn.deep_gp_fit import fit_deep_gp
from gpbridge.dnn.divergence import DivergedError
from gpbridge.dnn.dropout import MCDropout
from gpbridge.dnn.ensemble_fit import EnsembleFit, fit_ensemble
from gpbridge.dnn.ensembles import DeepEnsemble
from gpbridge.dnn.fast_geometric import FastGeometricEnsemble
from gpbridge.dnn.fit import fit_map
from gpbridge.dnn.gp_vae import GPPriorVAE
from gpbridge.dnn.gp_vae_fit import fit_gp_vae
from gpbridge.dnn.hamiltonian import hamiltonian_monte_carlo
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.dnn.loss_surface import CurveLosses, curve_losses
from gpbridge.dnn.multi_swag import MultiSWAG
from gpbridge.dnn.planes import (
    LossPlane,
    WeightPlane,
    loss_plane,
    plane_through,
    principal_plane,
)
from gpbridge.dnn.replica_fit import ReplicaFit
from gpbridge.dnn.replicas import train_replicas
from gpbridge.dnn.scale_tuning import tune_scale
from gpbridge.dnn.sgmcmc import SGHMC, SGLD
from gpbridge.dnn.slice_sampling import elliptical_slice_sampling
from gpbridge.dnn.snapshots import Snapshots
from gpbridge.dnn.subspace import Subspace
from gpbridge.dnn.subspace_inference import sample_subspace
from gpbridge.dnn.subspace_methods import (
    EllipticalSliceSampling,
    HamiltonianMonteCarlo,
    VariationalInference,
)
from gpbridge.dnn.subspace_tuning import tune_subspace
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.dnn.vae import VAE, fit_vae
from gpbridge.dnn.variational import MeanFieldVI
from gpbridge.dnn.variational_fit import fit_mean_field, fit_variational
from gpbridge.types import FitResult

__all__ = [
    "SGHMC",
    "SGLD",
    "SGMCMC",
    "SWA",
    "SWAG",
    "VAE",
    "BezierCurve",
    "CurveLosses",
    "CyclicalSchedule",
    "DeepEnsemble",
    "DeepGaussianProcess",
    "DivergedError",
    "EllipticalSliceSampling",
    "EnsembleFit",
    "FastGeometricEnsemble",
    "FitResult",
    "GPPriorVAE",
    "HamiltonianMonteCarlo",
    "LogPosterior",
    "LossPlane",
    "MCDropout",
    "MeanFieldVI",
    "MultiSWAG",
    "PolyChain",
    "ReplicaFit",
    "Snapshots",
    "Subspace",
    "VariationalInference",
    "WeightPlane",
    "build_deep_gp",
    "curve_losses",
    "elliptical_slice_sampling",
    "fit_curve",
    "fit_deep_gp",
    "fit_ensemble",
    "fit_gp_vae",
    "fit_map",
    "fit_mean_field",
    "fit_vae",
    "fit_variational",
    "hamiltonian_monte_carlo",
    "loss_plane",
    "plane_through",
    "principal_plane",
    "sample_sgmcmc",
    "sample_subspace",
    "train_replicas",
    "tune_scale",
    "tune_subspace",
]
