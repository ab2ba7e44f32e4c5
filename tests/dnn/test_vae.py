"""VAEs against linear Gaussian models, where every integral is known."""

import copy
import math
import pickle

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from gpbridge.dnn import VAE, DivergedError, fit_vae
from gpbridge.dnn.vae import divergence
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.storage import load_state, save_state
from gpbridge.testing import assert_module_unchanged
from tests import oracles_weight_space as oracles


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


class Exact(nn.Module):
    """The posterior of z in y = W z + b + noise, for orthogonal columns of W."""

    def __init__(self, W, b, noise, prior_variance=1.0):
        super().__init__()
        self.layer = linear(W, b)  # nested, and shared with no one
        self.noise, self.prior_variance = noise, prior_variance

    def forward(self, Y):
        W = self.layer.weight
        variance = 1 / (W.square().sum(0) / self.noise + 1 / self.prior_variance)
        mean = (Y - self.layer.bias) @ W * variance / self.noise
        return torch.cat([mean, variance.log().expand_as(mean)], -1)


def problem(d=5, n=7, noise=0.3):
    W = torch.linalg.qr(normal(d, 2, seed=1))[0] * torch.tensor([1.5, 0.7]).double()
    b = normal(d, seed=2)
    likelihood = GaussianLikelihood().double()
    likelihood.noise = noise
    Y = normal(n, 2, seed=3) @ W.T + b + noise**0.5 * normal(n, d, seed=4)
    return W, b, likelihood, Y


def images(n=12, seed=0):
    generator = seeded(seed)
    return torch.rand(n, 1, 4, 4, generator=generator)


class Nested(nn.Module):
    """A convolution, batch normalisation and a head, from images to 2 l numbers."""

    def __init__(self, width):
        super().__init__()
        self.features = nn.ModuleDict(
            {"first": nn.Conv2d(1, 3, 3, padding=1), "norm": nn.BatchNorm2d(3)}
        )
        self.head = nn.Linear(48, width)

    def forward(self, x):
        h = self.features["norm"](self.features["first"](x)).tanh()
        return self.head(h.flatten(1))


class Painter(nn.Module):
    """From latent rows to images."""

    def __init__(self, latent_dim):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(latent_dim, 8), nn.Linear(8, 16)])

    def forward(self, z):
        return self.layers[1](self.layers[0](z).tanh()).reshape(-1, 1, 4, 4)


def picture_vae(**options):
    torch.manual_seed(3)
    return VAE(Nested(4), Painter(2), 2, input_shape=(1, 4, 4), **options)


def test_the_divergence_is_a_sum_over_latent_dimensions():
    for width in (1, 6):
        mean, std = normal(5, width), normal(5, width, seed=1).exp()
        q = Independent(Normal(mean, std), 1)
        p = Independent(Normal(torch.zeros_like(mean), torch.ones_like(std)), 1)
        torch.testing.assert_close(divergence(q), kl_divergence(q, p))


def test_the_bound_weighs_pixels_and_latent_dimensions_as_sums():
    # With a decoder that ignores z the bound has no noise, so every term is visible.
    _, b, likelihood, Y = problem()
    torch.manual_seed(0)
    encoder = nn.Linear(5, 6).double()
    vae = VAE(encoder, linear(torch.zeros(5, 3).double(), b), 3, likelihood)
    mean, log_variance = encoder(Y).chunk(2, -1)
    noise = likelihood.noise.item()
    fit = Normal(b, noise**0.5).log_prob(Y).sum(-1)
    q, p = Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)
    expected = (fit - kl_divergence(q, p).sum(-1)).mean()
    torch.testing.assert_close(vae.elbo(Y, generator=seeded()), expected)


