"""Dropout draws are functions: one set of masks, at whatever inputs."""

import copy

import pytest
import torch
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.dnn.dropout import DropoutDraws, MCDropout
from gpbridge.testing import assert_module_unchanged
from gpbridge.types import FunctionDraws, WeightPosterior


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(*shape):
    return torch.randn(*shape, generator=seeded(1), dtype=torch.float64)


def dense(p=0.3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Dropout(p),
        nn.Linear(30, 20), nn.Tanh(), nn.Dropout(p), nn.Linear(20, 2),
    ).double()  # fmt: skip


def test_a_draw_is_a_function():
    posterior, X = MCDropout(dense()), points(40, 2)
    draws = posterior.draw(6, seeded())
    assert isinstance(draws, FunctionDraws) and isinstance(posterior, WeightPosterior)
    values = draws(X)
    assert values.shape == (6, 40, 2)
    torch.testing.assert_close(draws(X[:7]), values[:, :7])
    torch.testing.assert_close(draws(X.flip(0)), values.flip(1))
    torch.testing.assert_close(draws(X.reshape(4, 10, 2)), values.reshape(6, 4, 10, 2))
    torch.testing.assert_close(draws(X[:1].expand(5, 2)), values[:, :1].expand(6, 5, 2))
    spread = (values[:, None] - values).abs().amax((-2, -1))
    assert (spread + torch.eye(6) > 1e-3).all()  # no two draws are equal
    torch.testing.assert_close(posterior.draw(6, seeded())(X), values)
    assert (posterior.draw(6, seeded(3))(X) - values).abs().max() > 1e-3


def test_moments_are_those_of_independent_masks():
    """At one point: the law of a forward in train mode, batch norm frozen."""
    network, X = dense(), points(3, 2)
    values = MCDropout(network).draw(3000, seeded())(X)[..., 0]
    reference = copy.deepcopy(network).eval()
    for module in reference.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    torch.manual_seed(1)
    expected = torch.stack([reference(X)[:, 0] for _ in range(3000)]).detach()
    error = (values.mean(0) - expected.mean(0)) / (expected.var(0) / 1500).sqrt()
    assert error.abs().max() < 4.5
    ratio = values.var(0) / expected.var(0)
    assert (ratio - 1).abs().max() < 0.15
    # Jointly they are correlated, which independent masks per row are not.
    assert torch.corrcoef(values.T)[0, 1].abs() > 0.2
    assert torch.corrcoef(expected.T)[0, 1].abs() < 0.1


def test_the_global_state_and_the_module_are_left_alone():
    network, X = dense().train(), points(4, 2)
    with assert_module_unchanged(network):
        state = torch.get_rng_state()
        MCDropout(network).draw(2)(X)
        assert torch.equal(torch.get_rng_state(), state)
    assert network.training


def test_gradients_and_copies():
    draws, X = MCDropout(dense()).draw(3, seeded()), points(4, 2).requires_grad_()
    gradient = torch.autograd.grad(draws(X).sum(), X)[0]
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    twin = copy.deepcopy(draws)
    other = MCDropout(dense()).draw(3, seeded(5))
    other.load_state_dict(draws.state_dict())
    assert torch.equal(twin(X), draws(X)) and torch.equal(other(X), draws(X))


def test_images_and_channels():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Dropout2d(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    draws = MCDropout(network, input_shape=(1, 6, 6)).draw(4, seeded())
    X = points(5, 36)
    torch.testing.assert_close(draws(X)[:, :2], draws(X[:2]))


def test_a_network_may_have_no_weights():
    X = torch.ones(3, 50, dtype=torch.float64)
    values = MCDropout(nn.Dropout(0.5)).draw(2, seeded())(X)
    assert values.dtype == X.dtype and set(values.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(values[:, 0], values[:, 1])


@pytest.mark.parametrize("network", [nn.Linear(2, 1), dense(0.0)])
def test_a_network_without_dropout_is_refused(network):
    with pytest.raises(ValueError, match=r"a dropout layer with p > 0"):
        MCDropout(network)


def test_the_posterior_is_not_called_and_says_what_to_do():
    posterior = MCDropout(nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5)))
    with pytest.raises(TypeError, match=r"Draw functions, .draw\(num_samples\)"):
        posterior(torch.zeros(3, 2))


def test_a_chunk_size_bounds_what_is_held_and_not_the_functions(monkeypatch):
    posterior, X, rows = MCDropout(dense()), points(3, 7, 2), []
    expected, evaluate = posterior.draw(6, seeded())(X), DropoutDraws._evaluate

    def counted(self, part, own):
        rows.append(len(part))
        return evaluate(self, part, own)

    monkeypatch.setattr(DropoutDraws, "_evaluate", counted)
    for chunk_size, most in ((1, 4), (2, 7), (5, 18), (6, 21), (50, 21)):
        draws = posterior.draw(6, seeded(), chunk_size=chunk_size)
        rows.clear()
        torch.testing.assert_close(draws(X), expected)
        assert max(rows) == most and sum(rows) == 21
    with pytest.raises(ValueError, match="chunk_size must be a whole number"):
        posterior.draw(6, chunk_size=0)


class Branches(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


class Named(Branches):
    def forward(self, x):
        return {"mean": self.inner(x)}


def test_bad_input_says_what_to_pass():
    draws = MCDropout(dense()).draw(2)
    with pytest.raises(
        ShapeError, match=r"fails on an X of 3 columns.*takes ``... x 2``"
    ):
        draws(points(4, 3))
    with pytest.raises(TypeError, match="X must be a torch.Tensor, but is dict"):
        draws({"x": points(4, 2)})
    with pytest.raises(TypeError, match="must return one tensor, but returns dict"):
        MCDropout(Named(dense())).draw(2)(points(4, 2))
    with pytest.raises(ValueError, match=r"vmap cannot evaluate the draws.*where"):
        MCDropout(Branches(dense())).draw(2)(points(4, 2))
    images = MCDropout(nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), (1, 2, 2)).draw(2)
    with pytest.raises(ShapeError, match=r"\(1, 2, 2\) has 4 entries, but X has 3"):
        images(points(4, 3))
