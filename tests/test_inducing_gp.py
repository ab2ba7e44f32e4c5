"""The ready sparse GP: start, outputs and their likelihoods, copies, doors."""

import copy
import pickle

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from gpytorch.mlls import VariationalELBO
from gpytorch.variational import IndependentMultitaskVariationalStrategy

from gpbridge.checks import ShapeError
from gpbridge.inducing_gp import SparseGP
from gpbridge.kernels import ConvolutionalKernel
from gpbridge.polya_gamma import PolyaGammaBernoulliLikelihood
from gpbridge.selection import OrbitVariationalELBO
from tests.inducing_problems import (
    DOUBLE,
    M,
    N,
    convolutional,
    kernels,
    normal,
    rbf,
    sparse,
)


def test_state_dict_pickle_and_deepcopy_keep_the_posterior():
    kernel, d, width = kernels("convolutional")
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    model = sparse(ScaleKernel(kernel).double(), width, softmax, num_outputs=3).eval()
    x = normal(N, d, seed=2)
    expected = model(x).mean
    fresh = ConvolutionalKernel(rbf(0.3), (4, 4), (2, 2)).double()
    other = SparseGP(
        ScaleKernel(fresh).double(),
        torch.zeros(M, width, dtype=DOUBLE),
        SoftmaxLikelihood(num_classes=3, mixing_weights=False),
        num_outputs=3,
    ).eval()
    other.load_state_dict(model.state_dict())
    twins = other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        assert torch.equal(twin(x).mean, expected)
    other.load_state_dict(
        SparseGP(
            ScaleKernel(convolutional()).double(),
            normal(M, width),
            softmax,
            num_outputs=3,
        ).state_dict()
    )
    assert (other(x).mean - expected).abs().max() > 0.1  # nothing kept of before


def test_the_model_follows_its_dtype():
    kernel, d, width = kernels("convolutional")
    model = sparse(kernel, width).eval()
    expected = model(normal(N, d, seed=2)).mean
    single = model.float()(normal(N, d, seed=2).float())
    assert single.mean.dtype == single.variance.dtype == torch.float32
    assert (single.mean - expected).abs().max() < 1e-3  # jitter 1e-4 in float32


def test_a_bound_and_its_gradients_are_finite_in_all_parameters():
    kernel, d, width = kernels("convolutional")
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    model = SparseGP(
        ScaleKernel(kernel).double(), normal(M, width), softmax, num_outputs=3
    )
    elbo = VariationalELBO(softmax, model, num_data=20)
    labels = torch.tensor([0, 1, 2, 0, 1])
    elbo(model(normal(N, d)), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_the_model_refuses_an_unknown_distribution():
    with pytest.raises(ValueError, match="one of 'cholesky', 'natural'"):
        SparseGP(rbf(), normal(M, 2), distribution="full")


def test_several_outputs_stand_in_the_wrapper_of_gpytorch():
    noise = MultitaskGaussianLikelihood(num_tasks=2)
    model = SparseGP(rbf(), normal(M, 2), noise, num_outputs=2)
    wrapper = model.variational_strategy
    assert isinstance(wrapper, IndependentMultitaskVariationalStrategy)


@pytest.mark.parametrize("name", ["cholesky", "natural", "mean_field"])
def test_the_start_has_the_asked_standard_deviation_and_no_noise(name):
    state = torch.get_rng_state()
    model = SparseGP(rbf(), normal(M, 2), distribution=name, initial_std=0.3)
    model(normal(N, 2))
    q = model.variational_strategy.variational_distribution
    identity = torch.eye(M, dtype=DOUBLE)
    assert (q.covariance_matrix - 0.09 * identity).abs().max() < 1e-8
    assert torch.equal(q.mean, torch.zeros(M, dtype=DOUBLE))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="initial_std must be positive"):
        SparseGP(rbf(), normal(M, 2), initial_std=0.0)