def test_with_the_exact_posterior_importance_weights_give_the_density_itself():
    W, b, likelihood, Y = problem()
    noise = likelihood.noise.item()
    vae = VAE(Exact(W, b, noise), linear(W, b), 2, likelihood)
    covariance = W @ W.T + noise * torch.eye(5).double()
    expected = torch.stack([oracles.gaussian_log_density(y, b, covariance) for y in Y])
    for k in (1, 7):  # the weights are constant
        torch.testing.assert_close(vae.log_likelihood(Y, k, seeded()), expected)
    # Then the bound is tight, up to the noise of its draws.
    draws = vae.elbo(Y, 20_000, seeded())
    torch.testing.assert_close(draws, expected.mean(), rtol=0, atol=0.02)


def test_importance_weights_tighten_the_bound_from_below():
    W, b, likelihood, Y = problem()
    vae = VAE(Exact(W, b, 3 * likelihood.noise.item()), linear(W, b), 2, likelihood)
    covariance = W @ W.T + likelihood.noise.item() * torch.eye(5).double()
    exact = torch.stack([oracles.gaussian_log_density(y, b, covariance) for y in Y])
    many = Y.repeat(300, 1)
    gaps = [
        float(exact.mean() - vae.log_likelihood(many, k, seeded()).mean())
        for k in (1, 10, 100)
    ]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0
    gap = float(exact.mean() - vae.elbo(Y, 5000, seeded()).detach())
    assert gap == pytest.approx(gaps[0], rel=0.1)


def test_the_expected_fit_is_that_of_the_linear_model():
    W, b, likelihood, Y = problem()
    noise = likelihood.noise.item()
    vae = VAE(nn.Linear(5, 4).double(), linear(W, b), 2, likelihood)
    q = vae.encode(Y)
    fit = oracles.linear_elbo_terms(Y, W, b, noise, q.mean, q.variance)
    expected = (fit - divergence(q)).mean()
    torch.testing.assert_close(
        vae.elbo(Y, 40_000, seeded()), expected, rtol=0, atol=0.03
    )


def test_the_bound_is_a_mean_over_data():
    _, b, likelihood, Y = problem(n=6)
    vae = VAE(nn.Linear(5, 4).double(), linear(torch.zeros(5, 2).double(), b), 2)
    whole = vae.elbo(Y)
    torch.testing.assert_close(vae.elbo(Y.flip(0)), whole)
    torch.testing.assert_close(vae.elbo(Y.repeat(3, 1)), whole)
    parts = torch.stack([vae.elbo(part) for part in Y.split(2)])
    torch.testing.assert_close(parts.mean(), whole)


@pytest.mark.parametrize("likelihood", [LogisticLikelihood(), BernoulliLikelihood()])
def test_binary_pixels_have_a_probability(likelihood):
    # All data of 3 pixels, and one latent dimension: probabilities sum to one.
    torch.manual_seed(0)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    vae = VAE(nn.Linear(3, 2), nn.Linear(1, 3), 1, likelihood)
    total = vae.log_likelihood(every, 3000, seeded()).exp().sum()
    assert float(total) == pytest.approx(1, abs=0.02)
    drawn = vae.sample(500, seeded(), observation_noise=True)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    gap = drawn.mean(0) - vae.sample(500, seeded(1)).mean(0)
    assert gap.abs().max() < 0.12
    with pytest.raises(ValueError, match=r"support of .*contains 0.5.*Binarise"):
        vae.elbo(every / 2)


def test_images_keep_their_shape():
    Y = images()
    vae = picture_vae()
    assert vae.reconstruct(Y).shape == Y.shape
    torch.testing.assert_close(vae.reconstruct(Y.flatten(1)).reshape(Y.shape),
                               vae.reconstruct(Y))  # fmt: skip
    assert vae.sample(3, seeded()).shape == (3, 1, 4, 4)
    assert vae.decode(torch.zeros(2, 3, 2)).event_shape == (16,)
    assert vae.log_likelihood(Y[:1], 1, seeded()).shape == (1,)


