"""Members of an ensemble taken once each, at every position of a batch the same."""

import copy
import pickle

import pytest
import torch
from botorch.acquisition import PosteriorMean
from botorch.acquisition.logei import (
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
)
from botorch.acquisition.monte_carlo import qUpperConfidenceBound
from botorch.acquisition.objective import (
    ExpectationPosteriorTransform,
    ScalarizedPosteriorTransform,
)
from botorch.models.ensemble import EnsembleModel
from botorch.models.transforms import Normalize, Standardize
from botorch.optim import optimize_acqf
from botorch.posteriors.ensemble import EnsemblePosterior
from botorch.sampling.get_sampler import get_sampler
from botorch.sampling.index_sampler import IndexSampler
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.acquisition import DrawsPosterior, EnumeratingSampler, ThompsonDraw
from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.checks import ReliabilityWarning
from gpbridge.functional import FunctionalNet
from gpbridge.surrogates import WeightSpaceModel
from gpbridge.weights import GaussianWeights


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Waves(EnsembleModel):
    """Eight functions in closed form, answering with one kind of posterior or other."""

    def __init__(self, kind=DrawsPosterior):
        super().__init__()
        self.kind, self._num_outputs, self.batch_shape_ = kind, 1, torch.Size()

    @property
    def batch_shape(self):
        return torch.Size()

    def forward(self, X):
        phases = torch.arange(8).to(X)[:, None]
        return torch.sin(X.sum(-1).unsqueeze(-2) + phases).unsqueeze(-1)

    def posterior(self, X, **kwargs):
        return self.kind(self(X))


def all_members(k, batch=()):
    sampler = EnumeratingSampler(torch.Size([k]))
    values = torch.arange(8.0).reshape(8, 1, 1).expand(*batch, 8, 1, 1)
    return sampler(DrawsPosterior(values)).squeeze((-2, -1))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_every_member_comes_once_at_every_position(batch):
    samples = all_members(8, batch)
    expected = torch.arange(8.0).reshape(8, *[1] * len(batch)).expand(8, *batch)
    assert torch.equal(samples, expected)


def test_fewer_samples_are_spread_and_more_are_even():
    assert torch.equal(all_members(4), torch.tensor([0.0, 2.0, 4.0, 6.0]))
    counts = torch.bincount(all_members(20).long(), minlength=8)
    assert int(counts.min()) == 2 and int(counts.max()) == 3


def test_unequal_weights_are_kept_up_to_one_sample():
    weights = torch.tensor([0.5, 0.05, 0.3, 0.15])
    values = torch.arange(4.0).reshape(4, 1, 1)
    sampler = EnumeratingSampler(torch.Size([10]))
    samples = sampler(DrawsPosterior(values, weights)).flatten().long()
    counts = torch.bincount(samples, minlength=4)
    assert bool(((counts - 10 * weights).abs() < 1).all())


def test_large_ensembles_lose_no_member_to_rounding():
    values = torch.arange(5000.0).reshape(5000, 1, 1)
    samples = EnumeratingSampler(torch.Size([5000]))(DrawsPosterior(values))
    assert torch.equal(samples.flatten(), values.flatten())


def acquisitions(model, **options):
    X = normal(6, 2, seed=3)
    yield qLogExpectedImprovement(model, 0.5, **options)
    yield qLogNoisyExpectedImprovement(model, X, prune_baseline=False, **options)
    yield qUpperConfidenceBound(model, 2.0, **options)


def test_the_value_of_a_candidate_does_not_depend_on_its_place():
    X = normal(3, 2, seed=1)
    same = X.expand(5, 3, 2)
    for function in acquisitions(Waves()):
        values = function(same)
        assert torch.equal(values, values[:1].expand(5))
        torch.testing.assert_close(function(X[None]), values[:1])
    # That of the stock sampler does.
    torch.manual_seed(0)
    sampler = IndexSampler(torch.Size([8]), seed=0)
    stock = qLogExpectedImprovement(Waves(EnsemblePosterior), 0.5, sampler=sampler)
    assert float(stock(same).std()) > 1e-3


def test_an_acquisition_is_the_average_over_all_members():
    X = normal(4, 3, 2, seed=1)
    values = Waves()(X).squeeze(-1)  # 4 x 8 x 3
    # Each function once: the bound is the mean over members of the largest deviation.
    mean = values.mean(-2, keepdim=True)
    expected = (mean + (torch.pi) ** 0.5 * (values - mean).abs()).amax(-1).mean(-1)
    torch.testing.assert_close(qUpperConfidenceBound(Waves(), 2.0)(X), expected)


def test_only_our_posteriors_get_the_sampler():
    values = normal(8, 2, 1)
    shape = torch.Size([512])
    before = torch.get_rng_state()
    sampler = get_sampler(DrawsPosterior(values), shape)
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(sampler, EnumeratingSampler)
    assert sampler.sample_shape == torch.Size([8])
    stock = get_sampler(EnsemblePosterior(values), shape, seed=0)
    assert type(stock) is IndexSampler


