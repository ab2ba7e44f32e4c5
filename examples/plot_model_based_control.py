"""Does a planner act better if it knows what its model of a system does not know?

A pendulum hangs from a motor that is too weak to lift it: it has to swing. Its dynamics
are learnt by a network, linearised, from a second of random torques. Then one plans:
which torques of the next two seconds have the largest return, according to the model?
The first of them is applied, and so on. After each episode the model has more data.

With uncertainty, the return of a plan is the mean over functions drawn from the
posterior, each of which is a pendulum that is consistent with the data: a particle
follows one of them all the way. Without, one trusts the posterior's mean.
"""

# %% Set up: a pendulum to swing up, and a second of random torques
import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge.acquisition import plan_actions, trajectories
from gpbridge.plots import COLORS, INK, STYLE
from gpbridge.surrogates import LinearizedSurrogate

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from control_systems import Pendulum, advance

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
steps, horizon, episodes, width, epochs = 50, 20, 3, 24, 300
if options.smoke:
    steps, horizon, episodes, width, epochs = 5, 3, 1, 4, 10

torch.set_num_threads(1)
pendulum, noise = Pendulum(), 0.01
bounds = torch.tensor([[-pendulum.limit], [pendulum.limit]], dtype=torch.float64)


def value(states, torques):
    """The sum of rewards along the way, largest where the pole stands still."""
    return pendulum.reward(states[..., 1:, :]).sum(-1)


def play(choose, steps, generator):
    """One episode from hanging: states as they were and as they are seen, torques."""
    state, states, seen, torques = pendulum.start, [], [], []
    for _ in range(steps):
        states.append(state)
        error = torch.randn(state.shape, generator=generator, dtype=state.dtype)
        seen.append(state + noise * error)
        torques.append(choose(seen[-1]))
        state = advance(pendulum, state, torques[-1])
    return torch.stack(states), torch.stack(seen), torch.stack(torques)


def random_torques(generator):
    def choose(state):
        share = torch.rand(1, generator=generator, dtype=torch.float64)
        return bounds[0] + share * (bounds[1] - bounds[0])

    return choose


# %% The model: from (sine, cosine, speed, torque) to the change of (angle, speed)
def network(num_inputs, num_outputs):
    return nn.Sequential(
        *(nn.Linear(num_inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
        nn.Linear(width, num_outputs),
    )


def fit(played):
    X = [torch.cat([pendulum.encode(s[:-1]), u[:-1]], -1) for _, s, u in played]
    Y = [s[1:] - s[:-1] for _, s, _ in played]
    recipe = LinearizedSurrogate(network=network, epochs=epochs)
    return recipe.fit(torch.cat(X), torch.cat(Y))


def functions(model, uncertain, generator):
    """Five possible pendulums, or the likely one: the mean of very many."""
    if uncertain:
        return model.draw(5, generator)
    draws = model.draw(4096, generator)
    draws.change = draws.change.mean(0, keepdim=True)  # they are linear in it
    return draws


# %% The planner: where one would go by each function, and the best of what was tried
def planner(draws, generator):
    last = None

    def choose(state):
        nonlocal last
        plan = plan_actions(
            draws,
            value,
            state,
            horizon,
            bounds,
            encode=pendulum.encode,
            start=last,
            rounds=2,
            generator=generator,
        )
        last = torch.cat([plan.actions[1:], 0 * plan.actions[-1:]])
        return plan.actions[0]

    return choose


# %% Learn, with and without uncertainty
generator = torch.Generator().manual_seed(0)
first = play(random_torques(generator), 11, generator)
heights = {}
for uncertain in (True, False):
    generator = torch.Generator().manual_seed(1)
    played = [first]
    for _ in range(episodes):
        draws = functions(fit(played), uncertain, generator)
        played.append(play(planner(draws, generator), steps, generator))
    name = "draws" if uncertain else "mean"
    heights[name] = [states[:, 0].cos() for states, _, _ in played[1:]]
    rewards = [pendulum.reward(states).sum().item() for states, _, _ in played[1:]]
    print(f"planning on the {name}: returns", *(f"{total:.1f}" for total in rewards))

# %% Left: what the first model expects of swinging, and what happens
pyplot.rcParams.update(STYLE)
figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
left, middle, right = axes
swing = pendulum.limit * torch.sin(3.4 * pendulum.step * torch.arange(horizon)).double()
swing = swing[None, :, None]
model, time = fit([first]), pendulum.step * torch.arange(horizon + 1)
with torch.no_grad():
    fan, likely = (
        trajectories(draws, pendulum.start, swing, pendulum.encode)[:, 0, :, 0]
        for draws in (model.draw(30, generator), functions(model, False, generator))
    )
state, truth = pendulum.start, [pendulum.start]
for torque in swing[0]:
    state = advance(pendulum, state, torque)
    truth.append(state)
degrees = 180 / torch.pi
left.plot(time, degrees * fan.mT, color=COLORS[0], linewidth=0.8, alpha=0.5)
left.plot([], [], color=COLORS[0], label="30 draws")
left.plot(time, degrees * likely[0], color=COLORS[1], linestyle="--", label="mean")
truth = torch.stack(truth)[:, 0]
left.plot(time, degrees * truth, color=INK, linewidth=2, label="what happens")
left.set(xlabel="time (s)", ylabel="angle from upright (degrees)")
left.set_title(
    "After 1 s of random torques", loc="left", fontweight="bold", fontsize=11
)
left.legend(frameon=False, fontsize=8)

# %% Middle and right: the height of the tip in each episode
for axis, (name, color) in zip(
    (middle, right), {"draws": COLORS[0], "mean": COLORS[1]}.items(), strict=True
):
    for number, height in enumerate(heights[name], 1):
        axis.plot(
            pendulum.step * torch.arange(steps),
            height,
            color=color,
            alpha=number / episodes,
            linewidth=1 + number / episodes,
            label=f"episode {number}",
        )
    axis.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axis.set(xlabel="time (s)", ylabel="height of the tip (m)", ylim=(-1.1, 1.15))
    axis.set_title(
        f"Planning on the {name}", loc="left", fontweight="bold", fontsize=11
    )
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.95))

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_model_based_control.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
