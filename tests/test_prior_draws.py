"""Prior draws are frozen functions with the covariance of the kernel."""

import copy
import pickle

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, RQKernel, ScaleKernel
from torch import nn

from gpbridge import prior_draws
from gpbridge.checks import ShapeError
from gpbridge.kernels import DeepKernel, FeatureKernel, NeuralTangentKernel
from gpbridge.prior_draws import draw_prior
from gpbridge.randomness import row_normals
from gpbridge.testing import assert_gradients_match_finite_differences
from gpbridge.types import FunctionDraws
from tests import oracles_sampling as oracles

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(*shape, seed=1):
    return torch.rand(*shape, 2, dtype=torch.float64, generator=seeded(seed))


def network(width=1):
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, width)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(2), dtype=p.dtype))
    return net


def moments(x):
    return torch.cat([torch.ones_like(x), x, x**2], dim=-1)


KERNELS = {
    "matern": lambda: ScaleKernel(MaternKernel(1.5, ard_num_dims=2)),
    "columns": lambda: ScaleKernel(RBFKernel(active_dims=[1])),
    "tangent": lambda: NeuralTangentKernel(network()),
    "features": lambda: ScaleKernel(FeatureKernel(moments)),
    "sum": lambda: NeuralTangentKernel(network()) + ScaleKernel(MaternKernel(2.5)),
    "scaled sum": lambda: ScaleKernel(FeatureKernel(moments) + RBFKernel()),
    "product": lambda: FeatureKernel(moments) * RBFKernel(),
    "deep": lambda: DeepKernel(network(2), RBFKernel()),
}


@pytest.fixture(params=KERNELS)
def kernel(request):
    kernel = KERNELS[request.param]().double()
    for part in kernel.modules():
        if isinstance(part, ScaleKernel):
            part.outputscale = 0.4
    return kernel


def test_draws_have_the_covariance_of_the_kernel(kernel):
    X = points(6)
    values = draw_prior(kernel, 2, 1500, num_features=8, generator=seeded())(X)
    # Each draw has its own frequencies, of which four are enough for covariances.
    errors = oracles.covariance_errors(values[..., 0], kernel(X).to_dense().detach())
    assert errors.abs().max() < 4.5


def test_exact_features_are_the_jacobian_times_prior_weights():
    kernel, X = NeuralTangentKernel(network()).double(), points(4)
    kernel.prior_variance = 0.3
    draw = draw_prior(kernel, 2, 3, generator=seeded())
    (w,) = draw.weights
    expected = (kernel.features(X) @ w[..., 0]).mT
    torch.testing.assert_close(draw(X)[..., 0], expected, **EXACT)


def test_weights_of_different_leaves_are_not_correlated():
    # One key for every leaf would draw leaves of one shape alike.
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)]).double()
    s = 2000
    draw = draw_prior(NeuralTangentKernel(net), 3, s, generator=seeded())
    w = draw.weights[0][..., 0].double()
    assert w.shape == (36, s)
    correlation = w @ w.mT / s
    assert (correlation.diagonal() - 1).abs().max() < 4.5 * (2 / s) ** 0.5
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 4.5 / s**0.5
    noise = row_normals(50, s, seed=0)  # of the same seed as the weights
    assert (w @ noise.mT / s).abs().max() < 4.5 / s**0.5


def test_batches_of_points_equal_a_loop(kernel):
    X = points(2, 3, 4)
    draw = draw_prior(kernel, 2, 5, num_outputs=3, num_features=16, generator=seeded())
    assert isinstance(draw, FunctionDraws)
    whole = draw(X)
    assert whole.shape == (5, 2, 3, 4, 3)
    torch.testing.assert_close(whole[:, 1, 2], draw(X[1, 2]), **EXACT)
    assert draw(X[:, :, :0]).shape == (5, 2, 3, 0, 3)
    own = points(5, 3, 4, seed=4)
    expected = torch.stack([draw(own[s])[s] for s in range(5)])
    torch.testing.assert_close(draw.each(own), expected, **EXACT)
    some = draw.take(torch.tensor([3, 0])).take_outputs([2])
    torch.testing.assert_close(some(X), whole[[3, 0]][..., 2:], **EXACT)
    torch.testing.assert_close(some.each(own[:2]), some(own[:2])[[0, 1], [0, 1]])