def test_training_raises_the_bound_and_changes_nothing_of_the_callers():
    Y = images(40)
    torch.manual_seed(0)
    encoder, decoder, likelihood = Nested(4), Painter(2), GaussianLikelihood()
    random = torch.get_rng_state()
    with assert_module_unchanged(encoder), assert_module_unchanged(decoder):
        with assert_module_unchanged(likelihood):
            vae = VAE(encoder, decoder, 2, likelihood, input_shape=(1, 4, 4))
            with assert_module_unchanged(vae):
                seen = []

                def watch(epoch, model, entry):
                    seen.append(epoch)
                    return epoch == 9

                fit = fit_vae(
                    vae, Y, epochs=12, learning_rate=1e-2, batch_size=16,
                    generator=seeded(), progress=False,
                    callback=watch,
                )  # fmt: skip
    assert seen == list(range(10)) and len(fit.history["elbo"]) == 10
    assert fit.history["elbo"][-1] > fit.history["elbo"][0] + 3
    assert not fit.model.training
    assert fit.model.likelihood.noise < 0.8 * likelihood.noise
    assert torch.equal(random, torch.get_rng_state())


def test_the_same_seed_gives_the_same_fit_and_the_default_is_seed_zero():
    Y = images(8)
    fits = [
        fit_vae(picture_vae(), Y, epochs=2, generator=generator).model.state_dict()
        for generator in (None, seeded(0), seeded(1))
    ]
    name = "head.weight"
    assert torch.equal(fits[0][f"encoder.{name}"], fits[1][f"encoder.{name}"])
    assert not torch.equal(fits[0][f"encoder.{name}"], fits[2][f"encoder.{name}"])


def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path):
    Y = images(10)
    options = {"batch_size": 4, "progress": False}
    whole = fit_vae(picture_vae(), Y, epochs=4, generator=seeded(5), **options)
    half = fit_vae(picture_vae(), Y, epochs=2, generator=seeded(5), **options)
    save_state(half.state, tmp_path / "state")
    state = load_state(tmp_path / "state")
    for again in (state, half.state, half.state):  # it is left as it was
        rest = fit_vae(picture_vae(), Y, epochs=2, resume=again, **options)
        assert rest.history == whole.history
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, rest.model.state_dict()[name])
    with pytest.raises(ValueError, match="lacks generator, history, model, optim"):
        fit_vae(picture_vae(), Y, resume={})
    with pytest.raises(ValueError, match="resume or generator and not both"):
        fit_vae(picture_vae(), Y, resume=state, generator=seeded())


def test_batch_norm_leaves_out_a_last_batch_of_one_row():
    Y, options = images(5), {"epochs": 1, "progress": False}
    fit = fit_vae(picture_vae(), Y, batch_size=4, **options)
    assert int(fit.model.encoder.features["norm"].num_batches_tracked) == 1
    assert math.isfinite(fit.history["elbo"][0])
    with pytest.raises(ValueError, match="batches of two rows or more"):
        fit_vae(picture_vae(), Y[:1], **options)


def test_copies_predict_the_same():
    Y, vae = images(), picture_vae()
    expected = vae.log_likelihood(Y, 5, seeded())
    other = picture_vae()
    nn.init.zeros_(other.encoder.head.weight)
    other.load_state_dict(vae.state_dict())
    for twin in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae)), other):
        assert torch.equal(twin.log_likelihood(Y, 5, seeded()), expected)


class Overflowing(nn.Linear):
    """A linear layer that returns NaN once it has been trained for some steps."""

    def __init__(self, *sizes, steps):
        super().__init__(*sizes)
        self._steps = steps  # no option: it changes as it is called

    def forward(self, x):
        self._steps -= self.training
        return super().forward(x) * (math.nan if self._steps < 0 else 1)


