"""Kernels: maps from inputs to covariance, made of networks and features."""

from gpbridge.kernels.deep import DeepKernel, body, parameter_groups
from gpbridge.kernels.feature import FeatureKernel
from gpbridge.kernels.tangent import NeuralTangentKernel

__all__ = [
    "DeepKernel",
    "FeatureKernel",
    "NeuralTangentKernel",
    "body",
    "parameter_groups",
]