def test_draws_are_differentiable(kernel):
    draw = draw_prior(kernel, 2, 2, num_features=16, generator=seeded())
    assert_gradients_match_finite_differences(draw, points(2, 2))


def test_draws_are_frozen_and_survive_copies(kernel):
    X = points(4)
    draw = draw_prior(kernel, 2, 5, num_outputs=2, num_features=16, generator=seeded())
    before = draw(X)
    with torch.no_grad():
        for p in kernel.parameters():
            p.add_(0.3)
    other = draw_prior(kernel, 2, 5, num_outputs=2, num_features=16)
    other.load_state_dict(draw.state_dict())
    for twin in (draw, copy.deepcopy(draw), pickle.loads(pickle.dumps(draw))):
        assert torch.equal(twin(X), before)
    assert all(not p.requires_grad for p in draw.parameters())


def test_draws_that_follow_keep_their_base_draws():
    kernel, X = KERNELS["matern"]().double(), points(4)
    draw = draw_prior(kernel, 2, 5, generator=seeded(), follow=True)
    kernel.base_kernel.lengthscale = torch.tensor([0.2, 0.4])
    fresh = draw_prior(kernel, 2, 5, generator=seeded())
    torch.testing.assert_close(draw(X), fresh(X), **EXACT)


def test_draws_come_from_the_generator_and_leave_the_global_state(kernel):
    X, before = points(4), torch.get_rng_state()
    draws = [
        draw_prior(kernel, 2, 2, num_features=16, generator=g)(X)
        for g in (seeded(), seeded(), None, None)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[2], draws[3])
    assert torch.equal(before, torch.get_rng_state())


def test_float32_kernels_have_float32_draws():
    draw = draw_prior(MaternKernel(1.5), 2, 3)
    assert draw(points(4).float()).dtype == torch.float32
    assert draw(points(4)).dtype == torch.float64


def test_waves_are_added_in_blocks_by_type_of_device(monkeypatch):
    draw = draw_prior(MaternKernel(1.5).double(), 2, 7, num_features=8)
    X = points(50)
    whole = draw(X)
    for device in ("cpu", "cuda"):  # any other type is as a GPU
        monkeypatch.setitem(prior_draws.WAVES, device, 4 * 5 * 2)
        monkeypatch.setitem(prior_draws._ROWS, device, 5)
        torch.testing.assert_close(draw(X), whole, **EXACT)
        monkeypatch.delitem(prior_draws.WAVES, "cpu", raising=False)
        monkeypatch.delitem(prior_draws._ROWS, "cpu", raising=False)


class TestRefusals:
    def test_kernels_with_a_batch(self):
        with pytest.raises(ShapeError, match=r"has batch_shape \(2,\). Draw from kern"):
            draw_prior(RBFKernel(batch_shape=torch.Size([2])), 2)

    def test_kernels_without_features(self):
        with pytest.raises(NotImplementedError, match="RQKernel has no feature map"):
            draw_prior(RQKernel(), 2)

    @pytest.mark.parametrize("num_samples", [1, 4])
    def test_odd_numbers_of_features(self, num_samples):
        with pytest.raises(ValueError, match="num_features must be even, .* 7. Try 8."):
            draw_prior(RBFKernel(), 2, num_samples, num_features=7)

    def test_no_samples(self):
        with pytest.raises(ValueError, match="num_samples must be positive"):
            draw_prior(RBFKernel(), 2, 0)

    def test_networks_with_several_outputs(self):
        draw = draw_prior(NeuralTangentKernel(network(3)), 2)
        with pytest.raises(ShapeError, match="use LinearizedGP.draw"):
            draw(points(3))
