import math

import pytest
import torch
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning

from gpbridge.checks import ShapeError
from gpbridge.linearized.links import (
    LINKS,
    laplace_bridge,
    monte_carlo,
    pairwise,
    plugin,
    probit,
    probit_centred,
)
from tests import oracles_likelihoods as oracles

EXACT = {"rtol": 1e-9, "atol": 1e-12}
INVARIANT = [pairwise, probit_centred, monte_carlo]


def moments(*shape, variance=1.0, seed=0):
    """Random logits, and covariances with a given mean diagonal."""
    generator = torch.Generator().manual_seed(seed)
    m = shape[-1]
    f = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    root = torch.randn(*shape, m + 2, generator=generator, dtype=torch.float64)
    S = root @ root.mT
    scale = S.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return f, variance * S / scale


@pytest.mark.parametrize("m", [2, 3, 10])
@pytest.mark.parametrize(
    "link, oracle",
    [
        (plugin, lambda f, S: torch.exp(f) / torch.exp(f).sum()),
        (pairwise, oracles.pairwise_link),
        (probit, oracles.probit_link),
        (probit_centred, lambda f, S: oracles.probit_link(*oracles.centred(f, S))),
        (laplace_bridge, oracles.bridge_link),
    ],
)
def test_a_link_is_its_formula(link, oracle, m):
    f, S = moments(4, m)
    dense = torch.stack([oracle(f[i], S[i]) for i in range(4)])
    torch.testing.assert_close(link(f, S), dense, **EXACT)
    torch.testing.assert_close(link(f, S, log=True), dense.log(), **EXACT)


@pytest.mark.parametrize("link", LINKS.values())
def test_probabilities_are_positive_and_sum_to_one(link):
    for variance in (1e-6, 1.0, 1e4):
        q = link(*moments(2, 5, 4, variance=variance))
        assert q.shape == (2, 5, 4) and (q >= 0).all()
        torch.testing.assert_close(q.sum(-1), torch.ones_like(q[..., 0]), **EXACT)


@pytest.mark.parametrize("f, v", [(0.5, 0.2), (-1.0, 2.0), (3.0, 1.0), (2.0, 8.0)])
def test_pairwise_of_two_classes_is_the_probit_formula_close_to_the_integral(f, v):
    mean = torch.tensor([0.3, 0.3 + f], dtype=torch.float64)
    covariance = torch.tensor([[0.5, 0.2], [0.2, v - 0.1]], dtype=torch.float64)
    got = pairwise(mean, covariance)[1].item()  # variance of the difference is v
    formula = 1 / (1 + math.exp(-f / math.sqrt(1 + math.pi / 8 * v)))
    assert got == pytest.approx(formula, rel=1e-12)
    assert got == pytest.approx(oracles.logistic_average(f, v), abs=0.02)


@pytest.mark.parametrize("link", INVARIANT)
def test_a_common_shift_of_the_logits_is_ignored(link):
    f, S = moments(5, 4)
    shifted = link(f + 3.0, S + 7.0)
    torch.testing.assert_close(shifted, link(f, S), rtol=1e-6, atol=1e-9)


def test_the_diagonal_probit_depends_on_a_common_shift():
    f, S = moments(5, 4)
    assert (probit(f, S + 7.0) - probit(f, S)).abs().max() > 0.05
    assert (probit(f + 3.0, S) - probit(f, S)).abs().max() > 0.01


def test_the_bridge_ignores_the_scale_of_the_covariance():
    f, S = moments(5, 4)
    torch.testing.assert_close(laplace_bridge(f, S), laplace_bridge(f, 10 * S), **EXACT)


@pytest.mark.parametrize(
    "link", [plugin, pairwise, probit, probit_centred, monte_carlo]
)
def test_without_covariance_a_link_is_the_softmax(link):
    f, S = moments(5, 4)
    torch.testing.assert_close(link(f, 0 * S), torch.softmax(f, -1), **EXACT)


