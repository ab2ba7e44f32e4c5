"""Statistics of other weights, where batches or stored statistics are unusual.

That they are those of update_bn is shown beside the posteriors, in ``dnn``.
"""

import copy

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from torch import nn

from gpbridge.batch_norm import (
    even_batches,
    has_batch_norm,
    is_stale,
    refresh_batch_norm,
)
from gpbridge.checks import ShapeError
from gpbridge.dnn.ensembles import DeepEnsemble
from gpbridge.draws import JoinedDraws
from gpbridge.functional import FunctionalNet
from gpbridge.weights import EmpiricalWeights, GaussianWeights


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


def test_batches_of_one_row_are_skipped_as_in_training():
    module, X = network(), random(9, 2)
    expected = refresh_batch_norm(draws_of(module), X[:8].split(4))
    draws = refresh_batch_norm(draws_of(module), X.split(4))  # 4, 4 and 1 rows
    assert torch.equal(draws(X), expected(X))
    with pytest.raises(ValueError, match="two rows or more"):
        refresh_batch_norm(draws_of(module), X.split(1))


def test_bad_batches_say_what_to_pass_and_leave_the_draws_as_they_were():
    module, X = network(), random(8, 2)
    draws = draws_of(module)
    before = draws(X)
    for batches, kind, message in (
        ([X, X * torch.nan], InputDataError, r"1 of 2 batches, the first at \[1\]"),
        (X, TypeError, r"Wrap it: \[X\]"),
        ([{"x": X}], TypeError, r"one is dict. Pick the inputs"),
        ([X[0]], ShapeError, r"shape \(2,\). Pass a list of batches"),
        ([X.repeat(1, 2)], ShapeError, "takes ``... x 2``"),
    ):
        with pytest.raises(kind, match=message):
            refresh_batch_norm(draws, batches)
        assert torch.equal(draws(X), before)
    net = FunctionalNet(module)
    posterior = EmpiricalWeights(net, net.flatten(net.params)[None])
    with pytest.raises(TypeError, match="is a posterior. Call .draw"):
        refresh_batch_norm(posterior, [X])


def test_statistics_are_stale_where_other_weights_come_before_them():
    module, X = network(), random(8, 2)
    head = FunctionalNet(module, "last_layer")
    moved = GaussianWeights(head, head.flatten(head.params) + 1)
    assert not is_stale(moved.draw(2))  # the statistics are those of the layer before
    net = FunctionalNet(module)
    mean = net.flatten(net.params)
    assert not is_stale(GaussianWeights(net, mean).draw(2))  # those that were trained
    draws = GaussianWeights(net, mean + 1).draw(2)
    assert is_stale(draws) and is_stale(JoinedDraws([draws_of(module), draws]))
    assert not is_stale(refresh_batch_norm(draws, [X]))
    assert not is_stale(module) and not is_stale(DeepEnsemble([module] * 2).draw())


class Branches(nn.Module):
    """A branch on values, which ``vmap`` cannot take."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        h = self.body(x)
        return self.head(h if h.sum() > -1e6 else -h)


def test_a_network_without_vectorisation_is_passed_draw_by_draw_and_says_so():
    module, X = Branches().double(), random(9, 2)
    net = FunctionalNet(module)
    weights = net.flatten(net.params) + random(3, net.num_params, seed=1)
    draws = EmpiricalWeights(net, weights).draw()
    with pytest.warns(UserWarning, match="cannot evaluate the draws side by side"):
        refresh_batch_norm(draws, X.split(5))
    plain = nn.Sequential(*module.body, module.head)  # the same, without the branch
    names = dict(zip(plain.state_dict(), module.state_dict(), strict=True))
    same = FunctionalNet(plain)
    assert same.num_params == net.num_params
    expected = EmpiricalWeights(same, weights).draw()
    refresh_batch_norm(expected, X.split(5))
    for name, values in expected.statistics.items():
        torch.testing.assert_close(draws.statistics[names[name]], values)
    with pytest.warns(UserWarning, match="cannot evaluate the draws side by side"):
        values = draws(X)
    torch.testing.assert_close(values, expected(X))
    torch.testing.assert_close(draws(X), expected(X))  # and it is said once
    message = "fails on an X of 3 columns"
    for fails in (draws, lambda X: refresh_batch_norm(draws, [X])):
        with pytest.raises(ShapeError, match=message):
            fails(random(4, 3))
