"""What decisions need of posteriors that are sets of functions."""

from gpbridge.acquisition.draws import ThompsonDraw
from gpbridge.acquisition.ensembles import DrawsPosterior, EnumeratingSampler
from gpbridge.acquisition.planning import Plan, plan_actions, trajectories

__all__ = [
    "DrawsPosterior",
    "EnumeratingSampler",
    "Plan",
    "ThompsonDraw",
    "plan_actions",
    "trajectories",
]
