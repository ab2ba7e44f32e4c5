import copy
import functools

import pytest
import torch
from torch import nn

from gpbridge import layer_gram
from gpbridge.checks import ShapeError
from gpbridge.features import DenseFeatures, dense_features
from gpbridge.functional import FunctionalNet
from gpbridge.layer_features import LayerFeatures
from gpbridge.layer_gram import tangent_features
from tests import oracles
from tests.cases import LOOPED, NETS, every_net

EXACT = {"rtol": 1e-10, "atol": 1e-12}
every_method = pytest.mark.parametrize("method", ["auto", "layers", "dense"])
CONTRACTED = {
    "tanh_mlp": ["0", "2"],
    "nested": ["body.0.0", "head.out"],
    "inplace_relu": ["0", "2"],
    "no_bias": ["0", "2"],
    "images": ["0", "2", "4"],
    "grouped_images": ["5"],
    "series": ["0", "3"],
    "tied": ["out"],
    "called_twice": ["start", "out"],
    "used_outside": ["out"],
    "batch_norm": ["0", "3"],
    "layer_norm": ["0", "3"],
    "dropout": ["0", "3"],
    "attention": ["out"],
    "transformer": ["0.linear1", "0.linear2", "2"],
    "frozen": ["2", "4"],
    "scalar_weight": ["layer", "out"],
    "residual": ["start", "branch"],
    "weight_norm": ["2"],
    "flat": ["layers.0", "layers.2"],
    "no_forward_mode": ["0", "2"],
}


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def standard_deviations(net):
    return {n: torch.tensor(0.4 + 0.1 * i).double() for i, n in enumerate(net.params)}


@functools.cache  # a probe takes longer than what most tests do with it
def problem(case, m):
    """A probed net, the deviations, and dense rows of any points by the oracle."""
    network = case.network(m)
    net = FunctionalNet(network, input_shape=case.input_shape)
    net.probe(case.inputs(3))
    std = standard_deviations(net)
    flat = torch.cat([s.expand(net.params[n].numel()) for n, s in std.items()])

    def rows(X):
        shaped = X.reshape(-1, *(case.input_shape or (case.width,)))
        return oracles.jacobian(network, shaped).flatten(0, 1) * flat

    return net, std, rows


@every_net
@every_method
def test_every_product_equals_that_of_the_dense_jacobian(case, m, method):
    net, std, rows = problem(case, m)
    X, Z = case.inputs(5), case.inputs(3, seed=1)
    Phi, Phi_z = rows(X), rows(Z)
    left = tangent_features(net, X, std, method)
    right = tangent_features(net, Z, std, method)
    torch.testing.assert_close(left.gram(), Phi @ Phi.T, **EXACT)
    torch.testing.assert_close(left.gram(right), Phi @ Phi_z.T, **EXACT)
    torch.testing.assert_close(right.gram(left), Phi_z @ Phi.T, **EXACT)
    torch.testing.assert_close(left.rows(), Phi, **EXACT)
    per_point = Phi.reshape(5, m, -1)
    torch.testing.assert_close(left.blocks(), per_point @ per_point.mT, **EXACT)
    omega, u = random(Phi.shape[1]), random(5, m, 2)
    torch.testing.assert_close(left.matmul(omega), per_point @ omega, **EXACT)
    torch.testing.assert_close(left.t_matmul(u), Phi.T @ u.flatten(0, 1), **EXACT)
    torch.testing.assert_close(left.value, net(X), **EXACT)


@every_net
@every_method
@pytest.mark.parametrize("count", [1, 4])
def test_features_of_combinations_are_combinations_of_features(case, m, method, count):
    net, std, rows = problem(case, m)
    X, root = case.inputs(5), random(5, m, count, seed=2)
    seen = []

    def directions(outputs):
        seen.append(outputs)
        return root

    features = tangent_features(net, X, std, method, directions)
    expected = (root.mT @ rows(X).unflatten(0, (5, m))).flatten(0, 1)
    torch.testing.assert_close(features.rows(), expected, **EXACT)
    value = torch.einsum("nmr,nm->nr", root, net(X))
    torch.testing.assert_close(features.value, value, **EXACT)
    torch.testing.assert_close(seen[-1], net(X), **EXACT)


