import copy
import pickle

import pytest
import torch
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.functional import FunctionalNet, functionalize
from gpbridge.jacobians import jacobian, jvp, linearize, vjp
from gpbridge.layer_gram import tangent_features
from tests import cases, oracles
from tests.cases import LOOPED, NETS, every_looped_net, every_net

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def shaped(case, X):
    return X.reshape(-1, *(case.input_shape or (case.width,)))


def probed(case, m, n=4, **options):
    """A net of the case, inputs, and the user's module."""
    network = case.network(m)
    X = case.inputs(n)
    net = FunctionalNet(network, input_shape=case.input_shape, **options)
    assert net.probe(X) == m == net.num_outputs
    return net, X, network


# --- the Jacobian and the products with it


@every_net
def test_the_jacobian_equals_one_backward_pass_per_output(case, m):
    net, X, network = probed(case, m)
    exact = oracles.jacobian(network, shaped(case, X))
    J = jacobian(net, X)
    assert net.vectorized and J.shape == (4, m, net.num_params)
    torch.testing.assert_close(J, exact, **EXACT)
    torch.testing.assert_close(jacobian(net, X, chunk_size=3), J, **EXACT)
    with torch.no_grad():
        expected = copy.deepcopy(network).eval()(shaped(case, X)).reshape(4, m)
        torch.testing.assert_close(net(X), expected, **EXACT)


@every_net
def test_products_equal_those_with_the_jacobian(case, m):
    net, X, _ = probed(case, m)
    J, v, u = jacobian(net, X), random(net.num_params), random(4, m)
    torch.testing.assert_close(jvp(net, X, v), J @ v, rtol=1e-9, atol=1e-11)
    expected = torch.einsum("nmp,nm->p", J, u)
    torch.testing.assert_close(vjp(net, X, u), expected, rtol=1e-9, atol=1e-11)
    outputs, push = linearize(net, X)
    torch.testing.assert_close(outputs, net(X), **EXACT)
    torch.testing.assert_close(push(v), J @ v, rtol=1e-9, atol=1e-11)


@every_looped_net
def test_what_torch_func_cannot_trace_is_announced_and_computed_in_a_loop(case, m):
    network, X = case.network(m), case.inputs(5)
    net = FunctionalNet(network, input_shape=case.input_shape)
    with pytest.warns(UserWarning, match="cannot vectorise .* one point at a time"):
        net.probe(X)
    exact = oracles.jacobian(network, shaped(case, X))
    torch.testing.assert_close(jacobian(net, X), exact, **EXACT)
    v, u = random(net.num_params), random(5, m)
    torch.testing.assert_close(jvp(net, X, v), exact @ v, **EXACT)
    expected = torch.einsum("nmp,nm->p", exact, u)
    torch.testing.assert_close(vjp(net, X, u), expected, **EXACT)
    outputs, push = linearize(net, X)
    torch.testing.assert_close(push(v), exact @ v, **EXACT)
    torch.testing.assert_close(outputs, net(X), **EXACT)
    batch = X.reshape(5, 1, -1)
    torch.testing.assert_close(jacobian(net, batch)[:, 0], exact, **EXACT)


@pytest.mark.parametrize("name", ["tanh_mlp", "images", "attention", "flat"])
def test_a_batch_equals_a_loop_and_rows_permute(name):
    case = NETS[name]
    net, _, _ = probed(case, 1)
    X = case.inputs(2, 3, 4)
    J = jacobian(net, X)
    assert net(X).shape == (2, 3, 4, 1) and J.shape[:-1] == (2, 3, 4, 1)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(J[i, j], jacobian(net, X[i, j]), **EXACT)
    order = torch.tensor([2, 0, 3, 1])
    permuted = jacobian(net, X[0, 0][order])
    torch.testing.assert_close(permuted, J[0, 0][order], **EXACT)
    torch.testing.assert_close(jvp(net, X, J[0, 0, 0, 0]), J @ J[0, 0, 0, 0], **EXACT)