def _refused(*args):
    raise AssertionError("pairs of different inputs are not needed")


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_marginals_are_those_of_the_posterior_and_need_no_other_pairs(
    num_outputs, monkeypatch
):
    kernel, d, width = kernels("convolutional")
    model = sparse(kernel, width, num_outputs=num_outputs).eval()
    x = normal(N, d, seed=2)
    joint, alone = model(x), model.marginals(x)
    assert torch.allclose(alone.mean, joint.mean)
    assert torch.allclose(alone.variance, joint.variance)
    monkeypatch.setattr(kernel, "sums", kernel.sums._replace(matrix=_refused))
    # In train mode gpytorch's likelihoods draw from marginals themselves.
    softmax = SoftmaxLikelihood(
        num_classes=max(2, num_outputs), mixing_weights=False
    ).eval()
    predict = softmax if num_outputs > 1 else GaussianLikelihood()
    predicted = predict(model.marginals(x)).sample()
    assert predicted.shape[-1] == N
    assert model.marginals(x).rsample().shape == joint.mean.shape
    with pytest.raises(AssertionError, match="pairs of different inputs"):
        predict(model(x)).sample()


@pytest.mark.parametrize("stochastic", [False, True])
def test_several_outputs_have_a_noise_each_by_default(stochastic):
    kernel, d, width = kernels("turns")
    model = SparseGP(kernel, normal(M, width, seed=1), num_outputs=3).double()
    model.likelihood.task_noises = torch.tensor([0.1, 0.5, 2.0], dtype=DOUBLE)
    x, y = normal(N, d, seed=2), normal(N, 3, seed=3)
    f = model(x)
    noise = model.likelihood.task_noises
    fit = torch.distributions.Normal(f.mean, noise.sqrt()).log_prob(y)
    fit = fit - f.variance / (2 * noise)
    kl = model.variational_strategy.kl_divergence().sum()
    expected = fit.sum(-1).mean() - kl / 20
    if stochastic:
        elbo = OrbitVariationalELBO(model.likelihood, model, 20, 4)
        found = elbo(x, y)
    else:
        found = VariationalELBO(model.likelihood, model, 20)(f, y)
    assert found.shape == ()
    assert (found - expected).detach().abs() < 1e-9


@pytest.mark.parametrize(
    "likelihood, num_outputs, message",
    [
        (GaussianLikelihood(), 3, "of 1 latent output, but there are 3.*num_tasks=3"),
        (PolyaGammaBernoulliLikelihood(), 2, "but there are 2.*num_classes=2"),
        (BernoulliLikelihood(), 2, "of 1 latent output, but there are 2"),
        (MultitaskGaussianLikelihood(2), 3, "of 2 latent outputs, but there are 3"),
        (MultitaskGaussianLikelihood(2), 1, r"but there are 1.*GaussianLikelihood\(\)"),
        (MultitaskGaussianLikelihood(2), 1, "but there are 1. Try num_outputs=2, or"),
        (
            SoftmaxLikelihood(num_classes=10, mixing_weights=False),
            1,
            "of 10 latent outputs, but there are 1. Try num_outputs=10, or",
        ),
    ],
)
def test_a_likelihood_of_another_number_of_outputs_is_refused(
    likelihood, num_outputs, message
):
    with pytest.raises(ShapeError, match=message):
        SparseGP(rbf(), normal(M, 2), likelihood, num_outputs=num_outputs)


@pytest.mark.parametrize("batch", [(2,), (3,), (4, 2)])
@pytest.mark.parametrize("name", ["convolutional", "rotation", "turns", "one each"])
def test_a_batch_of_inputs_is_a_loop_for_several_outputs(name, batch):
    if name == "one each":
        kernel, d, width = rbf(batch_shape=torch.Size([3])), 2, 2
        kernel.lengthscale = torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)[:, None, None]
    else:
        kernel, d, width = kernels(name)
    model = sparse(kernel, width, num_outputs=3).eval()
    x = normal(*batch, N, d, seed=2)
    joint, alone, prior = model(x), model.marginals(x), model(x, prior=True)
    assert joint.event_shape == alone.event_shape == prior.event_shape == (N, 3)
    assert joint.batch_shape == alone.batch_shape == prior.batch_shape == batch
    rows = x.reshape(-1, N, d)
    for i, one in enumerate(rows):
        expected = model(one)
        for found in (joint, alone):
            assert torch.allclose(found.mean.reshape(-1, N, 3)[i], expected.mean)
            variance = found.variance.reshape(-1, N, 3)[i]
            assert torch.allclose(variance, expected.variance)
        size = 3 * N
        covariance = joint.covariance_matrix.reshape(-1, size, size)[i]
        assert torch.allclose(covariance, expected.covariance_matrix)
        covariance = prior.covariance_matrix.reshape(-1, size, size)[i]
        expected = model(one, prior=True).covariance_matrix
        assert torch.allclose(covariance, expected)
    assert joint.rsample().shape == alone.rsample().shape == (*batch, N, 3)


