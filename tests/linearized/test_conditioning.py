"""Conditioning on further observations is a refit without its cost."""

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from botorch.models.transforms import Normalize, Standardize
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood

from gpbridge.checks import ShapeError
from tests import oracles_linearized as oracles
from tests.linearized.problems import (
    PRIOR_VARIANCE,
    PROBLEMS,
    both_spaces,
    build,
    gaussian_likelihoods,
    inputs,
    network,
    point_noise,
    targets,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def split(name, n=12, more=4):
    """Old and new data, and the noise arguments of both."""
    X = inputs(n + more)
    Y = targets(name, X)
    old, new = {}, {}
    if name == "fixed_noise":
        noise = point_noise(n + more)
        old = {"likelihood": FixedNoiseGaussianLikelihood(noise[:n])}
        new = {"noise": noise[n:, None]}
    return (X[:n], Y[:n], old), (X[n:], Y[n:], new)


def refit(name, space, n=12, more=4, **options):
    X = inputs(n + more)
    if name == "fixed_noise":
        options["likelihood"] = FixedNoiseGaussianLikelihood(point_noise(n + more))
    return build(name, space, X, targets(name, X), **options)


def moments(model, X):
    posterior = model.posterior(X)
    return posterior.mean, posterior.distribution.covariance_matrix


def assert_same(model, other, tolerance=EXACT):
    X = inputs(5, seed=7)
    for got, expected in zip(moments(model, X), moments(other, X), strict=True):
        torch.testing.assert_close(got, expected, **tolerance)
    got, expected = model.predict(X), other.predict(X)
    assert type(got) is type(expected)
    if hasattr(got, "probs"):
        torch.testing.assert_close(got.probs, expected.probs, **tolerance)
    elif not isinstance(model.likelihood, FixedNoiseGaussianLikelihood):
        # Which noise a new point has is a guess there: the mean of those known first.
        torch.testing.assert_close(got.stddev, expected.stddev, **tolerance)
    torch.testing.assert_close(model.train_targets, other.train_targets)
    torch.testing.assert_close(model.train_inputs[0], other.train_inputs[0])


@pytest.mark.parametrize(
    "name, space",
    [(name, space) for name in PROBLEMS for space in ("function", "weight")]
    + [
        (name, "matrix_free") for name in ("fixed_noise", "multitask_rank_1", "softmax")
    ],
)
def test_it_equals_a_refit(name, space):
    (X, Y, old), (X_new, Y_new, new) = split(name)
    model = build(name, space, X, Y, mean="linear_model", **old)
    conditioned = model.condition_on_observations(X_new, Y_new, **new)
    tolerance = EXACT if PROBLEMS[name].gaussian else {"rtol": 1e-7, "atol": 1e-7}
    if space == "matrix_free":
        tolerance = {"rtol": 1e-7, "atol": 1e-9}
    assert_same(conditioned, refit(name, space, mean="linear_model"), tolerance)


@both_spaces
@gaussian_likelihoods
def test_one_point_at_a_time_equals_all_at_once(name, space):
    (X, Y, old), (X_new, Y_new, new) = split(name)
    model = build(name, space, X, Y, **old)
    for i in range(4):
        noise = {k: v[i : i + 1] for k, v in new.items()}
        model = model.condition_on_observations(
            X_new[i : i + 1], Y_new[i : i + 1], **noise
        )
        model.posterior(inputs(2))
    assert_same(model, refit(name, space))


@both_spaces
def test_with_the_networks_mean_new_observations_correct_it(space):
    # The posterior of the training data is the prior of the new ones, its mean is f.
    name = "gaussian"
    (X, Y, _), (X_new, Y_new, _) = split(name)
    X_test = inputs(5, seed=7)
    model = build(name, space, X, Y, mean="network", noise=0.03)
    noise = model.noise_variance.item()
    conditioned = model.condition_on_observations(X_new, Y_new)
    at = torch.cat([X_new, X_test])
    train, both = oracles.tangent(network(), X), oracles.tangent(network(), at)
    precision = torch.eye(12).double() / noise
    covariance = oracles.laplace_covariance(train, both, PRIOR_VARIANCE, precision)
    C = covariance[:4, :4] + noise * torch.eye(4).double()
    gain = covariance[4:, :4] @ torch.linalg.inv(C)
    mean = both.value[4:] + gain @ (Y_new[:, 0] - both.value[:4])
    expected = covariance[4:, 4:] - gain @ covariance[:4, 4:]
    got = moments(conditioned, X_test)
    torch.testing.assert_close(got[0][:, 0], mean, **EXACT)
    torch.testing.assert_close(got[1], expected, **EXACT)


@both_spaces
@pytest.mark.parametrize("name", ["multitask", "multitask_rank_1"])
def test_one_output_of_several_can_be_observed(name, space):
    (X, Y, _), (X_new, Y_new, _) = split(name)
    X_test = inputs(5, seed=7)
    model = build(name, space, X, Y)
    one = model.subset_output([1]).condition_on_observations(X_new, Y_new[:, 1:])
    # Dense: condition the joint posterior of both outputs on the second alone.
    mean, covariance = moments(model, torch.cat([X_new, X_test]))
    second = torch.arange(1, 18, 2)
    mean, covariance = mean[:, 1], covariance[second][:, second]
    variance = PROBLEMS[name].noise(1)[1, 1]
    C = covariance[:4, :4] + variance * torch.eye(4).double()
    gain = covariance[4:, :4] @ torch.linalg.inv(C)
    expected = mean[4:] + gain @ (Y_new[:, 1] - mean[:4])
    reduced = covariance[4:, 4:] - gain @ covariance[:4, 4:]
    got = moments(one, X_test)
    torch.testing.assert_close(got[0][:, 0], expected, **EXACT)
    torch.testing.assert_close(got[1], reduced, **EXACT)
    predicted = one.predict(X_test)
    torch.testing.assert_close(predicted.mean[:, 0], expected, **EXACT)
    torch.testing.assert_close(
        predicted.variance[:, 0], reduced.diagonal() + variance, **EXACT
    )
    assert one.num_outputs == 1 and one.train_targets.shape == (16,)


@both_spaces
def test_it_does_not_change_the_model_it_came_from(space):
    (X, Y, _), (X_new, Y_new, _) = split("multitask")
    model = build("multitask", space, X, Y)
    before = moments(model, inputs(5, seed=7))
    first = model.condition_on_observations(X_new[:2], Y_new[:2])
    between = moments(first, inputs(5, seed=7))
    second = first.condition_on_observations(X_new[2:], Y_new[2:])
    second.posterior(inputs(3))
    for earlier, kept in ((model, before), (first, between)):
        for got, expected in zip(
            moments(earlier, inputs(5, seed=7)), kept, strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert second.functional is model.functional
    assert second.likelihood is model.likelihood


def test_a_prior_variance_set_later_is_seen_by_both():
    (X, Y, _), (X_new, Y_new, _) = split("gaussian")
    model = build("gaussian", "auto", X, Y)
    conditioned = model.condition_on_observations(X_new, Y_new)
    conditioned.posterior(inputs(3))
    model.prior_variance = 2.0
    expected = refit("gaussian", "auto")
    expected.prior_variance = 2.0
    assert_same(conditioned, expected)


def test_transforms_apply_to_new_observations():
    (X, Y, _), (X_new, Y_new, _) = split("multitask")
    transforms = {
        "input_transform": Normalize(2, bounds=torch.tensor([[-1.0, -1], [2, 3]])),
        "outcome_transform": Standardize(2),
    }
    model = build("multitask", "auto", X, Y, **transforms)
    Z, Z_new = (model.input_transform(x) for x in (X, X_new))
    V, V_new = (model.outcome_transform(y)[0] for y in (Y, Y_new))
    plain = build("multitask", "auto", Z, V).condition_on_observations(Z_new, V_new)
    got = model.condition_on_observations(X_new, Y_new).posterior(inputs(5, seed=7))
    expected = plain.posterior(model.input_transform(inputs(5, seed=7)))
    mean, _ = model.outcome_transform.untransform(expected.mean)
    torch.testing.assert_close(got.mean, mean, **EXACT)
    variance = expected.variance * model.outcome_transform.stdvs.square()
    torch.testing.assert_close(got.variance, variance, **EXACT)


@gaussian_likelihoods
def test_fantasies_are_conditioned_models_in_a_batch(name):
    model, m = build(name), PROBLEMS[name].m
    X_new, X_test = inputs(6, seed=8).reshape(3, 2, 2), inputs(5, seed=7)
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
    noise = None
    if name == "fixed_noise":
        noise = torch.full((3, 2, 1), 0.05, dtype=torch.float64)
    fantasies = model.fantasize(X_new, sampler, observation_noise=noise)
    assert fantasies.batch_shape == (4, 3)
    posterior = fantasies.posterior(X_test)
    assert posterior.mean.shape == (4, 3, 5, m)
    drawn = sampler(
        model.posterior(X_new, observation_noise=True if noise is None else noise)
    )
    extra = {} if noise is None else {"noise": noise[1]}
    one = model.condition_on_observations(X_new[1], drawn[2, 1].detach(), **extra)
    torch.testing.assert_close(
        posterior.mean[2, 1], one.posterior(X_test).mean, **EXACT
    )
    with pytest.raises(NotImplementedError, match="batch of fantasies"):
        fantasies.predict(X_test)
    with pytest.raises(NotImplementedError, match="batch of fantasies"):
        fantasies.draw(2)


def test_gradients_flow_to_new_inputs_and_targets():
    (X, Y, _), (X_new, Y_new, _) = split("gaussian")
    model = build("gaussian", "auto", X, Y)
    X_test = inputs(5, seed=7)

    def value(X_new, Y_new):
        posterior = model.condition_on_observations(X_new, Y_new).posterior(X_test)
        return posterior.mean.sum() + posterior.variance.sum()

    assert torch.autograd.gradcheck(
        value, (X_new.requires_grad_(), Y_new.requires_grad_())
    )


def test_a_look_without_gradients_does_not_cut_them_off():
    (X, Y, _), (X_new, Y_new, _) = split("gaussian")
    conditioned = build("gaussian", "auto", X, Y).condition_on_observations(
        X_new.requires_grad_(), Y_new
    )
    with torch.no_grad():
        conditioned.posterior(inputs(5, seed=7))
    conditioned.posterior(inputs(5, seed=7)).mean.sum().backward()
    assert X_new.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["logistic", "softmax"])
def test_fantasies_of_labels_are_refused_with_the_reason(name):
    model = build(name)
    sampler = SobolQMCNormalSampler(torch.Size([2]), seed=0)
    with pytest.raises(
        NotImplementedError, match="observes labels. Condition on labels"
    ):
        model.fantasize(inputs(2), sampler)


def test_observations_of_the_wrong_kind_are_refused():
    model = build("multitask")
    X, Y = inputs(3, seed=8), targets("multitask", inputs(3, seed=8))
    condition = model.condition_on_observations
    with pytest.raises(
        ShapeError, match=r"``... x 3 x 2`` for X of shape \(3, 2\), but"
    ):
        condition(X, Y[:, :1])
    with pytest.raises(ShapeError, match=r"``... x 3 x 2``.* but has shape \(2, 2\)"):
        condition(X, Y[:2])
    with pytest.raises(ShapeError, match=r"shape \(2,\). Try Y.unsqueeze\(0\)"):
        condition(X[:1], Y[0])
    with pytest.raises(ShapeError, match=r"shape \(3,\). Try Y.unsqueeze\(-1\)"):
        build("gaussian").condition_on_observations(X, Y[:, 0])
    with pytest.raises(ShapeError, match="must have 2 columns as the training inputs"):
        condition(X[:, :1], Y)
    with pytest.raises(TypeError, match="X must be torch.float64 .* is torch.float32"):
        condition(X.float(), Y)
    with pytest.raises(TypeError, match="Y must be torch.float64 .* is torch.float32"):
        condition(X, Y.float())
    Y[1] = float("nan")
    with pytest.raises(
        InputDataError, match=r"Y contains NaN or Inf in 1 of 3 .* \[1\]"
    ):
        condition(X, Y)
    fixed = build("fixed_noise")
    with pytest.raises(ValueError, match="noise must be given"):
        fixed.condition_on_observations(X, X[:, :1])
    with pytest.raises(ValueError, match="noise must be positive and finite"):
        fixed.condition_on_observations(X, X[:, :1], noise=torch.zeros(3, 1).double())
    with pytest.raises(NotImplementedError, match="takes one data set, ``n' x d``"):
        build("logistic").condition_on_observations(X[None], torch.ones(1, 3))
    with pytest.raises(ValueError, match="noise is for Gaussian observations, but"):
        build("logistic").condition_on_observations(X, torch.ones(3), noise=X)
    with pytest.raises(InputDataError, match="Y must hold 0 and 1"):
        build("logistic").condition_on_observations(X, torch.full((3,), 2.0).double())
    with pytest.raises(NotImplementedError, match="Subset the outputs before"):
        condition(X, X).subset_output([0])


def test_a_model_with_a_graph_serves_several_backward_passes():
    (X, Y, _), (X_new, Y_new, _) = split("gaussian")
    conditioned = build("gaussian", "auto", X, Y).condition_on_observations(
        X_new.requires_grad_(), Y_new
    )
    gradients = []
    for _ in range(2):
        posterior = conditioned.posterior(inputs(5, seed=7))
        (posterior.mean.sum() + posterior.variance.sum()).backward()
        gradients.append(X_new.grad.clone())
        X_new.grad = None
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gaussian", "multitask"])
def test_a_noise_set_later_is_that_of_all_observations(name):
    (X, Y, _), (X_new, Y_new, _) = split(name)
    model = build(name, "auto", X, Y)
    conditioned = model.condition_on_observations(X_new, Y_new)
    conditioned.posterior(inputs(3))
    expected = refit(name, "auto")
    for each in (model, expected):
        if name == "gaussian":
            each.likelihood.noise = torch.tensor([0.5], dtype=torch.float64)
        else:
            noises = torch.tensor([0.5, 0.1], dtype=torch.float64)
            each.likelihood.task_noises = noises
    assert_same(conditioned, expected)
    generator = torch.Generator().manual_seed
    got = conditioned.draw(3, generator(0))(inputs(5, seed=7))
    again = model.condition_on_observations(X_new, Y_new).draw(3, generator(0))
    torch.testing.assert_close(got, again(inputs(5, seed=7)), **EXACT)


def test_noise_that_was_given_stays_as_it_is():
    (X, Y, _), (X_new, Y_new, _) = split("gaussian")
    given = torch.full((2, 1), 0.2, dtype=torch.float64)
    model = build("gaussian", "auto", X, Y)
    mixed = model.condition_on_observations(X_new[:2], Y_new[:2], noise=given)
    mixed = mixed.condition_on_observations(X_new[2:], Y_new[2:])
    model.likelihood.noise = torch.tensor([0.5], dtype=torch.float64)
    noise = torch.tensor([0.5] * 12 + [0.2] * 2 + [0.5] * 2, dtype=torch.float64)
    fixed = build(
        "gaussian",
        "auto",
        inputs(16),
        targets("gaussian", inputs(16)),
        likelihood=FixedNoiseGaussianLikelihood(noise),
    )
    for got, expected in zip(
        moments(mixed, inputs(5, seed=7)),
        moments(fixed, inputs(5, seed=7)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, **EXACT)