@pytest.mark.parametrize("name", [*NETS, *LOOPED])
@pytest.mark.filterwarnings("ignore:torch.func cannot vectorise")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_one_point_and_no_point(name):
    case = {**NETS, **LOOPED}[name]
    net, X, _ = probed(case, 1)
    torch.testing.assert_close(jacobian(net, X[:1]), jacobian(net, X)[:1], **EXACT)
    p = net.num_params
    assert jacobian(net, X[:0]).shape == (0, 1, p)
    assert jacobian(net, case.inputs(2, 0)).shape == (2, 0, 1, p)
    assert net(X[:0]).shape == (0, 1)


@pytest.mark.parametrize("name", [*NETS, *LOOPED])
@pytest.mark.filterwarnings("ignore:torch.func cannot vectorise")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_derivatives_in_the_inputs_equal_those_of_two_plain_backward_passes(name):
    case = {**NETS, **LOOPED}[name]
    m = case.outputs[-1]
    net, _, network = probed(case, m)
    v, u = random(net.num_params), random(2, m)
    X = case.inputs(2).requires_grad_()
    J = oracles.jacobian(network, shaped(case, X), create_graph=True)
    (exact,) = torch.autograd.grad((J @ v * u).sum(), X)
    routes = [jacobian(net, X) @ v, jvp(net, X, v), linearize(net, X)[1](v)]
    if net.vectorized:
        routes.append(torch.vmap(lambda t: jvp(net, X, t))(v[None])[0])
    for product in routes:
        (slope,) = torch.autograd.grad((product * u).sum(), X)
        torch.testing.assert_close(slope, exact, rtol=1e-9, atol=1e-10)
    (slope,) = torch.autograd.grad(vjp(net, X, u) @ v, X)
    torch.testing.assert_close(slope, exact, rtol=1e-9, atol=1e-10)


def test_weights_of_a_subset_give_their_columns():
    net, X, network = probed(NETS["nested"], 2)
    name = "body.0.0.bias"
    part = jacobian(net, X, {name: net.params[name]})
    exact = oracles.jacobian(network, X, [name])
    torch.testing.assert_close(part, exact, **EXACT)


@pytest.mark.parametrize("branch", ["forward mode", "reverse mode", "loop"])
def test_products_in_a_subset_of_the_weights_are_those_with_its_columns(branch):
    net, X, _ = probed(NETS["nested"], 2)
    net.vectorized, net.forward_mode = branch != "loop", branch == "forward mode"
    names = ["head.out.weight", "body.0.0.bias"]  # in another order than the network's
    params = {name: net.params[name] + 0.1 for name in names}
    J = jacobian(net, X, params)
    v, u = random(J.shape[-1]), random(4, 2)
    torch.testing.assert_close(jvp(net, X, v, params), J @ v, rtol=1e-9, atol=1e-11)
    expected = torch.einsum("nmp,nm->p", J, u)
    torch.testing.assert_close(vjp(net, X, u, params), expected, **EXACT)


def test_products_at_other_weights_are_those_of_a_net_that_has_them():
    net, X, _ = probed(NETS["scalar_weight"], 2)
    theta = random(net.num_params)
    params = net.unflatten(theta)
    other = copy.deepcopy(net)
    other.network.load_state_dict(params)
    v, u = random(net.num_params, seed=2), random(4, 2)
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(jacobian(net, X, params), jacobian(other, X), **same)
    torch.testing.assert_close(jvp(net, X, v, params), jvp(other, X, v), **same)
    torch.testing.assert_close(vjp(net, X, u, params), vjp(other, X, u), **same)


def test_a_trainable_net_passes_gradients_to_its_weights():
    net, X, _ = probed(NETS["tanh_mlp"], 1, freeze=False)
    jacobian(net, X).square().sum().backward()
    grads = [p.grad for p in net.params.values()]
    assert all(g is not None and g.abs().max() > 0 for g in grads[:-1])
    frozen, X, _ = probed(NETS["tanh_mlp"], 1)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_float32_networks_work_in_float32_and_in_float64():
    case = NETS["batch_norm"]
    network = case.network(2).float()
    net = FunctionalNet(network)
    X = case.inputs(4)
    net.probe(X)
    assert jacobian(net, X.float()).dtype == torch.float32
    exact = oracles.jacobian(copy.deepcopy(network).double(), X)
    torch.testing.assert_close(
        jacobian(net, X.float()).double(), exact, rtol=1e-3, atol=1e-4
    )
    params = {name: p.double() for name, p in net.params.items()}
    torch.testing.assert_close(jacobian(net, X, params), exact, **EXACT)
    assert net.dtype == torch.float32


