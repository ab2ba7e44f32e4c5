"""Hyperparameters and models chosen by marginal likelihood, and by held-out data."""

from gpbridge.selection.compare import Comparison, compare
from gpbridge.selection.curvature_gradient import EvidenceGradient, evidence_gradient
from gpbridge.selection.deep_kernel import fit_deep_kernel
from gpbridge.selection.diagnostics import Diagnostics
from gpbridge.selection.em import EMStep, SampleBasedEM
from gpbridge.selection.evidence import fit_evidence
from gpbridge.selection.held_out import (
    ConditionalEvidence,
    LeaveOneOut,
    conditional_log_evidence,
    held_out_log_density,
    leave_one_out,
)
from gpbridge.selection.iterative_mll import IterativeFit, fit_iterative
from gpbridge.selection.marginal_likelihood import (
    EvidenceParts,
    evidence_parts,
    log_evidence,
)
from gpbridge.selection.mll import LaplaceEvidence
from gpbridge.selection.multi_start import fit_matern_plus_kernel, multi_start
from gpbridge.selection.scan import ScanResult, scan
from gpbridge.selection.subset_start import SubsetStart
from gpbridge.selection.weight_decay import MatchedWeightDecay

__all__ = [
    "Comparison",
    "ConditionalEvidence",
    "Diagnostics",
    "EMStep",
    "EvidenceGradient",
    "EvidenceParts",
    "IterativeFit",
    "LaplaceEvidence",
    "LeaveOneOut",
    "MatchedWeightDecay",
    "SampleBasedEM",
    "ScanResult",
    "SubsetStart",
    "compare",
    "conditional_log_evidence",
    "evidence_gradient",
    "evidence_parts",
    "fit_deep_kernel",
    "fit_evidence",
    "fit_iterative",
    "fit_matern_plus_kernel",
    "held_out_log_density",
    "leave_one_out",
    "log_evidence",
    "multi_start",
    "scan",
]
