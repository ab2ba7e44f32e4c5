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
from gpbridge.surrogates.recipe import Recipe, relu_network, tanh_network
from gpbridge.surrogates.recipe_model import RecipeModel
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
    "RecipeModel",
    "SGHMCSurrogate",
    "SWAGSurrogate",
    "SubspaceSurrogate",
    "TangentSurrogate",
    "WeightSpaceModel",
    "relu_network",
    "tanh_network",
]