@pytest.mark.parametrize("name", ["tanh_mlp", "images", "tied"])
def test_nothing_needs_to_leave_inference_mode(name):
    case = NETS[name]
    network = case.network(2)
    net = FunctionalNet(network, input_shape=case.input_shape)
    X = case.inputs(4)
    net.probe(X)
    std = {name: torch.tensor(1.0).double() for name in net.params}
    J = jacobian(net, X)
    K = tangent_features(net, X, std, "layers").gram()
    with torch.inference_mode():
        inside = FunctionalNet(network, input_shape=case.input_shape)
        inside.probe(case.inputs(4))
        for x in (X, case.inputs(4)):  # made outside, and inside
            gram = tangent_features(inside, x, std, "layers").gram()
            torch.testing.assert_close(gram, K, **EXACT)
            torch.testing.assert_close(jacobian(inside, x), J, **EXACT)
    assert not any(p.is_inference() for p in inside.parameters())
    X.requires_grad_()
    assert jacobian(inside, X).requires_grad


def test_functionalize_gives_a_pure_function_and_detached_weights():
    network = NETS["tied"].network(2)
    apply, params = functionalize(network)
    X = NETS["tied"].inputs(3)
    torch.testing.assert_close(apply(params, X), network(X))
    assert not any(p.requires_grad for p in params.values())
    for p in params.values():
        p.zero_()
    assert network.first.weight.abs().sum() > 0
    assert torch.equal(apply(params, X), torch.zeros(3, 2, dtype=X.dtype))


@every_net
def test_flatten_and_unflatten_are_inverse(case, m):
    net, _, _ = probed(case, m)
    flat = random(2, 3, net.num_params)
    params = net.unflatten(flat)
    assert list(params) == net.names
    for name, value in params.items():
        assert value.shape == (2, 3, *net.params[name].shape)
    assert torch.equal(net.flatten(params), flat)


# --- which weights are random


