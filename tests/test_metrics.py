import math

import numpy as np
import pytest
import torch
from botorch.exceptions.errors import InputDataError
from scipy import integrate, optimize, stats
from sklearn import metrics as sklearn_metrics

from gpbridge import metrics
from gpbridge.checks import ShapeError

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(params=[(7,), (1,), (5, 3)], ids=str)
def gaussian(request):
    """Mean, variance and targets of one shape, in float64."""
    generator = torch.Generator().manual_seed(1)
    mean, y = torch.randn(2, *request.param, dtype=torch.float64, generator=generator)
    spread = torch.rand(request.param, dtype=torch.float64, generator=generator)
    return mean, 0.1 + spread, y


@pytest.fixture
def classes():
    """Probabilities of 200 points and labels that are less sure than they are."""
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(200, 4, dtype=torch.float64, generator=generator)
    labels = torch.multinomial((logits / 1.7).softmax(-1), 1, generator=generator)
    return logits.softmax(-1), labels[:, 0]


def close(value, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, expected, **EXACT)


def test_rmse_is_the_root_of_the_mean_squared_error(gaussian):
    mean, _, y = gaussian
    expected = sklearn_metrics.mean_squared_error(y.flatten(), mean.flatten()) ** 0.5
    close(metrics.rmse(mean, y), expected)


def test_gaussian_nll_sums_outputs_and_averages_points(gaussian):
    mean, variance, y = gaussian
    nats = -stats.norm(mean.numpy(), variance.sqrt().numpy()).logpdf(y.numpy())
    close(
        metrics.gaussian_nll(mean, variance, y), nats.reshape(len(y), -1).sum(1).mean()
    )


def test_gaussian_nll_changes_by_the_log_of_the_scale():
    mean, y = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator())
    variance = torch.ones_like(y)
    scaled = metrics.gaussian_nll(3 * mean, 9 * variance, 3 * y)
    close(scaled, metrics.gaussian_nll(mean, variance, y) + math.log(3))


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_interval_coverage_counts_targets_between_the_quantiles(gaussian, level):
    mean, variance, y = (value.numpy() for value in gaussian)
    low, high = stats.norm(mean, np.sqrt(variance)).interval(level)
    expected = ((low <= y) & (y <= high)).mean()
    close(metrics.interval_coverage(*gaussian, level=level), expected)


def test_interval_coverage_approaches_its_level_for_a_calibrated_model():
    n = 20_000
    y = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = metrics.interval_coverage(torch.zeros_like(y), torch.ones_like(y), y)
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / n)


def test_crps_is_the_integral_of_the_squared_distribution_error():
    mean, variance, y = 0.3, 0.49, [-1.4, 0.31, 2.0]
    F = stats.norm(mean, math.sqrt(variance)).cdf
    expected = []
    for target in y:
        below = integrate.quad(lambda t: F(t) ** 2, -np.inf, target, epsabs=1e-12)
        above = integrate.quad(lambda t: (1 - F(t)) ** 2, target, np.inf, epsabs=1e-12)
        expected.append(below[0] + above[0])
    y = torch.tensor(y, dtype=torch.float64)
    got = metrics.crps_gaussian(
        torch.full_like(y, mean), torch.full_like(y, variance), y
    )
    torch.testing.assert_close(
        got, torch.tensor(np.mean(expected)), rtol=1e-7, atol=1e-9
    )


def test_crps_of_a_sharp_prediction_is_the_absolute_error(gaussian):
    mean, variance, y = gaussian
    got = metrics.crps_gaussian(mean, 1e-24 * variance, y)
    torch.testing.assert_close(got, (mean - y).abs().mean(), rtol=1e-9, atol=1e-9)


def test_categorical_nll_agrees_with_scikit_learn(classes):
    expected = sklearn_metrics.log_loss(classes[1], classes[0], labels=range(4))
    close(metrics.categorical_nll(*classes), expected)


def test_categorical_nll_of_an_underflown_probability_is_finite():
    got = metrics.categorical_nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert 87 < got < 88


def test_brier_sums_squares_over_classes(classes):
    probabilities, labels = (value.numpy() for value in classes)
    error = probabilities - np.eye(4)[labels]
    close(metrics.brier(*classes), (error**2).sum(1).mean())


