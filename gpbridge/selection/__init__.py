"""Hyperparameters and models chosen by marginal likelihood, and by held-out data."""

from gpbridge.selection.evidence import fit_evidence, log_evidence
from gpbridge.selection.mll import LaplaceEvidence
from gpbridge.selection.weight_decay import MatchedWeightDecay

__all__ = ["LaplaceEvidence", "MatchedWeightDecay", "fit_evidence", "log_evidence"]
