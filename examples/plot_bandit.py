"""Does it pay to try arms that a network is unsure of?

The wheel bandit: contexts in a disk, five arms. One arm pays a little more than the
others, but near the rim another one pays fifty times as much, a different one in each
quadrant. Who takes what looks best at the moment may never see those. Thompson sampling
takes the arm that is best under one function drawn from the posterior, another one at
each step, so that arms are tried where they may be good, and no longer than that.
"""

# %% Set up: contexts, what each arm pays, and what is lost by each choice
import argparse
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from botorch.models.deterministic import GenericDeterministicModel
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge.checks import ReliabilityWarning
from gpbridge.plots import COLORS, INK, STYLE
from gpbridge.surrogates import LastLayerSurrogate, LinearizedSurrogate, Recipe
from gpbridge.surrogates.training import train

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
steps, seeds, epochs = (40, 1, 4) if options.smoke else (300, 3, 50)
ARMS, FIRST, BLOCK, DELTA = 5, 60, 20, 0.8
FIRST = min(FIRST, steps // 2)

torch.set_num_threads(1)


def wheel(seed):
    """Contexts ``T x 2``, and ``T x 5`` rewards and their means."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(steps, 2, generator=generator, dtype=torch.float64)
    radius, angle = u[:, 0].sqrt(), 2 * math.pi * u[:, 1]
    contexts = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    means = torch.ones(steps, ARMS, dtype=torch.float64)
    means[:, 0] = 1.2
    quadrant = 1 + 2 * (contexts[:, 0] > 0).long() + (contexts[:, 1] > 0).long()
    rim = radius > DELTA
    means[rim, quadrant[rim]] = 50.0
    noise = torch.randn(means.shape, generator=generator, dtype=torch.float64)
    return contexts, means + 0.01 * noise, means


# %% One network for all: an output per arm, of which the last columns pick one
class ArmNetwork(nn.Module):
    def __init__(self, num_inputs, num_outputs):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(num_inputs - ARMS, 64), nn.ReLU()),
            *(nn.Linear(64, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, ARMS)

    def forward(self, x):
        outputs = self.head(self.body(x[..., :-ARMS]))
        return (outputs * x[..., -ARMS:]).sum(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Greedy(Recipe):
    """The network without uncertainty, trained as the others are."""

    def _fit(self, experiments):
        network, encode = train(self, experiments).network, experiments.input_transform
        model = GenericDeterministicModel(lambda X: network(encode(X)))
        model.draw = lambda s, generator: lambda X: model(X).expand(s, -1, -1)
        return model, [network.state_dict()]


recipes = {
    "greedy": Greedy,
    "Thompson, last layer": LastLayerSurrogate,
    "Thompson, all weights": LinearizedSurrogate,
}


# %% Play: every 20 steps train further, and draw a function for each step
def play(kind, seed):
    contexts, rewards, _ = wheel(seed)
    generator = torch.Generator().manual_seed(seed)
    recipe = kind(
        network=ArmNetwork,
        bounds=torch.tensor([[-1.0, -1.0, 0.0], [1.0, 1.0, ARMS - 1.0]]).double(),
        categories={2: ARMS},
        epochs=epochs,
        update_epochs=epochs // 2,
        seed=seed,
    )
    taken, model = (
        torch.arange(FIRST) % ARMS,
        None,
    )  # in turn, to see the scale of rewards
    while len(taken) < steps:
        t = len(taken)
        X = torch.cat([contexts[:t], taken[:, None].double()], -1)
        Y = rewards[:t].gather(1, taken[:, None])
        model = recipe.fit(X, Y) if model is None else recipe.update(model, X, Y)
        block = contexts[t : t + BLOCK]
        steps_ahead = torch.arange(len(block))
        numbers = torch.arange(ARMS).double().repeat(len(block))
        each = torch.cat([block.repeat_interleave(ARMS, 0), numbers[:, None]], -1)
        with torch.no_grad():  # one function for each step, at all of its arms
            values = model.draw(len(block), generator)(each)
        values = values.reshape(len(block), len(block), ARMS)
        taken = torch.cat([taken, values[steps_ahead, steps_ahead].argmax(-1)])
    return taken


def regret(taken, seed):
    means = wheel(seed)[2]
    lost = means.amax(-1) - means.gather(1, taken[:, None])[:, 0]
    return lost.cumsum(0)


chosen, curves = {}, {}
with warnings.catch_warnings():
    # At first all rewards may be the same, and there are too few to hold some out.
    warnings.simplefilter("ignore", ReliabilityWarning)
    warnings.filterwarnings("ignore", "parameters='last_layer' with a learnt noise")
    for name, kind in recipes.items():
        chosen[name] = [play(kind, seed) for seed in range(seeds)]
        curves[name] = torch.stack([regret(a, s) for s, a in enumerate(chosen[name])])
        lost = ", ".join(f"{r:.0f}" for r in curves[name][:, -1].tolist())
        print(f"{name}: regret after {steps} steps {lost}")
anyhow = torch.Generator().manual_seed(0)
uniform = torch.stack(
    [regret(torch.randint(ARMS, (steps,), generator=anyhow), s) for s in range(seeds)]
)

# %% Draw: the wheel, what was chosen in the second half, what was lost
pyplot.rcParams.update(STYLE)
figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.5), layout="constrained")
arm_colors = ["#c9ced6", *COLORS]
shown = torch.arange(steps) >= steps // 2
contexts, _, means = wheel(0)


def wheel_panel(ax, arms, title):
    for arm, color in enumerate(arm_colors):
        points = contexts[shown & (arms == arm)]
        ax.plot(*points.T, ".", color=color, markersize=5)
    for radius in (DELTA, 1.0):
        circle = pyplot.Circle((0, 0), radius, fill=False, color=INK, linewidth=0.8)
        ax.add_patch(circle)
    ax.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(title, fontweight="bold", fontsize=11)


wheel_panel(axes[0], means.argmax(-1), "Best arm, by color")
wheel_panel(axes[1], chosen["greedy"][0], "Chosen: greedy")
name = "Thompson, all weights"
wheel_panel(axes[2], chosen[name][0], "Chosen: Thompson sampling")
axes[3].plot(uniform.mean(0), ":", color="#9aa1ab", label="uniform")
for color, (name, runs) in zip((INK, *COLORS), curves.items(), strict=False):
    axes[3].plot(runs.mean(0), color=color, linewidth=1.8, label=name)
    if seeds > 1:
        error = runs.std(0) / seeds**0.5
        band = runs.mean(0) - error, runs.mean(0) + error
        axes[3].fill_between(range(steps), *band, color=color, alpha=0.15, linewidth=0)
axes[3].set(xlabel="step", xlim=(0, steps), ylim=(0, None))
axes[3].set_title(f"Cumulative regret, seeds: {seeds}", fontweight="bold", fontsize=11)
axes[3].grid(True)
axes[3].legend(frameon=False, loc="upper left", fontsize=8)

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_bandit.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
