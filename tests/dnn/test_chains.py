"""Chains against Bayesian regression, and as a posterior over functions."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from torch import nn

from gpbridge.checks import ReliabilityWarning, ShapeError
from gpbridge.dnn import DivergedError
from gpbridge.dnn.chains import SGMCMC, sample_sgmcmc
from gpbridge.dnn.priors import GaussianPrior, WeightPrior
from gpbridge.dnn.sgmcmc import SGHMC, SGLD
from gpbridge.testing import assert_module_unchanged
from gpbridge.types import WeightPosterior
from tests import cases
from tests import oracles_weight_space as oracles


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def mlp():
    return nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 1)))


def data(n=30):
    X = random(n, 2)
    return X, X.sum(-1, keepdim=True) + 0.1 * random(n, 1, seed=1)


def gaussian(noise):
    likelihood = GaussianLikelihood().double()
    likelihood.noise = noise
    return likelihood


SHORT = {"num_cycles": 2, "steps_per_cycle": 20, "samples_per_cycle": 3}


@pytest.mark.parametrize(
    ("sampler", "rate", "temperature"),
    [
        (SGLD, 0.02, 0.2),
        (partial(SGHMC, friction=0.3), 0.006, 1.0),
        pytest.param(SGLD, 0.02, 1.0, marks=pytest.mark.slow),
        pytest.param(partial(SGHMC, friction=0.3), 0.006, 0.2, marks=pytest.mark.slow),
    ],
)
def test_a_linear_model_has_the_law_of_bayesian_regression(sampler, rate, temperature):
    X = random(25, 2, seed=3) @ torch.tensor([[1.0, 0.6], [0.0, 0.8]]).double()
    y = X @ torch.tensor([1.0, -0.5]).double() + 0.5 * random(25, seed=4)
    # A likelihood to the power 1 / T is one with T times the noise.
    mean, covariance = oracles.linear_regression_posterior(
        X, y, 0.25 * temperature, 0.1
    )
    std, many = covariance.diagonal().sqrt(), 1000
    chains = SGMCMC(
        nn.Linear(2, 1, bias=False).double(),
        X,
        y[:, None],
        gaussian(0.25),
        sampler=sampler,
        learning_rate=rate,
        num_cycles=1,
        steps_per_cycle=200,
        samples_per_cycle=1,
        cyclical=False,
        num_chains=many,
        initial_weights=(mean + std).repeat(many, 1),
        prior=WeightPrior(GaussianPrior(0.1)),
        likelihood_temperature=temperature,
        generator=seeded(2),
    )
    posterior = chains.run(progress=False).posterior()
    assert ((posterior.weights.mean(0) - mean) / std).abs().max() < 5 / many**0.5
    found = posterior.weights.mT.cov() / (std[:, None] * std)
    expected = covariance / (std[:, None] * std)
    assert (found - expected).abs().max() < 0.05 + 3.5 * (2 / many) ** 0.5
    assert expected[0, 1].abs() > 0.3  # correlated: more than two variances are right


def test_chains_are_a_posterior_over_functions_and_the_network_stays():
    network = mlp().double().train()
    X, Y = data()
    with assert_module_unchanged(network):
        posterior = sample_sgmcmc(
            network, X, Y, num_chains=2, progress=False, batch_size=8, **SHORT
        )
    assert isinstance(posterior, WeightPosterior) and posterior.num_members == 12
    assert len(posterior.weights.unique(dim=0)) == 12
    assert posterior.draw(5, seeded())(X).shape == (5, 30, 1)


def test_samples_are_the_states_after_evenly_spread_steps():
    X, Y = data()
    options = {**SHORT, "sampling_fraction": 0.3, "progress": False}
    progress = options.pop("progress")
    chains = SGMCMC(mlp().double(), X, Y, num_chains=2, **options)
    assert chains.kept_steps == [15, 17, 19]
    states, switches = [], []
    for _ in range(40):
        chains.run(1, progress)
        states.append(chains.weights.detach().clone())
        switches.append(chains.optimizer.param_groups[0]["noise"])
    expected = [states[k] for k in (15, 17, 19, 35, 37, 39)]
    assert torch.equal(chains.samples, torch.stack(expected))
    assert torch.equal(chains.posterior().weights, torch.cat(expected))
    assert switches == 2 * (14 * [False] + 6 * [True])
    assert chains.history.shape == (40, 2) and chains.num_samples == 6
    assert chains.run(progress=False).step == 40  # nothing is left


@pytest.mark.parametrize("batch_size", [7, 100])
def test_a_chain_alone_is_the_user_s_own_loop(batch_size):
    """With all rows, one step is the optimizer's on the log posterior written out."""
    X, Y = data()
    network, likelihood = mlp().double(), gaussian(0.25)
    chains = SGMCMC(
        network, X, Y, likelihood, batch_size=batch_size, generator=seeded(3), **SHORT
    )
    start = chains.weights.detach().clone()
    first = -torch.distributions.Normal(network(X), 0.5).log_prob(Y).mean()
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(start).sum()
    chains.run(1, progress=False)
    loss = float(chains.history[0, 0])
    expected = float((first - prior / 30).detach())
    assert (abs(loss - expected) < 1e-9) == (batch_size == 100)
    assert likelihood.raw_noise.grad is None


