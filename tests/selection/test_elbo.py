"""Bounds over parts of orbits: unbiased by enumeration, below by Jensen, refusals."""

import itertools
import traceback
from pathlib import Path

import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from gpytorch.means import ConstantMean
from gpytorch.mlls import VariationalELBO
from gpytorch.models import ApproximateGP
from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy
from torch.utils._python_dispatch import TorchDispatchMode

import gpbridge
from gpbridge.augmentation import FiniteOrbit, Rotation2d
from gpbridge.checks import ShapeError
from gpbridge.inducing_gp import SparseGP
from gpbridge.inducing_orbits import draw_elements
from gpbridge.kernels import ConvolutionalKernel, InvariantKernel
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.polya_gamma import PolyaGammaBernoulliLikelihood
from gpbridge.selection import OrbitVariationalELBO
from tests.inducing_problems import (
    DOUBLE,
    LMC,
    convolutional,
    normal,
    rbf,
    settle,
    sparse,
)

N = 4


def build(name, likelihood, num_outputs=1):
    """A model with an orbit of a few elements, and data."""
    if name == "patches":  # with weights of its own for each element
        kernel = ConvolutionalKernel(rbf(), (3, 3), (2, 2)).double()
        kernel.augmentation.patch_weights.data = 1 + 0.5 * normal(4, seed=9)
        d, width = 9, 4
    else:
        kernel = InvariantKernel(rbf(), FiniteOrbit.permutations(3))
        d = width = 3
    kernel = ScaleKernel(ScaleKernel(kernel)).double()
    kernel.base_kernel.outputscale = torch.tensor(1.7, dtype=DOUBLE)
    mean = ConstantMean().double()
    mean.initialize(constant=torch.tensor(0.4, dtype=DOUBLE))
    model = sparse(kernel, width, likelihood, num_outputs=num_outputs, mean=mean)
    return model.double(), normal(N, d, seed=3)


def gradients(value, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(parameters, found, strict=True)
    ]


def likelihood_and_targets(name):
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=DOUBLE)
    if name == "gaussian":
        return GaussianLikelihood(), normal(N, seed=4), 1, {}
    if name == "fixed noise":
        noise = torch.tensor([0.1, 0.5, 0.2, 1.0], dtype=DOUBLE)
        fixed = FixedNoiseGaussianLikelihood(torch.ones(9, dtype=DOUBLE))
        return fixed, normal(N, seed=4), 1, {"noise": noise}
    if name == "multitask":
        return MultitaskGaussianLikelihood(num_tasks=2), normal(N, 2, seed=4), 2, {}
    return PolyaGammaBernoulliLikelihood(), labels, 1, {}


@pytest.mark.parametrize("num_elements", [2, 3])
@pytest.mark.parametrize("orbit", ["patches", "permutations"])
@pytest.mark.parametrize("name", ["gaussian", "fixed noise", "multitask", "label"])
def test_the_mean_over_all_subsets_is_the_bound_of_the_whole_orbit(
    name, orbit, num_elements
):
    """Exact enumeration, values and gradients; for labels at a fixed c."""
    likelihood, y, num_outputs, options = likelihood_and_targets(name)
    model, x = build(orbit, likelihood, num_outputs)
    elbo = OrbitVariationalELBO(likelihood, model, 50, num_elements)
    assert elbo.unbiased
    size = elbo.augmentation.orbit_size
    everything = torch.arange(size)
    fixed = {} if name != "label" else {"expansion_elements": torch.tensor([2, 0])}
    whole = elbo(x, y, elements=everything, **fixed, **options)
    parts = [
        elbo(x, y, elements=torch.tensor(subset), **fixed, **options)
        for subset in itertools.combinations(range(size), num_elements)
    ]
    average = torch.stack(parts).mean()
    assert torch.stack(parts).std() > 1e-4
    assert (average - whole).detach().abs() < 1e-11
    pairs = zip(gradients(average, model), gradients(whole, model), strict=True)
    checked = [(a - b).abs().max() < 1e-10 for a, b in pairs]
    assert len(checked) >= 6 and all(checked)


@pytest.mark.parametrize("orbit", ["patches", "permutations"])
@pytest.mark.parametrize("name", ["gaussian", "fixed noise", "multitask", "label"])
def test_all_of_the_orbit_gives_the_bound_of_upstream(name, orbit):
    likelihood, y, num_outputs, options = likelihood_and_targets(name)
    model, x = build(orbit, likelihood, num_outputs)
    elbo = OrbitVariationalELBO(likelihood, model, 50, 2)
    found = elbo(x, y, elements=torch.arange(elbo.augmentation.orbit_size), **options)
    upstream = VariationalELBO(likelihood, model, 50)
    expected = upstream(model(x), y, **options)
    assert (found - expected).detach().abs() < 1e-10
    pairs = zip(gradients(found, model), gradients(expected, model), strict=True)
    assert all((a - b).abs().max() < 1e-8 for a, b in pairs)


