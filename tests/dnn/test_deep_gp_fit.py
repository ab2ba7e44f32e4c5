"""Training of deep GPs."""

import pytest
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from torch.utils.data import DataLoader, TensorDataset

from gpbridge.checks import NotConvergedWarning, ShapeError
from gpbridge.dnn import DivergedError, build_deep_gp, fit_deep_gp
from gpbridge.storage import load_state, save_state
from gpbridge.testing import assert_module_unchanged
from tests.dnn.deep_gp_problems import normal, problem, seeded

QUIET = {"progress": False}
RISES = pytest.mark.filterwarnings("ignore:fit_deep_gp ended after .* epochs")


def step(n, seed, noise=0.05):
    generator = seeded(seed)
    X = 3.5 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 1.75
    noise = noise * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return X, X.sign() + noise


def trained(depth, seed, n=60, num_inducing=20, epochs=500, fit=None, **options):
    """Log density of fresh data, in nats per point; defaults as a user has them."""
    X, Y = step(n, seed)
    model = build_deep_gp(X, depth=depth, num_inducing=num_inducing, **options)
    result = fit_deep_gp(model, X, Y, epochs=epochs, **(fit or {}), **QUIET)
    test_X, test_Y = step(200, 100 + seed)
    with torch.no_grad():
        return result.model.predict(test_X).log_prob(test_Y).mean().item()


@RISES
@pytest.mark.slow
def test_two_layers_fit_a_step_better_than_one():
    # Larger variances to start at, so that few steps show it.
    options = {"hidden_variance": 0.03, "noise_variance": 0.05}
    options["fit"] = {"learning_rate": 0.03, "num_samples": 1}
    one, two = (trained(depth, 0, 40, 12, 120, **options) for depth in (1, 2))
    assert two > one + 0.2


@RISES
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_two_layers_with_default_options_fit_a_step_better_than_one(seed):
    assert trained(2, seed) > trained(1, seed) + 0.4


def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path):
    model, X, Y = problem(m=2)
    options = {"batch_size": 5, "num_samples": 2, **QUIET}
    whole = fit_deep_gp(model, X, Y, epochs=4, generator=seeded(3), **options)
    half = fit_deep_gp(model, X, Y, epochs=2, generator=seeded(3), **options)
    save_state(half.state, tmp_path / "fit.pt")
    state = load_state(tmp_path / "fit.pt")
    rest = fit_deep_gp(model, X, Y, epochs=2, resume=state, **options)
    assert rest.history == whole.history and len(whole.history["elbo"]) == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name


def test_a_fit_leaves_the_model_and_the_global_random_state():
    model, X, Y = problem()
    before = torch.get_rng_state()
    with assert_module_unchanged(model):
        fit = fit_deep_gp(model, X, Y, epochs=3, **QUIET)
    assert torch.equal(torch.get_rng_state(), before)
    assert not fit.model.training
    assert fit.history["elbo"][-1] > fit.history["elbo"][0]
    weight = model.layers[0].mean_module.weight
    assert torch.equal(fit.model.layers[0].mean_module.weight, weight)


def test_a_loader_stands_for_its_data():
    model, X, Y = problem()
    expected = fit_deep_gp(model, X, Y, epochs=2, batch_size=6, **QUIET)
    loader = DataLoader(TensorDataset(X, Y), batch_size=5)
    fit = fit_deep_gp(model, loader, epochs=2, batch_size=6, **QUIET)
    assert fit.history == expected.history


def test_classes_are_learnt():
    X = normal(60, 2)
    y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    model = build_deep_gp(X, likelihood, num_inducing=20)
    fit = fit_deep_gp(model, X, y, epochs=30, learning_rate=0.1, num_samples=2, **QUIET)
    assert (fit.model.predict(X).probs.argmax(-1) == y).double().mean() > 0.85


def test_divergence_leaves_the_last_good_state():
    model, X, Y = problem()
    good = fit_deep_gp(model, X, Y, epochs=2, **QUIET)
    with torch.no_grad():
        good.state["optimizer"]["state"][0]["exp_avg"].fill_(float("inf"))
    with pytest.raises(DivergedError, match="diverged after 0 of 5") as error:
        fit_deep_gp(model, X, Y, epochs=5, resume=good.state, **QUIET)
    last = error.value.last_good.model
    for name, value in good.model.state_dict().items():
        assert torch.equal(value, last.state_dict()[name])


