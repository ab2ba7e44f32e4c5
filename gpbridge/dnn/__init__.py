"""Deep networks and posteriors over the weights of the nonlinear network."""

from gpbridge.dnn.dropout import MCDropout
from gpbridge.dnn.fit import fit_map
from gpbridge.dnn.hamiltonian import hamiltonian_monte_carlo
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.dnn.scale_tuning import tune_scale
from gpbridge.dnn.slice_sampling import elliptical_slice_sampling
from gpbridge.dnn.subspace import Subspace
from gpbridge.dnn.subspace_inference import (
    EllipticalSliceSampling,
    HamiltonianMonteCarlo,
    VariationalInference,
    sample_subspace,
)
from gpbridge.dnn.subspace_tuning import tune_subspace
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.types import FitResult

__all__ = [
    "SWA",
    "SWAG",
    "EllipticalSliceSampling",
    "FitResult",
    "HamiltonianMonteCarlo",
    "LogPosterior",
    "MCDropout",
    "Subspace",
    "VariationalInference",
    "elliptical_slice_sampling",
    "fit_map",
    "hamiltonian_monte_carlo",
    "sample_subspace",
    "tune_scale",
    "tune_subspace",
]
