import pytest
import torch

from gpbridge.features import DenseFeatures, dense_features, flat_std
from gpbridge.functional import FunctionalNet
from tests import oracles
from tests.cases import NETS

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def problem():
    case = NETS["scalar_weight"]
    network = case.network(2)
    net = FunctionalNet(network)
    net.probe(case.inputs(3))
    std = {
        name: random(*p.shape, seed=i).abs() if i % 2 else torch.tensor(0.7).double()
        for i, (name, p) in enumerate(net.params.items())
    }
    return case, network, net, std


def exact_rows(network, net, X, std):
    return oracles.jacobian(network, X).flatten(0, 1) * flat_std(net, std)


def test_standard_deviations_are_spread_over_the_entries_of_their_weights(problem):
    _, _, net, std = problem
    flat = flat_std(net, std)
    spread = net.unflatten(flat)
    for name, value in std.items():
        assert torch.equal(spread[name], value.expand(net.params[name].shape))


def test_features_are_the_scaled_rows_of_the_jacobian(problem):
    case, network, net, std = problem
    X, Z = case.inputs(4), case.inputs(3, seed=1)
    Phi, Phi_z = (exact_rows(network, net, x, std) for x in (X, Z))
    left, right = dense_features(net, X, std), dense_features(net, Z, std)
    torch.testing.assert_close(left.rows(), Phi, **EXACT)
    torch.testing.assert_close(left.gram(), Phi @ Phi.T, **EXACT)
    torch.testing.assert_close(left.gram(right), Phi @ Phi_z.T, **EXACT)
    per_point = Phi.reshape(4, 2, -1)
    torch.testing.assert_close(left.blocks(), per_point @ per_point.mT, **EXACT)
    omega, u = random(Phi.shape[1]), random(4, 2, 3)
    torch.testing.assert_close(left.matmul(omega), per_point @ omega, **EXACT)
    torch.testing.assert_close(left.t_matmul(u), Phi.T @ u.reshape(8, 3), **EXACT)
    torch.testing.assert_close(left.value, network(X), **EXACT)


def test_a_batch_of_sets_is_each_set(problem):
    case, network, net, std = problem
    X, Z = case.inputs(2, 3, 4), case.inputs(5, seed=1)
    batch, one = dense_features(net, X, std), dense_features(net, Z, std)
    for i in range(2):
        for j in range(3):
            alone = dense_features(net, X[i, j], std)
            torch.testing.assert_close(batch.gram()[i, j], alone.gram(), **EXACT)
            torch.testing.assert_close(batch.gram(one)[i, j], alone.gram(one), **EXACT)
            torch.testing.assert_close(one.gram(batch)[i, j], one.gram(alone), **EXACT)
            torch.testing.assert_close(batch.blocks()[i, j], alone.blocks(), **EXACT)


def test_only_named_weights_contribute_and_groups_add_up(problem):
    case, network, net, std = problem
    X = case.inputs(4)
    first, second = dict(list(std.items())[:2]), dict(list(std.items())[2:])
    parts = [dense_features(net, X, group).gram() for group in (first, second)]
    torch.testing.assert_close(
        parts[0] + parts[1], dense_features(net, X, std).gram(), **EXACT
    )
    names = list(first)
    Phi = oracles.jacobian(network, X, names).flatten(0, 1) * flat_std(net, first)
    torch.testing.assert_close(parts[0], Phi @ Phi.T, **EXACT)


def test_points_outputs_and_precision_can_be_chosen(problem):
    case, _, net, std = problem
    features = dense_features(net, case.inputs(4), std)
    rows = features.rows().reshape(4, 2, -1)
    some = features.take(torch.tensor([3, 1]))
    assert torch.equal(some.rows(), rows[[3, 1]].reshape(4, -1))
    assert torch.equal(some.value, features.value[[3, 1]])
    second = features.select([1])
    assert torch.equal(second.rows(), rows[:, 1])
    assert torch.equal(second.value, features.value[:, 1:])
    assert features.to(torch.float32).gram().dtype == torch.float32


def test_no_points_and_one_point(problem):
    case, _, net, std = problem
    one, none = (dense_features(net, case.inputs(n), std) for n in (1, 0))
    p = net.num_params
    assert none.rows().shape == (0, p) and none.value.shape == (0, 2)
    assert none.gram().shape == (0, 0) and one.gram(none).shape == (2, 0)
    assert none.blocks().shape == (0, 2, 2)
    assert none.matmul(random(p)).shape == (0, 2)
    assert torch.equal(none.t_matmul(random(0, 2, 3)), torch.zeros(p, 3).double())
    assert isinstance(one, DenseFeatures) and one.gram().shape == (2, 2)
