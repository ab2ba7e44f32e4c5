r"""Linear solvers as objects: an operator and right-hand sides in, a solution out.

A solver takes a symmetric positive definite operator, ``n x n``, right-hand sides
``n x k`` and perhaps a first guess, and returns a :class:`~gpbridge.types.Solution`
that says how good it is: ``residual_norm`` is exact, never the solver's own estimate.
Short of its tolerance a solver warns with the number of passes, the residual and the
remedy. A run that was interrupted goes on from ``initial=solution.value``, or from the
last :class:`Progress` that its ``callback`` saw; that costs one pass, for the residual.

Which one? On kernel matrices of pol and elevators (13 500 to 15 000 points), with 65
right-hand sides and to a relative residual of .01, :class:`SketchAndProject` needs 9 to
17 passes with its defaults, :class:`ConjugateGradients` 11 with a preconditioner of
rank 600 where noise is large, and 49 with rank 1000 where it is small. Measured once,
split 0 and one seed, on the two sets on which these defaults were picked.
:func:`choose_solver` follows that.
"""

from gpbridge.solvers.alternating_projections import AlternatingProjections
from gpbridge.solvers.choice import choose_solver
from gpbridge.solvers.cholesky import Cholesky
from gpbridge.solvers.conjugate_gradients import ConjugateGradients
from gpbridge.solvers.dual_descent import StochasticDualDescent
from gpbridge.solvers.minibatch_descent import MinibatchDescent
from gpbridge.solvers.preconditioners import (
    nystrom_preconditioner,
    pivoted_cholesky_preconditioner,
)
from gpbridge.solvers.sketch_and_project import SketchAndProject
from gpbridge.solvers.stochastic_gradient import StochasticGradientDescent
from gpbridge.solvers.system import Progress

__all__ = [
    "AlternatingProjections",
    "Cholesky",
    "ConjugateGradients",
    "MinibatchDescent",
    "Progress",
    "SketchAndProject",
    "StochasticDualDescent",
    "StochasticGradientDescent",
    "choose_solver",
    "nystrom_preconditioner",
    "pivoted_cholesky_preconditioner",
]
