"""What acquisition functions need of posteriors that are sets of functions."""

from gpbridge.acquisition.draws import ThompsonDraw
from gpbridge.acquisition.ensembles import DrawsPosterior, EnumeratingSampler

__all__ = ["DrawsPosterior", "EnumeratingSampler", "ThompsonDraw"]
