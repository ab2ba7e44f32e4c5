"""Can prior scales be learnt by mean-field variational inference? By the evidence?

The evidence lower bound of independent normals over weights pays for every weight that
moves away from its prior. In a network with thousands of weights and few data, prior
scales and noise that are learnt with this bound raise it by giving the signal up: the
scales shrink and the noise takes the standard deviation of the targets.

The evidence of the linearised network, on the same data, keeps the noise where it is,
with one prior variance as with one per layer. Several groups prune here too, the middle
layer first, in one seed to nothing. The tangent model of the other layers holds the
fit, but this is why one prior variance is the default.

What is learnt: a scale for each tensor of weights, the standard deviation of biases and
that of weights times the root of their number of inputs; and the noise.
"""

# %% Set up: 40 points of a sine with little noise
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from gpytorch.likelihoods import GaussianLikelihood
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.dnn import MeanFieldVI, fit_map
from gpbridge.metrics import gaussian_nll
from gpbridge.plots import COLORS, INK, STYLE, plot_posterior_band
from gpbridge.selection import fit_evidence

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
width, num_steps, num_seeds = (10, 40, 1) if options.smoke else (100, 1500, 3)
epochs = 50 if options.smoke else 1000
n, noise_std = 40, 0.1

torch.set_num_threads(1)


def truth(x):
    return torch.sin(2 * x)


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    X = 4 * torch.rand(n, 1, generator=generator) - 2
    return X, truth(X) + noise_std * torch.randn(n, 1, generator=generator)


def build(seed):
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(1, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 1),
        )


x = torch.linspace(-2, 2, 201)[:, None]


def report(name, seed, noise, mean, variance):
    """Noise and test score: mean NLL of fresh observations, in closed form."""
    nll = gaussian_nll(mean, variance, truth(x))
    nll = nll + 0.5 * (noise_std**2 / variance).mean()
    error = (mean - truth(x)).square().mean().sqrt()
    print(
        f"seed {seed}, {name}: noise {noise:.3f}, RMSE of the mean {error:.3f}, test "
        f"NLL {nll:+.3f}"
    )