def test_one_rate_serves_all_temperatures():
    X, Y = data()
    first = [
        SGMCMC(
            mlp_of_one_start(),
            X,
            Y,
            gaussian(0.25),
            likelihood_temperature=t,
            prior=WeightPrior(GaussianPrior(1e12)),
            **SHORT,
        )
        .run(1, progress=False)
        .weights.detach()
        for t in (0.01, 1.0)
    ]
    torch.testing.assert_close(*first)  # the first step has no noise


def mlp_of_one_start():
    torch.manual_seed(3)
    return mlp().double()


@pytest.mark.parametrize("sampler", [SGLD, SGHMC])
def test_a_run_resumed_from_its_state_is_the_same_bit_for_bit(sampler, tmp_path):
    X, Y = data()
    options = {**SHORT, "num_chains": 2, "batch_size": 5, "sampler": sampler}
    whole = SGMCMC(mlp().double(), X, Y, generator=seeded(4), **options)
    whole.run(27, progress=False)
    torch.save(whole.state_dict(), tmp_path / "state")
    half = SGMCMC(mlp().double(), X, Y, **options)
    half.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    twins = half, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))
    expected = whole.run(progress=False).posterior().weights
    for twin in twins:
        found = twin.run(progress=False)
        assert torch.equal(found.posterior().weights, expected)
        assert torch.equal(found.history, whole.history)


def test_seeds_decide_and_the_global_state_does_not():
    X, Y = data()
    network, before = mlp().double(), torch.get_rng_state()
    found = [
        sample_sgmcmc(network, X, Y, generator=seeded(s), progress=False, **SHORT)
        for s in (1, 1, 2)
    ]
    assert torch.equal(found[0].weights, found[1].weights)
    assert not torch.equal(found[0].weights, found[2].weights)
    assert torch.equal(before, torch.get_rng_state())


def test_a_run_that_diverges_keeps_the_last_good_state():
    X, Y = data()
    chains = SGMCMC(mlp().double(), X, Y, num_chains=2, learning_rate=0.001, **SHORT)
    chains.run(25, progress=False)
    weights, samples = chains.weights.detach().clone(), chains.samples.clone()
    chains.learning_rate = 1e200
    with pytest.raises(DivergedError, match=r"step 25.*\.last_good.*learning_rate=0.0"):
        chains.run(progress=False)
    assert torch.equal(chains.weights, weights) and chains.step == 25
    assert chains.num_samples == 3
    assert torch.equal(chains.posterior().weights, samples[:3].flatten(0, 1))
    chains.learning_rate = 0.001
    assert bool(chains.run(progress=False).posterior().weights.isfinite().all())
    with pytest.raises(DivergedError) as caught:
        sample_sgmcmc(mlp().double(), X, Y, learning_rate=1e200, **SHORT)
    assert caught.value.last_good.step == 0


