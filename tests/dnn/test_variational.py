"""Mean-field variational inference against the optimum of its bound."""

import copy
import math
import pickle

import pytest
import torch
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import nn
from torch.distributions import Normal, kl_divergence

from gpbridge.checks import ShapeError
from gpbridge.dnn.priors import GaussianPrior, LaplacePrior, WeightPrior
from gpbridge.dnn.variational import MeanFieldVI
from gpbridge.dnn.variational_fit import fit_mean_field, fit_variational
from gpbridge.testing import assert_module_unchanged
from gpbridge.types import WeightPosterior
from tests import oracles_weight_space as oracles
from tests.dnn.variational_problems import gaussian, mlp

SOFTMAX = SoftmaxLikelihood(num_classes=3, mixing_weights=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


class Mixed(nn.Module):
    """Convolution, normalisation and dense layers, nested."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3, padding=1)})
        self.norm = nn.LayerNorm(2)
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(2, 3))

    def forward(self, x):
        h = torch.relu(self.body["conv"](x)).mean((-2, -1))
        return self.head(self.norm(h))


@pytest.fixture(scope="module")
def regression():
    X = random(30, 3, seed=1) @ torch.tensor(
        [[1.0, 0.8, 0.0], [0.0, 0.6, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64
    )
    return X, X @ torch.tensor([1.0, -0.5, 0.3]).double() + 0.5 * random(30, seed=2)


def linear(local="exact", **options):
    return MeanFieldVI(
        nn.Linear(3, 1, bias=False).double(),
        gaussian(0.25),
        30,
        prior=WeightPrior(GaussianPrior(0.8)),
        local_reparameterization=local,
        **options,
    )


def test_a_linear_model_is_fitted_to_the_optimum_of_the_bound(regression):
    X, y = regression
    vi = linear()
    fit_variational(
        vi, X, y[:, None], epochs=300, learning_rate=0.05, num_samples=3, progress=False
    )
    mean, variance = oracles.mean_field_optimum(X, y, 0.25, 0.8)
    torch.testing.assert_close(vi.variance.detach(), variance, rtol=0.1, atol=0)
    assert ((vi.mean - mean) / variance.sqrt()).abs().max() < 0.1
    # Mean-field variances are smaller than marginal ones: the test could fail.
    _, covariance = oracles.linear_regression_posterior(X, y, 0.25, 0.8)
    assert (covariance.diagonal() / variance).max() > 1.5


@pytest.mark.parametrize("local", ["exact", "none"])
def test_the_expected_gradient_vanishes_at_the_optimum(regression, local):
    """And only there: the divergence of normals is convex in these parameters."""
    X, y = regression
    vi, generator, repeats = linear(local), seeded(5), 250
    mean, variance = oracles.mean_field_optimum(X, y, 0.25, 0.8)
    errors = []
    for shift in (0.0, 1.0):
        with torch.no_grad():
            vi.mean.copy_(mean + shift * variance.sqrt())
            vi.rho.copy_(torch.expm1((1 + shift) * variance.sqrt()).log())
        gradients = torch.stack(
            [
                torch.cat(
                    torch.autograd.grad(
                        vi.loss(X, y[:, None], generator), [vi.mean, vi.rho]
                    )
                )
                for _ in range(repeats)
            ]
        )
        errors.append(gradients.mean(0) / (gradients.std(0) / repeats**0.5))
    assert errors[0].abs().max() < 4 and errors[1].abs().max() > 6


@pytest.mark.parametrize("local", ["exact", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_the_loss_is_the_bound_per_datum(regression, temperature, local):
    X, y = regression
    vi = linear(local, initial_std=0.15, likelihood_temperature=temperature)
    generator = seeded(3)
    with torch.no_grad():
        losses = torch.stack([vi.loss(X, y[:, None], generator) for _ in range(300)])
    bound = oracles.linear_regression_evidence_bound(
        X, y, 0.25, 0.8, vi.mean.detach(), vi.variance.detach()
    )
    kl = kl_divergence(Normal(vi.mean, vi.variance.sqrt()), Normal(0.0, 0.8**0.5)).sum()
    exact = (-bound + (temperature - 1) * kl) / 30
    error = losses.mean() - exact
    assert abs(error) < 4.5 * losses.std() / 300**0.5
    assert losses.std() / 300**0.5 < 0.03 * exact.abs()


def test_the_divergence_is_that_of_torch_summed_over_weights():
    network = mlp()
    prior = WeightPrior(
        GaussianPrior(2.0), [(lambda name: name == "0.bias", GaussianPrior(0.1))]
    )
    vi = MeanFieldVI(network, gaussian(), 12, prior=prior, initial_std=0.3)
    with torch.no_grad():
        vi.rho += 0.3 * random(17)
    std = vi.net.unflatten(vi.variance.sqrt())
    expected = sum(
        kl_divergence(
            Normal(p, std[name]), Normal(0.0, (0.1 if name == "0.bias" else 2.0) ** 0.5)
        ).sum()
        for name, p in network.named_parameters()
    )
    torch.testing.assert_close(vi.kl().detach(), expected.detach())


@pytest.mark.parametrize("outputs", [1, 3])
def test_both_forms_have_one_expected_loss_and_the_local_one_less_noise(outputs):
    torch.manual_seed(1)
    network, X = mlp(outputs), random(40, 2, seed=1)
    likelihood, Y = gaussian(), random(40, 1, seed=2)
    if outputs == 3:
        likelihood, Y = SOFTMAX, torch.arange(40) % 3
    losses, spread, repeats = [], [], 100
    for how in ("exact", "none"):
        vi = MeanFieldVI(
            network, likelihood, 40, initial_std=0.3, local_reparameterization=how
        )
        generator, values, gradients = seeded(7), [], []
        for _ in range(repeats):
            loss = vi.loss(X, Y, generator)
            gradient = torch.autograd.grad(loss, [vi.mean, vi.rho])
            values.append(loss.detach())
            gradients.append(torch.cat(gradient))
        losses.append(torch.stack(values))
        spread.append(torch.stack(gradients).var(0).sum())
    difference = losses[0].mean() - losses[1].mean()
    scale = ((losses[0].var() + losses[1].var()) / repeats).sqrt()
    assert abs(difference) < 4.5 * scale and scale < 0.1 * losses[1].mean()
    assert spread[0] < 0.2 * spread[1]


def test_independent_noise_at_every_position_sees_too_little_of_it():
    """Why convolutions are exact by default: averaging over positions removes noise."""
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    X, variances = random(4, 36, seed=1), {}
    for how in ("exact", "all", "none"):
        vi = MeanFieldVI(
            network,
            gaussian(),
            4,
            initial_std=0.5,
            local_reparameterization=how,
            input_shape=(1, 6, 6),
        )
        generator = seeded(3)
        with torch.no_grad():
            outputs = [vi.sample_outputs(X, generator) for _ in range(200)]
        variances[how] = torch.stack(outputs).var(0).mean()
    assert torch.equal(variances["exact"], variances["none"])
    assert variances["all"] < 0.5 * variances["none"]


def test_a_nested_network_of_many_kinds_of_layers_is_fitted():
    torch.manual_seed(0)
    network, X = Mixed().double().train(), random(30, 36, seed=1)
    X[:, :12] += 2 * (torch.arange(30) % 3)[:, None]
    Y, losses = torch.arange(30) % 3, []
    with assert_module_unchanged(network):
        vi = fit_mean_field(
            network,
            X,
            Y,
            input_shape=(1, 6, 6),
            epochs=60,
            learning_rate=0.03,
            progress=False,
            callback=lambda epoch, vi, loss: losses.append(loss),
        )
    assert len(losses) == 60 and losses[-1] < losses[0]
    draws = vi.draw(4, seeded())
    assert isinstance(vi, WeightPosterior) and draws(X).shape == (4, 30, 3)
    assert vi._local == {"head.1.weight", "head.1.bias"}


def test_the_noise_is_learnt_unless_it_is_fixed():
    X, Y = random(30, 2, seed=1), random(30, 1, seed=2)
    for learn in (True, False):
        likelihood = gaussian(0.05, learn)
        vi = MeanFieldVI(mlp(), likelihood, 30)
        fit_variational(vi, X, Y, epochs=20, progress=False, learning_rate=0.05)
        moved = abs(vi.likelihood.noise.item() - 0.05) > 1e-3
        assert moved == learn
        torch.testing.assert_close(likelihood.noise.item(), 0.05)  # a copy is learnt


def test_noise_of_its_own_at_every_point():
    X, Y = random(9, 2, seed=1), random(9, 1, seed=2)
    noise = 0.1 + torch.rand(9, generator=seeded(), dtype=torch.float64)
    likelihood = FixedNoiseGaussianLikelihood(noise)
    vi = MeanFieldVI(mlp(), likelihood, 9, initial_std=1e-6)
    expected = -Normal(vi.net(X), noise.sqrt()[:, None]).log_prob(Y).mean()
    loss = vi.loss(X[:4], Y[:4], seeded(), noise=noise[:4])
    rest = vi.loss(X[4:], Y[4:], seeded(), noise=noise[4:])
    found = (4 * loss + 5 * rest) / 9 - vi.kl() / 9
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert len(fit_variational(vi, X, Y, epochs=2, batch_size=4, progress=False)) == 2


def test_fixed_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)
            self.out = nn.Linear(2, 1)

        def forward(self, x):
            return self.out(self.second(torch.tanh(self.first(x))))

    network = Tied().double()
    vi = MeanFieldVI(network, gaussian(), 5)
    assert vi.net.names == ["first.weight", "second.bias", "out.weight", "out.bias"]
    X, Y = random(5, 2), random(5, 1)
    fit_variational(vi, X, Y, epochs=2, progress=False)
    assert torch.equal(vi.net.network.first.bias, network.first.bias)
    assert vi._local == {"out.weight", "out.bias"}


def test_one_datum_and_many_samples():
    vi = MeanFieldVI(mlp(), gaussian(), 1)
    X, Y = random(1, 2), random(1, 1)
    losses = [vi.loss(X, Y, seeded(), s).item() for s in (1, 50)]
    assert all(math.isfinite(loss) for loss in losses)
    assert (
        len(fit_variational(vi, random(1, 2), random(1, 1), epochs=1, progress=False))
        == 1
    )


def test_the_posterior_is_a_gaussian_that_stays():
    network = mlp()
    vi = MeanFieldVI(network, gaussian(), 12, initial_std=0.2)
    posterior = vi.posterior()
    torch.testing.assert_close(posterior.variance, torch.full_like(vi.mean, 0.04))
    assert posterior.root is None
    start = torch.nn.utils.parameters_to_vector(network.parameters())
    with torch.no_grad():
        vi.mean += 1
    assert torch.equal(posterior.mean, start)


def test_a_loop_resumed_from_its_states_is_the_same_bit_for_bit():
    X, Y = random(12, 2), random(12, 1, seed=1)

    def parts(seed):
        torch.manual_seed(seed)
        vi = MeanFieldVI(mlp(), gaussian(learn=True), 12)
        weights = [p for p in vi.parameters() if p.requires_grad]
        return vi, torch.optim.Adam(weights, 0.01), seeded(seed)

    def steps(vi, optimizer, generator):
        for _ in range(3):
            optimizer.zero_grad()
            vi.loss(X, Y, generator).backward()
            optimizer.step()

    whole = parts(0)
    steps(*whole)
    half = parts(5)
    half[0].load_state_dict(copy.deepcopy(whole[0].state_dict()))
    half[1].load_state_dict(copy.deepcopy(whole[1].state_dict()))
    half[2].set_state(whole[2].get_state())
    twins = copy.deepcopy(whole[0]), pickle.loads(pickle.dumps(whole[0]))
    for twin in twins:
        assert torch.equal(twin.mean, whole[0].mean)
    steps(*whole)
    steps(*half)
    for p, q in zip(whole[0].parameters(), half[0].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_data": 0}, "num_data must be a whole number"),
        ({"initial_std": 0.0}, "initial_std must be positive"),
        ({"likelihood_temperature": -1.0}, "likelihood_temperature must be positive"),
        ({"local_reparameterization": "yes"}, "must be one of 'exact', 'all', 'none'"),
        ({"prior": WeightPrior(LaplacePrior())}, "0.weight has a LaplacePrior"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MeanFieldVI(mlp(), gaussian(), **({"num_data": 12} | options))


def test_bad_data():
    vi, X, Y = MeanFieldVI(mlp(), gaussian(), 12), random(12, 2), random(12, 1)
    with pytest.raises(ShapeError, match="batch is empty"):
        vi.loss(X[:0], Y[:0])
    with pytest.raises(TypeError, match="X must be torch.float64 as the weights"):
        vi.loss(X.float(), Y)
    with pytest.raises(ValueError, match="has 5 rows, but num_data is 12"):
        fit_variational(vi, X[:5], Y[:5])
    with pytest.raises(ValueError, match="epochs must be a whole number"):
        fit_variational(vi, X, Y, epochs=0)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        fit_variational(vi, X, Y, learning_rate=0.0)
