"""Acquisition values of ensembles are exact averages, the same at every call."""

import pytest
import torch
from botorch.acquisition.logei import (
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
)
from botorch.acquisition.monte_carlo import qExpectedImprovement
from botorch.acquisition.multi_objective.logei import (
    qLogExpectedHypervolumeImprovement,
    qLogNoisyExpectedHypervolumeImprovement,
)
from botorch.acquisition.multi_objective.monte_carlo import (
    qNoisyExpectedHypervolumeImprovement,
)
from botorch.optim import optimize_acqf
from botorch.utils.multi_objective.box_decompositions.non_dominated import (
    FastNondominatedPartitioning,
)
from botorch.utils.multi_objective.hypervolume import Hypervolume
from torch import nn

from gpbridge.acquisition import EnumeratingSampler
from gpbridge.dnn import DeepEnsemble
from gpbridge.surrogates import WeightSpaceModel

MEMBERS = 6
REFERENCE = torch.tensor([-1.0, -1.0]).double()


def points(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def ensemble(m):
    generator = torch.Generator().manual_seed(0)
    members = []
    for _ in range(MEMBERS):
        network = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, m)).double()
        with torch.no_grad():
            for p in network.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        members.append(network)
    return WeightSpaceModel(DeepEnsemble(members), num_outputs=m)


def improvement(model, X_pending=None):
    return qLogExpectedImprovement(model, best_f=0.2, X_pending=X_pending)


def noisy_improvement(model, X_pending=None):
    baseline = points(5, 2, seed=7)
    return qLogNoisyExpectedImprovement(
        model, baseline, X_pending=X_pending, prune_baseline=False
    )


def hypervolume(model, X_pending=None):
    partitioning = FastNondominatedPartitioning(REFERENCE, points(4, 2, seed=7) - 1)
    return qLogExpectedHypervolumeImprovement(
        model, REFERENCE.tolist(), partitioning, X_pending=X_pending
    )


def noisy_hypervolume(model, X_pending=None, kind=None):
    kind = kind or qLogNoisyExpectedHypervolumeImprovement
    baseline = points(4, 2, seed=7)
    return kind(
        *(model, REFERENCE.tolist(), baseline),
        X_pending=X_pending, prune_baseline=False, cache_root=False,
    )  # fmt: skip


# Hypervolumes compile a program of botorch's once on a machine, for a minute.
KINDS = [
    (improvement, 1),
    (noisy_improvement, 1),
    pytest.param(hypervolume, 2, marks=pytest.mark.slow),
    pytest.param(noisy_hypervolume, 2, marks=pytest.mark.slow),
]
EACH = pytest.mark.parametrize(
    "make, m", KINDS, ids=lambda k: getattr(k, "__name__", k)
)


@EACH
@pytest.mark.parametrize("pending", [False, True])
def test_values_are_the_same_at_every_call_and_in_every_place(make, m, pending):
    model, X = ensemble(m), points(4, 2, 2, seed=1)
    others = points(3, 2, seed=2) if pending else None
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        function = make(model, others)
        found += [function(X), function(X.flip(0)).flip(0)]
        found.append(torch.cat([function(x[None]) for x in X]))
        assert isinstance(function.sampler, EnumeratingSampler)
        assert function.sampler.sample_shape == torch.Size([MEMBERS])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)
    assert float(found[0].std()) > 0


@EACH
def test_pending_points_count_as_candidates(make, m):
    model, X, others = ensemble(m), points(4, 1, 2, seed=1), points(2, 2, seed=2)
    joined = torch.cat([X, others.expand(4, 2, 2)], -2)
    if make in (noisy_improvement, noisy_hypervolume):  # beyond what is pending
        function, plain = make(model, others), make(model)
        whole = plain(joined).exp() - plain(others[None]).exp()
        torch.testing.assert_close(function(X).exp(), whole, rtol=0.05, atol=0.02)
        return
    function = make(model, others)
    torch.testing.assert_close(function(X), make(model)(joined))
    later = make(model)
    later.set_X_pending(others)
    torch.testing.assert_close(later(X), function(X))


@pytest.mark.filterwarnings("ignore:qExpectedImprovement has known numerical")
def test_improvement_is_the_mean_over_members():
    model, X = ensemble(1), points(4, 3, 2, seed=1)
    values = model.posterior(X).values[..., 0]  # 4 x s x 3
    expected = (values.amax(-1) - 0.2).clamp_min(0).mean(-1)
    found = qExpectedImprovement(model, best_f=0.2)(X)
    torch.testing.assert_close(found, expected)
    # The logarithm is of a smooth form that is near it.
    near = qLogExpectedImprovement(model, best_f=0.2)(X).exp()
    torch.testing.assert_close(near, expected, rtol=0.1, atol=0.02)


@pytest.mark.slow  # compiles, too
@pytest.mark.filterwarnings("ignore:qNoisyExpectedHypervolume.* has known numerical")
def test_noisy_hypervolume_is_the_mean_over_members():
    model, X, baseline = ensemble(2), points(3, 2, 2, seed=1), points(4, 2, seed=7)
    function = noisy_hypervolume(model, kind=qNoisyExpectedHypervolumeImprovement)
    measure = Hypervolume(REFERENCE)

    def volume(rows):
        front = rows[(rows > REFERENCE).all(-1)]
        keep = [
            not bool(((front >= row).all(-1) & (front > row).any(-1)).any())
            for row in front
        ]
        return measure.compute(front[keep]) if len(front) else 0.0

    def gain(x, s):
        seen = model.posterior(baseline).values[s]
        new = model.posterior(x).values[s]
        return volume(torch.cat([seen, new])) - volume(seen)

    expected = [sum(gain(x, s) for s in range(MEMBERS)) / MEMBERS for x in X]
    torch.testing.assert_close(function(X), torch.tensor(expected).double())


def test_a_greedy_batch_is_found_the_same_way_twice():
    box = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
    batches = []
    for _ in range(2):
        torch.manual_seed(3)
        function = improvement(ensemble(1))
        batch, _ = optimize_acqf(function, box, 3, 2, 16, sequential=True)
        batches.append(batch)
    assert torch.equal(*batches) and len(batches[0].unique(dim=0)) == 3
