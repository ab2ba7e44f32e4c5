"""Deep networks and posteriors over the weights of the nonlinear network."""

from gpbridge.dnn.fit import fit_map
from gpbridge.types import FitResult

__all__ = ["FitResult", "fit_map"]
