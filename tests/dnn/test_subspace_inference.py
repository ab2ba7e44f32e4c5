"""Inference in a subspace against linear regression."""

import copy
import math
import pickle

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.likelihoods import (
    SoftmaxLikelihood,
)
from torch import nn

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.checks import ShapeError
from gpbridge.dnn.subspace import Subspace
from gpbridge.dnn.subspace_inference import sample_subspace
from gpbridge.dnn.subspace_likelihood import SubspaceLikelihood
from gpbridge.dnn.subspace_methods import (
    EllipticalSliceSampling,
    HamiltonianMonteCarlo,
    VariationalInference,
)
from gpbridge.functional import FunctionalNet
from gpbridge.likelihoods import log_prob
from gpbridge.testing import assert_module_unchanged
from gpbridge.weights import EmpiricalWeights, GaussianWeights
from tests import oracles_weight_space as oracles
from tests.dnn.subspace_problems import METHODS, Block, gaussian, linear_problem

NOISE, STD = 0.3, 1.5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def exact(subspace, X, Y, temperature):
    wide = torch.cat([X, torch.ones(len(X), 1)], 1).double()
    residual = Y[:, 0] - wide @ subspace.origin
    features = wide @ subspace.basis.mT
    return oracles.tempered_regression(features, residual, NOISE, temperature, STD)


def log_evidence(subspace, X, Y, temperature):
    """Where the Gaussian is exact the bound is the log of the integral."""
    wide = torch.cat([X, torch.ones(len(X), 1)], 1).double()
    features, n = wide @ subspace.basis.mT, len(X)
    # N(y | f, v)^(1/T) is N(y | f, T v) times a constant.
    K = STD**2 * features @ features.mT + NOISE * temperature * torch.eye(n).double()
    normal = torch.distributions.MultivariateNormal(wide @ subspace.origin, K)
    constant = math.log(2 * math.pi * NOISE * temperature)
    constant -= math.log(2 * math.pi * NOISE) / temperature
    return normal.log_prob(Y[:, 0]).item() + 0.5 * n * constant


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
@pytest.mark.parametrize(
    "method",
    [
        EllipticalSliceSampling(num_samples=2, num_chains=2500, burn_in=10),
        HamiltonianMonteCarlo(num_samples=10, num_chains=300, warm_up=40, num_steps=5),
    ],
    ids=["slice", "hamiltonian"],
)
def test_chains_of_a_linear_model_are_bayesian_linear_regression(method, temperature):
    subspace, X, Y = linear_problem()
    mean, covariance = exact(subspace, X, Y, temperature)
    # A posterior far narrower than the prior is reached slowly by slices. Here they
    # start in it, must stay in it, and must forget where they came from.
    start = None
    if isinstance(method, EllipticalSliceSampling):
        L = torch.linalg.cholesky(covariance)
        start = mean + normal(method.num_chains, 3, seed=5) @ L.mT
    run = sample_subspace(
        *(subspace, X, Y, gaussian()),
        method=method,
        temperature=temperature,
        prior_std=STD,
        initial=start,
        generator=seeded(),
        progress=False,
    )
    z = run.samples.flatten(0, 1)
    std = covariance.diagonal().sqrt()
    # Standard errors of 2500 draws are two percent.
    assert ((z.mean(0) - mean) / std).abs().max() < 0.06
    off = (z.mT.cov() - covariance) / torch.outer(std, std)
    assert off.abs().max() < 0.09
    if start is not None:
        both = torch.cat([start, run.samples[:, -1]], 1).mT.corrcoef()[:3, 3:]
        assert both.abs().max() < 0.5
    torch.testing.assert_close(run.posterior.weights, subspace.weights(z))


