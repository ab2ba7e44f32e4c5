"""Statistics of other weights, where batches or stored statistics are unusual.

That they are those of update_bn is shown beside the posteriors, in ``dnn``.
"""

import copy

import pytest
import torch
from torch import nn

from gpbridge.batch_norm import even_batches, has_batch_norm, refresh_batch_norm
from gpbridge.functional import FunctionalNet
from gpbridge.weights import EmpiricalWeights


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def network(norm=nn.BatchNorm1d):
    return nn.Sequential(nn.Linear(2, 3), norm(3), nn.Linear(3, 1)).double()


def draws_of(module):
    net = FunctionalNet(module)
    return EmpiricalWeights(net, net.flatten(net.params)[None]).draw()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_stored_statistics_do_not_matter_not_even_those_that_overflowed(norm):
    module, X = network(norm), random(9, 2)
    expected = copy.deepcopy(module).train()
    expected[1].momentum = 1.0
    expected(X)
    module[1].running_mean.fill_(torch.nan)
    module[1].running_var.fill_(torch.inf)
    assert has_batch_norm(module)
    draws = refresh_batch_norm(draws_of(module), [X])
    torch.testing.assert_close(draws(X)[0], expected.eval()(X))
    assert bool(module[1].running_mean.isnan().all())  # the caller's stay


def test_empty_batches_count_for_nothing():
    module, X = network(), random(8, 2)
    with_empty = refresh_batch_norm(draws_of(module), [X[:0], X[:4], X[4:]])
    without = refresh_batch_norm(draws_of(module), X.split(4))
    assert torch.equal(with_empty(X), without(X))
    with pytest.raises(ValueError, match="at least one batch of inputs"):
        refresh_batch_norm(draws_of(module), [X[:0]])


@pytest.mark.parametrize("n, most", [(9, 4), (4097, 4096), (8, 4), (3, 5)])
def test_even_batches_have_all_rows_and_no_rest(n, most):
    X = random(n, 2)
    batches = even_batches(X, most)
    assert torch.equal(torch.cat(batches), X)
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1 and min(sizes) > 1