def ends(bounds):
    """The bound averaged over the first and the last fifty steps."""
    first, *_, last = torch.tensor(bounds).split(min(50, num_steps // 2))
    return f"bound {first.mean():.0f} to {last.mean():.1f} nats"


# %% Mean-field VI: weights, prior scales and noise by the same bound


def fit_vi(network, X, Y, seed, learn_scales, noise=0.8):
    """Fit, and record the bound in total nats and the noise after every step."""
    likelihood = GaussianLikelihood()
    likelihood.noise = noise**2
    vi = MeanFieldVI(network, likelihood, n, initial_std=0.018)
    params = list(network.parameters())
    sizes = [p.numel() for p in params]
    per_tensor = torch.arange(len(params)).repeat_interleave(torch.tensor(sizes))
    inputs = [p[0].numel() if p.dim() > 1 else 1 for p in params]
    unit_std = torch.tensor(inputs).rsqrt()
    log_scale = torch.zeros(len(params), requires_grad=learn_scales)
    hyperparameters = [*vi.likelihood.parameters(), *[log_scale] * learn_scales]
    optimizer = torch.optim.Adam(
        [
            {"params": [vi.mean, vi.rho], "lr": 0.005},
            {"params": hyperparameters, "lr": 0.01},
        ]
    )
    generator = torch.Generator().manual_seed(seed)
    bounds, noises = [], []
    for _ in range(num_steps):
        # The prior is part of the bound: its gradient goes through these variances.
        vi.prior_variance = (log_scale.exp() * unit_std).square()[per_tensor]
        optimizer.zero_grad()
        loss = vi.loss(X, Y, generator)
        loss.backward()
        optimizer.step()
        bounds.append(-n * loss.item())
        noises.append(vi.likelihood.noise.item() ** 0.5)
    with torch.no_grad():
        draws = vi.draw(100, generator)(x)
    moments = draws.mean(0), draws.var(0)
    return moments, bounds, noises, log_scale.detach().exp()


print("standard deviation of the targets:", f"{data(0)[1].std():.3f}")
found = {}
for seed in range(num_seeds):
    X, Y = data(seed)
    runs = {"VI, scales fixed": False, "VI, scales learnt": True}
    for name, learn_scales in runs.items():
        result = fit_vi(build(seed), X, Y, seed, learn_scales)
        (mean, variance), bounds, noises, scales = result
        found[name, seed] = result
        report(name, seed, noises[-1], mean, variance + noises[-1] ** 2)
        print(
            f"    {ends(bounds)}; scales of W1, b1, W2, b2, W3, b3:",
            ", ".join(f"{s:.2g}" for s in scales.tolist()),
        )

# %% The evidence of the linearised network, trained on the same data
groupings = {"one prior variance": "all", "one per layer": "layer"}
for seed in range(num_seeds):
    X, Y = (part.double() for part in data(seed))
    fit = fit_map(build(seed).double(), X, Y, epochs=epochs, progress=False)
    for name, groups in groupings.items():
        model = LinearizedGP.from_fit(fit, X, Y, groups=groups, select=None)
        value = fit_evidence(model, warn=False).value
        with torch.no_grad():
            noise = model.noise_variance.item()
            predicted = model.predict(x.double())
            std = model.prior_variance.sqrt().expand(3)
        moments = predicted.mean.float(), predicted.variance.float() - noise
        inputs = torch.tensor([1.0, width, width]).sqrt()
        scales = torch.stack([std * inputs, std], -1).flatten()
        found[name, seed] = moments, value, noise**0.5, scales
        report(f"evidence, {name}", seed, noise**0.5, moments[0], moments[1] + noise)
        print(
            f"    evidence {value:.1f} nats; scales:",
            ", ".join(f"{s:.2g}" for s in scales.tolist()),
        )

# %% From the trained weights and little noise, the bound gives the signal up as well
network = fit_map(build(0), *data(0), epochs=epochs, progress=False).network
_, bounds, noises, _ = fit_vi(network, *data(0), 0, True, noise_std)
print(f"VI from trained weights: noise {noises[-1]:.3f}, {ends(bounds)}")

# %% Save
pyplot.rcParams.update(STYLE)
figure, (left, middle, right) = pyplot.subplots(
    1, 3, figsize=(13, 4), layout="constrained"
)
X, Y = data(0)
left.plot(X, Y, ".", color=INK, markersize=5, label="data", zorder=5)
bands = {"VI, scales learnt": COLORS[1], "one prior variance": COLORS[0]}
for name, color in bands.items():
    (mean, variance), *_, scales = found[name, 0]
    noise = found[name, 0][2]
    noise = noise[-1] if isinstance(noise, list) else noise
    label = name if name.startswith("VI") else f"evidence, {name}"
    plot_posterior_band(
        left, x, mean, (variance + noise**2).sqrt(), color=color, label=label
    )
for name, color in {
    "VI, scales fixed": COLORS[3],
    "VI, scales learnt": COLORS[1],
}.items():
    for seed in range(num_seeds):
        noises = found[name, seed][2]
        label = name if seed == 0 else None
        middle.plot(noises, color=color, linewidth=1.4, label=label)
for seed in range(num_seeds):
    label = "evidence, one prior variance" if seed == 0 else None
    noise = found["one prior variance", seed][2]
    middle.axhline(noise, color=COLORS[0], linewidth=1.4, label=label)
middle.axhline(noise_std, color=INK, linewidth=1.2, linestyle=":", label="true noise")
styles = {
    "VI, scales learnt": ("o", COLORS[1], ""),
    "one prior variance": ("s", COLORS[0], "evidence, "),
    "one per layer": ("^", COLORS[2], "evidence, "),
}
for shift, (name, (marker, color, prefix)) in enumerate(styles.items()):
    for seed in range(num_seeds):
        scales = found[name, seed][3].clamp_min(5e-5)
        at = torch.arange(len(scales)) + 0.22 * (shift - 1)
        label = prefix + name if seed == 0 else None
        right.plot(at, scales, marker, color=color, markersize=5, label=label)
right.axhline(1, color=COLORS[3], linewidth=1.2, label="VI, scales fixed")

left.set(xlim=(-2, 2), ylim=(-2.4, 2.9), xlabel="x", ylabel="y")
middle.set(xlabel="step of VI", ylabel="noise, standard deviation", ylim=(0, 1.35))
right.set(yscale="log", ylabel="prior scale", ylim=(3e-5, 2e3))
right.set_xticks(range(6), ["W1", "b1", "W2", "b2", "W3", "b3"])
titles = "Mean and two standard deviations of y", "Learnt noise", "Learnt prior scales"
for ax, title in zip((left, middle, right), titles, strict=True):
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
    ax.grid(True)
    handles, labels = ax.get_legend_handles_labels()
    kept = [k for k, label in enumerate(labels) if "interval" not in label]
    ax.legend(
        [handles[k] for k in kept],
        [labels[k] for k in kept],
        frameon=False,
        fontsize=8,
        loc="upper right",
    )
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_vi_collapse.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
