"""What acquisition functions need of posteriors that are sets of functions.

Also how to choose the points of a pool that are worth a label.
"""

from gpbridge.acquisition.bait import select_bait
from gpbridge.acquisition.draws import ThompsonDraw
from gpbridge.acquisition.ensembles import DrawsPosterior, EnumeratingSampler
from gpbridge.acquisition.fisher import fisher_embeddings
from gpbridge.acquisition.gp_draws import draw_functions
from gpbridge.acquisition.label_scores import bald, predictive_variance
from gpbridge.acquisition.planning import Plan, plan_actions, trajectories
from gpbridge.acquisition.ranking import select_top
from gpbridge.acquisition.thompson import ThompsonSample, thompson_sample
from gpbridge.metrics import predictive_entropy

__all__ = [
    "DrawsPosterior",
    "EnumeratingSampler",
    "Plan",
    "ThompsonDraw",
    "ThompsonSample",
    "bald",
    "draw_functions",
    "fisher_embeddings",
    "plan_actions",
    "predictive_entropy",
    "predictive_variance",
    "select_bait",
    "select_top",
    "thompson_sample",
    "trajectories",
]
