import math

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    SoftmaxLikelihood,
)

from gpbridge.checks import ShapeError
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.linearized.links import LINKS, pairwise
from gpbridge.linearized.predictive import (
    choose_calibration,
    class_log_probabilities,
    probabilities,
)
from gpbridge.metrics import apply_temperature
from tests import oracles_likelihoods as oracles

EXACT = {"rtol": 1e-9, "atol": 1e-12}
AVERAGING = [name for name in LINKS if name != "plugin"]
BINARY = {"logistic": LogisticLikelihood(), "probit": BernoulliLikelihood()}


def softmax(num_classes=4):
    return SoftmaxLikelihood(num_classes=num_classes, mixing_weights=False)


def moments(n, m, variance=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f = 3 * torch.randn(n, m, generator=generator, dtype=torch.float64)
    root = torch.randn(n, m, m + 2, generator=generator, dtype=torch.float64)
    return f, variance * root @ root.mT / (m + 2)


@pytest.mark.parametrize("link", LINKS)
def test_softmax_probabilities_are_those_of_the_link(link):
    f, S = moments(5, 4)
    got = probabilities(softmax(), f, S, link)
    torch.testing.assert_close(got, LINKS[link](f, S), **EXACT)


def test_the_logistic_probability_is_mackays():
    f, S = moments(50, 1, variance=4.0)
    expected = torch.sigmoid(f / torch.sqrt(1 + math.pi / 8 * S[..., 0]))
    for link in ("pairwise", "probit"):
        got = probabilities(LogisticLikelihood(), f, S, link)
        torch.testing.assert_close(got, expected, **EXACT)


def test_the_logistic_probability_is_that_of_two_softmax_classes():
    f, S = moments(5, 2)
    difference = f[:, 1:] - f[:, :1]
    D = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    for link in ("plugin", "pairwise", "probit_centred", "monte_carlo"):
        one = probabilities(LogisticLikelihood(), difference, D @ S @ D.T, link)
        two = probabilities(softmax(2), f, S, link)[:, 1:]
        if link == "probit_centred":  # shares the variance evenly, whatever S says
            half = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64) / 4
            two = probabilities(softmax(2), f, D @ S @ D.T * half, link)[:, 1:]
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_the_logistic_monte_carlo_is_the_integral():
    f, S = moments(4, 1, variance=2.0)
    exact = [
        oracles.logistic_average(a.item(), v.item())
        for a, v in zip(f.flatten(), S.flatten(), strict=True)
    ]
    got = probabilities(LogisticLikelihood(), f, S, "monte_carlo", num_samples=100_000)
    torch.testing.assert_close(
        got.flatten(), torch.tensor(exact, dtype=torch.float64), rtol=0, atol=2e-3
    )


