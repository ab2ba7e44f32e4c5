from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gpbridge import prediction
from gpbridge.features import DenseFeatures
from gpbridge.prediction import (
    FunctionSpaceStrategy,
    WeightSpaceStrategy,
    apply_root,
    apply_root_right,
    factorise,
    triangular_blocks,
    triangular_inverse,
    triangular_product,
    whiten,
)
from tests import oracles

EXACT = {"rtol": 1e-8, "atol": 1e-11}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def features(*batch_n_m, p, seed, dtype=torch.float64):
    """Dense features of points in a ``batch x n x m`` arrangement."""
    *batch, n, m = batch_n_m
    matrix = random(*batch, n * m, p, seed=seed).to(dtype)
    return DenseFeatures(random(*batch_n_m, seed=seed + 100).to(dtype), matrix)


class Problem(NamedTuple):
    train: DenseFeatures
    root: Tensor

    def strategy(self, space):
        if space == "function":
            return FunctionSpaceStrategy(self.train, self.train.gram(), self.root)
        return WeightSpaceStrategy([(self.train, self.root)], self.num_params)

    @property
    def num_params(self):
        return self.train.matrix.shape[-1]


def roots(kind, n, m):
    if kind == "gaussian":
        return 3.0 * torch.eye(m, dtype=torch.float64).expand(n, m, m)
    if kind == "softmax":  # singular: the logits are determined up to a constant
        return oracles.softmax_root(2 * random(n, m, seed=7))
    return random(n, m, m, seed=8)


PROBLEMS = {
    "p > n m": (4, 1, 9, "gaussian"),
    "p < n m": (9, 1, 4, "gaussian"),
    "two outputs": (5, 2, 7, "any root"),
    "softmax": (6, 3, 8, "softmax"),
    "softmax, many weights": (4, 3, 30, "softmax"),
    "one point": (1, 1, 3, "gaussian"),
    "one weight": (5, 2, 1, "any root"),
}


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS)
def problem(request):
    n, m, p, kind = request.param
    return Problem(features(n, m, p=p, seed=1), roots(kind, n, m))


every_space = pytest.mark.parametrize("space", ["function", "weight"])


def exact_covariance(problem, left, right):
    """Both of the oracle's ways to condition, which agree."""
    Phi = problem.train.matrix
    _, weights = oracles.weight_posterior(
        Phi, problem.root, torch.zeros_like(Phi[:, 0])
    )
    both = torch.cat([left.matrix, right.matrix])
    joint = oracles.function_posterior(
        Phi @ Phi.T, both @ Phi.T, both @ both.T, problem.root
    )
    cross = joint[: len(left.matrix), len(left.matrix) :]
    torch.testing.assert_close(left.matrix @ weights @ right.matrix.T, cross, **EXACT)
    return cross


@every_space
def test_covariances_equal_the_oracle_in_weight_and_in_function_space(problem, space):
    strategy = problem.strategy(space)
    p, m = problem.num_params, problem.root.shape[-1]
    left, right = features(4, m, p=p, seed=2), features(2, m, p=p, seed=3)
    seen, other = strategy.project(left), strategy.project(right)
    joint = exact_covariance(problem, left, left)
    torch.testing.assert_close(strategy.covariance(seen), joint, **EXACT)
    cross = exact_covariance(problem, left, right)
    torch.testing.assert_close(strategy.covariance(seen, other), cross, **EXACT)
    torch.testing.assert_close(strategy.covariance(other, seen), cross.T, **EXACT)
    blocks = [joint[i * m : (i + 1) * m, i * m : (i + 1) * m] for i in range(4)]
    torch.testing.assert_close(seen.blocks, torch.stack(blocks), **EXACT)


@every_space
def test_means_and_covariances_with_weights_equal_the_oracle(problem, space):
    strategy = problem.strategy(space)
    n, m = problem.train.value.shape
    whitened = random(n, m, seed=4)
    mean, covariance = oracles.weight_posterior(
        problem.train.matrix, problem.root, whitened
    )
    torch.testing.assert_close(strategy.mean_weights(whitened), mean, **EXACT)
    test = features(3, m, p=problem.num_params, seed=2)
    cross = strategy.cross_weights(strategy.project(test))
    torch.testing.assert_close(cross, test.matrix @ covariance, **EXACT)


