"""Augmentations: learnable distributions over transformations of the inputs."""

from gpbridge.augmentation.averaged import AveragedNetwork
from gpbridge.augmentation.base import Augmentation, DifferenceLaw
from gpbridge.augmentation.distances import median_orbit_distance
from gpbridge.augmentation.images import AffineAugmentation2d
from gpbridge.augmentation.orbits import FiniteOrbit
from gpbridge.augmentation.patches import PatchAugmentation
from gpbridge.augmentation.vectors import GaussianInputNoise, Rotation2d

__all__ = [
    "AffineAugmentation2d",
    "Augmentation",
    "AveragedNetwork",
    "DifferenceLaw",
    "FiniteOrbit",
    "GaussianInputNoise",
    "PatchAugmentation",
    "Rotation2d",
    "median_orbit_distance",
]