def test_samplers_can_be_copied_and_used_for_other_batches():
    sampler = EnumeratingSampler(torch.Size([8]))
    sampler(DrawsPosterior(normal(3, 8, 2, 1)))
    other = normal(5, 8, 4, 1)
    for twin in (sampler, copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(twin(DrawsPosterior(other)), other.movedim(-3, 0))


def test_the_covariance_is_that_of_the_members():
    values = normal(3, 8, 2, 2)  # batch x s x q x m
    distribution = DrawsPosterior(values).distribution
    assert distribution.mean.shape == (3, 2, 2)
    for i in range(3):
        expected = values[i].flatten(1).mT.cov()  # point-major, output fastest
        K = distribution.covariance_matrix[i]
        torch.testing.assert_close(K, expected)


def test_transforms_act_on_each_member():
    values, weights = normal(3, 8, 4, 2), torch.tensor([1.0, -2.0]).double()
    posterior = DrawsPosterior(values)
    scalar = posterior.transformed(ScalarizedPosteriorTransform(weights, 0.5))
    assert isinstance(scalar, DrawsPosterior)
    torch.testing.assert_close(scalar.values[..., 0], values @ weights + 0.5)
    X = normal(3, 4, 5)
    average = posterior.transformed(ExpectationPosteriorTransform(n_w=2), X)
    expected = values.unflatten(-2, (2, 2)).mean(-2)
    torch.testing.assert_close(average.values, expected)


def weights(m=1):
    torch.manual_seed(0)
    net = FunctionalNet(
        nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, m)).double()
    )
    return GaussianWeights(
        net, normal(net.num_params), variance=normal(net.num_params).abs()
    )


def test_a_thompson_draw_is_one_function_that_can_be_maximised():
    generator = torch.Generator().manual_seed(2)
    draw, X = ThompsonDraw(weights(), generator=generator), normal(3, 4, 2)
    expected = weights().draw(1, torch.Generator().manual_seed(2))(X)[0]
    torch.testing.assert_close(draw(X), expected)
    posterior = draw.posterior(X)
    torch.testing.assert_close(posterior.mean, expected)
    assert bool((posterior.variance == 0).all())
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    torch.manual_seed(0)
    best, value = optimize_acqf(
        PosteriorMean(draw), bounds, q=1, num_restarts=2, raw_samples=16
    )
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 21).double()] * 2)
    assert float(value) >= float(draw(grid).max()) - 1e-6
    two = ThompsonDraw(weights(2), num_outputs=2)
    assert two.num_outputs == 2 and two.posterior(X).mean.shape == (3, 4, 2)


def test_thompson_draws_come_from_a_gp_too():
    X = normal(6, 2)
    model = LinearizedGP(nn.Linear(2, 1).double(), X, X[:, :1])
    assert ThompsonDraw(model).posterior(X[:3]).mean.shape == (3, 1)


def test_a_thompson_draw_is_in_the_callers_units():
    X, Y = 5 + 3 * normal(12, 2), 100 + 10 * normal(12, 1)
    before, after = Normalize(2), Standardize(1)
    before(X), after(Y)
    draw = ThompsonDraw(
        weights(),
        generator=torch.Generator().manual_seed(4),
        input_transform=before,
        outcome_transform=after,
    )
    low, high = X.min(0).values, X.max(0).values
    inner = weights().draw(1, torch.Generator().manual_seed(4))
    expected = Y.mean() + Y.std() * inner((X - low) / (high - low))[0]
    torch.testing.assert_close(draw(X), expected)
    torch.testing.assert_close(draw.posterior(X).mean, expected)  # and not twice
    torch.testing.assert_close(copy.deepcopy(draw)(X), expected)
    model = WeightSpaceModel(
        weights(), X, Y, input_transform=Normalize(2), outcome_transform=Standardize(1),
        num_samples=1000,
    )  # fmt: skip
    z = (expected - model.posterior(X).mean) / model.posterior(X).variance.sqrt()
    assert bool((z.abs() < 4).all())
    # A GP of this library has them in its draws.
    gp = LinearizedGP(
        nn.Linear(2, 1).double(), X, Y, input_transform=Normalize(2),
        outcome_transform=Standardize(1),
    )  # fmt: skip
    z = (ThompsonDraw(gp)(X) - gp.posterior(X).mean) / gp.posterior(X).variance.sqrt()
    assert bool((z.abs() < 5).all())
    with pytest.raises(ValueError, match="LinearizedGP, whose draws are in the caller"):
        ThompsonDraw(gp, outcome_transform=after)
    one = ThompsonDraw(model, generator=torch.Generator().manual_seed(0))(X)
    members = model.posterior(X).values  # in the caller's units, too
    torch.testing.assert_close(one, members[(members - one).abs().sum((1, 2)).argmin()])


def test_a_thompson_draw_has_batch_norm_statistics_of_its_own_or_warns():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net, X = FunctionalNet(network.double()), 3 + 2 * normal(30, 2)
    posterior = GaussianWeights(
        net, normal(net.num_params), variance=torch.ones(net.num_params).double()
    )
    with pytest.warns(ReliabilityWarning, match=r"statistics of.*Pass batches=\[X\]"):
        ThompsonDraw(posterior)
    before = Normalize(2)
    before(X)
    draw = ThompsonDraw(
        posterior, generator=torch.Generator().manual_seed(1),
        input_transform=before, batches=[X[:20], X[20:]],
    )  # fmt: skip
    inner = posterior.draw(1, torch.Generator().manual_seed(1))
    before.eval()
    refresh_batch_norm(inner, [before(X[:20]), before(X[20:])])
    torch.testing.assert_close(draw(X), inner(before(X))[0])


def test_bad_input_says_what_to_try():
    with pytest.raises(ValueError, match="num_outputs must be a whole number"):
        ThompsonDraw(weights(), num_outputs=0)
    with pytest.raises(TypeError, match=r"must have draw\(num_samples, generator\)"):
        ThompsonDraw(3.0)
    with pytest.raises(TypeError, match="Linear, one network.*EmpiricalWeights"):
        ThompsonDraw(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="One function has no spread"):
        _ = DrawsPosterior(normal(1, 2, 1)).distribution
