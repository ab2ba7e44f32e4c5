"""When does a deep kernel help, and what does noise from validation repair?

A deep kernel measures distance between features of a network, and the marginal
likelihood trains the features. It helps where one lengthscale cannot serve everywhere,
as at a jump. It hurts where data are few and noisy: features that pull the training
targets apart explain the noise away. Held-out rows notice both.
"""

# %% Set up
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge.kernels import DeepKernel
from gpbridge.kernels.deep import parameter_groups
from gpbridge.metrics import gaussian_nll, interval_coverage
from gpbridge.plots import COLORS, INK, plot_posterior_band
from gpbridge.selection import fit_deep_kernel

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
epochs = 20 if options.smoke else 1000

torch.set_num_threads(1)
torch.manual_seed(0)  # initial weights are torch's, which have no generator
generator = torch.Generator().manual_seed(0)
x = torch.linspace(-1, 1, 401, dtype=torch.float64)[:, None]


def features():
    """An untrained network from one input to 20 features."""
    return nn.Sequential(
        nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 20)
    ).double()


def noisy(function, n, noise_std):
    """Data, and new data of the same kind to score on."""
    X = 2 * torch.rand(n, 1, generator=generator, dtype=x.dtype) - 1
    values = [function(X), function(x)]
    return X, *(
        v + noise_std * torch.randn(v.shape, generator=generator, dtype=x.dtype)
        for v in values
    )


# %% A panel: the posterior of f, and what the predictive distribution of y scores
pyplot.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK})
figure, axes = pyplot.subplots(
    2, 2, figsize=(9.6, 6.8), sharex=True, sharey="row", layout="constrained"
)


def panel(ax, title, model, truth, X, Y, test_Y, color):
    with torch.no_grad():
        f, y = model.posterior(x), model.posterior(x, observation_noise=True)
        noise_std = (y.variance - f.variance).mean().sqrt()
        nll = gaussian_nll(y.mean, y.variance, test_Y)
        covered = interval_coverage(y.mean, y.variance, test_Y)
        plot_posterior_band(ax, x, f.mean, f.variance.sqrt(), color=color)
    score = (
        f"noise std {noise_std:.2f}, NLL {nll:.2f}, 95% intervals cover {covered:.0%}"
    )
    print(f"{title}: {score}")
    ax.get_legend().remove()
    ax.plot(x, truth(x), color=INK, linewidth=1.2, linestyle=":", label="truth")
    ax.scatter(X, Y, s=9, color=INK, linewidth=0, zorder=3, label="data")
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11, pad=20)
    ax.text(0, 1.03, score, transform=ax.transAxes)
    ax.set(xlim=(-1, 1), xticks=(-0.8, -0.4, 0, 0.4, 0.8))


# %% Above: a jump between smooth pieces, noise std 0.1. The features learn the jump
def jump(x):
    return torch.where(x < 0, -1.0, 1.0) + 0.3 * torch.sin(6 * x)


data = noisy(jump, 100, 0.1)
plain = SingleTaskGP(*data[:2], input_transform=Normalize(1))
fit_gpytorch_mll(ExactMarginalLogLikelihood(plain.likelihood, plain))
panel(axes[0, 0], "A jump: SingleTaskGP", plain, jump, *data, COLORS[2])

deep = fit_deep_kernel(features(), *data[:2], max_epochs=epochs, generator=generator)
panel(axes[0, 1], "A jump: deep kernel", deep, jump, *data, COLORS[0])
print(f"features adopted after {deep.deep_kernel_fit.epoch} epochs")


# %% Below: few data, noise std 0.5. First weights and noise by evidence alone
def wave(x):
    return torch.sin(3 * x)


data = X, Y, _ = noisy(wave, 60, 0.5)
kernel = DeepKernel(features(), ScaleKernel(MaternKernel(2.5)), train_X=X)
eager = SingleTaskGP(X, Y, covar_module=kernel)
mll = ExactMarginalLogLikelihood(eager.likelihood, eager)
optimizer = torch.optim.Adam(parameter_groups(eager, 3e-3, 1e-2))
mll.train()
for _ in range(epochs):
    optimizer.zero_grad()
    loss = -mll(eager(*eager.train_inputs), eager.train_targets)
    loss.backward()
    optimizer.step()
panel(axes[1, 0], "Noisy: evidence alone", eager, wave, *data, COLORS[1])

# %% Then with held-out rows, which stop the training and set the noise
deep = fit_deep_kernel(features(), X, Y, max_epochs=epochs, generator=generator)
panel(axes[1, 1], "Noisy: held-out rows decide", deep, wave, *data, COLORS[0])
print(f"features adopted after {deep.deep_kernel_fit.epoch} epochs")

# %% Save
for ax in axes[1]:
    ax.set_xlabel("x")
handles, labels = axes[0, 1].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_deep_kernel.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
