"""Planes in weight space: coordinates, corners, principal axes, losses on a grid."""

import copy
import io

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from torch import nn
from torch.nn import functional as F

from gpbridge.checks import ShapeError
from gpbridge.dnn import BezierCurve, loss_plane, plane_through, principal_plane
from gpbridge.functional import FunctionalNet
from gpbridge.testing import assert_module_unchanged


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def build():
    inner = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh())
    return nn.Sequential(inner, nn.Linear(4, 3)).double()


def net():
    return FunctionalNet(build())


def test_three_weights_lie_in_their_plane_at_their_distances():
    space = net()
    corners = normal(3, space.num_params)
    plane = plane_through(space, corners)
    torch.testing.assert_close(plane.weights(plane.points), corners)
    torch.testing.assert_close(plane.coordinates(corners), plane.points)
    torch.testing.assert_close(torch.cdist(corners, corners),
                               torch.cdist(plane.points, plane.points))  # fmt: skip
    assert plane.points[0].tolist() == [0.0, 0.0] and plane.points[1, 1] == 0.0
    assert plane.points[1, 0] > 0 and plane.points[2, 1] > 0
    torch.testing.assert_close(plane.axes @ plane.axes.mT, torch.eye(2).double())


def test_a_bezier_curve_of_three_points_lies_in_the_plane_through_them():
    curve = BezierCurve(build(), build())
    with torch.no_grad():
        curve.bends.add_(normal(*curve.bends.shape))
    plane = plane_through(curve.net, curve.control_points[[0, 2, 1]])
    path = curve.weights(torch.linspace(0, 1, 9))
    torch.testing.assert_close(plane.weights(plane.coordinates(path)), path.detach())


def test_the_principal_plane_has_the_top_eigenvectors_of_the_covariance():
    space = net()
    weights = normal(10, space.num_params).cumsum(0)
    plane = principal_plane(space, weights)
    values, vectors = torch.linalg.eigh(torch.cov(weights.mT, correction=0))
    top = vectors[:, [-1, -2]].mT
    torch.testing.assert_close((plane.axes * top).sum(-1).abs(), torch.ones(2).double())
    torch.testing.assert_close(plane.origin, weights.mean(0))
    torch.testing.assert_close(plane.points, plane.coordinates(weights))
    share = values[[-1, -2]] / values.sum()
    torch.testing.assert_close(plane.explained, share)
    assert (plane.points[-1] >= 0).all()


def test_the_far_side_of_nearly_equal_directions_stays_orthonormal_in_float32():
    space = FunctionalNet(build().float())
    corners = normal(3, space.num_params).float()
    corners[2] = corners[0] + (corners[1] - corners[0]) * 0.5 + 1e-3 * corners[2]
    plane = plane_through(space, corners)
    torch.testing.assert_close(plane.axes @ plane.axes.mT, torch.eye(2))


@pytest.mark.parametrize("chunks", [(1, 7), (5, 1000)])
def test_losses_on_the_grid_are_those_of_each_network(chunks):
    network = build().train()
    space = FunctionalNet(network)
    X = normal(30, 2, seed=1)
    Y = torch.arange(30) % 3
    plane = plane_through(space, normal(3, space.num_params))
    batches = list(X.split(10))
    with assert_module_unchanged(network):
        surface = loss_plane(
            plane, X, Y, size=3, margin=0.5, batches=batches, progress=False,
            chunk_size=chunks[0], row_chunk_size=chunks[1],
        )  # fmt: skip
    extent = plane.points.amax(0) - plane.points.amin(0)
    for axis, values in enumerate((surface.x, surface.y)):
        middle = plane.points[:, axis].amin() + extent[axis] / 2
        reach = extent[axis] / 2 + 0.5 * extent.max()
        expected = middle + torch.tensor([-1.0, 0, 1.0]).double() * reach
        torch.testing.assert_close(values, expected)
    for i, y in enumerate(surface.y):
        for j, x in enumerate(surface.x):
            single = copy.deepcopy(network)
            w = plane.origin + x * plane.axes[0] + y * plane.axes[1]
            torch.nn.utils.vector_to_parameters(w, single.parameters())
            torch.optim.swa_utils.update_bn(batches, single)
            outputs = single.eval()(X)
            torch.testing.assert_close(surface.loss[i, j], F.cross_entropy(outputs, Y))
            wrong = (outputs.argmax(-1) != Y).double().mean()
            torch.testing.assert_close(surface.error[i, j], wrong)


def test_default_arguments_give_21_by_21_points():
    space = FunctionalNet(nn.Linear(2, 1).double())
    X = normal(5, 2)
    plane = plane_through(space, normal(3, 3, seed=4))
    surface = loss_plane(plane, X, X[:, :1])
    assert surface.loss.shape == (21, 21) and surface.error is None
    assert torch.equal(
        surface.points, plane_through(space, normal(3, 3, seed=4)).points
    )


def test_a_plane_survives_saving_and_a_change_of_dtype():
    space = net()
    plane = principal_plane(space, normal(5, space.num_params))
    buffer = io.BytesIO()
    torch.save(plane, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(plane), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin.weights(plane.points), plane.weights(plane.points))
    other = principal_plane(space, normal(5, space.num_params, seed=9))
    other.load_state_dict(plane.state_dict())
    assert torch.equal(other.axes, plane.axes)
    assert copy.deepcopy(plane).float().weights(plane.points).dtype == torch.float32


def test_bad_input_is_refused_with_its_reason():
    space = net()
    p = space.num_params
    corners = normal(3, p)
    line = corners[0] + torch.tensor([[0.0], [1.0], [2.0]]) * corners[1]
    for make in (plane_through, principal_plane):
        with pytest.raises(ValueError, match="lie on one line"):
            make(space, line)
        with pytest.raises(ValueError, match="lie on one line"):
            make(space, corners[:1].expand(3, p))
        with pytest.raises(ShapeError, match=f"must be ``s x {p}``"):
            make(space, corners[:, 1:])
        with pytest.raises(InputDataError, match="weights contains NaN"):
            make(space, corners * torch.nan)
    with pytest.raises(ShapeError, match=f"must be 3 x {p}"):
        plane_through(space, normal(4, p))
    with pytest.raises(ShapeError, match="at least three rows"):
        principal_plane(space, corners[:2])
    single = FunctionalNet(nn.Linear(1, 1, bias=False).double())
    with pytest.raises(ValueError, match="lie on one line"):
        principal_plane(single, normal(4, 1))
    plane, X = plane_through(space, corners), normal(6, 2)
    for bad in ({"size": 1}, {"margin": -0.1}, {"margin": torch.nan}):
        with pytest.raises(ValueError, match="size of at least 2 and a margin"):
            loss_plane(plane, X, torch.arange(6) % 3, **bad)
    with pytest.raises(ValueError, match="Pass batches="):
        loss_plane(plane, X, torch.arange(6) % 3)