@pytest.mark.parametrize(
    "parameters, names",
    [
        ("all", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("last_layer", ["2.weight", "2.bias"]),
        (["2"], ["2.weight", "2.bias"]),
        (["2.bias", "0.weight"], ["0.weight", "2.bias"]),
        (lambda name: name.endswith("bias"), ["0.bias", "2.bias"]),
    ],
)
def test_parameters_picks_the_random_weights(parameters, names):
    case = NETS["tanh_mlp"]
    network, X = case.network(2), case.inputs(3)
    net = FunctionalNet(network, parameters)
    net.probe(X)
    assert list(net.params) == names
    assert net.num_params == sum(network.get_parameter(n).numel() for n in names)
    exact = oracles.jacobian(network, X, names)
    torch.testing.assert_close(jacobian(net, X), exact, **EXACT)
    assert f"random weights: {net.num_params} of 32" in repr(net)


def test_frozen_weights_are_never_random_and_tied_ones_count_once():
    net = FunctionalNet(NETS["frozen"].network(1))
    assert list(net.params) == ["2.weight", "4.weight", "4.bias"]
    net = FunctionalNet(NETS["frozen"].network(1), ["0", "2"])
    assert list(net.params) == ["2.weight"]
    net = FunctionalNet(NETS["tied"].network(1))
    assert "second.weight" not in net.params and net.num_params == 9 + 3 + 3 + 4


@pytest.mark.parametrize(
    "parameters, message",
    [
        (["3.weight"], r"names \['3.weight'\], which the network does not have"),
        (["0.weigh"], r"\['0.weigh'\].* It has \['0.weight'"),
        ("0.weight", r"must be 'all'.* pass a list, \['0.weight'\]"),
        ([], "no random weight left: 4 parameters, 4 of them with requires_grad"),
        (lambda name: False, "no random weight left"),
    ],
)
def test_a_wrong_choice_of_parameters_is_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        FunctionalNet(NETS["tanh_mlp"].network(1), parameters)


def test_a_network_without_random_weights_is_refused():
    network = NETS["tanh_mlp"].network(1).requires_grad_(False)
    for parameters in ("all", "last_layer", ["0"]):
        with pytest.raises(ValueError, match="no random weight left: 4 .* 0 of them"):
            FunctionalNet(network, parameters)
    with pytest.raises(ValueError, match="no random weight left: 0 parameters"):
        FunctionalNet(nn.Tanh())


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, but is function"):
        FunctionalNet(lambda x: x)


# --- the user's module is never changed


def snapshot(network):
    """Everything about a module that a caller could notice."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    return {
        "state": {k: v.clone() for k, v in network.state_dict().items()},
        "identity": [id(p) for p in (*network.parameters(), *network.buffers())],
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "grad": [p.grad for p in network.parameters()],
        "mode": [module.training for module in network.modules()],
        "hooks": [
            (id(getattr(module, kind)), dict(getattr(module, kind)))
            for module in network.modules()
            for kind in hooks
        ],
        "attributes": [sorted(vars(module)) for module in network.modules()],
    }


def assert_unchanged(network, before):
    after = snapshot(network)
    state, old = after.pop("state"), before["state"]
    assert list(state) == list(old)
    assert all(torch.equal(state[k], old[k]) for k in old)
    assert after == {k: v for k, v in before.items() if k != "state"}


def with_hooks(network, log):
    """Hooks of every kind, closures that cannot be pickled or copied by value."""
    generator = (i for i in range(3))  # no generator can be deep-copied

    def forward(*args, lost=generator):
        log.append("hook")

    for module in network.modules():
        module.register_forward_hook(forward)
        module.register_forward_pre_hook(forward)
        module.register_full_backward_hook(forward)
        module.register_full_backward_pre_hook(forward)


@pytest.mark.parametrize("name", [*NETS, *LOOPED])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:torch.func cannot vectorise")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_no_call_changes_the_module_or_runs_its_hooks(name, training):
    case = {**NETS, **LOOPED}[name]
    network = case.network(1).train(training)
    log = []
    with_hooks(network, log)
    before, state = snapshot(network), torch.get_rng_state()
    net = FunctionalNet(network, input_shape=case.input_shape)
    X = case.inputs(3).requires_grad_()
    net.probe(X)
    jacobian(net, X).sum().backward()
    jvp(net, X.detach(), random(net.num_params))
    vjp(net, X.detach(), random(3, 1))
    linearize(net, X.detach())[1](random(net.num_params))
    std = {name: torch.tensor(1.0).double() for name in net.params}
    tangent_features(net, X, std, "layers").gram().sum().backward()
    net.train()
    assert_unchanged(network, before)
    assert log == [] and torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        network(shaped(case, X.detach()))
    assert "hook" in log


class Broken(nn.Module):
    """A layer, then something that no kernel can be made of."""

    def __init__(self, forward):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.then = forward

    def forward(self, x):
        return self.then(self, self.layer(x))


def counts(self, h):
    self.calls += 1
    return h + 0 * self.calls


def overwrites(self, h):
    h = h.exp()
    h += 1
    return h


BROKEN = {
    "noise": (
        lambda self, h: h + torch.randn_like(h),
        ValueError,
        "draws fresh randomness",
    ),
    "dropout": (
        lambda self, h: nn.functional.dropout(h),
        ValueError,
        "draws fresh randomness",
    ),
    "counter": (counts, ValueError, r"changes itself in forward: \['calls'\]"),
    "mixture": (lambda self, h: h - h.mean(0), ValueError, "mixes rows"),
    "tuple": (
        lambda self, h: (h, h),
        TypeError,
        "must return one tensor, but returns tuple",
    ),
    "dict": (lambda self, h: {"y": h}, TypeError, "but returns dict"),
    "three axes": (
        lambda self, h: h[..., None],
        ShapeError,
        r"3 rows of \(3,\) gave \(3, 2, 1\)",
    ),
    "one number": (lambda self, h: h.mean(), ShapeError, r"gave \(\)"),
    "transposed": (lambda self, h: h.T, ShapeError, r"gave \(2, 3\)"),
    "rounded": (lambda self, h: h.round(), ValueError, "zero derivative"),
    "argmax": (lambda self, h: h.argmax(-1), ValueError, "does not depend on its"),
    "detached": (lambda self, h: h.detach(), ValueError, "does not depend on its"),
    "in place": (overwrites, ValueError, "cannot be differentiated .* in place"),
    "one row": (
        lambda self, h: h if len(h) > 1 else h[:, :1],
        ShapeError,
        "One row alone gives 1 numbers, but a row among 3 gives 2",
    ),
    "nan": (lambda self, h: h / 0 * 0, ValueError, "NaN or Inf on the first rows"),
    "dead": (lambda self, h: (h - 1e6).relu(), ValueError, "zero derivative"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_function_of_inputs_and_weights_is_refused(name):
    forward, error, message = BROKEN[name]
    network = Broken(forward).double().train()
    log = []
    with_hooks(network, log)
    before, state = snapshot(network), torch.get_rng_state()
    net = FunctionalNet(network)
    with pytest.raises(error, match=message):
        net.probe(random(5, 3))
    assert_unchanged(network, before)
    assert log == [] and torch.equal(torch.get_rng_state(), state)


class Product(nn.Module):
    """A layer whose width cannot be read off."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 1))

    def forward(self, x):
        return x @ self.matrix


MISFITS = {
    "one layer": (
        lambda: nn.Linear(3, 1),
        None,
        2,
        r"fails on an X of 2 columns: mat1 and mat2 shapes .* Its one layer, Linear, "
        r"takes ``... x 3``, but got \(3, 2\). Pass the columns that the network was",
    ),
    "a later layer": (
        lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 1)),
        None,
        4,
        r"an X of 4 columns: .* Its layer '1', Linear, takes ``... x 3``, but got",
    ),
    "nothing to read off": (
        Product,
        None,
        2,
        r"an X of 2 columns: mat1 and mat2 .* \(3x2 and 3x1\). Pass the columns",
    ),
    "rows for images": (
        lambda: NETS["images"].network(1),
        None,
        50,
        r"an X of 50 columns: .* Its layer '0', Conv2d, takes ``n x 2 x h x w``, but "
        r"got \(3, 50\). .* input_shape=\(c, h, w\) if it wants images",
    ),
    "other channels": (
        lambda: NETS["images"].network(1),
        (1, 5, 5),
        25,
        r"an X of 25 columns, unflattened to \(1, 5, 5\): .* but got \(3, 1, 5, 5\)",
    ),
    "larger images": (
        lambda: NETS["images"].network(1),
        (2, 7, 7),
        98,
        r"Its layer '4', Linear, takes ``... x 2``, but got \(3, 8\)",
    ),
    "a sequence": (
        lambda: nn.Conv1d(4, 2, 3),
        (2, 4),
        8,
        r"Its one layer, Conv1d, takes ``n x 4 x l``, but got \(3, 2, 4\)",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_network_that_cannot_read_its_inputs_says_which_widths_disagree(name):
    make, input_shape, width, message = MISFITS[name]
    network = make().double()
    log = []
    with_hooks(network, log)
    before, state = snapshot(network), torch.get_rng_state()
    net = FunctionalNet(network, input_shape=input_shape)
    with pytest.raises(ShapeError, match=message) as caught:
        net.probe(random(5, width))
    assert type(caught.value.__cause__) is RuntimeError
    assert_unchanged(network, before)
    assert log == [] and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in net.network.modules())