@pytest.mark.parametrize("forced", ["difference", "root"])
def test_root_form_equals_difference_form(problem, forced, monkeypatch):
    m, p = problem.root.shape[-1], problem.num_params
    test = features(4, m, p=p, seed=2)
    exact = exact_covariance(problem, test, test)
    threshold = -1.0 if forced == "difference" else 1e300
    monkeypatch.setattr(prediction, "_SAFE", threshold)
    strategy = problem.strategy("function")
    seen = strategy.project(test)
    assert seen.is_root == (forced == "root")
    torch.testing.assert_close(strategy.covariance(seen), exact, **EXACT)
    # One side in each form: the difference is converted.
    monkeypatch.setattr(prediction, "_SAFE", -1.0 if seen.is_root else 1e300)
    other = strategy.project(test)
    assert other.is_root != seen.is_root
    torch.testing.assert_close(strategy.covariance(seen, other), exact, **EXACT)
    torch.testing.assert_close(strategy.covariance(other, seen), exact, **EXACT)


@every_space
def test_a_batch_of_test_sets_is_each_set(problem, space, monkeypatch):
    strategy = problem.strategy(space)
    m, p = problem.root.shape[-1], problem.num_params
    test = features(2, 3, 4, m, p=p, seed=2)
    for many_rows in (1, 10_000):  # both ways to compute V
        monkeypatch.setattr(prediction, "_MANY_ROWS", many_rows)
        batch = strategy.project(test)
        for i in range(2):
            for j in range(3):
                one = DenseFeatures(test.value[i, j], test.matrix[i, j])
                exact = exact_covariance(problem, one, one)
                got = strategy.covariance(batch)[i, j]
                torch.testing.assert_close(got, exact, **EXACT)
                alone = strategy.project(one)
                torch.testing.assert_close(batch.blocks[i, j], alone.blocks, **EXACT)
                cross = strategy.covariance(batch, alone)[i, j]
                torch.testing.assert_close(cross, exact, **EXACT)


@every_space
def test_draws_have_the_posterior_covariance(problem, space):
    strategy = problem.strategy(space)
    count = 4000
    draws = strategy.draw_weights(count, torch.Generator().manual_seed(0))
    Phi = problem.train.matrix
    _, exact = oracles.weight_posterior(Phi, problem.root, torch.zeros_like(Phi[:, 0]))
    scale = exact.diagonal().sqrt()
    # Standard errors: of a mean 1 / sqrt(s), of a covariance at most sqrt(2 / s).
    assert (draws.mean(0).abs() / scale).max() < 4 / count**0.5
    error = (draws.T @ draws / count - exact).abs() / scale / scale[:, None]
    assert error.max() < 4 * (2 / count) ** 0.5
    again = strategy.draw_weights(count, torch.Generator().manual_seed(0))
    other = strategy.draw_weights(count, torch.Generator().manual_seed(1))
    assert torch.equal(draws, again) and not torch.equal(draws, other)


KNOWN = {}  # sixty digits take longer than what is tested, in both spaces


def exact_variances(train, test, noise_variance):
    key = tuple(train.matrix.shape), noise_variance
    if key not in KNOWN:
        KNOWN[key] = oracles.precise_variances(train.matrix, test, noise_variance)
    return KNOWN[key]


@pytest.mark.parametrize("n, p", [(12, 5), (8, 20), (20, 20)])
@pytest.mark.parametrize("signal_to_noise", [1e3, 1e6, 1e9])
@every_space
def test_variances_keep_eight_digits_up_to_signal_to_noise_1e6(
    n, p, signal_to_noise, space
):
    train = features(n, 1, p=p, seed=1)
    noise_variance = p / signal_to_noise  # prior variances are about p
    root = torch.full((n, 1, 1), noise_variance**-0.5, dtype=torch.float64)
    strategy = Problem(train, root).strategy(space)
    inside = train.matrix[:2] + 1e-6 * random(2, p, seed=2)
    test = torch.cat([inside, random(2, p, seed=3)])
    exact = exact_variances(train, test, noise_variance)
    got = strategy.project(DenseFeatures(random(4, 1), test)).blocks[:, 0, 0]
    # Beyond 1e6 the smaller of the two matrices still gives five digits.
    smaller = "weight" if p < n else "function"
    digits = {1e9: 1e-5 if space == smaller else 1e-3}.get(signal_to_noise, 1e-8)
    torch.testing.assert_close(got, exact, rtol=digits, atol=0)


@every_space
def test_variances_stay_positive_however_small_the_noise(space):
    train = features(10, 1, p=4, seed=1)
    root = torch.full((10, 1, 1), 1e5, dtype=torch.float64)
    strategy = Problem(train, root).strategy(space)
    blocks = strategy.project(train).blocks
    assert (blocks > 0).all() and (blocks < 1.01e-10).all()


