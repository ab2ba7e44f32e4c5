"""Contract tests for models of your own, with assertions on modules and gradients.

Every model of this library passes them; run your own through them before you trust it.
"""

from gpbridge.testing.gradients import assert_gradients_match_finite_differences
from gpbridge.testing.model import ModelContractTestCase
from gpbridge.testing.modules import assert_module_unchanged

__all__ = [
    "ModelContractTestCase",
    "assert_gradients_match_finite_differences",
    "assert_module_unchanged",
]