def test_gradients_reach_all_parameters_through_a_batch_of_inputs():
    kernel, d, width = kernels("convolutional")
    model = sparse(ScaleKernel(kernel).double(), width, num_outputs=2)
    f = model.marginals(normal(2, N, d))
    (f.mean.sum() + f.variance.sum()).backward()
    for name, parameter in model.named_parameters():
        if "likelihood" not in name:
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "shape, message",
    [
        ((16,), r"``... x m x d``.*shape \(16,\).*inducing_points\[:, None\]"),
        ((0, 4), r"at least one, but has shape \(0, 4\).*initial_inducing_points"),
        ((), r"but has shape \(\)"),
    ],
)
def test_inducing_points_are_rows(shape, message):
    with pytest.raises(ShapeError, match=message):
        SparseGP(rbf(), torch.zeros(shape))


def test_inducing_points_are_finite_floats():
    with pytest.raises(TypeError, match="must be a torch.Tensor"):
        SparseGP(rbf(), [[0.0]])
    with pytest.raises(TypeError, match="float32 or float64"):
        SparseGP(rbf(), torch.zeros(3, 1).long())
    with pytest.raises(InputDataError, match="contains NaN"):
        SparseGP(rbf(), torch.full((3, 1), torch.nan))


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_inputs_of_another_dtype_are_refused(num_outputs):
    model = SparseGP(rbf().float(), torch.rand(M, 2), num_outputs=num_outputs)
    x, match = torch.rand(N, 2).double(), r"must be torch.float32 as the inducing poi"
    for call in (model, model.marginals, model.predict):
        with pytest.raises(TypeError, match=match + r".*Try [xX].to\(torch.float32\)"):
            call(x)
    with pytest.raises(TypeError, match="must be torch.float64"):
        model.double()(x.float())


def test_a_bound_over_parts_of_orbits_refuses_inputs_of_another_dtype():
    model = SparseGP(kernels("turns")[0].float(), torch.rand(M, 9))
    elbo = OrbitVariationalELBO(model.likelihood, model, 20, 2)
    with pytest.raises(TypeError, match="x must be torch.float32 as the inducing"):
        elbo(torch.rand(N, 9).double(), torch.rand(N).double())


@pytest.mark.parametrize("outputs", [1, 2])
def test_inputs_of_another_width_are_blamed_and_not_the_model(outputs):
    model = SparseGP(rbf(0.3), normal(M, 3), num_outputs=outputs)
    wrong = normal(N, 5)
    for name, call in (("X", model.predict), ("x", model), ("x", model.marginals)):
        message = rf"{name} must have 3 columns as the inducing.* has 5 .shape \({N}, 5"
        with pytest.raises(ShapeError, match=message):
            call(wrong)
    with pytest.raises(ShapeError, match="x must have 3 columns"):
        model(normal(N))  # one column


def test_patches_of_inputs_need_not_have_their_width():
    kernel, d, width = kernels("convolutional")
    model = sparse(kernel, width)
    assert width != d and model.predict(normal(N, d)).mean.shape == (N, 1)
    with pytest.raises(ShapeError, match=f"have {d} columns, but x has {d + 1}"):
        model.predict(normal(N, d + 1))


def test_a_model_of_features_sees_inputs_of_any_width():
    class OnFeatures(SparseGP):
        def forward(self, x):
            return super().forward(x[..., :3] + x[..., 3:])

    model = OnFeatures(rbf(0.3), normal(M, 3))
    # Upstream joins inputs and inducing points elsewhere only: the width is free.
    assert model(normal(N, 6)).mean.shape == (N,)


@pytest.mark.parametrize("value", [None, [[1.0, 2.0, 3.0]], 3.0])
def test_inputs_that_are_no_tensor_are_refused(value):
    model = SparseGP(rbf(0.3), normal(M, 3))
    for name, call in (("X", model.predict), ("x", model), ("x", model.marginals)):
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, but is"):
            call(value)
