"""The whole contract of a BoTorch model.

In: a ``unittest.TestCase`` that says how to build a model. Out: what BoTorch expects of
a surrogate, test by test: shapes, transforms, conditioning, fantasies, acquisition.
"""

from __future__ import annotations

from gpbridge.testing.acquisition import AcquisitionContract
from gpbridge.testing.conditioning import ConditioningContract
from gpbridge.testing.posterior import PosteriorContract
from gpbridge.testing.state import StateContract


class ModelContractTestCase(
    PosteriorContract, StateContract, ConditioningContract, AcquisitionContract
):
    r"""What a BoTorch model must do, as a mixin for ``unittest.TestCase``.

    Supply :meth:`create_model`, switch off what does not apply, and inherit the tests.
    Models are small (12 points, 2 inputs), so a run takes seconds. The global random
    state is seeded before and restored after each test. Networks passed through
    :meth:`watch` must be bit for bit unchanged at the end of each test.

    Attributes:
        outputs: The numbers of outputs that the model is tested with.
        num_inputs: The number d of inputs, all in the unit interval.
        num_train: The number n of training points.
        classification: Targets are labels, posteriors are over latent functions, and
            tests that need real targets are skipped.
        conditioning_equals_refit: Conditioning gives the posterior of a model that
            :meth:`refit` builds from all data.
        supports_conditioning: ``condition_on_observations`` exists.
        supports_fantasies: ``fantasize`` and the knowledge gradient work.
        supports_subset_output: ``subset_output`` exists.
        supports_noise_tensor: ``observation_noise`` may be a tensor.
        supports_transforms: ``input_transform`` and ``outcome_transform`` are options.
        supports_construct_inputs: ``construct_inputs`` gives constructor arguments.
        supports_pathwise: botorch's pathwise samplers know the model.
        rtol: Relative tolerance of identities in float64.
        atol: Absolute tolerance of identities in float64.
        gradient_rtol: Relative tolerance of a posterior's gradients against finite
            differences, a tenth of that of acquisition functions. Iterative solvers
            need more, in proportion to their residual.
        gradient_step: Step of the finite differences of acquisition functions, whose
            error is the third derivative times its square: smaller where the posterior
            is certain, since improvements then have a kink.
        pathwise_tolerance: How far the log of the variance of 1024 paths may be from
            that of the posterior. The default leaves room for the sampling error of
            exact paths; random Fourier features of stock kernels need 0.5.

    Example:
        The stock surrogate, as a class in a test file::

            class TestSingleTaskGP(ModelContractTestCase, unittest.TestCase):
                def create_model(self, dtype, num_outputs=1, **options):
                    return SingleTaskGP(**{"outcome_transform": None, **options})
    """