def test_accuracy_agrees_with_scikit_learn(classes):
    expected = sklearn_metrics.accuracy_score(classes[1], classes[0].argmax(-1))
    close(metrics.accuracy(*classes), expected)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_agrees_with_a_loop_over_bins(classes, bins):
    confidence, predicted = classes[0].max(-1)
    correct = (predicted == classes[1]).double()
    error, total = 0.0, 0
    curve = metrics.reliability_curve(*classes, bins=bins)
    rows = list(zip(*curve, strict=True))
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        if not inside.any():
            continue
        lower, upper, mean_confidence, share, count = rows.pop(0)
        close(torch.stack([lower, upper]), [k / bins, (k + 1) / bins])
        close(mean_confidence, confidence[inside].mean())
        close(share, correct[inside].mean())
        assert count == inside.sum()
        total += int(count)
        error += float(count) * abs(float(share - mean_confidence)) / 200
    assert not rows and total == 200
    close(metrics.expected_calibration_error(*classes, bins=bins), error)


@pytest.mark.parametrize("bins", [1, 7, 20])
def test_bins_of_equal_mass_agree_with_chunks_of_the_sorted_points(classes, bins):
    probabilities, labels = classes
    curve = metrics.reliability_curve(*classes, bins=bins, equal="mass")
    confidence, predicted = probabilities.double().max(-1)
    order = confidence.argsort()
    # Bin k ends with the point of number ceil(n k / b).
    n = len(order)
    ends = [-(-n * k // bins) for k in range(bins + 1)]
    parts = [order[i:j] for i, j in zip(ends[:-1], ends[1:], strict=True)]
    correct = (predicted == labels).double()
    assert curve.count.tolist() == [len(part) for part in parts]
    for k, part in enumerate(parts):
        torch.testing.assert_close(
            curve.confidence[k].double(), confidence[part].mean()
        )
        torch.testing.assert_close(curve.accuracy[k].double(), correct[part].mean())
    gap = sum(
        len(part) / n * abs(float((confidence - correct)[part].mean()))
        for part in parts
    )
    found = metrics.expected_calibration_error(*classes, bins=bins, equal="mass")
    assert float(found) == pytest.approx(gap)


def test_equal_confidences_share_a_bin_in_any_order():
    probabilities = torch.eye(2)[[0, 0, 0, 1, 1, 0]]
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    curve = metrics.reliability_curve(probabilities, labels, bins=3, equal="mass")
    assert curve.count.tolist() == [6]
    with pytest.raises(ValueError, match="equal must be one of 'width', 'mass'"):
        metrics.reliability_curve(probabilities, labels, equal="size")


def test_predictive_entropy_is_that_of_scipy(classes):
    expected = torch.as_tensor(stats.entropy(classes[0].numpy(), axis=1))
    torch.testing.assert_close(
        metrics.predictive_entropy(classes[0]), expected.to(classes[0])
    )
    certain = metrics.predictive_entropy(torch.eye(3))
    assert certain.tolist() == [0.0, 0.0, 0.0]


def test_confidence_on_an_edge_belongs_to_the_bin_below():
    certain = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    curve = metrics.reliability_curve(certain, torch.tensor([0, 0]), bins=2)
    assert curve.lower.tolist() == [0.0, 0.5]
    assert curve.count.tolist() == [1, 1]


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_agrees_with_scikit_learn(ties):
    generator = torch.Generator().manual_seed(3)
    positive = torch.rand(60, generator=generator) < 0.4
    scores = torch.randn(60, dtype=torch.float64, generator=generator) + positive
    scores = scores.round() if ties else scores
    expected = sklearn_metrics.roc_auc_score(positive, scores)
    close(metrics.auroc(scores, positive), expected)
    close(metrics.auroc(-scores, positive.long()), 1 - expected)


def test_auroc_of_equal_scores_is_one_half():
    assert metrics.auroc(torch.zeros(5), torch.tensor([1, 0, 0, 1, 0])) == 0.5


def test_fit_temperature_finds_the_minimum_of_the_nll(classes):
    probabilities, labels = classes

    def nll(log_temperature):
        logs = probabilities.log() / math.exp(log_temperature)
        return float(torch.nn.functional.cross_entropy(logs, labels))

    bounds = (math.log(0.05), math.log(10))
    best = optimize.minimize_scalar(
        nll, bounds=bounds, method="bounded", options={"xatol": 1e-9}
    )
    got = metrics.fit_temperature(probabilities.log(), labels)
    assert got == pytest.approx(math.exp(best.x), rel=1e-6)
    assert 1.2 < got < 2.5  # the labels were drawn at 1.7


def test_fit_temperature_does_not_care_about_logit_offsets(classes):
    logs, labels = classes[0].log(), classes[1]
    shifted = logs + torch.arange(200, dtype=torch.float64)[:, None]
    first = metrics.fit_temperature(logs, labels)
    assert metrics.fit_temperature(shifted, labels) == pytest.approx(first, rel=1e-9)


def test_fit_temperature_stops_at_its_bounds():
    logs = torch.tensor([[0.0, -3.0], [-3.0, 0.0]])
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 0])
    assert metrics.fit_temperature(logs, right) == 0.05
    assert metrics.fit_temperature(logs, right, bounds=(0.5, 10)) == 0.5
    assert metrics.fit_temperature(logs, wrong) == 10.0