def test_a_failure_of_another_kind_is_left_as_it_is():
    class Unwritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

    with pytest.raises(NotImplementedError, match='missing the required "forward"'):
        FunctionalNet(Unwritten()).probe(random(3, 3))
    with pytest.raises(RuntimeError, match="not on the expected device|same device"):
        FunctionalNet(nn.Linear(3, 1)).probe(torch.empty(3, 3, device="meta"))


def test_a_network_that_keeps_a_tensor_of_a_forward_pass_is_refused():
    network = NETS["tanh_mlp"].network(1)
    network.last = network(NETS["tanh_mlp"].inputs(3))
    before = snapshot(network)
    with pytest.raises(ValueError, match="cannot be copied: .* Detach them"):
        FunctionalNet(network)
    assert_unchanged(network, before)


def test_inputs_that_cannot_be_probed_are_refused():
    net = FunctionalNet(NETS["tanh_mlp"].network(1))
    with pytest.raises(ShapeError, match=r"X is empty \(shape \(0, 3\)\)"):
        net.probe(random(0, 3))
    net = FunctionalNet(NETS["images"].network(1), input_shape=(2, 5, 5))
    with pytest.raises(ShapeError, match=r"has 50 entries, but X has 49 columns"):
        net.probe(random(4, 49))