def test_a_bound_that_becomes_nan_stops_with_the_last_good_state():
    Y = images(8).flatten(1)
    torch.manual_seed(0)
    vae = VAE(Overflowing(16, 4, steps=5), nn.Linear(2, 16), 2)
    options = {"batch_size": 4, "generator": seeded(), "progress": False}
    message = r"after 2 of 9 epochs: The decoder.*\.last_good.*learning_rate=0.0001"
    with pytest.raises(DivergedError, match=message) as caught:
        fit_vae(vae, Y, epochs=9, **options)
    fit = caught.value.last_good
    assert len(fit.history["elbo"]) == 2
    vae.encoder._steps = 100
    options["generator"] = seeded()
    good = fit_vae(vae, Y, epochs=2, **options).model
    for name, value in good.state_dict().items():
        assert torch.equal(value, fit.model.state_dict()[name])
    vae.encoder._steps = 1
    with pytest.raises(DivergedError, match=r"after 0 of 9 epochs") as caught:
        fit_vae(vae, Y, epochs=9, **options)
    untrained = caught.value.last_good.model
    for name, value in vae.state_dict().items():
        assert torch.equal(value, untrained.state_dict()[name])
    vae.encoder._steps = 100  # and the fit goes on from what is kept
    longer = fit_vae(vae, Y, epochs=1, progress=False, resume=fit.state)
    assert len(longer.history["elbo"]) == 3


def test_frozen_weights_stay_and_nothing_to_train_is_an_error():
    Y = images(6)
    vae = picture_vae()
    vae.encoder.requires_grad_(False)
    fit = fit_vae(vae, Y, epochs=1)
    assert torch.equal(fit.model.encoder.head.weight, vae.encoder.head.weight)
    assert not torch.equal(
        fit.model.decoder.layers[1].weight, vae.decoder.layers[1].weight
    )
    with pytest.raises(ValueError, match="nothing to train"):
        fit_vae(vae.requires_grad_(False), Y)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda Y: VAE(nn.Linear(5, 6), nn.Linear(4, 5), 4).elbo(Y),
         r"n x 8.*latent_dim 4.*\(7, 6\) for 7 rows"),
        (lambda Y: VAE(nn.Linear(5, 8), nn.Linear(4, 3), 4).elbo(Y),
         r"decoder must return 5 numbers.*returns 3"),
        (lambda Y: VAE(nn.Linear(5, 8), nn.Linear(4, 5), 4).elbo(Y[:0]), "no rows"),
        (lambda Y: VAE(nn.Linear(5, 8), nn.Linear(4, 5), 4).elbo(Y / 0),
         "NaN or Inf"),
        (lambda Y: VAE(nn.Linear(5, 8), nn.Linear(4, 5), 4).elbo(Y[0]),
         r"n x d.*shape \(5,\)"),
        (lambda Y: VAE(nn.Linear(5, 8), nn.Linear(4, 5), 4, input_shape=(2, 2)).elbo(Y),
         r"input_shape \(2, 2\) has 4 numbers"),
        (lambda Y: VAE(nn.Linear(5, 8), nn.Linear(4, 5), 0), "latent_dim must be"),
        (lambda Y: fit_vae(VAE(nn.Linear(5, 6), nn.Linear(4, 5), 4), Y),
         r"n x 8.*latent_dim 4"),
        (lambda Y: fit_vae(VAE(nn.Linear(5, 8), nn.Linear(4, 5), 4), Y[:0]), "no rows"),
        (lambda Y: fit_vae(VAE(nn.Linear(5, 8), nn.Linear(4, 5), 4), Y,
                           learning_rate=0.0), "learning_rate must be positive"),
        (lambda Y: fit_vae(VAE(nn.Linear(5, 8), nn.Linear(4, 5), 4), Y,
                           likelihood_learning_rate=-1.0),
         "likelihood_learning_rate must be positive"),
        (lambda Y: VAE(nn.Linear(5, 8), nn.Linear(4, 5), 4,
                       SoftmaxLikelihood(num_classes=5, mixing_weights=False)).elbo(Y),
         "each pixel alone"),
    ],
)  # fmt: skip
def test_bad_input_is_named(build, message):
    with pytest.raises((ValueError, InputDataError), match=message):
        build(torch.ones(7, 5))


def test_what_is_no_module_or_of_another_dtype_is_refused():
    with pytest.raises(TypeError, match="encoder must be a torch.nn.Module"):
        VAE(torch.tanh, nn.Linear(2, 5), 2)
    with pytest.raises(TypeError, match=r"Y must be torch.float32.*float64"):
        VAE(nn.Linear(5, 4), nn.Linear(2, 5), 2).elbo(torch.ones(3, 5).double())