@every_method
def test_combinations_are_of_one_set_of_points(method):
    net, std, _ = problem(NETS["tanh_mlp"], 2)
    X = NETS["tanh_mlp"].inputs(5)[None]
    with pytest.raises(ShapeError, match=r"must be ``n x d``, but has shape \(1, 5"):
        tangent_features(net, X, std, method, lambda outputs: random(5, 2, 1))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_layers_too_large_to_compare_at_once_are_compared_alone(name, monkeypatch):
    monkeypatch.setattr(layer_gram, "_VERIFY_BYTES", 0)
    net = FunctionalNet(NETS[name].network(1), input_shape=NETS[name].input_shape)
    net.probe(NETS[name].inputs(3))
    std = standard_deviations(net)
    features = tangent_features(net, NETS[name].inputs(3), std, "layers")
    assert sorted(features.layers) == sorted(CONTRACTED[name])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_linear_and_convolution_layers_are_contracted_and_others_are_not(name):
    net, std, _ = problem(NETS[name], 1)
    features = tangent_features(net, NETS[name].inputs(3), std, "layers")
    assert isinstance(features, LayerFeatures)
    assert sorted(features.layers) == sorted(CONTRACTED[name])


class Overwrites(nn.Module):
    """Changes what a layer received, which plain autograd allows for its bias."""

    def __init__(self):
        super().__init__()
        self.start, self.layer = nn.Linear(3, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)
        self.layer.weight.requires_grad_(False)

    def forward(self, x):
        h = self.start(x)
        z = self.layer(h)
        h.zero_()
        return self.out(z)