def test_batches_of_data_and_orbits_average_to_the_whole_bound():
    likelihood, y, _, _ = likelihood_and_targets("gaussian")
    model, x = build("patches", likelihood)
    elbo = OrbitVariationalELBO(likelihood, model, N, 2)
    whole = elbo(x, y, elements=torch.arange(4))
    values = [
        elbo(x[list(rows)], y[list(rows)], elements=torch.tensor(subset))
        for rows in itertools.combinations(range(N), 2)
        for subset in itertools.combinations(range(4), 2)
    ]
    assert (torch.stack(values).mean() - whole).detach().abs() < 1e-11


def test_draws_of_a_continuous_law_are_unbiased():
    """Monte Carlo, within four standard errors of quadrature by 400 angles."""
    kernel = InvariantKernel(rbf(0.7), Rotation2d(8, init=1.0).double())
    model = settle(SparseGP(kernel, normal(6, 2, seed=1), GaussianLikelihood()))
    model.double()
    x, y = normal(N, 2, seed=3), normal(N, seed=4)
    elbo = OrbitVariationalELBO(model.likelihood, model, 20, 2, unbiased=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([elbo(x, y, generator=generator) for _ in range(120)])
        grid = (torch.arange(400, dtype=DOUBLE) + 0.5)[:, None] / 200 - 1
        jensen = OrbitVariationalELBO(model.likelihood, model, 20, 2, jensen=True)
        whole = jensen(x, y, elements=grid)  # of all angles: exact
    error = draws.std() / 120**0.5
    assert (draws.mean() - whole).abs() < 4 * error
    assert draws.std() > 1e-3


@pytest.mark.parametrize("name", ["softmax", "logistic", "gaussian"])
def test_the_bound_of_jensen_is_below_and_all_of_the_orbit_reaches_it(name):
    """Enumeration over subsets of an orbit; means of a known u, so nothing is noise."""
    if name == "softmax":
        likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
        model, x = build("patches", likelihood, 3)
        y = torch.tensor([0, 2, 1, 1])
    else:
        likelihood = {"logistic": LogisticLikelihood, "gaussian": GaussianLikelihood}
        likelihood = likelihood[name]().double()
        model, x = build("patches", likelihood)
        y = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=DOUBLE)
    elbo = OrbitVariationalELBO(likelihood, model, 50, 2, jensen=True)

    def value(elements):
        torch.manual_seed(0)  # the samples of the softmax are common to all
        return elbo(x, y, elements=torch.tensor(elements)).detach()

    whole = value([0, 1, 2, 3])
    means = []
    for size in (1, 2, 3):
        subsets = itertools.combinations(range(4), size)
        means.append(torch.stack([value(subset) for subset in subsets]).mean())
    assert means[0] < means[1] < means[2] < whole
    torch.manual_seed(0)
    upstream = VariationalELBO(likelihood, model, 50)(model(x), y)
    assert (upstream - whole).detach().abs() < 1e-10


def test_an_orbit_of_one_element_is_an_ordinary_sparse_gp():
    orbit = FiniteOrbit(torch.arange(3)[None])
    model = sparse(InvariantKernel(rbf(), orbit), 3, GaussianLikelihood()).double()
    x, y = normal(N, 3, seed=3), normal(N, seed=4)
    plain = sparse(rbf(), 3, model.likelihood)
    expected = VariationalELBO(plain.likelihood, plain, 20)(plain(x), y)
    for form in ({"unbiased": True}, {"jensen": True}):
        elbo = OrbitVariationalELBO(model.likelihood, model, 20, 1, **form)
        assert (elbo(x, y) - expected).detach().abs() < 1e-12


def test_mixed_outputs_take_the_bound_of_jensen():
    model, x = settle(LMC()), normal(N, 16, seed=3)
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    elbo = OrbitVariationalELBO(softmax, model, 20, 3)
    assert elbo.jensen
    values, state = [], torch.get_rng_state()
    for _ in range(2):  # the samples of a softmax, too, come from the generator
        generator = torch.Generator().manual_seed(1)
        values.append(elbo(x, torch.tensor([0, 1, 2, 0]), generator=generator))
    assert torch.equal(torch.get_rng_state(), state)
    assert values[0].isfinite() and torch.equal(*values)
    noise = MultitaskGaussianLikelihood(num_tasks=3)
    with pytest.raises(TypeError, match="mixes outputs"):
        OrbitVariationalELBO(noise, model, 20, 3, unbiased=True)


