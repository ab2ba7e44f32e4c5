r"""Linear solvers as objects: an operator and right-hand sides in, a solution out.

A solver takes a symmetric positive definite operator, ``n x n``, right-hand sides
``n x k`` and perhaps a first guess, and returns a :class:`~gpbridge.types.Solution`
that says how good it is: ``residual_norm`` is exact, never the solver's own estimate.
Short of its tolerance a solver warns with the number of passes, the residual and the
remedy. A run that was interrupted goes on from ``initial=solution.value``, or from the
last :class:`Progress` that its ``callback`` saw.
"""

from gpbridge.solvers.alternating_projections import AlternatingProjections
from gpbridge.solvers.cholesky import Cholesky
from gpbridge.solvers.conjugate_gradients import ConjugateGradients
from gpbridge.solvers.dual_descent import StochasticDualDescent
from gpbridge.solvers.preconditioners import (
    nystrom_preconditioner,
    pivoted_cholesky_preconditioner,
)
from gpbridge.solvers.refinement import Progress
from gpbridge.solvers.sketch_and_project import SketchAndProject
from gpbridge.solvers.stochastic_gradient import StochasticGradientDescent

__all__ = [
    "AlternatingProjections",
    "Cholesky",
    "ConjugateGradients",
    "Progress",
    "SketchAndProject",
    "StochasticDualDescent",
    "StochasticGradientDescent",
    "nystrom_preconditioner",
    "pivoted_cholesky_preconditioner",
]