class SometimesCalls(nn.Module):
    """Skips a layer where all points are negative."""

    def __init__(self):
        super().__init__()
        self.start, self.layer = nn.Linear(3, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        h = self.start(x).tanh()
        return self.out(h if (x < 0).all() else self.layer(h))


def test_a_layer_whose_input_is_overwritten_is_not_contracted():
    network = Overwrites().double()
    net = FunctionalNet(network)
    X = random(4, 3)
    net.probe(X)
    features = tangent_features(net, X, standard_deviations(net), "layers")
    assert "layer" not in features.layers and "out" in features.layers
    dense = dense_features(net, X, standard_deviations(net))
    torch.testing.assert_close(features.gram(), dense.gram(), **EXACT)


def test_layers_that_these_data_do_not_call_are_left_to_the_jacobian():
    network = SometimesCalls().double()
    net = FunctionalNet(network)
    X = random(4, 3).abs()
    with pytest.warns(UserWarning, match="cannot vectorise"):
        net.probe(X)
    std = {name: torch.tensor(1.0).double() for name in net.params}
    positive = tangent_features(net, X, std, "layers")
    negative = tangent_features(net, -X, std, "layers")
    assert isinstance(positive, LayerFeatures) and isinstance(negative, DenseFeatures)
    exact = oracles.jacobian(network, X).flatten(0, 1)
    other = oracles.jacobian(network, -X).flatten(0, 1)
    torch.testing.assert_close(positive.gram(negative), exact @ other.T, **EXACT)
    torch.testing.assert_close(negative.gram(), other @ other.T, **EXACT)


def test_a_wide_layer_is_contracted_and_a_narrow_one_is_not():
    for width, kind in [(200, {"0", "2"}), (1, set())]:
        net = nn.Sequential(nn.Linear(30, width), nn.Tanh(), nn.Linear(width, 3))
        net = FunctionalNet(net.double())
        X = random(4, 30)
        net.probe(X)
        auto = tangent_features(net, X, standard_deviations(net))
        assert set(auto.layers) == kind


@pytest.mark.parametrize("name", ["tanh_mlp", "images", "series", "transformer"])
@every_method
def test_a_batch_of_sets_is_each_set(name, method):
    case = NETS[name]
    net, std, _ = problem(case, 3)
    X, Z = case.inputs(2, 2, 4), case.inputs(5, seed=1)
    batch = tangent_features(net, X, std, method)
    one = tangent_features(net, Z, std, method)
    omega = random(net.num_params)
    for i in range(2):
        for j in range(2):
            alone = tangent_features(net, X[i, j], std, method)
            for got, exact in [
                (batch.gram(), alone.gram()),
                (batch.gram(one), alone.gram(one)),
                (one.gram(batch), one.gram(alone)),
                (batch.blocks(), alone.blocks()),
                (batch.rows(), alone.rows()),
                (batch.matmul(omega), alone.matmul(omega)),
                (batch.value, alone.value),
            ]:
                torch.testing.assert_close(got[i, j], exact, **EXACT)


def assert_input_gradients_are_the_dense_ones(case, m, method):
    net, std, _ = problem(case, m)
    Z = tangent_features(net, case.inputs(3, seed=1), std, method)
    dense_Z = dense_features(net, case.inputs(3, seed=1), std)
    weights, omega = random(2 * m, 3 * m), random(net.num_params)
    grads = []
    for build, other in [
        (lambda X: tangent_features(net, X, std, method), Z),
        (lambda X: dense_features(net, X, std), dense_Z),
    ]:
        X = case.inputs(2).requires_grad_()
        features = build(X)
        total = (features.gram(other) * weights).sum() + features.gram().square().sum()
        total = total + features.blocks().sum() + features.matmul(omega).sum()
        total = total + features.value.sum() + features.rows().sum()
        grads.append(torch.autograd.grad(total, X)[0])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


@every_net
def test_input_gradients_equal_those_of_the_dense_jacobian(case, m):
    assert_input_gradients_are_the_dense_ones(case, m, "layers")


@pytest.mark.parametrize("name", ["tanh_mlp", "images", "called_twice", "transformer"])
def test_so_they_do_where_each_layer_goes_its_cheaper_way(name):
    assert_input_gradients_are_the_dense_ones(NETS[name], 3, "auto")


@pytest.mark.parametrize("name", ["tanh_mlp", "images"])
def test_blocks_of_rows_give_the_whole_matrix(name, monkeypatch):
    case = NETS[name]
    net, std, rows = problem(case, 3)
    monkeypatch.setattr("gpbridge.layer_features._CACHE_ROWS", 4)
    X = case.inputs(5)
    K = tangent_features(net, X, std, "layers").gram()
    torch.testing.assert_close(K, rows(X) @ rows(X).T, **EXACT)


@every_method
def test_permuting_the_points_permutes_the_matrix(method):
    case = NETS["nested"]
    net, std, _ = problem(case, 1)
    X, order = case.inputs(5), torch.tensor([3, 0, 4, 1, 2])
    K = tangent_features(net, X, std, method).gram()
    permuted = tangent_features(net, X[order], std, method).gram()
    torch.testing.assert_close(permuted, K[order][:, order], **EXACT)
    torch.testing.assert_close(K, K.T, **EXACT)
    assert torch.linalg.eigvalsh(K).min() > -1e-12


@pytest.mark.parametrize("name", [*NETS, *LOOPED])
@every_method
@pytest.mark.filterwarnings("ignore:torch.func cannot vectorise")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_one_point_first_then_many_then_none(name, method):
    case = {**NETS, **LOOPED}[name]
    net, std, rows = problem(case, 1)
    X = case.inputs(4)
    one = tangent_features(net, X[:1], std, method)
    many = tangent_features(net, X, std, method)
    torch.testing.assert_close(one.gram(many), rows(X[:1]) @ rows(X).T, **EXACT)
    none = tangent_features(net, X[:0], std, method)
    assert none.gram().shape == (0, 0) and many.gram(none).shape == (4, 0)
    assert none.gram(many).shape == (0, 4)
    assert tangent_features(net, case.inputs(2, 0), std).gram().shape == (2, 0, 0)


@pytest.mark.parametrize("name", ["nested", "images", "transformer"])
def test_groups_of_weights_add_up(name):
    case = NETS[name]
    net, std, rows = problem(case, 3)
    X, names = case.inputs(4), list(std)
    groups = [names[0::3], names[1::3], names[2::3]]
    total = sum(
        tangent_features(net, X, {n: std[n] for n in group}, "layers").gram()
        for group in groups
    )
    torch.testing.assert_close(total, rows(X) @ rows(X).T, **EXACT)


@every_method
def test_dense_and_layered_features_can_be_paired(method):
    case = NETS["images"]
    net, std, rows = problem(case, 3)
    X, Z = case.inputs(4), case.inputs(3, seed=1)
    dense = dense_features(net, Z, std)
    other = tangent_features(net, X, std, method)
    torch.testing.assert_close(other.gram(dense), rows(X) @ rows(Z).T, **EXACT)
    torch.testing.assert_close(dense.gram(other), rows(Z) @ rows(X).T, **EXACT)


@pytest.mark.parametrize("name", ["tanh_mlp", "images", "scalar_weight"])
@pytest.mark.parametrize("method", ["auto", "layers"])
def test_points_outputs_and_precision_can_be_chosen(name, method):
    case = NETS[name]
    net, std, _ = problem(case, 3)
    features = tangent_features(net, case.inputs(5), std, method)
    rows = features.rows().reshape(5, 3, -1)
    some = features.take(torch.tensor([3, 1]))
    torch.testing.assert_close(some.rows(), rows[[3, 1]].flatten(0, 1), **EXACT)
    torch.testing.assert_close(some.gram(), some.rows() @ some.rows().T, **EXACT)
    chosen = features.select([2, 0])
    expected = rows[:, [2, 0]].flatten(0, 1)
    torch.testing.assert_close(chosen.rows(), expected, **EXACT)
    torch.testing.assert_close(
        chosen.gram(features), expected @ rows.flatten(0, 1).T, **EXACT
    )
    assert torch.equal(chosen.value, features.value[:, [2, 0]])
    single = features.to(torch.float32).gram()
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), features.gram(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tanh_mlp", "images", "layer_norm"])
@every_method
def test_float32_networks_give_float32_features(name, method):
    case = NETS[name]
    network = case.network(2)
    exact = FunctionalNet(network, input_shape=case.input_shape)
    net = FunctionalNet(copy.deepcopy(network).float(), input_shape=case.input_shape)
    X = case.inputs(4)
    exact.probe(X)
    net.probe(X.float())
    std = standard_deviations(exact)
    single = {n: s.float() for n, s in std.items()}
    K = tangent_features(net, X.float(), single, method).gram()
    assert K.dtype == torch.float32
    expected = tangent_features(exact, X, std, "dense").gram()
    torch.testing.assert_close(K.double(), expected, rtol=1e-3, atol=1e-4)


def test_one_deviation_per_entry_and_trainable_weights_use_the_jacobian():
    case = NETS["tanh_mlp"]
    net, std, rows = problem(case, 1)
    X = case.inputs(4)
    std["0.weight"] = random(5, 3).abs()
    features = tangent_features(net, X, std, "layers")
    assert isinstance(features, DenseFeatures)
    net = FunctionalNet(case.network(1), freeze=False)
    net.probe(X)
    features = tangent_features(net, X, standard_deviations(net))
    features.gram().sum().backward()
    grads = [p.grad for p in net.params.values()]
    assert all(g is not None and g.abs().max() > 0 for g in grads[:-1])


def test_no_hooks_stay_on_the_copy_also_after_a_failure():
    case = NETS["tanh_mlp"]
    net, std, _ = problem(case, 1)
    with pytest.raises(RuntimeError, match="shape"):
        tangent_features(net, random(3, 7), std, "layers")
    tangent_features(net, case.inputs(3), std, "layers")
    with pytest.raises(RuntimeError, match="shape"):
        tangent_features(net, random(3, 7), std, "layers")
    assert not any(module._forward_hooks for module in net.network.modules())


def test_an_unknown_method_is_refused():
    net, std, _ = problem(NETS["tanh_mlp"], 1)
    message = "method must be one of 'auto', 'layers', 'dense', but is 'fast'"
    with pytest.raises(ValueError, match=message):
        tangent_features(net, random(2, 3), std, "fast")
