"""A pendulum and a cart-pole, to be swung up by an actuator that is too weak to lift.

Both poles are uniform rods; angles count from upright. Equations of motion by Lagrange,
integrated by the classical Runge-Kutta rule with the action held over a control step.
In: states and actions of any batch. Out: the next states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pendulum:
    """State (angle, angular velocity), one torque.

    Mass 1 kg, length 1 m, gravity 10 m/s2 and torque at most 2 N m as in Gymnasium's
    Pendulum-v1, there at 20 Hz and with limited speed. The torque holds the rod up to
    24 degrees from hanging, so that it has to swing.
    """

    mass: float = 1.0  # kg
    length: float = 1.0  # m
    gravity: float = 10.0  # m/s2
    friction: float = 0.0  # N m s
    limit: float = 2.0  # N m
    step: float = 0.1  # s, of control
    substeps: int = 2
    episode: int = 50  # control steps
    horizon: int = 20  # of planning

    name = "pendulum"
    num_states, angle = 2, 0

    @property
    def start(self) -> Tensor:
        return torch.tensor([math.pi, 0.0], dtype=torch.float64)

    def derivative(self, state: Tensor, action: Tensor) -> Tensor:
        angle, speed = state.unbind(-1)
        inertia = self.mass * self.length**2 / 3
        weight = self.mass * self.gravity * self.length / 2
        torque = action[..., 0] - self.friction * speed + weight * angle.sin()
        return torch.stack([speed, torque / inertia], -1)

    def energy(self, state: Tensor) -> Tensor:
        angle, speed = state.unbind(-1)
        moving = self.mass * self.length**2 * speed.square() / 6
        return moving + self.mass * self.gravity * self.length / 2 * angle.cos()

    def encode(self, state: Tensor) -> Tensor:
        angle, speed = state.unbind(-1)
        return torch.stack([angle.sin(), angle.cos(), speed], -1)

    def reward(self, state: Tensor) -> Tensor:
        """One at rest and upright, zero where the pole hangs or races."""
        angle, speed = state.unbind(-1)
        height = (1 + angle.cos()) / 2
        return height * torch.exp(-0.02 * speed.square())


@dataclass(frozen=True)
class CartPole:
    """State (position, velocity, angle, angular velocity), one force on the cart.

    Cart and pole 0.5 kg each, pole 0.6 m, friction of the cart 0.1 N s/m, gravity 9.82
    m/s2, force at most 10 N, control at 10 Hz: the constants of Deisenroth, Fox,
    Rasmussen, Gaussian processes for data-efficient learning in robotics and control,
    TPAMI 2015, section 6.
    """

    cart: float = 0.5  # kg
    mass: float = 0.5  # kg
    length: float = 0.6  # m
    gravity: float = 9.82  # m/s2
    friction: float = 0.1  # N s/m
    limit: float = 10.0  # N
    step: float = 0.1  # s
    substeps: int = 4
    episode: int = 40
    horizon: int = 12

    name = "cart-pole"
    num_states, angle = 4, 2

    @property
    def start(self) -> Tensor:
        return torch.tensor([0.0, 0.0, math.pi, 0.0], dtype=torch.float64)

    def derivative(self, state: Tensor, action: Tensor) -> Tensor:
        _, velocity, angle, speed = state.unbind(-1)
        sin, cos = angle.sin(), angle.cos()
        force = action[..., 0] - self.friction * velocity
        swing = self.mass * self.length * speed.square() * sin / 2
        falling = 0.75 * self.mass * self.gravity * sin * cos
        inertia = self.cart + self.mass - 0.75 * self.mass * cos.square()
        push = (force + swing - falling) / inertia
        turn = 1.5 / self.length * (self.gravity * sin - cos * push)
        return torch.stack([velocity, push, speed, turn], -1)

    def energy(self, state: Tensor) -> Tensor:
        _, velocity, angle, speed = state.unbind(-1)
        cart = (self.cart + self.mass) * velocity.square() / 2
        both = self.mass * self.length * velocity * speed * angle.cos() / 2
        pole = self.mass * self.length**2 * speed.square() / 6
        height = self.mass * self.gravity * self.length / 2 * angle.cos()
        return cart + both + pole + height

    def encode(self, state: Tensor) -> Tensor:
        position, velocity, angle, speed = state.unbind(-1)
        return torch.stack([position, velocity, angle.sin(), angle.cos(), speed], -1)

    def reward(self, state: Tensor) -> Tensor:
        """One where the tip is a pole's length above the middle of the track."""
        position, _, angle, _ = state.unbind(-1)
        across = position + self.length * angle.sin()
        below = self.length * (1 - angle.cos())
        return torch.exp(-(across.square() + below.square()) / self.length**2 / 2)


System = Pendulum | CartPole
SYSTEMS = {system.name: system for system in (Pendulum(), CartPole())}


def advance(system: System, state: Tensor, action: Tensor) -> Tensor:
    """States after one control step, ``... x d``, by the classical Runge-Kutta rule."""
    h = system.step / system.substeps
    for _ in range(system.substeps):
        first = system.derivative(state, action)
        second = system.derivative(state + h / 2 * first, action)
        third = system.derivative(state + h / 2 * second, action)
        last = system.derivative(state + h * third, action)
        state = state + h / 6 * (first + 2 * second + 2 * third + last)
    return state


class TrueDynamics:
    """The system itself as one function of (state, action), for a planner."""

    num_samples = 1

    def __init__(self, system: System) -> None:
        self.system = system

    def each(self, X: Tensor) -> Tensor:
        state, action = X.tensor_split([self.system.num_states], dim=-1)
        return advance(self.system, state, action) - state

    def __call__(self, X: Tensor) -> Tensor:
        return self.each(X[None])