def test_finished_chains_go_on_with_more_cycles_bit_for_bit():
    X, Y = data()
    network = mlp_of_one_start()
    done = SGMCMC(network, X, Y, **SHORT).run(progress=False)
    with pytest.raises(RuntimeError, match="steps are made. To go on, build the same"):
        done.run(10, progress=False)
    longer = SGMCMC(network, X, Y, **SHORT | {"num_cycles": 3})
    longer.load_state_dict(done.state_dict())
    longer.run(progress=False)
    whole = SGMCMC(network, X, Y, **SHORT | {"num_cycles": 3}).run(progress=False)
    assert torch.equal(longer.samples, whole.samples)
    assert torch.equal(longer.losses, whole.losses)
    with pytest.raises(ValueError, match="Build them with num_cycles=3 or more"):
        SGMCMC(network, X, Y, **SHORT).load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_X": random(30, 2, seed=8)}, "its data is"),
        ({"steps_per_cycle": 30}, "its steps of a cycle is 20, and now it is 30"),
        ({"batch_size": 5}, "its batch size is"),
        ({"sampler": SGLD}, "its sampler is SGHMC, and now it is SGLD"),
    ],
)
def test_the_state_of_another_run_is_refused(change, message):
    X, Y = data()
    given = {"network": mlp().double(), "train_X": X, "train_Y": Y, **SHORT}
    state = SGMCMC(**given).state_dict()
    with pytest.raises(ValueError, match=f"state is of another run: {message}"):
        SGMCMC(**{**given, **change}).load_state_dict(state)


def test_the_default_rate_follows_the_noise():
    X, Y = data()
    for noise, rate in [(0.01, 1e-4), (4.0, 0.01)]:
        chains = SGMCMC(mlp().double(), X, Y, gaussian(noise), **SHORT)
        assert abs(chains.learning_rate - rate) < 1e-8
        assert chains.run(progress=False).history.isfinite().all()
    labels = (Y > 0).long().flatten()
    two = nn.Linear(2, 2).double()
    assert SGMCMC(two, X, labels, **SHORT).learning_rate == 0.01


@pytest.mark.parametrize("sampler", [torch.optim.SGD, "sgld"])
def test_samplers_that_are_none_are_refused(sampler):
    X, Y = data()
    with pytest.raises(TypeError, match=r"sampler must build an optimizer.*Pass SGHMC"):
        SGMCMC(mlp().double(), X, Y, sampler=sampler)


def test_samples_that_are_one_point_are_seen():
    X, Y = data()
    network = nn.Linear(2, 1)
    with torch.no_grad():  # where descent ends
        solution = torch.linalg.lstsq(torch.cat([X, torch.ones(30, 1)], 1), Y).solution
        network.weight.copy_(solution[:2].mT), network.bias.copy_(solution[2])
    options = {"likelihood_temperature": 1e-30, "num_cycles": 1}
    chains = SGMCMC(network, X.float(), Y.float(), **SHORT | options)
    chains.run(progress=False)
    with pytest.warns(ReliabilityWarning, match="which is rounding"):
        chains.posterior()
    assert chains.spread.between is None


def test_spreads_are_those_of_the_samples():
    X, Y = data()
    chains = SGMCMC(mlp().double(), X, Y, num_chains=2, **SHORT).run(progress=False)
    grouped = chains.samples.reshape(2, 3, 2, -1)  # cycles, samples, chains, weights
    within = grouped.var(1).mean().sqrt()
    between = grouped.mean(1).reshape(4, -1).var(0).mean().sqrt()
    assert abs(chains.spread.within - within) < 1e-12
    assert abs(chains.spread.between - between) < 1e-12
    one = SGMCMC(mlp().double(), X, Y, **SHORT | {"samples_per_cycle": 1})
    assert one.spread == (None, None)
    assert one.run(progress=False).spread.within is None


@pytest.mark.parametrize("size", [30, 4])
def test_noise_of_its_own_at_every_point_follows_its_batch(size):
    """All targets zero, the network too: a loss of the noise alone, which is constant
    if each point has the noise that makes its own density one."""
    X, network = random(30, 2), nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        network.weight.zero_()
    noise = 0.5 + torch.rand(30, generator=seeded(), dtype=torch.float64)
    # With y^2 = noise (c - log noise), each point has the same density.
    Y = (noise * (2 - noise.log())).sqrt()[:, None]
    likelihood = FixedNoiseGaussianLikelihood(noise)
    chains = SGMCMC(network, X, Y, likelihood, batch_size=size, num_chains=3, **SHORT)
    chains.run(1, progress=False)
    prior = -math.log(2 * math.pi) / 30
    expected = 0.5 * (2 + math.log(2 * math.pi)) - prior
    torch.testing.assert_close(
        chains.history[0], torch.full((3,), expected).double(), rtol=1e-7, atol=0
    )


