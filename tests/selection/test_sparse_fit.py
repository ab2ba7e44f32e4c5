"""Fits of sparse GPs: against exact GPs, resumed, diverged, natural gradients."""

import copy
import math

import pytest
import torch
from gpytorch.kernels import RBFKernel
from gpytorch.likelihoods import SoftmaxLikelihood

from gpbridge.augmentation import FiniteOrbit, Rotation2d
from gpbridge.dnn.divergence import DivergedError
from gpbridge.inducing_gp import SparseGP
from gpbridge.inducing_points import initial_inducing_points
from gpbridge.kernels import ConvolutionalKernel, InvariantKernel
from gpbridge.selection import OrbitVariationalELBO, fit_sparse_gp
from gpbridge.storage import load_state, save_state
from tests.selection.sparse_problems import (
    DOUBLE,
    bound,
    model_for,
    of_outputs,
    regression,
)


def test_one_natural_step_on_all_data_is_the_exact_posterior():
    """Conjugate, inducing points on the data, jitter aside: the exact GP."""
    X, y = regression()
    model = SparseGP(RBFKernel(), X, distribution="natural").double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    q = model.variational_strategy._variational_distribution.requires_grad_(True)
    model.likelihood.noise = torch.tensor(0.1, dtype=DOUBLE)
    elbo = bound(model, X)
    fit_sparse_gp(
        elbo, X, y, epochs=1, batch_size=len(X), natural_rate=1.0, progress=False
    )
    assert all(p.grad is None for p in q.parameters())
    K = RBFKernel().double()(X).to_dense().detach()
    noisy = K + 0.1 * torch.eye(len(X), dtype=DOUBLE)
    mean = K @ torch.linalg.solve(noisy, y)
    assert (model(X).mean - mean).abs().max() < 1e-4
    evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), noisy)
    value = elbo.train()(model(X), y) * len(X)
    assert float(value.detach()) == pytest.approx(float(evidence.log_prob(y)), abs=1e-2)


def test_natural_and_adam_steps_work_together():
    X, y = regression()
    model = model_for(X, distribution="natural")
    elbo = bound(model, X)
    before = model.covar_module.lengthscale.item()
    options = {"batch_size": 8, "learning_rate": 0.05, "progress": False}
    fit = fit_sparse_gp(elbo, X, y, epochs=8, **options)
    assert fit.history["elbo"][-1] > fit.history["elbo"][0]
    assert model.covar_module.lengthscale.item() != before


@pytest.mark.parametrize("distribution", ["cholesky", "natural"])
@pytest.mark.parametrize("stochastic", [True, False])
def test_a_resumed_run_is_the_run_without_a_pause(distribution, stochastic, tmp_path):
    X, y = regression()
    kernel = InvariantKernel(RBFKernel(), Rotation2d(4))

    def start():
        model = model_for(X, copy.deepcopy(kernel), distribution=distribution)
        if stochastic:
            return OrbitVariationalELBO(model.likelihood, model, len(X), 3)
        return bound(model, X)

    options = {"batch_size": 7, "progress": False}
    whole = fit_sparse_gp(start(), X, y, epochs=4, **options)
    half = fit_sparse_gp(start(), X, y, epochs=2, **options)
    save_state(half.state, tmp_path / "state")
    state = load_state(tmp_path / "state")
    resumed = fit_sparse_gp(start(), X, y, epochs=2, resume=state, **options)
    assert resumed.history == whole.history and len(whole.history["elbo"]) == 4
    states = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_a_run_with_a_redrawn_orbit_goes_on_in_a_model_built_alike():
    X, y = regression()

    def start():
        return bound(model_for(X, InvariantKernel(RBFKernel(), Rotation2d(4))), X)

    def redrawn():
        elbo = start()
        law = elbo.model.covar_module.augmentation
        law.resample(torch.Generator().manual_seed(3))
        return elbo

    options = {"batch_size": 7, "progress": False}
    whole = fit_sparse_gp(redrawn(), X, y, epochs=2, **options)
    state = fit_sparse_gp(redrawn(), X, y, epochs=1, **options).state
    rest = fit_sparse_gp(start(), X, y, epochs=1, resume=state, **options)
    assert rest.history == whole.history
    states = rest.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fit_sparse_gp ended after 25 epochs")
