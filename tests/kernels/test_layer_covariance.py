"""What passes between wide layers: variances are recorded once and read in order."""

import pytest
import torch

from gpbridge.kernels.layer_covariance import (
    LayerCovariance,
    RecordedVariances,
    Values,
    Variances,
)
from tests.kernels.orbit_problems import points


def between_images(aligned=False):
    """Covariances of all pairs of pixels, of 3 x 2 pixels with 4 channels."""
    x = points(5, 24).view(5, 4, 3, 2)
    if aligned:
        k = torch.einsum("nchw,ncuv->nhwuv", x, x).unsqueeze(1)
    else:
        k = torch.einsum("ichw,jcuv->ijhwuv", x, x)
    return x, k


def test_variances_recorded_of_single_points_are_those_of_pairs():
    x, k = between_images(aligned=True)
    recorded = Variances()
    state = LayerCovariance(k, None, recorded, 4, True, False)
    own, other = recorded.pair(state)
    assert recorded.recorded[0].shape == (5, 6)
    variance = x.square().sum(1)
    torch.testing.assert_close(own.expand_as(k)[:, 0, :, :, 0, 0], variance)
    torch.testing.assert_close(other.expand_as(k)[:, 0, 0, 0], variance)
    _, pairs = between_images()
    read = RecordedVariances(recorded.recorded, [q[:3] for q in recorded.recorded])
    state = LayerCovariance(pairs[:, :3], None, read, 4, False, False)
    first, second = (q.expand_as(state.k) for q in read.pair(state))
    for i, j in ((0, 2), (4, 1)):
        torch.testing.assert_close(first[i, j, :, :, 2, 1], variance[i])
        torch.testing.assert_close(second[i, j, 2, 1], variance[j])
    with pytest.raises(StopIteration):  # one nonlinearity was recorded
        read.pair(state)


@pytest.mark.parametrize("space", [0, 2, 4])
def test_correlations_of_points_with_themselves_are_one(space):
    x, k = between_images(aligned=True)
    if space < 4:
        k = k.diagonal(dim1=-4, dim2=-2).diagonal(dim1=-3, dim2=-2)
    if space == 0:
        k = k.mean((-2, -1))
    first, second = Variances().pair(
        LayerCovariance(k, None, Variances(), space, True, False)
    )
    correlation = k * first.rsqrt() * second.rsqrt()
    if space == 4:
        correlation = correlation.diagonal(dim1=-4, dim2=-2).diagonal(dim1=-3, dim2=-2)
    torch.testing.assert_close(correlation, torch.ones_like(correlation))


def test_a_linear_map_keeps_k_and_theta_one_where_they_are_one():
    k = points(3, 3)
    calls = []

    def double(values):
        calls.append(values)
        return 2 * values

    state = LayerCovariance(k, k, Variances(), 0, False, True).map(double)
    assert state.theta is state.k and len(calls) == 1
    state = LayerCovariance(k, 3 * k, Variances(), 0, False, True).map(double)
    torch.testing.assert_close(state.theta, 3 * state.k)


def test_values_come_in_the_order_of_layers_and_broadcast():
    k = points(3, 4).expand(2, 3, 4)
    state = LayerCovariance(k, None, Variances(), 0, False, False)
    values = Values(weight=torch.tensor([[1.0, 3.0], [2.0, 4.0]]), bias=None)
    for expected in ([1.0, 2.0], [3.0, 4.0]):
        value = values.take("weight", state)
        assert value.shape == (2, 1, 1) and value.flatten().tolist() == expected
    with pytest.raises(KeyError):
        values.take("bias", state)
