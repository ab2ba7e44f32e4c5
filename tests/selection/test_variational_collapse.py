"""Prior scales learnt by mean-field VI give the signal up; by the evidence they do not.

The experiment of ``examples/plot_vi_collapse.py`` with fewer steps: 40 points of a sine
with noise 0.1, a network of two hidden layers of 100.
"""

import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.dnn import MeanFieldVI, fit_map
from gpbridge.selection import fit_evidence

N, WIDTH = 40, 100


def data():
    generator = torch.Generator().manual_seed(0)
    X = 4 * torch.rand(N, 1, generator=generator) - 2
    return X, torch.sin(2 * X) + 0.1 * torch.randn(N, 1, generator=generator)


def network():
    layers = [nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers:
            fan_in = layer.in_features
            for p in layer.parameters():
                p.copy_(2 * torch.rand(p.shape, generator=generator) - 1)
                p.mul_(fan_in**-0.5)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


@pytest.mark.slow
def test_the_bound_rises_while_the_signal_becomes_noise():
    X, Y = data()
    net = network()
    vi = MeanFieldVI(net, GaussianLikelihood(), N, initial_std=0.018)
    params = list(net.parameters())
    sizes = torch.tensor([p.numel() for p in params])
    owner = torch.arange(len(params)).repeat_interleave(sizes)
    inputs = torch.tensor([p[0].numel() if p.dim() > 1 else 1 for p in params])
    log_scale = torch.zeros(len(params), requires_grad=True)
    slow, fast = [vi.mean, vi.rho], [log_scale, *vi.likelihood.parameters()]
    optimizer = torch.optim.Adam(
        [{"params": slow, "lr": 0.005}, {"params": fast, "lr": 0.01}]
    )
    generator = torch.Generator().manual_seed(0)
    bounds = []
    for _ in range(600):
        vi.prior_variance = (log_scale.exp() * inputs.rsqrt()).square()[owner]
        optimizer.zero_grad()
        loss = vi.loss(X, Y, generator)
        loss.backward()
        optimizer.step()
        bounds.append(-N * loss.item())
    quarters = torch.tensor(bounds).reshape(4, -1).mean(1)
    assert bool((quarters.diff() > 0).all())
    assert vi.likelihood.noise.item() ** 0.5 > 0.5
    assert bool((log_scale < 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["all", "layer"])
def test_the_evidence_on_the_same_data_keeps_the_noise(groups):
    X, Y = (part.double() for part in data())
    fit = fit_map(network().double(), X, Y, epochs=1000, progress=False)
    model = LinearizedGP.from_fit(fit, X, Y, groups=groups, select=None)
    fit_evidence(model, warn=False)
    assert 0.05 < float(model.noise_variance.detach()) ** 0.5 < 0.2
