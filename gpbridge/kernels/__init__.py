"""Kernels: maps from inputs to covariance, made of networks and features."""

from gpbridge.kernels import random_features
from gpbridge.kernels.compositions import draw_feature_map
from gpbridge.kernels.convolutional import ConvolutionalKernel
from gpbridge.kernels.deep import DeepKernel, network_body, parameter_groups
from gpbridge.kernels.feature import FeatureKernel
from gpbridge.kernels.invariant import InvariantKernel
from gpbridge.kernels.tangent import NeuralTangentKernel

__all__ = [
    "ConvolutionalKernel",
    "DeepKernel",
    "FeatureKernel",
    "InvariantKernel",
    "NeuralTangentKernel",
    "network_body",
    "parameter_groups",
    "draw_feature_map",
    "random_features",
]
