"""What trackers take: networks and results of training, of one dtype."""

import copy

import pytest
import torch
from torch import nn

from gpbridge.dnn.fit import fit_map
from gpbridge.dnn.snapshots import Snapshots
from gpbridge.dnn.swag import SWAG


def test_trackers_take_one_dtype_and_networks_and_say_how_many_they_took():
    network = nn.Linear(2, 1).double()
    tracker, snapshots = SWAG(network, rank=3), Snapshots(network, max_snapshots=1)
    for each in (tracker, snapshots):
        for _ in range(2):
            each.update(network)
        with pytest.raises(TypeError, match=r"weight must be torch.float64.*\.to\("):
            each.update(copy.deepcopy(network).float())
        assert "num_snapshots=2" in repr(each)
    assert "rank=3, centering='running'" in repr(tracker)
    assert "num_kept=1" in repr(snapshots)


def test_a_result_of_training_is_its_network():
    X = torch.linspace(-1, 1, 20)[:, None]
    fit = fit_map(nn.Linear(1, 1), X, X, epochs=1, progress=False)
    tracker = SWAG(nn.Linear(1, 1), rank=2)
    tracker.update(fit)
    weights = torch.cat([fit.network.weight.flatten(), fit.network.bias])
    torch.testing.assert_close(tracker.mean, weights.detach())
    assert "num_snapshots=1, rank=2" in repr(tracker)
    with pytest.raises(TypeError, match="a module, a result of fit_map, .*but is list"):
        tracker.update([fit])
