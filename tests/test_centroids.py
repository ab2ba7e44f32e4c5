"""Centroids by k-means."""

import pytest
import torch
from botorch.exceptions.errors import InputDataError

from gpbridge.centroids import centroids
from tests.dnn.deep_gp_problems import normal, seeded


def cost(X, centers):
    return torch.cdist(X, centers).square().min(-1).values.sum()


def test_separate_clusters_are_found():
    middle = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]]).double()
    X = (middle[:, None] + 0.1 * normal(3, 20, 2)).flatten(0, 1)
    found = centroids(X, 3)
    expected = X.reshape(3, 20, 2).mean(1)
    order = torch.cdist(expected, found).argmin(-1)
    torch.testing.assert_close(found[order], expected)


def test_each_centre_is_the_mean_of_its_rows_and_better_than_a_random_choice():
    X = normal(300, 2)
    found = centroids(X, 10, seeded(1))
    nearest = torch.cdist(X, found).argmin(-1)
    means = torch.stack([X[nearest == k].mean(0) for k in range(10)])
    assert (means - found).abs().max() < 0.1  # after 30 steps they hardly move
    assert cost(X, found) < 0.8 * cost(X, X[:10])


def test_equal_rows_count_as_one_and_few_rows_are_all_taken():
    X = torch.tensor([[1.0], [1.0], [2.0], [3.0]])
    assert torch.equal(
        centroids(X, 7).sort(0).values, torch.tensor([[1.0], [2.0], [3.0]])
    )
    many = torch.cat([X, X + 10]).repeat(50, 1)
    found = centroids(many, 5)
    assert len(found.unique(dim=0)) == 5


def test_the_same_seed_gives_the_same_centres_far_from_the_origin_too():
    X = normal(200, 3) + 1e4
    first, second = (centroids(X, 8, seeded(2)) for _ in range(2))
    assert torch.equal(first, second)
    near = centroids(X - 1e4, 8, seeded(2))
    torch.testing.assert_close(first - 1e4, near, rtol=0, atol=1e-8)


def test_bad_input_is_named():
    with pytest.raises(InputDataError, match="X has no rows"):
        centroids(torch.zeros(0, 2), 3)
    with pytest.raises(ValueError, match="num_points must be a whole number"):
        centroids(torch.zeros(3, 2), 0)