def test_images_are_data():
    case = cases.NETS["images"]
    X = case.inputs(6).reshape(6, 2, 5, 5)
    posterior = sample_sgmcmc(
        case.network(3), X, torch.arange(6) % 3, num_chains=2, progress=False, **SHORT
    )
    assert posterior.draw(2)(X.flatten(1)).shape == (2, 6, 3)


@pytest.mark.filterwarnings("ignore:torch.func cannot vectorise")
def test_networks_that_torch_func_cannot_trace_run_chain_by_chain():
    case = cases.LOOPED["skips_on_data"]
    X = case.inputs(3)
    posterior = sample_sgmcmc(
        case.network(1), X, X[:, :1], num_chains=2, batch_size=2, progress=False,
        num_cycles=1, steps_per_cycle=5, samples_per_cycle=1,
    )  # fmt: skip
    assert posterior.num_members == 2


def test_one_datum():
    posterior = sample_sgmcmc(
        mlp().double(), random(1, 2), random(1, 1), progress=False, **SHORT
    )
    assert posterior.num_members == 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_cycles": 0}, ValueError, "num_cycles must be a whole number"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be positive"),
        ({"samples_per_cycle": 9}, ValueError, "at most the 4 sampling steps of a"),
        ({"sampling_fraction": 2.0}, ValueError, "sampling_fraction must lie in"),
        ({"likelihood_temperature": 0.0}, ValueError, "likelihood_temperature must"),
        (
            {"initial_weights": torch.zeros(3, 2)},
            ShapeError,
            r"``1 x 17``, one row per chain, but has shape \(3, 2\)",
        ),
    ],
)
def test_bad_options(options, error, message):
    X, Y = data()
    with pytest.raises(error, match=message):
        SGMCMC(mlp().double(), X, Y, **SHORT | options)


def test_no_samples_yet_and_starts_of_their_own():
    X, Y = data()
    starts = random(2, 17)
    chains = SGMCMC(mlp().double(), X, Y, num_chains=2, initial_weights=starts, **SHORT)
    with pytest.raises(RuntimeError, match="no sample after 0 of 40.*comes after 17"):
        chains.posterior()
    assert torch.equal(chains.weights, starts)


def test_chains_that_are_converted_take_data_and_momenta_along():
    X, Y = data()
    chains = SGMCMC(mlp().double(), X, Y, num_chains=2, batch_size=5, **SHORT)
    chains.run(25, progress=False)
    twin = copy.deepcopy(chains).float()
    velocity = twin.optimizer.state[twin.weights]["velocity"]
    assert {v.dtype for v in (velocity, twin.weights, *twin.loss.data)} == {
        torch.float32
    }
    for each in (chains, twin):
        each.run(5, progress=False)
    # These steps are without noise: the same batches, losses equal up to rounding.
    expected = chains.losses[:30].float()
    torch.testing.assert_close(twin.losses[:30], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(twin.samples[:3], chains.samples[:3].float())
    assert twin.posterior().draw(2)(X.float()).dtype == torch.float32
    names = twin.state_dict()  # data are the caller's, and not part of the state
    assert not [name for name in names if name in ("loss.X", "loss.Y", "loss.noise")]
    with pytest.raises(ValueError, match="state is of another run: its"):
        chains.load_state_dict(names)


def test_chains_that_climb_far_above_their_start_are_named():
    X, Y = data()
    chains = SGMCMC(
        mlp().double(), X, Y, num_cycles=1, steps_per_cycle=40, generator=seeded()
    )
    chains.run(progress=False)
    chains.posterior()  # no warning
    usual = chains.net.num_params / (2 * len(X))
    with torch.no_grad():
        chains.losses[30:] = chains.losses[:10].mean() + 1.0 + 9 * usual
    chains.posterior()
    with torch.no_grad():
        chains.losses[30:] += 2 * usual
    with pytest.warns(
        ReliabilityWarning, match="rose by .* steps are too long. Try le"
    ):
        chains.posterior()