def test_a_fit_with_few_orbit_elements_approaches_that_with_all():
    X, y = regression(40)
    fits = []
    for stochastic in (False, True):
        orbit = FiniteOrbit(_turns(8))
        model = model_for(X, InvariantKernel(RBFKernel(), orbit))
        elbo = bound(model, X)
        if stochastic:
            elbo = OrbitVariationalELBO(model.likelihood, model, len(X), 3)
        options = {"batch_size": 20, "learning_rate": 0.05, "progress": False}
        fit_sparse_gp(elbo, X, y, epochs=25, **options)
        fits.append(bound(model, X).train())
    values = [float(fit(fit.model(X), y).detach()) for fit in fits]
    assert values[0] > -1.1 and values[1] > values[0] - 0.15
    start = bound(model_for(X, InvariantKernel(RBFKernel(), FiniteOrbit(_turns(8)))), X)
    assert values[1] > float(start(start.model(X), y).detach()) + 0.2


def _turns(number):
    def turn(angle):
        c, s = math.cos(angle), math.sin(angle)
        return lambda x: x @ torch.tensor([[c, s], [-s, c]], dtype=x.dtype)

    return [turn(2 * math.pi * a / number) for a in range(number)]


def test_a_convolutional_classifier_learns_where_an_edge_points():
    """Lines at random places: the class is their direction, not their place."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(1, 5, (60,), generator=generator)
    labels = torch.arange(60) % 2
    images = torch.zeros(60, 6, 6)
    for image, where, label in zip(images, place, labels, strict=True):
        (image[where] if label else image[:, where]).fill_(1)
    X = images.flatten(1)
    kernel = ConvolutionalKernel(RBFKernel(), (6, 6), (3, 3))
    Z = initial_inducing_points(kernel, X, 6, generator)
    softmax = SoftmaxLikelihood(num_classes=2, mixing_weights=False)
    model = SparseGP(kernel, Z, softmax, num_outputs=2)
    elbo = bound(model, X)
    fit = fit_sparse_gp(
        elbo, X, labels, epochs=10, batch_size=20, learning_rate=0.1, progress=False
    )
    assert fit.model is elbo and not model.training
    with torch.no_grad():
        assert (model(X).mean.argmax(-1) == labels).float().mean() == 1


def test_the_same_seed_gives_the_same_fit_and_the_global_state_stays():
    X, y = regression()
    state = torch.get_rng_state()
    histories = [
        fit_sparse_gp(bound(model_for(X), X), X, y, epochs=2, progress=False).history
        for _ in range(2)
    ]
    assert histories[0] == histories[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_that_diverges_leaves_the_last_good_state():
    X, y = regression()
    model = model_for(X)
    elbo = bound(model, X)
    kept = []

    def spoil(epoch, elbo, entry):
        kept.append(copy.deepcopy(elbo.state_dict()))
        if epoch == 1:
            model.covar_module.raw_lengthscale.data.fill_(torch.nan)

    with pytest.raises(DivergedError, match="after 2 of 5 epochs") as caught:
        fit_sparse_gp(elbo, X, y, epochs=5, progress=False, callback=spoil)
    assert len(caught.value.last_good.history["elbo"]) == 2
    found = elbo.state_dict()
    assert all(torch.equal(found[key], kept[1][key]) for key in found)


def test_a_callback_may_end_training():
    X, y = regression()
    fit = fit_sparse_gp(
        bound(model_for(X), X),
        X,
        y,
        epochs=5,
        progress=False,
        callback=lambda epoch, elbo, entry: epoch == 1,
    )
    assert len(fit.history["elbo"]) == 2


def test_each_output_learns_its_own_column():
    X, y = regression()
    elbo = of_outputs(X, 2)
    Y = torch.stack([y, -2 * y], -1)
    fit_sparse_gp(elbo, X, Y, epochs=10, learning_rate=0.1, progress=False)
    mean = elbo.model(X).mean.detach()
    assert torch.corrcoef(mean.mT)[0, 1] < -0.8


@pytest.mark.parametrize(
    "dtype, message",
    [
        (torch.float64, "train_Y must be torch.float32 as the training inputs are"),
        (torch.int64, "train_Y must be float32 or float64, but is torch.int64"),
    ],
)
def test_targets_of_gaussian_noise_have_the_dtype_of_the_inputs(dtype, message):
    """As for fit_online."""
    X, y = regression(6)
    model = model_for(X, num_inducing=3).float()
    with pytest.raises(TypeError, match=message):
        fit_sparse_gp(bound(model, X), X.float(), y.to(dtype), progress=False)