@pytest.mark.parametrize("temperature", [0.5, 10.0])
@pytest.mark.parametrize("full", [False, True])
def test_the_gaussian_of_a_linear_model_is_the_optimum_of_its_bound(full, temperature):
    problem = linear_problem()
    mean, covariance = exact(*problem, temperature)
    run = sample_subspace(
        *(*problem, gaussian()),
        method=VariationalInference(200, 0.1, num_draws=256, full_covariance=full),
        temperature=temperature,
        prior_std=STD,
        generator=seeded(),
        progress=False,
    )
    torch.testing.assert_close(run.mean, mean, atol=1e-3, rtol=1e-3)
    found = run.root @ run.root.mT
    if full:
        std = covariance.diagonal().sqrt()
        assert ((found - covariance) / torch.outer(std, std)).abs().max() < 0.04
        assert run.elbo[-50:].mean().item() == pytest.approx(
            log_evidence(*problem, temperature), abs=0.1
        )
    else:
        variances = oracles.mean_field(covariance)
        torch.testing.assert_close(found.diagonal(), variances, rtol=0.04, atol=0)
        assert bool((variances < covariance.diagonal()).all())
    B = problem[0].basis
    torch.testing.assert_close(run.posterior.covariance.to_dense(), B.mT @ found @ B)
    assert len(run.elbo) == run.num_calls == 200 and run.elbo[-1] > run.elbo[0]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n", [1, 6])
def test_every_method_draws_functions_of_a_module_it_does_not_change(name, n):
    torch.manual_seed(0)
    network = Block()
    X, Y = normal(n, 2).float(), normal(n, 1).float()
    before = torch.get_rng_state()
    with assert_module_unchanged(network):
        subspace = Subspace.random(FunctionalNet(network), None, 3, generator=seeded())
        runs = [
            sample_subspace(
                *(subspace, X, Y, gaussian().float()),
                method=METHODS[name],
                generator=seeded(),
                progress=False,
            )
            for _ in range(2)
        ]
    assert torch.equal(torch.get_rng_state(), before)
    posterior, twin = (run.posterior for run in runs)
    kind = EmpiricalWeights if name in ("slice", "hamiltonian") else GaussianWeights
    assert isinstance(posterior, kind)
    draws = posterior.draw(5, seeded(1))
    assert draws(X).shape == (5, n, 1) and draws(X).dtype == X.dtype
    for other in (
        twin,
        copy.deepcopy(posterior),
        pickle.loads(pickle.dumps(posterior)),
    ):
        assert torch.equal(other.draw(5, seeded(1))(X), draws(X))
    target = SubspaceLikelihood(subspace, X, Y, gaussian().float(), temperature=3.0)
    z = normal(2, 3).float()
    for other in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        assert torch.equal(other(z), target(z))


def test_few_draws_have_no_diagnostics_and_starts_are_taken():
    subspace, X, Y = linear_problem()
    start = normal(2, 3, seed=4)
    run = sample_subspace(
        *(subspace, X, Y, gaussian()),
        method=EllipticalSliceSampling(num_samples=2, burn_in=0),
        temperature=1e12,
        prior_std=1e-9,
        initial=start,
        generator=seeded(),
        progress=False,
    )
    assert run.r_hat is None and run.effective_sample_size is None
    # The prior is far narrower than the start: the first ellipse passes through it.
    cosine = nn.functional.cosine_similarity(run.samples[:, 0], start).abs()
    torch.testing.assert_close(cosine, torch.ones(2).double())


