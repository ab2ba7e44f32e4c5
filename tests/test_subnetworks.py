"""Single entries of the weights as the random ones, and the free choices of them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.checks import ShapeError
from gpbridge.dnn import SWAG, MeanFieldVI
from gpbridge.draws import TangentDraws, WeightDraws
from gpbridge.function_space import FunctionSpace
from gpbridge.functional import FunctionalNet, functionalize
from gpbridge.jacobians import jacobian, jvp, linearize, vjp
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.layer_gram import tangent_features
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.subnetworks import largest_magnitude, random_subset
from gpbridge.testing import assert_module_unchanged
from gpbridge.weights import GaussianWeights
from tests import oracles
from tests.cases import every_looped_net, every_net

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shaped(case, X):
    return X.reshape(-1, *(case.input_shape or (case.width,)))


def flat(masks):
    return torch.cat([mask.reshape(-1) for mask in masks.values()])


def some(network, share=3, seed=0):
    total = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return random_subset(network, max(1, total // share), generator(seed))


def partial(case, m, n=4):
    network, X = case.network(m), case.inputs(n)
    masks = some(network)
    net = FunctionalNet(network, masks, case.input_shape)
    net.probe(X)
    return net, X, network, flat(masks)


# --- the function of the chosen entries


@pytest.mark.filterwarnings("ignore:The output does not reach")
@every_net
def test_the_jacobian_has_the_columns_of_the_chosen_entries(case, m):
    net, X, network, chosen = partial(case, m)
    exact = oracles.jacobian(network, shaped(case, X))[..., chosen]
    assert net.num_params == int(chosen.sum()) == exact.shape[-1]
    torch.testing.assert_close(jacobian(net, X), exact, **EXACT)
    v = torch.randn(net.num_params, generator=generator(1), dtype=torch.float64)
    u = torch.randn(4, m, generator=generator(2), dtype=torch.float64)
    torch.testing.assert_close(jvp(net, X, v), exact @ v, rtol=1e-9, atol=1e-11)
    pulled = torch.einsum("nmp,nm->p", exact, u)
    torch.testing.assert_close(vjp(net, X, u), pulled, rtol=1e-9, atol=1e-11)
    value, push = linearize(net, X)
    torch.testing.assert_close(push(v), exact @ v, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(value, net(X), **EXACT)


@pytest.mark.filterwarnings("ignore:The output does not reach")
@every_net
def test_features_have_the_columns_of_the_chosen_entries(case, m):
    net, X, _, _ = partial(case, m)
    std = {name: X.new_tensor(0.3 + k) for k, name in enumerate(net.params)}
    features = tangent_features(net, X, std, "layers")
    scale = torch.cat([s.expand(net.params[name].numel()) for name, s in std.items()])
    expected = (jacobian(net, X) * scale).flatten(0, 1)
    torch.testing.assert_close(features.rows(), expected, **EXACT)
    torch.testing.assert_close(
        features.gram(), expected @ expected.mT, rtol=1e-9, atol=1e-10
    )


@pytest.mark.filterwarnings("ignore:torch.func cannot", "ignore:The output does not")
@every_looped_net
def test_networks_that_cannot_be_traced_have_them_too(case, m):
    net, X, network, chosen = partial(case, m)
    exact = oracles.jacobian(network, shaped(case, X))[..., chosen]
    torch.testing.assert_close(jacobian(net, X), exact, **EXACT)


def test_weights_go_to_their_places_and_the_others_stay():
    network = nn.Linear(3, 2)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    net = FunctionalNet(network, {"weight": mask})
    moved = net.unflatten(torch.tensor([10.0, 20.0, 30.0]))
    whole = network.weight.detach().clone()
    whole[0, 0], whole[0, 2], whole[1, 2] = 10.0, 20.0, 30.0
    X = torch.randn(4, 3, generator=generator())
    expected = X @ whole.mT + network.bias.detach()
    torch.testing.assert_close(net.apply_network(moved, X), expected)
    torch.testing.assert_close(net.flatten(net.params), network.weight[mask].detach())
    net.write(moved)
    torch.testing.assert_close(net(X), expected)
    apply, params = functionalize(network, {"weight": mask})
    torch.testing.assert_close(apply(params, X), network(X).detach())


def test_masks_and_places_choose_the_same_entries():
    network = nn.Linear(3, 2)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    places = torch.tensor([5, 0, 2])
    by_mask = FunctionalNet(network, {"weight": mask})
    by_place = FunctionalNet(network, {"weight": places})
    assert torch.equal(by_mask.entries["weight"], by_place.entries["weight"])


def test_a_mask_of_everything_is_no_choice():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    everything = {
        n: torch.ones_like(p, dtype=bool) for n, p in network.named_parameters()
    }
    net = FunctionalNet(network, everything)
    assert net.names == FunctionalNet(network).names and not net.entries
    assert list(net.state_dict()) == list(FunctionalNet(network).state_dict())


def test_the_order_of_the_mapping_does_not_matter_and_empty_masks_drop_out():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    none = torch.zeros(4, 3, dtype=torch.bool)
    choice = {
        "2.bias": torch.tensor([1]),
        "0.weight": none,
        "0.bias": torch.tensor([0, 3]),
    }
    assert FunctionalNet(network, choice).names == ["0.bias", "2.bias"]


def test_frozen_weights_are_never_random():
    network = nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    every = {"weight": torch.tensor([0]), "bias": torch.tensor([0, 1])}
    assert FunctionalNet(network, every).names == ["weight"]
    assert list(largest_magnitude(network, 2)) == ["weight"]


def test_other_entries_of_a_trainable_copy_stay_constant():
    network = nn.Linear(3, 1)
    net = FunctionalNet(network, {"weight": torch.tensor([1])}, freeze=False)
    net(torch.ones(2, 3)).sum().backward()
    grad = net.network.weight.grad
    assert grad.tolist() == [[0.0, 2.0, 0.0]]


def test_the_module_is_untouched_and_masks_are_copied():
    network, X = nn.Linear(3, 1), torch.ones(2, 3)
    places = torch.tensor([0, 2])
    with assert_module_unchanged(network):
        net = FunctionalNet(network, {"weight": places})
        net.write({"weight": torch.zeros(2)})
        jacobian(net, X)
    places.fill_(1)
    assert net.entries["weight"].tolist() == [0, 2]


def test_copies_pickles_states_and_moves_keep_the_choice():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    X = torch.randn(5, 3, generator=generator())
    net = FunctionalNet(network, some(network, seed=1))
    net.probe(X)
    J = jacobian(net, X)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(jacobian(twin, X), J)
    other = FunctionalNet(network, some(network, seed=1))
    for held in other.entries.values():
        held.copy_(held.flip(0))
    other.load_state_dict(net.state_dict())
    assert torch.equal(jacobian(other, X), J)
    net.double()
    assert {places.dtype for places in net.entries.values()} == {torch.int64}
    assert net.params["0.weight"].dtype == torch.float64
    torch.testing.assert_close(jacobian(net, X.double()).float(), J)
    torch.testing.assert_close(net.float()(X.double()).float(), net(X))


def test_draws_and_kernels_take_the_chosen_entries():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    X = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    net = FunctionalNet(network, some(network))
    net.probe(X)
    p = net.num_params
    weights = torch.randn(3, p, generator=generator(1), dtype=torch.float64)
    one_by_one = torch.stack([net.apply_network(net.unflatten(w), X) for w in weights])
    torch.testing.assert_close(WeightDraws(net, weights)(X), one_by_one)
    moved = torch.stack([jvp(net, X, w) for w in weights]) + net(X)
    torch.testing.assert_close(TangentDraws(net, weights)(X), moved)
    J = jacobian(net, X)[:, 0]
    kernel = NeuralTangentKernel(net)
    torch.testing.assert_close(kernel(X).to_dense(), kernel.prior_variance * J @ J.mT)
    posterior = GaussianWeights(net, weights[0], torch.full((p,), 0.1).double())
    space = FunctionSpace(posterior, mode="linearized", num_samples=2)
    value = net.apply_network(net.unflatten(weights[0]), X)
    torch.testing.assert_close(space(X).mean.reshape(5), value[:, 0])


def test_variational_inference_takes_a_subnetwork():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    X = torch.randn(6, 3, generator=generator(), dtype=torch.float64)
    Y = (X[:, :1] > 0).double()
    options = {"num_data": 6, "parameters": some(network)}
    vi = MeanFieldVI(network, LogisticLikelihood(), **options)
    vi.loss(X, Y, generator=generator()).backward()
    assert vi.mean.grad.shape == (vi.net.num_params,) and vi.mean.grad.abs().sum() > 0


def test_trackers_and_batch_norm_take_a_subnetwork():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    masks = some(network, seed=2)
    swag = SWAG(network, parameters=masks, rank=2)
    values = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    for step in (1.0, 3.0):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(step)
        swag.update(network)
    posterior = swag.posterior()
    torch.testing.assert_close(posterior.mean, values[flat(masks)] + 2.5)
    held = posterior.net.network[0].weight  # the other entries are the last ones
    mask = masks["0.weight"]
    torch.testing.assert_close(held[~mask], network[0].weight.detach()[~mask])
    draws = posterior.draw(2, generator())
    X = torch.randn(8, 3, generator=generator())
    refresh_batch_norm(draws, [X])
    assert draws(X).shape == (2, 8, 1)


# --- which entries


def test_the_largest_weights_are_chosen_over_all_tensors():
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    masks = largest_magnitude(network, 7)
    assert [m.shape for m in masks.values()] == [p.shape for p in network.parameters()]
    values = torch.cat([p.detach().reshape(-1).abs() for p in network.parameters()])
    chosen = flat(masks)
    assert int(chosen.sum()) == 7
    assert values[chosen].min() > values[~chosen].max()


def test_of_equal_weights_the_earlier_ones_are_chosen():
    network = nn.Linear(4, 1, bias=False)
    nn.init.ones_(network.weight)
    assert largest_magnitude(network, 2)["weight"].tolist() == [
        [True, True, False, False]
    ]


def test_a_random_subset_has_its_size_and_is_that_of_the_seed():
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    first = flat(random_subset(network, 9, generator(3)))
    assert int(first.sum()) == 9
    assert torch.equal(first, flat(random_subset(network, 9, generator(3))))
    assert not torch.equal(first, flat(random_subset(network, 9, generator(4))))
    state = torch.get_rng_state()
    random_subset(network, 9)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_weight_is_equally_likely():
    network, source = nn.Linear(4, 1), generator()
    counts = sum(flat(random_subset(network, 2, source)).double() for _ in range(500))
    # Binomial with p = 2/5: six standard deviations.
    assert (counts / 500 - 0.4).abs().max() < 6 * (0.24 / 500) ** 0.5


def test_a_choice_within_some_tensors_names_no_others():
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    for choose in (largest_magnitude, random_subset):
        masks = choose(network, 3, within="last_layer")
        assert list(masks) == ["2.weight", "2.bias"]


# --- bad input


@pytest.mark.parametrize(
    "choice, error, message",
    [
        (
            {"wieght": torch.tensor([0])},
            ValueError,
            r"parameters masks \['wieght'\], which the network does not have. It has "
            r"\['weight', 'bias'\]",
        ),
        (
            {"weight": torch.ones(3, 2, dtype=torch.bool)},
            ShapeError,
            r"mask of weight must have its shape \(2, 3\), but has shape \(3, 2\)",
        ),
        ({"weight": torch.ones(2, 3)}, TypeError, "but is torch.float32"),
        ({"weight": [0, 1]}, TypeError, r"parameters\['weight'\]"),
        (
            {"weight": torch.ones(2, 3, dtype=torch.long)},
            ShapeError,
            "must be a vector of integers",
        ),
        ({"weight": torch.tensor([1, 1])}, ValueError, "names a place twice"),
        ({"bias": torch.tensor([0, 2])}, ValueError, "must lie in 0 .. 1"),
        ({"bias": torch.tensor([-1])}, ValueError, "must lie in 0 .. 1"),
        ({"bias": torch.zeros(2, dtype=torch.bool)}, ValueError, "no entry of"),
        ({}, ValueError, "no entry of"),
    ],
)
def test_a_bad_choice_is_named(choice, error, message):
    with pytest.raises(error, match=message):
        FunctionalNet(nn.Linear(3, 2), choice)


@pytest.mark.parametrize("choose", [largest_magnitude, random_subset])
def test_more_weights_than_there_are_cannot_be_chosen(choose):
    with pytest.raises(ValueError, match="at most the 8 weights .* but is 9"):
        choose(nn.Linear(3, 2), 9)
    with pytest.raises(ValueError, match="count"):
        choose(nn.Linear(3, 2), 0)