def test_elements_come_from_the_generator_and_nothing_else():
    likelihood, y, _, _ = likelihood_and_targets("label")
    model, x = build("permutations", likelihood)
    elbo = OrbitVariationalELBO(likelihood, model, 20, 2)
    state = torch.get_rng_state()
    first, second, third = (
        elbo(x, y, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert first == second != third
    assert torch.equal(torch.get_rng_state(), state)
    drawn = draw_elements(elbo.augmentation, 6, torch.Generator().manual_seed(0))
    assert sorted(drawn.tolist()) == list(range(6))


def test_a_sample_of_a_finite_orbit_stands_for_all_of_it():
    """An augmentation that keeps two of six elements: the bound draws from six."""
    orbit = FiniteOrbit(FiniteOrbit.permutations(3).index, num_samples=2)
    model = sparse(InvariantKernel(rbf(), orbit), 3, GaussianLikelihood()).double()
    elbo = OrbitVariationalELBO(model.likelihood, model, 20, 2)
    x, y = normal(N, 3, seed=3), normal(N, seed=4)
    whole = sparse(
        InvariantKernel(rbf(), FiniteOrbit.permutations(3)), 3, model.likelihood
    )
    expected = VariationalELBO(model.likelihood, whole, 20)(whole(x), y)
    found = elbo(x, y, elements=torch.arange(6))
    assert (found - expected).detach().abs() < 1e-10


def test_terms_come_apart_as_upstream():
    likelihood, y, _, _ = likelihood_and_targets("gaussian")
    model, x = build("patches", likelihood)
    parts = OrbitVariationalELBO(likelihood, model, 50, 4, combine_terms=False)
    fit, complexity, prior = parts(x, y)
    together = OrbitVariationalELBO(likelihood, model, 50, 4)(x, y)
    assert (fit - complexity + prior - together).detach().abs() < 1e-12


def test_a_likelihood_that_is_not_quadratic_is_refused_an_unbiased_bound():
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    model, _ = build("patches", softmax, 3)
    with pytest.raises(TypeError, match="SoftmaxLikelihood is not quadratic"):
        OrbitVariationalELBO(softmax, model, 20, 2, unbiased=True)


@pytest.mark.parametrize("both", [True, False])
def test_one_bound_is_chosen(both):
    model, _ = build("patches", GaussianLikelihood())
    with pytest.raises(ValueError, match="Choose one of two bounds"):
        OrbitVariationalELBO(model.likelihood, model, 20, 2, unbiased=both, jensen=both)


@pytest.mark.parametrize("number", [1, 5])
def test_a_number_of_elements_that_does_not_fit_is_refused(number):
    model, _ = build("patches", GaussianLikelihood())
    with pytest.raises(ValueError, match="at least 2 and at most 4"):
        OrbitVariationalELBO(model.likelihood, model, 20, number)


def test_kernels_without_orbits_are_refused():
    model = sparse(rbf(), 3, GaussianLikelihood())
    with pytest.raises(TypeError, match="the kernel is a RBFKernel"):
        OrbitVariationalELBO(model.likelihood, model, 20, 2)
    both = sparse(convolutional() + convolutional(), 4, GaussianLikelihood())
    with pytest.raises(TypeError, match="the kernel is a AdditiveKernel"):
        OrbitVariationalELBO(both.likelihood, both, 20, 2)


def test_the_strategy_of_upstream_is_refused():
    class Plain(ApproximateGP):
        def __init__(self):
            q = CholeskyVariationalDistribution(3)
            super().__init__(VariationalStrategy(self, torch.zeros(3, 2), q))
            self.covar_module = RBFKernel()

    with pytest.raises(TypeError, match="this one has a VariationalStrategy"):
        OrbitVariationalELBO(GaussianLikelihood(), Plain(), 20, 2)


class Looks(TorchDispatchMode):
    """Who brings values to the host, each of which stops a device."""

    def __init__(self):
        super().__init__()
        self.callers = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            files = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
            packages = [file for file in files if "torch" not in file.parts]
            self.callers.append(packages[-1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["unbiased", "jensen"])
def test_a_step_looks_at_no_values_but_where_upstream_does(form):
    """Upstream looks at its flags and at what a factorisation says."""
    likelihood, y, _, _ = likelihood_and_targets("gaussian")
    model, x = build("patches", likelihood)
    elbo = OrbitVariationalELBO(likelihood, model, 50, 2, **{form: True})
    with Looks() as looks:
        elbo(x, y)
    assert looks.callers  # of upstream
    ours = Path(gpbridge.__file__).parent
    assert not [file for file in looks.callers if ours in file.parents]


def test_inputs_of_a_step_are_checked_by_shape_and_type():
    model, x = build("patches", GaussianLikelihood())
    elbo = OrbitVariationalELBO(model.likelihood, model, 50, 2)
    y = torch.zeros(N, dtype=DOUBLE)
    for change, error, message in (
        ((x[0], y), ShapeError, "must be ``n x d``"),
        ((x[None], y[None]), ShapeError, "must be ``n x d``.*flatten"),
        ((x, y[:2]), ShapeError, "target has 2"),
        ((x, y[:, None]), ShapeError, r"target must be ``4``.*squeeze\(-1\)"),
        ((x.long(), y), TypeError, "float32 or float64"),
        ((x, [0.0]), TypeError, "must be a torch.Tensor"),
    ):
        with pytest.raises(error, match=message):
            elbo(*change)


def test_a_likelihood_of_another_number_of_outputs_is_refused():
    model, _ = build("patches", MultitaskGaussianLikelihood(num_tasks=2), 2)
    with pytest.raises(ShapeError, match="of 1 latent output, but there are 2"):
        OrbitVariationalELBO(GaussianLikelihood(), model, 20, 2)
