import warnings

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    PoissonLikelihood,
    SoftmaxLikelihood,
)

from gpbridge.checks import ShapeError
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.targets import check_targets, default_likelihood, warn_if_logits

REAL = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
BINARY = torch.tensor([0, 1, 1, 0])
CLASSES = torch.tensor([0, 2, 1, 2])


def softmax(num_classes=3):
    return SoftmaxLikelihood(num_classes=num_classes, mixing_weights=False)


@pytest.mark.parametrize(
    "train_Y, num_outputs, kind",
    [
        (REAL[:, None], 1, GaussianLikelihood),
        (REAL, 1, GaussianLikelihood),
        (REAL.reshape(2, 2), 2, MultitaskGaussianLikelihood),
        (BINARY, 1, LogisticLikelihood),
        (BINARY[:, None], 1, LogisticLikelihood),
        (BINARY.bool(), 1, LogisticLikelihood),
        (BINARY.float(), 1, LogisticLikelihood),
        (BINARY.double()[:, None], 1, LogisticLikelihood),
        (BINARY, 2, SoftmaxLikelihood),
        (CLASSES, 3, SoftmaxLikelihood),
        (torch.zeros(4, 1), 1, GaussianLikelihood),
        (torch.ones(4, 1), 1, GaussianLikelihood),
        (torch.zeros(4, dtype=torch.long), 1, LogisticLikelihood),
    ],
)
def test_targets_suggest_a_likelihood_that_accepts_them(train_Y, num_outputs, kind):
    likelihood = default_likelihood(train_Y, num_outputs)
    assert type(likelihood) is kind
    if train_Y.shape == (4,) and kind is GaussianLikelihood:
        train_Y = train_Y[:, None]
    check_targets(likelihood, train_Y, num_outputs, len(train_Y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_noise_starts_and_ends_at_shares_of_the_variance_of_the_targets(scale, dtype):
    y = (scale * REAL + 3 * scale).to(dtype).unsqueeze(-1)
    variance = y.var(correction=0)
    likelihood = default_likelihood(y, 1)
    assert likelihood.noise.dtype == dtype
    torch.testing.assert_close(likelihood.noise[0], 0.1 * variance, rtol=1e-3, atol=0)
    likelihood.noise_covar.raw_noise.data.fill_(-1e4)
    torch.testing.assert_close(likelihood.noise[0], 1e-7 * variance, rtol=1e-3, atol=0)


def test_each_output_has_a_noise_of_its_own_and_none_in_common():
    y = torch.stack([REAL, 100 * REAL], -1)
    likelihood = default_likelihood(y, 2)
    expected = 0.1 * y.var(0, correction=0)
    torch.testing.assert_close(likelihood.task_noises, expected, rtol=1e-5, atol=0)
    assert [name for name, _ in likelihood.named_parameters()] == ["raw_task_noises"]
    likelihood.raw_task_noises.data.fill_(-1e4)
    floor = 1e-7 * y.var(0, correction=0)
    torch.testing.assert_close(likelihood.task_noises, floor, rtol=1e-5, atol=0)


def test_constant_targets_count_as_having_variance_one():
    likelihood = default_likelihood(torch.full((4, 1), 7.0), 1)
    assert likelihood.noise.item() == pytest.approx(0.1)
    assert default_likelihood(torch.ones(1, 1), 1).noise.item() == pytest.approx(0.1)


def test_the_dtype_of_the_likelihood_can_be_asked_for():
    likelihood = default_likelihood(REAL.float()[:, None], 1, dtype=torch.float64)
    assert likelihood.noise.dtype == torch.float64


@pytest.mark.parametrize(
    "train_Y, num_outputs, error, message",
    [
        (CLASSES, 1, TypeError, r"integers other than 0 and 1.*train_Y.double\(\)"),
        (CLASSES.double(), 3, TypeError, r"is torch.float64. Try train_Y.long\(\)"),
        (CLASSES.float()[:, None], 3, TypeError, r"Try train_Y.long\(\)"),
        (REAL, 3, ShapeError, r"``n x 3``.*has shape \(4,\)"),
        (REAL[:, None], 3, ShapeError, "Give the network one output per column"),
        (REAL[:0], 1, InputDataError, "train_Y has no rows"),
        ([0.0, 1.0], 1, TypeError, "train_Y must be a torch.Tensor"),
    ],
)
def test_targets_that_suggest_nothing_are_refused(train_Y, num_outputs, error, message):
    with pytest.raises(error, match=message):
        default_likelihood(train_Y, num_outputs)


def test_gaussian_targets_pass_unchanged():
    fixed = FixedNoiseGaussianLikelihood(torch.ones(4, dtype=torch.float64))
    for likelihood in (GaussianLikelihood(), fixed):
        y = REAL[:, None]
        assert check_targets(likelihood, y, 1, 4) is y
    batch = torch.stack([REAL, -REAL])[..., None]
    assert check_targets(GaussianLikelihood(), batch, 1, 4) is batch


@pytest.mark.parametrize("likelihood", [LogisticLikelihood(), BernoulliLikelihood()])
@pytest.mark.parametrize("label", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_binary_labels_become_a_column_of_floats(likelihood, label):
    expected = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    for labels in (BINARY.to(label), BINARY.to(label)[:, None]):
        got = check_targets(likelihood, labels, 1, 4, dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_class_labels_become_long_integers():
    got = check_targets(softmax(), CLASSES.to(torch.int32), 3, 4)
    assert got.dtype == torch.long and torch.equal(got, CLASSES)


REFUSED = [
    # Outputs of the network against the likelihood.
    (LogisticLikelihood(), BINARY, 3, ShapeError, "models one output.*network has 3"),
    (BernoulliLikelihood(), BINARY, 2, ShapeError, r"SoftmaxLikelihood\(num_classes=2"),
    (softmax(), CLASSES, 1, ShapeError, r"has one output.*LogisticLikelihood\(\)"),
    (softmax(), CLASSES, 4, ShapeError, "models 3 classes, but the network has 4 outp"),
    (GaussianLikelihood(), REAL[:, None], 2, ShapeError, "models 1 output, but.*has 2"),
    (GaussianLikelihood(), REAL[:, None], 2, ShapeError, r"num_tasks=2, rank=0\)"),
    (
        MultitaskGaussianLikelihood(num_tasks=3),
        REAL[:, None],
        1,
        ShapeError,
        r"models 3 outputs, but the network has 1. Try GaussianLikelihood\(\)",
    ),
    # Kinds of labels.
    (softmax(), CLASSES.float(), 3, TypeError, r"is torch.float32. Try train_Y.long"),
    (softmax(), BINARY.bool(), 3, TypeError, r"is torch.bool. Try train_Y.long"),
    (
        GaussianLikelihood(),
        BINARY[:, None],
        1,
        TypeError,
        r"train_Y.double\(\); for cl",
    ),
    # Values.
    (softmax(), CLASSES + 1, 3, InputDataError, r"0 .. 2.*row 1 is 3"),
    (softmax(), CLASSES - 1, 3, InputDataError, r"row 0 is -1"),
    (LogisticLikelihood(), CLASSES, 1, InputDataError, "hold 0 and 1.*contains 2"),
    (LogisticLikelihood(), 2 * BINARY - 1, 1, InputDataError, "contains -1"),
    (LogisticLikelihood(), REAL / 0, 1, InputDataError, "NaN or Inf"),
    (
        GaussianLikelihood(),
        REAL[:, None] / 0,
        1,
        InputDataError,
        "NaN or Inf in 4 of 4",
    ),
    # Shapes.
    (GaussianLikelihood(), REAL, 1, ShapeError, r"Try train_Y.unsqueeze\(-1\)"),
    (GaussianLikelihood(), REAL[:3, None], 1, ShapeError, r"``4 x 1``.*one row of tar"),
    (GaussianLikelihood(), REAL.reshape(2, 2), 1, ShapeError, "one output per column"),
    (softmax(), CLASSES[:, None], 3, ShapeError, r"Try train_Y.squeeze\(-1\)"),
    (softmax(), CLASSES[:3], 3, ShapeError, r"must have 4 rows.*shape \(3,\)"),
    (LogisticLikelihood(), BINARY[:3], 1, ShapeError, "must have 4 rows"),
    (LogisticLikelihood(), BINARY.reshape(2, 2), 1, ShapeError, r"argmax\(-1\)"),
    # Likelihoods.
    (
        SoftmaxLikelihood(num_features=3, num_classes=3),
        CLASSES,
        3,
        ValueError,
        "mixing_weights=False",
    ),
    (
        FixedNoiseGaussianLikelihood(torch.ones(3, dtype=torch.float64)),
        REAL[:, None],
        1,
        ShapeError,
        "holds the noise of 3 points, but there are 4",
    ),
    (
        FixedNoiseGaussianLikelihood(torch.full((4,), torch.inf, dtype=torch.float64)),
        REAL[:, None],
        1,
        ValueError,
        "noise must be positive and finite",
    ),
    (
        MultitaskGaussianLikelihood(num_tasks=2, rank=1, has_global_noise=False),
        REAL.repeat(2).reshape(4, 2),
        2,
        ValueError,
        "is singular without global noise",
    ),
    (
        PoissonLikelihood(),
        REAL,
        1,
        NotImplementedError,
        "no rule for PoissonLikelihood",
    ),
]


@pytest.mark.parametrize("likelihood, Y, num_outputs, error, message", REFUSED)
def test_bad_targets_are_refused(likelihood, Y, num_outputs, error, message):
    with pytest.raises(error, match=message):
        check_targets(likelihood, Y, num_outputs, 4)


def test_the_message_names_the_argument():
    with pytest.raises(ShapeError, match=r"^Y_val must be.*Y_val.unsqueeze\(-1\)"):
        check_targets(GaussianLikelihood(), REAL, 1, 4, name="Y_val")


def test_logits_under_a_probit_likelihood_are_reported():
    f = torch.tensor([[3.0], [-2.0], [2.5], [-4.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"is the probit link.*LogisticLikelihood\(\)"):
        warn_if_logits(BernoulliLikelihood(), f, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_logits(LogisticLikelihood(), f, y)
        warn_if_logits(BernoulliLikelihood(), f / 4, y)