@every_space
def test_data_that_say_nothing_leave_the_prior(space):
    train = features(5, 2, p=6, seed=1)
    test = features(3, 2, p=6, seed=2)
    strategy = Problem(train, torch.zeros(5, 2, 2).double()).strategy(space)
    prior = test.matrix @ test.matrix.T
    torch.testing.assert_close(
        strategy.covariance(strategy.project(test)), prior, **EXACT
    )
    zero = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(strategy.mean_weights(random(5, 2)), zero, **EXACT)


@every_space
def test_no_data_leave_the_prior(space):
    train = features(0, 2, p=6, seed=1)
    test = features(3, 2, p=6, seed=2)
    strategy = Problem(train, torch.zeros(0, 2, 2).double()).strategy(space)
    prior = test.matrix @ test.matrix.T
    torch.testing.assert_close(
        strategy.covariance(strategy.project(test)), prior, **EXACT
    )
    assert torch.equal(strategy.mean_weights(random(0, 2)), torch.zeros(6).double())
    assert strategy.draw_weights(2).shape == (2, 6)


@every_space
def test_no_test_points(problem, space):
    strategy = problem.strategy(space)
    none = features(0, problem.root.shape[-1], p=problem.num_params, seed=1)
    assert strategy.covariance(strategy.project(none)).shape == (0, 0)


@every_space
def test_the_order_of_the_data_does_not_matter(problem, space):
    n, m = problem.train.value.shape
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    permuted = Problem(problem.train.take(order), problem.root[order])
    test = features(3, m, p=problem.num_params, seed=2)
    whitened = random(n, m)
    one, other = problem.strategy(space), permuted.strategy(space)
    torch.testing.assert_close(
        one.project(test).blocks, other.project(test).blocks, **EXACT
    )
    torch.testing.assert_close(
        one.mean_weights(whitened), other.mean_weights(whitened[order]), **EXACT
    )


def test_batches_of_data_add_up_to_all_of_them(problem):
    n, m = problem.train.value.shape
    parts = [
        (problem.train.take(rows), problem.root[rows])
        for rows in torch.arange(n).split(2)
    ]
    split = WeightSpaceStrategy(parts, problem.num_params)
    whole = problem.strategy("weight")
    torch.testing.assert_close(split.cholesky, whole.cholesky, **EXACT)
    whitened = random(n, m)
    torch.testing.assert_close(
        split.mean_weights(whitened), whole.mean_weights(whitened), **EXACT
    )


def test_batches_that_can_be_read_once_only_are_refused(problem):
    with pytest.raises(TypeError, match="batches must be re-iterable, but is a list_i"):
        WeightSpaceStrategy(iter([(problem.train, problem.root)]), problem.num_params)


@every_space
def test_gradients_in_the_test_features_equal_finite_differences(problem, space):
    strategy = problem.strategy(space)
    m, p = problem.root.shape[-1], problem.num_params
    value = random(2, m)

    def joint(matrix):
        return strategy.covariance(strategy.project(DenseFeatures(value, matrix)))

    matrix = random(2 * m, p, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(joint, matrix)


@pytest.mark.parametrize("n, p", [(30, 60), (600, 5), (5, 600)])
@every_space
def test_float32_products_are_close_or_refused(n, p, space):
    train = features(n, 1, p=p, seed=1)
    root = torch.ones(n, 1, 1, dtype=torch.float64)
    strategy = Problem(train, root).strategy(space)
    test = features(200, 1, p=p, seed=2)
    single = strategy.single_precision_blocks(test)
    exact = strategy.project(test).blocks
    torch.testing.assert_close(single, exact, rtol=1e-3, atol=0)
    few = features(3, 1, p=p, seed=2)
    assert strategy.single_precision_blocks(few) is None


def test_float32_products_keep_digits_where_a_few_directions_explain_all():
    size = torch.ones(300, dtype=torch.float64)
    size[:10] = 1000.0
    train, test = (
        DenseFeatures(f.value, f.matrix * size)
        for f in (features(200, 1, p=300, seed=seed) for seed in (1, 2))
    )
    root = torch.full((200, 1, 1), 3.0, dtype=torch.float64)
    strategy = Problem(train, root).strategy("function")
    exact = strategy.project(test).blocks
    assert (exact / test.blocks()).min() < 1e-5  # most of the prior variance cancels
    plain = test.gram(train).float() @ strategy._inverse_root.float()
    rounded = test.blocks() - plain.square().sum(-1).double()[:, None, None]
    assert (rounded / exact - 1).abs().max() > 1e-2
    single = strategy.single_precision_blocks(test)
    torch.testing.assert_close(single, exact, rtol=1e-5, atol=0)


def test_float32_products_that_lose_digits_are_refused_for_good():
    train = features(60, 1, p=50, seed=1)
    root = torch.full((60, 1, 1), 1e5, dtype=torch.float64)
    strategy = Problem(train, root).strategy("function")
    test = features(200, 1, p=50, seed=2)
    assert strategy.single_precision_blocks(test) is None
    assert strategy._gram_dtypes == []
    assert strategy.single_precision_blocks(test) is None


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-6])
def test_float32_features_come_from_one_precision_only(noise):
    train = features(40, 1, p=50, seed=1, dtype=torch.float32)
    root = torch.full((40, 1, 1), noise**-0.5, dtype=torch.float64)
    strategy = Problem(train, root).strategy("function")
    test = features(200, 1, p=50, seed=2, dtype=torch.float32)
    single = strategy.single_precision_blocks(test)
    if single is not None:
        exact = strategy.project(test).blocks
        torch.testing.assert_close(single, exact, rtol=1e-3, atol=0)


