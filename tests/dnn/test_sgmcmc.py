"""Langevin and Hamiltonian dynamics against the laws of linear recursions."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gpbridge.dnn.sgmcmc import SGHMC, SGLD
from tests import oracles_weight_space as oracles

NUM_DATA = 50
CURVATURES = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(sampler, theta, steps, curvatures=CURVATURES):
    """Steps on the loss per datum ``h theta^2 / 2``, whose gradient is h theta."""
    for _ in range(steps):
        theta.grad = curvatures * theta.detach()
        sampler.step()


def start(copies=1, dtype=torch.float64):
    return torch.zeros(3, copies, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    "temperature", [0.1, pytest.param(1.0, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("kind", "lr", "options", "steps"),
    [
        (SGLD, 0.02, {}, 400),
        (SGLD, 0.4, {}, 40),
        (SGHMC, 0.002, {"friction": 0.1}, 400),
        (SGHMC, 0.002, {"friction": 0.02}, 600),
        (SGHMC, 0.4, {"friction": 0.5}, 60),
    ],
)
def test_the_stationary_variance_is_that_of_the_target(
    kind, lr, options, steps, temperature
):
    copies = 8000
    theta = start(copies)
    sampler = kind(
        [theta],
        lr,
        NUM_DATA,
        temperature=temperature,
        generator=seeded(),
        **options,
    )
    run(sampler, theta, steps)
    found = theta.detach().square().mean(-1)
    tau = temperature / NUM_DATA
    alpha = options.get("friction", 1.0)
    exact = torch.stack(
        [
            oracles.sghmc_stationary_covariance(h, lr, alpha, tau)[1, 1]
            for h in CURVATURES[:, 0]
        ]
    )
    # 4.5 standard errors of a variance, over all cases.
    torch.testing.assert_close(found, exact, rtol=4.5 * (2 / copies) ** 0.5, atol=0)
    target = tau / CURVATURES[:, 0]
    if lr < 0.1:  # small steps: the target N(0, T / (N h)) itself
        torch.testing.assert_close(exact, target, rtol=0.03, atol=0)
        torch.testing.assert_close(found.sum(), target.sum(), rtol=0.05, atol=0)
    else:  # and steps that are not small are seen
        assert (exact / target - 1).abs().max() > 0.1


def test_langevin_is_wide_by_half_the_step():
    found = oracles.sghmc_stationary_covariance(2.0, 0.3, 1.0, 0.5)[1, 1]
    torch.testing.assert_close(float(found), 0.5 / (2.0 * (1 - 0.3 * 2.0 / 2)))


def test_hamiltonian_dynamics_with_full_friction_is_langevin_draw_for_draw():
    first, second = start(4), start(4)
    options = {"temperature": 0.7, "prior_precision": 3.0}
    run(SGLD([first], 0.1, NUM_DATA, generator=seeded(1), **options), first, 9)
    run(
        SGHMC([second], 0.1, NUM_DATA, friction=1.0, generator=seeded(1), **options),
        second,
        9,
    )
    assert first.abs().max() > 0
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("off", [{"noise": False}, {"temperature": 0.0}])
def test_without_noise_they_are_gradient_descent(off):
    for kind, momentum in ((SGLD, 0.0), (SGHMC, 0.9)):
        ours = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        decay = {"weight_decay": 5.0 / NUM_DATA}
        run(kind([ours], 0.1, NUM_DATA, prior_precision=5.0, **off), ours, 6)
        run(torch.optim.SGD([theirs], 0.1, momentum, **decay), theirs, 6)
        torch.testing.assert_close(ours, theirs)


def test_a_prior_precision_is_a_prior():
    """A likelihood of curvature h per datum and a prior: N h + lambda in all."""
    theta, lam = start(8000), 40.0
    sampler = SGLD([theta], 0.02, NUM_DATA, prior_precision=lam, generator=seeded())
    run(sampler, theta, 300)
    expected = 1 / (NUM_DATA * CURVATURES[:, 0] + lam)
    torch.testing.assert_close(
        theta.detach().square().mean(-1), expected, rtol=0.09, atol=0
    )


def test_the_rate_of_the_group_is_the_rate_of_the_noise():
    theta = torch.zeros(100_000, dtype=torch.float64, requires_grad=True)
    sampler = SGLD([theta], 1.0, 10, generator=seeded())
    schedule = torch.optim.lr_scheduler.LambdaLR(sampler, lambda k: 0.25**k)
    sizes = []
    for _ in range(3):
        theta.grad = torch.zeros_like(theta)
        before = theta.detach().clone()
        sampler.step()
        schedule.step()
        sizes.append((theta.detach() - before).std())
    expected = [(2 * 0.25**k / 10) ** 0.5 for k in range(3)]
    torch.testing.assert_close(
        torch.stack(sizes), torch.tensor(expected).double(), rtol=0.02, atol=0
    )


def test_groups_have_temperatures_of_their_own():
    cold, warm, still = (torch.zeros(50_000, requires_grad=True) for _ in range(3))
    sampler = SGHMC(
        [
            {"params": [cold], "temperature": 0.01},
            {"params": [warm]},
            {"params": [still]},
        ],
        0.1,
        10,
        generator=seeded(),
    )
    cold.grad, warm.grad = torch.zeros_like(cold), torch.zeros_like(warm)
    sampler.step()
    ratio = float(cold.detach().std() / warm.detach().std())
    assert abs(ratio / 0.1 - 1) < 0.02
    assert still.abs().max() == 0  # no gradient, no step


def test_a_closure_is_evaluated_with_gradients():
    theta = torch.ones(2, requires_grad=True)
    sampler = SGLD([theta], 0.1, 10, generator=seeded())

    def closure():
        sampler.zero_grad()
        loss = theta.square().sum()
        loss.backward()
        return loss

    assert float(sampler.step(closure).detach()) == 2.0
    assert sampler.step() is None


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 1)))


def train(network, sampler, steps):
    X = torch.linspace(-1, 1, 12).reshape(6, 2)
    for _ in range(steps):
        sampler.zero_grad()
        network(X).square().mean().backward()
        sampler.step()


@pytest.mark.parametrize("kind", [SGLD, SGHMC])
def test_a_run_resumed_from_its_state_is_the_same_bit_for_bit(kind):
    whole = small()
    sampler = kind(whole.parameters(), 0.1, 6, generator=seeded(1))
    train(whole, sampler, 3)
    twins = []
    for how in ("state", "pickle", "copy"):
        twin = small(seed=5)
        twin.load_state_dict(whole.state_dict())
        if how == "state":
            other = kind(twin.parameters(), 0.7, 99, generator=seeded(8))
            other.load_state_dict(copy.deepcopy(sampler.state_dict()))
        elif how == "pickle":
            twin, other = pickle.loads(pickle.dumps((whole, sampler)))
        else:
            twin, other = copy.deepcopy((whole, sampler))
        twins.append((twin, other))
    train(whole, sampler, 4)
    for twin, other in twins:
        train(twin, other, 4)
        for p, q in zip(whole.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)


def test_states_load_without_running_code(tmp_path):
    network = small()
    sampler = SGHMC(network.parameters(), 0.1, 6)
    train(network, sampler, 1)
    torch.save(sampler.state_dict(), tmp_path / "state")
    loaded = torch.load(tmp_path / "state", weights_only=True)
    sampler.load_state_dict(loaded)


def test_only_the_generator_is_a_source_of_randomness():
    before = torch.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        theta = start()
        run(SGLD([theta], 0.1, NUM_DATA, generator=seeded(seed)), theta, 2)
        results.append(theta.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(before, torch.get_rng_state())
    a, b = start(), start()
    for theta in (a, b):
        run(SGLD([theta], 0.1, NUM_DATA), theta, 1)
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (SGLD, {"lr": 0.0}, ValueError, "lr must be positive"),
        (SGLD, {"lr": torch.tensor(0.1)}, TypeError, "lr must be a number, but is a"),
        (SGLD, {"num_data": 0.5}, ValueError, "num_data must be a whole number"),
        (SGLD, {"temperature": -1.0}, ValueError, "temperature must be finite"),
        (SGHMC, {"prior_precision": -1.0}, ValueError, "prior_precision must be"),
        (
            SGHMC,
            {"friction": 0.0},
            ValueError,
            r"friction must lie in \(0, 1\], but is 0",
        ),
        (SGHMC, {"friction": 9.0}, ValueError, "for a momentum of 0.9 pass 0.1"),
    ],
)
def test_bad_options(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind([start()], **({"lr": 0.1, "num_data": 10} | options))
    group = {"params": [start()], **options}
    with pytest.raises(error, match=message):  # also of one group
        kind([start()], 0.1, 10).add_param_group(group)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        SGLD(embedding.parameters(), 0.1, 10).step()


def test_float32_smoke():
    theta = start(dtype=torch.float32)
    run(SGHMC([theta], 0.1, NUM_DATA), theta, 2, CURVATURES.float())
    assert theta.dtype == torch.float32 and bool(theta.isfinite().all())