def test_a_fit_that_ends_too_early_says_so_once_and_a_longer_one_does_not():
    X, Y = step(12, 0)
    model = build_deep_gp(X, depth=1, num_inducing=4)
    message = "fit_deep_gp ended after 24 epochs.*epochs= .now 24.*rate= .now 0.01"
    with pytest.warns(NotConvergedWarning, match=message) as caught:
        fit = fit_deep_gp(model, X, Y, epochs=24, **QUIET)
    assert [warning.filename for warning in caught] == [__file__]
    # Warnings are errors.
    done = fit_deep_gp(model, X, Y, epochs=200, learning_rate=0.2, **QUIET)
    assert done.history["elbo"][-1] > fit.history["elbo"][-1] + 1


def test_a_resumed_fit_is_judged_by_its_own_epochs():
    X, Y = step(12, 0)
    model = build_deep_gp(X, depth=1, num_inducing=4)
    with pytest.warns(NotConvergedWarning):
        fit = fit_deep_gp(model, X, Y, epochs=24, **QUIET)
    # Warnings are errors: the rise before is not that of a single epoch.
    fit = fit_deep_gp(model, X, Y, epochs=1, resume=fit.state, **QUIET)
    assert len(fit.history["elbo"]) == 25


def test_a_callback_that_ends_a_fit_knows_what_it_does():
    X, Y = step(12, 0)
    model = build_deep_gp(X, depth=1, num_inducing=4)
    stop = {"callback": lambda epoch, *_: epoch == 24, **QUIET}
    fit = fit_deep_gp(model, X, Y, epochs=60, **stop)
    assert len(fit.history["elbo"]) == 25


def test_bad_data_are_named():
    model, X, Y = problem()
    with pytest.raises(TypeError, match="one loader of pairs"):
        fit_deep_gp(model, X)
    with pytest.raises(TypeError, match="iterated once only"):
        fit_deep_gp(model, iter([(X, Y)]))
    for loader in ([], [X], [(X, Y, Y)]):
        with pytest.raises(TypeError, match="pairs of tensors"):
            fit_deep_gp(model, loader)
    with pytest.raises(ShapeError, match="Y must be"):
        fit_deep_gp(model, X, Y[:-1])
    with pytest.raises(TypeError, match="Y must be torch.float64"):
        fit_deep_gp(model, X, Y.float())
    with pytest.raises(ValueError, match="num_samples must be"):
        fit_deep_gp(model, X, Y, num_samples=0)
    with pytest.raises(TypeError, match="must be a gpbridge DeepGaussianProcess.*buil"):
        fit_deep_gp("a", X, Y)
    with pytest.raises(TypeError, match="learning_rate must be one number"):
        fit_deep_gp(model, X, Y, learning_rate=(0.1,))
    with pytest.raises(TypeError, match="generator must be a torch Generator"):
        fit_deep_gp(model, X, Y, generator=0, **QUIET)
    with pytest.raises(TypeError, match="callback must be a function"):
        fit_deep_gp(model, X, Y, callback="a", **QUIET)


def test_a_state_of_another_run_is_refused():
    model, X, Y = problem()
    state = fit_deep_gp(model, X, Y, epochs=1, **QUIET).state
    with pytest.raises(ValueError, match="of another run: its data is"):
        fit_deep_gp(model, X, Y + 1, epochs=1, resume=state, **QUIET)
    other, _, _ = problem(num_inducing=5)
    with pytest.raises(ValueError, match=r"its model is .*\(6, 2\)"):
        fit_deep_gp(other, X, Y, epochs=1, resume=state, **QUIET)


def test_a_model_without_parameters_to_train_is_refused_by_what_it_has():
    model, X, Y = problem()
    with pytest.raises(ValueError, match="Try model.requires_grad_") as caught:
        fit_deep_gp(model.requires_grad_(False), X, Y, epochs=1, **QUIET)
    assert "encoder" not in str(caught.value)
