"""Learning the law of a GP's transformations: against loops, starts, copies."""

import copy
import math
import pickle

import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from gpytorch.models import ExactGP

from gpbridge.augmentation import AffineAugmentation2d, GaussianInputNoise, Rotation2d
from gpbridge.checks import NotConvergedWarning
from gpbridge.kernels import InvariantKernel
from gpbridge.selection import (
    OrbitVariationalELBO,
    learn_kernel_invariance,
    log_evidence,
)
from gpbridge.testing import assert_module_unchanged
from tests.oracles_architecture import rotated_evidence
from tests.selection.invariant_gp_problems import (
    DOUBLE,
    QUIET,
    exact,
    points,
    radial,
    sparse,
)

# The plane is no unit cube, and float32 is what one test is about.
pytestmark = pytest.mark.filterwarnings(
    "ignore::botorch.exceptions.warnings.InputDataWarning",
    "ignore::gpytorch.utils.warnings.GPInputWarning",
)
few_steps = pytest.mark.filterwarnings(  # on purpose, to be quick
    "ignore:.*L-BFGS stopped at its limit:gpbridge.checks.NotConvergedWarning"
)


class SharedGP(ExactGP):
    """Outputs that share a kernel; targets ``m x n``."""

    def __init__(self, X, Y, law):
        super().__init__(X, Y, GaussianLikelihood())
        self.mean_module = ZeroMean(batch_shape=torch.Size([len(Y)]))
        self.covar_module = ScaleKernel(InvariantKernel(RBFKernel(), law))
        self.to(X)

    def forward(self, x):
        K = self.covar_module(x).evaluate_kernel()
        return MultivariateNormal(self.mean_module(x), K)


def bound_of(model):
    return model.covar_module.base_kernel.augmentation.bound


# -- exact -----------------------------------------------------------------------------


def test_the_curve_is_the_evidence_of_an_explicit_double_sum():
    X = points(8)
    Y = radial(X)
    model = exact(X, Y)
    for prior in list(model.named_priors()):
        del prior[1]._priors[prior[0].rpartition(".")[2]]
    starts = [0.3, 1.0, 2.5]
    fit = learn_kernel_invariance(
        model, starts=starts, refit_steps=0, polish=0, **QUIET
    )
    kernel = model.covar_module
    for start, value in zip(starts, fit.curve.evidence, strict=True):
        expected = rotated_evidence(
            X,
            Y[:, 0] - model.mean_module.constant.detach(),
            angle=start,
            num_samples=4,
            lengthscale=kernel.base_kernel.base_kernel.lengthscale.item(),
            outputscale=kernel.outputscale.item(),
            noise=model.likelihood.noise.item(),
        )
        assert abs(float(value) - float(expected)) < 1e-8