def test_fit_temperature_bears_impossible_classes():
    logs = torch.tensor([[0.3, 0.7, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0]]).log()
    labels = torch.tensor([1, 1, 0])
    with_class = metrics.fit_temperature(logs, labels)
    without = metrics.fit_temperature(logs[:, :2], labels)
    assert with_class == pytest.approx(without, rel=1e-9)


def test_apply_temperature_is_a_normalised_power(classes):
    got = metrics.apply_temperature(classes[0].log(), 2.5).exp()
    power = classes[0] ** (1 / 2.5)
    torch.testing.assert_close(got, power / power.sum(-1, keepdim=True), **EXACT)
    same = metrics.apply_temperature(classes[0].log(), 1.0)
    torch.testing.assert_close(same, classes[0].log(), **EXACT)


def test_scores_keep_the_dtype_and_differentiate():
    mean = torch.zeros(4, requires_grad=True)
    y, variance = torch.ones(4), torch.ones(4)
    for score in (
        metrics.rmse(mean, y),
        metrics.gaussian_nll(mean, variance, y),
        metrics.crps_gaussian(mean, variance, y),
    ):
        assert score.dtype == torch.float32 and score.shape == ()
        (gradient,) = torch.autograd.grad(score, mean)
        assert (gradient < 0).all()
    probabilities = torch.tensor([[0.2, 0.8], [0.9, 0.1]])
    labels = torch.tensor([1, 0], dtype=torch.int32)
    for score in (metrics.brier, metrics.accuracy, metrics.expected_calibration_error):
        assert score(probabilities, labels).dtype == torch.float32


ONE = torch.ones(3)
HALF = torch.full((2, 2), 0.5)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: metrics.rmse(ONE, ONE[:, None]), ShapeError, r"y is \(3, 1\)"),
        (lambda: metrics.rmse(ONE.view(1, 1, 3), ONE.view(1, 1, 3)), ShapeError, "n x"),
        (lambda: metrics.rmse([1.0], ONE), TypeError, "mean must be a torch.Tensor"),
        (lambda: metrics.rmse(ONE[:0], ONE[:0]), InputDataError, "mean has no rows"),
        (
            lambda: metrics.rmse(ONE * math.nan, ONE),
            InputDataError,
            "mean contains NaN",
        ),
        (
            lambda: metrics.gaussian_nll(ONE, -ONE, ONE),
            ValueError,
            "variance must be p",
        ),
        (
            lambda: metrics.interval_coverage(ONE, ONE, ONE, level=95),
            ValueError,
            "level must lie strictly between 0 and 1, but is 95",
        ),
        (
            lambda: metrics.brier(2 * HALF, LABELS),
            InputDataError,
            "must sum to one over the last axis, but row 0 sums to 2",
        ),
        (
            lambda: metrics.accuracy(HALF.log(), LABELS),
            InputDataError,
            "must not be negative, but are as low as -0.693",
        ),
        (lambda: metrics.accuracy(HALF[0], LABELS), ShapeError, r"stack\(\[1 - p, p\]"),
        (lambda: metrics.accuracy(HALF, LABELS[:1]), ShapeError, "labels has 1"),
        (lambda: metrics.accuracy(HALF, LABELS + 1), InputDataError, "row 1 is 2"),
        (
            lambda: metrics.accuracy(HALF, LABELS.float()),
            TypeError,
            "integer class lab",
        ),
        (lambda: metrics.auroc(HALF, HALF), ShapeError, "must both be ``n``"),
        (
            lambda: metrics.auroc(ONE, ONE.bool()),
            InputDataError,
            "3 positive and 0 neg",
        ),
        (lambda: metrics.auroc(ONE, 2 * ONE), InputDataError, "but contains 2.0"),
        (
            lambda: metrics.fit_temperature(HALF.log(), LABELS, bounds=(2.0, 1.0)),
            ValueError,
            r"two increasing positive temperatures, but are \(2.0, 1.0\)",
        ),
        (
            lambda: metrics.fit_temperature(torch.eye(2).log(), 1 - LABELS),
            InputDataError,
            "label of row 0 probability zero",
        ),
        (
            lambda: metrics.fit_temperature(HALF * math.nan, LABELS),
            InputDataError,
            r"NaN or \+Inf in 2 of 2 rows",
        ),
        (
            lambda: metrics.apply_temperature(HALF, 0.0),
            ValueError,
            "temperature must be positive",
        ),
    ],
)
def test_bad_input_is_refused_with_its_reason(call, error, message):
    with pytest.raises(error, match=message):
        call()