def test_float32_products_spare_contrasts_between_outputs():
    """Two outputs that are nearly the same function."""
    m, n, t, p = 2, 60, 200, 400
    train, test = features(n, m, p=p, seed=1), features(t, m, p=p, seed=2)
    for f in (train, test):
        pairs = f.matrix.unflatten(0, (-1, m))
        pairs[:, 1] = pairs[:, 0] + 1e-4 * pairs[:, 1]
    root = 3 * torch.eye(m, dtype=torch.float64).expand(n, m, m)
    strategy = Problem(train, root).strategy("function")
    contrast = torch.tensor([1.0, -1.0], dtype=torch.float64)
    exact = contrast @ strategy.project(test).blocks @ contrast
    single = strategy.single_precision_blocks(test)
    if single is not None:
        got = contrast @ single @ contrast
        torch.testing.assert_close(got, exact, rtol=2e-3, atol=0)


def test_float32_features_are_conditioned_in_float64():
    train = features(8, 2, p=20, seed=1)
    root = roots("any root", 8, 2)
    exact = Problem(train, root).strategy("function")
    test = features(3, 2, p=20, seed=2)
    expected = exact.project(test).blocks
    low = Problem(train.to(torch.float32), root.float())
    for space in ("function", "weight"):
        blocks = low.strategy(space).project(test.to(torch.float32)).blocks
        assert blocks.dtype == torch.float64
        torch.testing.assert_close(blocks, expected, rtol=1e-3, atol=1e-4)


def test_roots_are_applied_blockwise():
    root, M = random(4, 3, 3), random(12, 5, seed=1)
    R = oracles.block_diagonal(root)
    torch.testing.assert_close(apply_root(root, M), R @ M)
    torch.testing.assert_close(apply_root_right(M.T, root), M.T @ R)
    K = M @ M.T
    torch.testing.assert_close(whiten(K, root), R.T @ K @ R)
    one = random(12, 1, 1, seed=2)
    R = oracles.block_diagonal(one)
    torch.testing.assert_close(whiten(K, one), R.T @ K @ R)
    torch.testing.assert_close(apply_root_right(M.T, one), M.T @ R)


@pytest.mark.parametrize("k", [0, 1, 128, 129, 300])
def test_a_triangular_inverse_by_halves_is_the_inverse(k):
    lower = (random(k, k) / max(k, 1) ** 0.5).tril(-1) + torch.eye(k).double()
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(triangular_inverse(lower) @ lower, eye, **EXACT)
    assert triangular_inverse(lower).triu(1).count_nonzero() == 0


@pytest.mark.parametrize("k", [6, 600, 1030])
def test_a_triangular_product_skips_zeros_only(k):
    triangular, matrix = random(k, k).triu(), random(130, k, seed=1)
    expected = matrix @ triangular
    torch.testing.assert_close(
        triangular_product(matrix, triangular), expected, **EXACT
    )


@pytest.mark.parametrize("k", [6, 600])
@pytest.mark.parametrize("m", [1, 3])
def test_blocks_of_a_triangular_product(k, m):
    triangular, matrix = random(k, k).triu(), random(50 * m, k, seed=1)
    F = (matrix @ triangular).unflatten(0, (50, m))
    got = triangular_blocks(matrix, triangular, (50, m))
    torch.testing.assert_close(got, F @ F.mT, **EXACT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e3])
def test_a_matrix_that_cannot_be_factorised_is_refused(value):
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 1] = value
    with pytest.raises(ValueError, match=r"could not be factorised.* noise floor"):
        factorise(matrix)
