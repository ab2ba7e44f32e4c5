r"""Invariant kernels: a kernel averaged over the orbits of both its inputs.

In: any kernel, and a distribution over transformations. Out: the kernel of a function
that is the average of another over transformations of its input, with the cross
covariance between the two. Next: ``convolutional`` takes patches as the orbit.
"""

from __future__ import annotations

from gpbridge.kernels.compositions import register_with_botorch
from gpbridge.kernels.orbit_kernel import OrbitKernel
from gpbridge.kernels.orbit_sums import SUMS


class InvariantKernel(OrbitKernel):
    r"""Covariance of a function averaged over transformations of its input.

    With :math:`g \sim GP(0, k_g)` and :math:`f(x) = \frac1s \sum_a w_a\, g(T_a x)`,

    .. math::
        k(x, x') = \frac{1}{s^2} \sum_{a, a'} w_a w_{a'}\, k_g(T_a x, T_{a'} x').

    All pairs count, also a = a': the matrix is positive semi-definite for any s (a
    V-statistic), and its diagonal is larger than that of the continuous average by
    O(1/s). The width of the augmentation is a hyperparameter like any other, and the
    marginal likelihood has several optima in it: scan it.

    Modes, n and n' points:

    * ``"double"``: the sum above, any base kernel, n n' s² evaluations of it.
    * ``"features"``: for a base kernel of finitely many features, which are averaged.
      n s evaluations of them, then a product. The neural tangent kernel of a network
      has features; its average belongs to the averaged network.
    * ``"difference"``: for a group of isometries and an isotropic base kernel, the
      law of :math:`T_a^{-1} T_{a'}`: n n' times 2 s - 1 evaluations for angles on a
      grid, s for a finite group. The same result as ``"double"``.
    * ``"auto"``: features, else differences, where they are exact; else double.

    The diagonal is not one, and depends on the augmentation. Scale with a
    ``ScaleKernel`` around this kernel. ``active_dims`` of this kernel select columns
    before the transformation. Transformed images have many columns: start the
    lengthscale of a base kernel near
    :func:`gpbridge.augmentation.median_orbit_distance`, or the matrix is the identity,
    whose gradients vanish.

    Orbits must not be redrawn while predictions are made; see
    :meth:`Augmentation.resample <gpbridge.augmentation.Augmentation.resample>`.

    Args:
        base_kernel: The kernel k_g of transformed inputs. Its batch shape is that of
            the whole kernel, all of whose members share the augmentation.
        augmentation: The distribution over transformations; it is used as it is.
        mode: How the average is computed, see above.
        chunk_size: Points whose orbits are compared at a time; default what suits the
            device. Blocks are computed again in the backward pass, not stored.
        memory_budget: Bytes that one matrix may take, its orbits included.
        **kwargs: ``active_dims``, as for any gpytorch kernel.

    Raises:
        TypeError: If the arguments are no kernel and no augmentation.
        ValueError: If the mode does not apply, or ``batch_shape`` is passed.

    Example:
        >>> import torch
        >>> from gpytorch.kernels import RBFKernel
        >>> from gpbridge.augmentation import Rotation2d
        >>> kernel = InvariantKernel(RBFKernel(), Rotation2d(num_samples=8))
        >>> kernel(torch.zeros(5, 2)).shape
        torch.Size([5, 5])

    References:
        van der Wilk et al., Learning invariances using the marginal likelihood, NeurIPS
        2018, eq. (8). Haasdonk and Burkhardt, Invariant kernel functions for pattern
        analysis and machine learning, Machine Learning 2007.
    """

    sums = SUMS


register_with_botorch(InvariantKernel)