def drawn(n, degrees, outputs=1, noise_std=0.1, seed=0):
    """Points of a disc and draws of a GP of known half-width there."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": DOUBLE}
    X = 1.5 * points(n, seed)
    base = RBFKernel().double()
    base.lengthscale = 0.5
    law = Rotation2d(32, init=math.radians(degrees))
    with torch.no_grad():
        K = InvariantKernel(base, law.double())(X).to_dense()
    root = torch.linalg.cholesky(K + 1e-9 * torch.eye(n, dtype=DOUBLE))
    noise = noise_std * torch.randn(n, outputs, **options)
    return X, root @ torch.randn(n, outputs, **options) + noise


def test_a_scan_finds_an_optimum_that_one_ascent_misses():
    model = exact(*drawn(30, 60), Rotation2d(8))
    options = {"polish_steps": 20, "refit_steps": 5} | QUIET
    fit = learn_kernel_invariance(model, num_points=6, polish=2, **options)
    message = "best of 1 starts.*limit of 20 iterations while the objective still rose"
    with pytest.warns(NotConvergedWarning, match=message) as caught:
        single = learn_kernel_invariance(model, starts=[3.0], **options)
    assert len(caught) == 1
    assert fit.evidence > single.evidence + 1
    assert len(fit.curve.grid) == 6 and 1 <= len(fit.starts) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [30, 60, 120])
def test_a_known_half_width_is_recovered(degrees):
    """Within 15 % for three draws of four outputs, everything else learnt, too."""
    for seed in range(3):
        X, Y = drawn(120, degrees, outputs=4, seed=seed)
        model = SharedGP(X, Y.mT.contiguous(), Rotation2d(24))
        fit = learn_kernel_invariance(model, **QUIET)
        found = math.degrees(fit.learnt["bound"].item())
        assert abs(found / degrees - 1) < 0.15, (seed, found)


@few_steps
def test_the_model_of_the_caller_stays_and_the_copy_has_what_was_learnt():
    X = points()
    model = exact(X, radial(X)).eval()
    before = model(X[:3]).mean  # gpytorch now keeps tensors with a graph
    fit = learn_kernel_invariance(model, starts=[0.5, 2.0], polish_steps=5, **QUIET)
    assert not fit.model.training and model.prediction_strategy is not None
    assert torch.equal(model(X[:3]).mean, before)
    assert torch.equal(bound_of(fit.model), fit.learnt["bound"])
    assert fit.evidence == float(log_evidence(fit.model).detach())
    assert fit.evidence > float(log_evidence(model).detach())
    assert "bound" in repr(fit) and "1 ascents" in repr(fit)


@few_steps
def test_a_model_in_float32_is_fitted_in_float64_and_returned_in_float32():
    X = points()
    low = exact(X.float(), radial(X).float())
    fit = learn_kernel_invariance(low, starts=[0.5, 2.0], polish_steps=5, **QUIET)
    assert all(p.dtype == torch.float32 for p in fit.model.parameters())
    assert fit.model.train_inputs[0].dtype == torch.float32
    assert fit.model.posterior(X[:2].float()).mean.dtype == torch.float32
    high = exact(X.float().double(), radial(X).float().double())
    same = learn_kernel_invariance(high, starts=[0.5, 2.0], polish_steps=5, **QUIET)
    assert abs(fit.evidence - same.evidence) < 1e-3


@few_steps
def test_a_law_of_two_parameters_starts_at_vectors_and_the_best_start_is_kept():
    X = torch.rand(12, 9, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    law = AffineAugmentation2d((3, 3), ["rotation", "tx"], num_samples=4)
    model = exact(X, X.sum(-1, keepdim=True), law)
    starts = [[0.1, 0.1], torch.tensor([2.0, 0.2]), 0.4]
    fit = learn_kernel_invariance(model, starts=starts, polish_steps=5, **QUIET)
    assert fit.curve is None and len(fit.starts) == 3
    torch.testing.assert_close(fit.starts[1].start["bound"], starts[1].double())
    best = max(fit.starts, key=lambda row: row.objective)
    assert torch.equal(best.end["bound"], fit.learnt["bound"])
    default = learn_kernel_invariance(model, num_points=2, polish_steps=1, **QUIET)
    torch.testing.assert_close(
        default.starts[1].start["bound"], 0.75 * law.cap.detach().double()
    )


@few_steps
def test_two_laws_are_named_by_their_paths():
    X = points(10)
    kernel = InvariantKernel(RBFKernel(), Rotation2d(3)) + InvariantKernel(
        RBFKernel(), GaussianInputNoise(2, num_samples=3)
    )
    model = SingleTaskGP(X, radial(X), covar_module=kernel, outcome_transform=None)
    names = [
        "covar_module.kernels.0.augmentation.bound",
        "covar_module.kernels.1.augmentation.variance",
    ]
    start = {names[0]: 0.7, names[1]: 0.2}
    fit = learn_kernel_invariance(model, starts=[start], polish_steps=3, **QUIET)
    assert sorted(fit.learnt) == names
    with pytest.raises(ValueError, match="has 2 laws to learn"):
        learn_kernel_invariance(model, starts=[0.3])
    with pytest.raises(ValueError, match="has no half-width with a cap"):
        learn_kernel_invariance(model)


@few_steps
def test_what_requires_no_gradient_stays():
    X = points(10)
    model = exact(X, radial(X))
    model.covar_module.base_kernel.base_kernel.requires_grad_(False)
    fit = learn_kernel_invariance(model, starts=[0.5, 2.0], polish_steps=5, **QUIET)
    found = fit.model.covar_module.base_kernel.base_kernel
    assert torch.equal(
        found.raw_lengthscale,
        model.covar_module.base_kernel.base_kernel.raw_lengthscale,
    )
    assert not found.raw_lengthscale.requires_grad


class Breaking(Rotation2d):
    """Orbits that are NaN beyond two radians."""

    def transform(self, x):
        return super().transform(x) * torch.where(self.bound > 2, torch.nan, 1.0)

    def difference_law(self):
        return None


@few_steps
def test_a_start_without_a_finite_evidence_is_said_and_left_out():
    X = points(10)
    model = exact(X, radial(X), Breaking(3))
    with pytest.warns(NotConvergedWarning, match="not finite at"):
        fit = learn_kernel_invariance(
            model, starts=[0.5, 1.0, 2.5], refit_steps=1, polish_steps=2, **QUIET
        )
    assert fit.curve.evidence[2] == -math.inf
    assert math.isfinite(fit.evidence)
    with pytest.raises(ValueError, match="No grid value has a finite evidence"):
        learn_kernel_invariance(model, starts=[2.2, 2.5], **QUIET)


def test_a_fit_can_be_copied_and_pickled():
    X = points(10)
    fit = learn_kernel_invariance(
        exact(X, radial(X)), starts=[0.5, 1.0], refit_steps=1, polish=0, **QUIET
    )
    for twin in (copy.deepcopy(fit), pickle.loads(pickle.dumps(fit))):
        assert torch.equal(twin.learnt["bound"], fit.learnt["bound"])
        assert torch.equal(twin.model(X).mean, fit.model(X).mean)


# -- sparse ----------------------------------------------------------------------------


@pytest.mark.parametrize("orbit_bound", [False, True])
def test_a_sparse_gp_learns_a_wide_law_from_radial_targets(orbit_bound):
    X = points(40)
    Y = radial(X)[:, 0]
    model = sparse(X)
    elbo = model
    if orbit_bound:
        elbo = OrbitVariationalELBO(model.likelihood, model, 40, num_orbit_samples=2)
    with assert_module_unchanged(elbo):
        fit = learn_kernel_invariance(
            elbo,
            (X, Y),
            starts=[0.3, 2.0],
            epochs=10,
            batch_size=20,
            learning_rate=0.05,
            **QUIET,
        )
    narrow, wide = fit.starts
    assert fit.curve is None and wide.objective > narrow.objective
    assert torch.equal(fit.learnt["bound"], wide.end["bound"])
    assert fit.objective.model is fit.model and not fit.model.training
    again = float(log_evidence(fit.model, X, Y).detach())
    assert fit.evidence == again


def test_the_seed_decides_and_the_global_state_stays():
    X = points(20)
    Y = radial(X)[:, 0]
    state = torch.get_rng_state()
    first, second, other = (
        learn_kernel_invariance(
            sparse(X),
            (X, Y),
            starts=[1.0],
            epochs=2,
            batch_size=5,
            seed=seed,
            **QUIET,
        ).evidence
        for seed in (0, 0, 1)
    )
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sparse_start_that_diverges_is_said_and_left_out():
    X = points(20)
    model = sparse(X, Breaking(3))
    with pytest.warns(NotConvergedWarning, match="Start 1 of 2 failed"):
        fit = learn_kernel_invariance(
            model, (X, radial(X)[:, 0]), starts=[0.5, 2.5], epochs=1, **QUIET
        )
    assert fit.starts[1].objective == -math.inf and fit.starts[1].end == {}
    assert fit.starts[0].objective > -math.inf
