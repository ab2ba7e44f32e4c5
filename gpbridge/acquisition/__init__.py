"""What decisions need of posteriors that are sets of functions."""

from gpbridge.acquisition.draws import ThompsonDraw
from gpbridge.acquisition.ensembles import DrawsPosterior, EnumeratingSampler
from gpbridge.acquisition.gp_draws import draw_functions
from gpbridge.acquisition.planning import Plan, plan_actions, trajectories
from gpbridge.acquisition.thompson import ThompsonSample, thompson_sample

__all__ = [
    "DrawsPosterior",
    "EnumeratingSampler",
    "Plan",
    "ThompsonDraw",
    "ThompsonSample",
    "draw_functions",
    "plan_actions",
    "thompson_sample",
    "trajectories",
]