def test_without_covariance_the_bridge_is_its_limit_and_not_the_softmax():
    f, S = moments(5, 4)
    got = laplace_bridge(f, 0 * S)
    eye = 1e-3 * torch.eye(4, dtype=f.dtype)
    limit = torch.stack([oracles.bridge_link(row, eye) for row in f])
    torch.testing.assert_close(got, limit, **EXACT)
    assert (got - torch.softmax(f, -1)).abs().max() > 0.01


def test_the_bridge_takes_a_covariance_that_is_centred_already():
    f, S = moments(5, 4)
    centred = [oracles.centred(f[i], S[i]) for i in range(5)]
    centre = torch.stack([row for row, _ in centred])
    P_S = torch.stack([matrix for _, matrix in centred])
    one = torch.ones(4, 4, dtype=f.dtype)
    expected = torch.stack(
        [oracles.bridge_link(centre[i], P_S[i] + one) for i in range(5)]
    )
    torch.testing.assert_close(laplace_bridge(f, P_S), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("variance", [0.1, 1.0, 10.0])
def test_monte_carlo_agrees_with_independent_samples_within_their_error(variance):
    f, S = moments(3, 10, variance=variance)
    got = monte_carlo(f, S, num_samples=4000)
    for i in range(3):
        mean, error = oracles.sampled_link(f[i], S[i], 40_000)
        assert ((got[i] - mean).abs() < 4 * math.sqrt(11) * error + 1e-5).all()


def test_monte_carlo_of_two_classes_is_the_integral():
    f = torch.tensor([[0.0, 1.2], [2.0, 0.0]], dtype=torch.float64)
    S = torch.tensor([[[2.0, 0.5], [0.5, 1.0]], [[1.0, 0], [0, 3.0]]]).double()
    got = monte_carlo(f, S, num_samples=100_000)[:, 1]
    exact = [oracles.logistic_average(1.2, 2.0), oracles.logistic_average(-2.0, 4.0)]
    torch.testing.assert_close(
        got, torch.tensor(exact, dtype=torch.float64), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("variance, bound", [(0.1, 0.01), (1.0, 0.06), (10.0, 0.2)])
def test_pairwise_is_closer_to_the_integral_than_the_other_closed_forms(
    variance, bound
):
    f, S = moments(100, 10, variance=variance)
    S = S + 3 * variance  # a common shift, as every network's posterior has
    reference = monte_carlo(f, S, num_samples=4000)

    def distance(q):
        return 0.5 * (q - reference).abs().sum(-1).mean()

    assert distance(pairwise(f, S)) < bound
    for link in (probit_centred, probit, laplace_bridge):
        assert distance(pairwise(f, S)) < distance(link(f, S))


@pytest.mark.parametrize("size", [30.0, 800.0, 1e4])
@pytest.mark.parametrize("name", LINKS)
def test_extreme_logits_give_finite_log_probabilities_and_gradients(name, size):
    f, S = moments(4, 3)
    f, S = (size * f).requires_grad_(), S.requires_grad_()
    logs = LINKS[name](f, S, log=True)
    slopes = torch.autograd.grad(logs.sum(), (f, S), allow_unused=name == "plugin")
    assert logs.isfinite().all() and (logs <= 0).all()
    assert all(slope.isfinite().all() for slope in slopes if slope is not None)


@pytest.mark.parametrize("name", [name for name in LINKS if name != "plugin"])
def test_gradients_agree_with_finite_differences(name):
    f, S = moments(2, 3)
    options = {"num_samples": 20} if name == "monte_carlo" else {}
    root = torch.linalg.cholesky(S).requires_grad_()
    inputs = f.requires_grad_(), root
    assert torch.autograd.gradcheck(
        lambda f, root: LINKS[name](f, root @ root.mT, **options), inputs
    )


@pytest.mark.parametrize("link", LINKS.values())
def test_a_point_does_not_depend_on_its_batch(link):
    f, S = moments(2, 5, 4)
    alone = torch.stack([link(f[0, i], S[0, i]) for i in range(5)])
    torch.testing.assert_close(link(f, S)[0], alone, **EXACT)


@pytest.mark.parametrize("link", LINKS.values())
def test_classes_can_be_permuted(link):
    if link is monte_carlo:
        pytest.skip("its draws belong to the order of the classes")
    f, S = moments(5, 4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = link(f[:, order], S[:, order][:, :, order])
    torch.testing.assert_close(permuted, link(f, S)[:, order], **EXACT)


@pytest.mark.parametrize("link", LINKS.values())
def test_float32_moments_give_float32_probabilities(link):
    f, S = moments(5, 4)
    got = link(f.float(), S.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), link(f, S), rtol=1e-4, atol=1e-5)


def test_monte_carlo_repeats_itself_and_leaves_the_global_state_alone():
    f, S = moments(5, 4)
    state = torch.get_rng_state()
    torch.testing.assert_close(monte_carlo(f, S), monte_carlo(f, S), rtol=0, atol=0)
    one = monte_carlo(f, S, generator=torch.Generator().manual_seed(1))
    two = monte_carlo(f, S, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_antithetic_pairs_are_exact_where_the_softmax_is_odd():
    f = torch.zeros(1, 2, dtype=torch.float64)
    _, S = moments(1, 2)
    half = torch.full_like(f, 0.5)
    torch.testing.assert_close(monte_carlo(f, S, num_samples=2), half, **EXACT)
    plain = monte_carlo(f, S, num_samples=2, antithetic=False)
    assert (plain - 0.5).abs().max() > 1e-3


def test_samples_taken_in_chunks_are_the_same_average(monkeypatch):
    f, S = moments(5, 4)
    whole = monte_carlo(f, S, num_samples=20_000)
    monkeypatch.setattr("gpbridge.linearized.links.SAMPLE_NUMBERS", 20_000)
    torch.testing.assert_close(
        monte_carlo(f, S, num_samples=20_000), whole, rtol=0.1, atol=0.01
    )


def test_a_slightly_indefinite_covariance_is_sampled_with_a_warning():
    f, S = moments(3, 4)
    bad = S.clone()
    values, vectors = torch.linalg.eigh(oracles.centred(f[1], S[1])[1])
    bad[1] = vectors[:, 2:] @ torch.diag(values[2:]) @ vectors[:, 2:].T
    bad[1] -= 1e-4 * values.mean() * torch.outer(vectors[:, 1], vectors[:, 1])
    with pytest.warns(NumericalWarning, match="1 points needs a jitter of") as caught:
        got = monte_carlo(f, bad)
    assert "0.0001 of its" in str(caught[0].message)
    assert "0.001 of its" in str(caught[1].message)
    torch.testing.assert_close(got[[0, 2]], monte_carlo(f, S)[[0, 2]], **EXACT)
    assert got.isfinite().all()


@pytest.mark.filterwarnings("ignore:The covariance of")
def test_an_indefinite_covariance_is_refused():
    f, S = moments(3, 4)
    with pytest.raises(NotPSDError, match="3 points is indefinite.*pairwise"):
        monte_carlo(f, -S)
    with pytest.raises(NotPSDError, match="1 points is indefinite, or not finite"):
        monte_carlo(f, torch.cat([S[:2], S[2:] * torch.nan]))


def test_no_points_give_no_probabilities():
    f, S = moments(3, 4)
    for link in LINKS.values():
        assert link(f[:0], S[:0]).shape == (0, 4)


def test_one_output_and_wrong_shapes_are_refused():
    f, S = moments(3, 4)
    with pytest.raises(ShapeError, match=r"m > 1, but mean has shape \(3, 1\)"):
        pairwise(f[:, :1], S[:, :1, :1])
    with pytest.raises(ShapeError, match=r"``... x 4 x 4``.*shape \(3, 4\)"):
        pairwise(f, S[..., 0])
    with pytest.raises(ValueError, match="num_samples must be positive"):
        monte_carlo(f, S, num_samples=0)