def test_hooks_stay_where_they_are_if_the_copy_fails():
    network = NETS["tanh_mlp"].network(1)
    log = []
    with_hooks(network, log)
    network.cannot_be_copied = (i for i in range(3))
    before = snapshot(network)
    with pytest.raises(TypeError, match="generator"):
        FunctionalNet(network)
    assert_unchanged(network, before)


def test_a_weight_that_forward_does_not_reach_is_announced():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 1), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    net = FunctionalNet(Part().double())
    X = random(3, 3)
    with pytest.warns(UserWarning, match=r"\['unused.weight', 'unused.bias'\]"):
        net.probe(X)
    J = jacobian(net, X)
    assert J.shape == (3, 1, 10) and torch.equal(J[..., 4:], torch.zeros(3, 1, 6))


def test_summed_outputs_may_be_constant():
    # Softmax outputs sum to one: their summed gradient is zero, the Jacobian is not.
    network = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)).double()
    net = FunctionalNet(network)
    X = random(3, 3)
    net.probe(X)
    torch.testing.assert_close(jacobian(net, X), oracles.jacobian(network, X), **EXACT)


def test_outputs_squeezed_to_a_scalar_for_one_row_are_one_output():
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = cases.tanh_mlp(1)

        def forward(self, x):
            return self.layers(x).squeeze()

    net = FunctionalNet(Squeezed().double())
    X = random(4, 3)
    assert net.probe(X) == 1
    assert net(X[:1]).shape == (1, 1) and jacobian(net, X).shape == (4, 1, 26)


def test_the_number_of_outputs_is_not_known_before_a_point_was_seen():
    net = FunctionalNet(NETS["tanh_mlp"].network(1))
    with pytest.raises(RuntimeError, match="Call probe"):
        net.num_outputs  # noqa: B018


# --- modes, copies and files


def test_train_leaves_the_network_in_eval_mode():
    case = NETS["dropout"]
    net, X, network = probed(case, 1)
    before = net(X)
    outer = nn.ModuleList([net]).train()
    assert outer.training and net.training
    assert not any(module.training for module in net.network.modules())
    assert torch.equal(net(X), before)
    assert network.training
    case = NETS["batch_norm"]
    net, X, network = probed(case, 1)
    net.train()
    net(10 * X)
    assert torch.equal(net.network[1].running_mean, network[1].running_mean)


def test_the_copy_does_not_follow_the_module():
    net, X, network = probed(NETS["tanh_mlp"], 1)
    before = net(X)
    with torch.no_grad():
        network[0].weight.zero_()
    assert torch.equal(net(X), before)


@pytest.mark.parametrize("name", [*NETS, *LOOPED])
@pytest.mark.filterwarnings("ignore:torch.func cannot vectorise")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_deepcopy_pickle_and_state_dict_keep_the_function(name):
    case = {**NETS, **LOOPED}[name]
    net, X, _ = probed(case, 1)
    J = jacobian(net, X)
    others = [copy.deepcopy(net)]
    if name != "weight_norm":  # torch refuses to pickle parametrized modules
        others.append(pickle.loads(pickle.dumps(net)))
    fresh = FunctionalNet(case.network(1), input_shape=case.input_shape)
    fresh.load_state_dict(net.state_dict())
    fresh.probe(X)
    for other in (*others, fresh):
        assert torch.equal(other(X), net(X))
        assert torch.equal(jacobian(other, X), J)
        assert not {id(p) for p in other.parameters()} & {
            id(p) for p in net.parameters()
        }