def test_the_logistic_bridge_returns_the_network():
    f, S = moments(5, 1)
    got = probabilities(LogisticLikelihood(), f, S, "laplace_bridge")
    torch.testing.assert_close(got, torch.sigmoid(f), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("link", AVERAGING)
def test_the_probit_probability_is_exact_under_every_link_that_averages(link):
    f, S = moments(20, 1, variance=3.0)
    exact = [
        oracles.probit_average(a.item(), v.item())
        for a, v in zip(f.flatten(), S.flatten(), strict=True)
    ]
    got = probabilities(BernoulliLikelihood(), f, S, link).flatten()
    torch.testing.assert_close(got, torch.tensor(exact, dtype=torch.float64), **EXACT)


def test_plugin_ignores_the_covariance():
    f, S = moments(20, 1)
    got = probabilities(BernoulliLikelihood(), f, S, "plugin")
    torch.testing.assert_close(got, torch.special.ndtr(f), **EXACT)
    got = probabilities(LogisticLikelihood(), f, S, "plugin")
    torch.testing.assert_close(got, torch.sigmoid(f), **EXACT)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logs_of_binary_probabilities_keep_both_tails(name, dtype):
    f = torch.tensor([[30.0], [-30.0], [0.0]], dtype=dtype)
    logs = class_log_probabilities(BINARY[name], f, f.unsqueeze(-1) * 0, "pairwise")
    assert logs.dtype == dtype and logs.shape == (3, 2)
    rare = -30.0 if name == "logistic" else oracles.log_normal_tail(30.0)
    assert logs[0, 0].item() == pytest.approx(rare, rel=1e-6)
    assert logs[1, 1].item() == pytest.approx(rare, rel=1e-6)
    assert logs[2].tolist() == pytest.approx([-math.log(2)] * 2)


def test_a_temperature_divides_log_probabilities():
    f, S = moments(5, 4)
    q = pairwise(f, S)
    expected = q**0.5 / (q**0.5).sum(-1, keepdim=True)
    got = probabilities(softmax(), f, S, "pairwise", calibration_temperature=2.0)
    torch.testing.assert_close(got, expected, **EXACT)


def test_the_temperature_of_the_network_divides_its_logits():
    f, S = moments(5, 4)
    got = probabilities(softmax(), f, S, "plugin", calibration_temperature=3.0)
    torch.testing.assert_close(got, torch.softmax(f / 3, -1), **EXACT)
    f, S = moments(5, 1)
    for size in (1.0, 100.0):  # also where one minus a probability is lost
        got = probabilities(LogisticLikelihood(), size * f, S, "plugin", 5.0)
        torch.testing.assert_close(got, torch.sigmoid(size * f / 5), **EXACT)


def test_probabilities_of_bad_requests_are_refused():
    f, S = moments(5, 4)
    with pytest.raises(ValueError, match="link must be one of 'plugin', 'pairwise', "):
        probabilities(softmax(), f, S, "softmax")
    with pytest.raises(
        ShapeError, match="LogisticLikelihood needs ``... x 1`` outputs"
    ):
        probabilities(LogisticLikelihood(), f, S)
    with pytest.raises(NotImplementedError, match="no rule for GaussianLikelihood"):
        probabilities(GaussianLikelihood(), f, S)
    with pytest.raises(ValueError, match="calibration_temperature must be positive"):
        probabilities(softmax(), f, S, calibration_temperature=0.0)
    mixed = SoftmaxLikelihood(num_features=4, num_classes=4)
    with pytest.raises(ValueError, match="mixing_weights=False"):
        probabilities(mixed, f, S)


class Problem:
    """Labels drawn from softmax(f / T), a network that says f, some covariance."""

    def __init__(self, n, temperature, seed, m=4):
        self.f, self.S = moments(n, m, seed=seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        truth = torch.softmax(self.f / temperature, -1)
        self.labels = torch.multinomial(truth, 1, generator=generator).flatten()

    def covariance_of(self, prior_variance):
        return prior_variance * self.S

    def choose(self, likelihood=None, **options):
        return choose_calibration(
            likelihood or softmax(self.f.shape[-1]),
            self.f,
            self.labels,
            self.covariance_of,
            **options,
        )


def nll(logs, labels):
    return -logs.gather(-1, labels.unsqueeze(-1)).mean()


def test_the_choice_is_the_smallest_held_out_nll_over_grid_and_temperatures():
    problem = Problem(60, temperature=2.0, seed=0)
    result = problem.choose()
    grid = torch.logspace(-1.3, 1.0, 200, dtype=torch.float64)
    found = []
    for exponent in [0.5 * k for k in range(-2, 10)]:
        q = torch.stack(
            [
                oracles.pairwise_link(f, 10**-exponent * S)
                for f, S in zip(problem.f, problem.S, strict=True)
            ]
        )
        logs = torch.log_softmax(q.log() / grid[:, None, None], -1)
        nlls = torch.stack([nll(one, problem.labels) for one in logs])
        found.append((nlls.min().item(), 10**-exponent, grid[nlls.argmin()].item()))
    found.append(
        min(
            (nll(torch.log_softmax(problem.f / t, -1), problem.labels).item(), 0.0, t)
            for t in grid.tolist()
        )
    )
    best, prior_variance, temperature = min(found)
    assert result.calibrated_nll == pytest.approx(best, abs=1e-4)
    assert result.prior_variance == pytest.approx(prior_variance)
    assert result.calibration_temperature == pytest.approx(temperature, rel=0.02)


def calibrated_nll(result, f, covariance, labels):
    logs = class_log_probabilities(softmax(), f, covariance, "pairwise")
    logs = apply_temperature(logs, result.calibration_temperature)
    return -logs.gather(-1, labels.unsqueeze(-1)).flatten()


def test_the_numbers_of_the_result_are_those_of_its_predictions():
    problem = Problem(150, temperature=2.0, seed=0)
    result = problem.choose()
    covariance = problem.covariance_of(result.prior_variance)
    after = calibrated_nll(result, problem.f, covariance, problem.labels)
    before = nll(torch.log_softmax(problem.f, -1), problem.labels)
    assert result.network_nll == pytest.approx(before.item())
    assert result.calibrated_nll == pytest.approx(after.mean().item())
    each = -torch.log_softmax(problem.f, -1).gather(-1, problem.labels[:, None])
    gain = each.flatten() - after
    assert result.gain == pytest.approx(gain.mean().item())
    assert result.gain_std_error == pytest.approx(gain.std().item() / math.sqrt(150))
    assert result.adopted == (result.gain > result.gain_std_error)


@pytest.mark.parametrize("name", BINARY)
def test_an_overconfident_network_is_calibrated(name):
    several = Problem(400, temperature=3.0, seed=1).choose()
    assert several.adopted and several.gain > 0.1
    generator = torch.Generator().manual_seed(0)
    f = 6 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    truth = torch.sigmoid(f / 3)
    labels = torch.bernoulli(truth, generator=generator)
    one = choose_calibration(
        BINARY[name], f, labels, lambda s: s * torch.ones_like(f).unsqueeze(-1)
    )
    assert one.adopted and one.calibrated_nll < one.network_nll
    fitted = probabilities(
        BINARY[name],
        f,
        one.prior_variance * torch.ones_like(f).unsqueeze(-1),
        calibration_temperature=one.calibration_temperature,
    )
    assert (fitted - truth).abs().mean() < 0.05


def test_a_calibrated_network_mostly_stays_and_loses_little():
    adopted, loss = [], []
    for seed in range(20):
        result = Problem(200, temperature=1.0, seed=seed).choose()
        fresh = Problem(2000, temperature=1.0, seed=100 + seed)
        covariance = fresh.covariance_of(result.prior_variance)
        after = calibrated_nll(result, fresh.f, covariance, fresh.labels).mean()
        before = nll(torch.log_softmax(fresh.f, -1), fresh.labels)
        adopted.append(result.adopted)
        loss.append(result.adopted * float(after - before))
    assert sum(adopted) <= 5
    assert sum(loss) / 20 < 0.01


def test_an_informative_covariance_is_chosen_over_a_temperature_alone():
    # Half of the points are unreliable and their covariance says so.
    problem = Problem(400, temperature=1.0, seed=0)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(problem.f.shape, generator=generator, dtype=torch.float64)
    unreliable = (torch.arange(400) % 2).double()
    problem.f = problem.f + 4 * unreliable[:, None] * noise
    problem.S = 16 * unreliable[:, None, None] * torch.eye(4).double().expand(400, 4, 4)
    result = problem.choose()
    alone = problem.choose(prior_variances=())
    assert result.adopted and result.prior_variance > 0 and alone.prior_variance == 0
    assert result.calibrated_nll < alone.calibrated_nll - 0.05


def test_without_covariance_the_network_wins_the_tie():
    problem = Problem(100, temperature=2.0, seed=0)
    problem.S = 0 * problem.S
    assert problem.choose().prior_variance == 0


def test_a_network_that_is_always_right_is_not_sharpened_without_limit():
    problem = Problem(50, temperature=1.0, seed=0)
    problem.labels = problem.f.argmax(-1)
    alone = problem.choose(prior_variances=())
    assert alone.calibration_temperature == 0.5


def test_one_held_out_point_is_never_enough():
    problem = Problem(1, temperature=1.0, seed=0)
    result = problem.choose()
    assert not result.adopted and result.gain_std_error == math.inf


def test_float32_logits_are_calibrated_in_float64():
    problem = Problem(100, temperature=2.0, seed=0)
    exact = problem.choose()
    problem.f, problem.S = problem.f.float(), problem.S.float()
    assert problem.choose().calibrated_nll == pytest.approx(exact.calibrated_nll)


def test_calibration_refuses_bad_requests():
    problem = Problem(20, temperature=1.0, seed=0)
    with pytest.raises(ValueError, match="link must be one of 'pairwise'.*'plugin'"):
        problem.choose(link="plugin")
    with pytest.raises(ValueError, match="prior_variances must be positive"):
        problem.choose(prior_variances=(-1.0,))
    good, problem.labels = problem.labels, problem.labels[:-1]
    with pytest.raises(ShapeError, match="network_logits has 20, labels has 19"):
        problem.choose()
    problem.labels, S = good, problem.S
    problem.S = S[:, 0]
    with pytest.raises(ShapeError, match=r"must be \(20, 4, 4\).*shape \(20, 4\)"):
        problem.choose()
    problem.S = S * torch.nan
    with pytest.raises(InputDataError, match="covariance contains NaN"):
        problem.choose()
    problem.f = problem.f[:0]
    with pytest.raises(InputDataError, match="network_logits has no rows"):
        problem.choose()