def test_batch_norm_takes_the_statistics_of_each_pass():
    torch.manual_seed(0)
    network = Block(norm=True).double()
    subspace = Subspace.random(FunctionalNet(network), None, 3, generator=seeded())
    X, Y = 3 + 2 * normal(20, 2), normal(20, 1)
    z = normal(2, 3)
    with assert_module_unchanged(network):
        by_batch = SubspaceLikelihood(subspace, X, Y, gaussian())(z)
        stored = SubspaceLikelihood(subspace, X, Y, gaussian(), batch_norm="stored")(z)
    for i in range(2):
        twin = copy.deepcopy(network).train()
        nn.utils.vector_to_parameters(subspace.weights(z[i]), twin.parameters())
        expected = log_prob(gaussian(), twin(X), Y).sum()
        torch.testing.assert_close(by_batch[i], expected)
        expected = log_prob(
            gaussian(),
            subspace.net.apply_network(
                subspace.net.unflatten(subspace.weights(z[i])), X
            ),
            Y,
        ).sum()
        torch.testing.assert_close(stored[i], expected)
    assert (by_batch - stored).abs().min() > 0.5
    # Refreshed statistics are those that the likelihood has seen, up to n / (n - 1).
    run = sample_subspace(
        *(subspace, X, Y, gaussian()), method=METHODS["slice"], progress=False
    )
    draws = refresh_batch_norm(run.posterior.draw(), [X])
    refreshed = log_prob(gaussian(), draws(X), Y).sum(-1).reshape(2, 4)
    torch.testing.assert_close(refreshed, run.log_densities, rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="at least 2 rows in every pass, but 20 rows"):
        SubspaceLikelihood(subspace, X, Y, gaussian(), batch_size=1)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"prior_std": 0.0}, ValueError, "prior_std must be positive"),
        ({"prior_std": math.nan}, ValueError, "prior_std must be positive"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number"),
        ({"batch_norm": "train"}, ValueError, "batch_norm must be one of 'batch'"),
        ({"X": torch.zeros(12)}, ShapeError, "X must be ``... x n x d``"),
        ({"X": torch.zeros(1, 12, 4)}, ShapeError, "X must be ``n x d``"),
        ({"Y": torch.zeros(11, 1)}, ShapeError, "numbers of rows must agree"),
        ({"Y": torch.zeros(12)}, ShapeError, "Y must be ``12 x 1``"),
        (
            {"X": torch.zeros(0, 4), "Y": torch.zeros(0, 1)},
            InputDataError,
            "X has no rows",
        ),
        ({"initial": torch.zeros(4)}, ShapeError, "initial must be ``3`` coordinates"),
        (
            {"initial": torch.zeros(5, 3)},
            ShapeError,
            "has 5 rows for 2 chains. Pass num_chains=5",
        ),
        (
            {"method": EllipticalSliceSampling(num_chains=0)},
            ValueError,
            "num_chains must be a whole number",
        ),
        (
            {"method": VariationalInference(initial_std=0.0)},
            ValueError,
            "initial_std must be positive",
        ),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    subspace, X, Y = linear_problem()
    given = {"X": X, "Y": Y, "likelihood": gaussian(), **change}
    with pytest.raises(error, match=message):
        sample_subspace(subspace, **given, progress=False)


def test_a_bound_that_diverges_is_an_error():
    subspace, X, Y = linear_problem()

    def wall(f, y):
        return torch.where(f.abs() < 1e3, -(y - f).square(), torch.nan)[..., 0]

    with pytest.raises(RuntimeError, match="The bound is nan in step 0"):
        sample_subspace(
            *(subspace, X, Y, wall),
            method=VariationalInference(initial_std=1e4),
            progress=False,
        )


def test_images_are_rows_and_labels_have_their_likelihood():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )
    net = FunctionalNet(network, input_shape=(1, 4, 4))
    subspace = Subspace.random(net, None, 2, generator=seeded())
    X, Y = normal(7, 16).float(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    target = SubspaceLikelihood(subspace, X, Y, likelihood, batch_size=3)
    origin = -nn.functional.cross_entropy(network(X.reshape(7, 1, 4, 4)), Y)
    torch.testing.assert_close(target(torch.zeros(1, 2))[0].float(), 7 * origin)
    run = sample_subspace(
        *(subspace, X, Y, likelihood), method=METHODS["variational"], progress=False
    )
    assert run.posterior.draw(3)(X).shape == (3, 7, 3)


def test_something_else_in_place_of_a_subspace_or_a_method_is_named():
    network, X = nn.Linear(4, 1).double(), normal(9, 4)
    a, b = [
        Subspace.random(net, None, 2, generator=seeded())
        for net in (network, FunctionalNet(network))
    ]
    assert torch.equal(a.basis, b.basis) and torch.equal(a.origin, b.origin)
    with pytest.raises(TypeError, match="net must be a network, but is list"):
        Subspace.random([network], None, 2)
    with pytest.raises(TypeError, match="must be a SWAG.*but is a GaussianWeights"):
        Subspace.pca(GaussianWeights(FunctionalNet(network), torch.zeros(5).double()))
    for method in ("ess", EllipticalSliceSampling):
        with pytest.raises(TypeError, match=r"method must be EllipticalSliceSampling"):
            sample_subspace(a, X, X[:, :1], gaussian(), method=method)
    with pytest.raises(TypeError, match=r"be a Subspace, but is a Linear. Try"):
        sample_subspace(network, X, X[:, :1], gaussian())
    found = sample_subspace(a, X, X[:, :1], gaussian(), method=METHODS["slice"])
    assert repr(found).startswith("SubspaceChains(chains=2, draws=4, coordinates=2")
    found = sample_subspace(a, X, X[:, :1], gaussian(), method=METHODS["variational"])
    assert repr(found).startswith("SubspaceGaussian(2 coordinates, 3 steps, bound")
