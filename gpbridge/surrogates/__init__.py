"""Surrogates: any posterior as a BoTorch model, and recipes that fit one to data."""

from gpbridge.surrogates.averages import SubspaceSurrogate, SWAGSurrogate
from gpbridge.surrogates.chains import SGHMCSurrogate
from gpbridge.surrogates.ensembles import DropoutSurrogate, EnsembleSurrogate
from gpbridge.surrogates.kernels import (
    DeepKernelSurrogate,
    InfiniteWidthSurrogate,
    MaternTangentSurrogate,
    TangentSurrogate,
)
from gpbridge.surrogates.linearized import LastLayerSurrogate, LinearizedSurrogate
from gpbridge.surrogates.recipe import Recipe, tanh_network
from gpbridge.surrogates.weight_space import WeightSpaceModel

__all__ = [
    "DeepKernelSurrogate",
    "DropoutSurrogate",
    "EnsembleSurrogate",
    "InfiniteWidthSurrogate",
    "LastLayerSurrogate",
    "LinearizedSurrogate",
    "MaternTangentSurrogate",
    "Recipe",
    "SGHMCSurrogate",
    "SWAGSurrogate",
    "SubspaceSurrogate",
    "TangentSurrogate",
    "WeightSpaceModel",
    "tanh_network",
]
