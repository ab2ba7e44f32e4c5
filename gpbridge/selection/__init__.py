"""Hyperparameters and models chosen by marginal likelihood, and by held-out data."""

from gpbridge.selection.augerino import augerino_penalty
from gpbridge.selection.compare import Comparison, compare
from gpbridge.selection.curvature_gradient import EvidenceGradient, evidence_gradient
from gpbridge.selection.deep_kernel import fit_deep_kernel
from gpbridge.selection.diagnostics import Diagnostics
from gpbridge.selection.elbo import OrbitVariationalELBO
from gpbridge.selection.em import EMStep, SampleBasedEM
from gpbridge.selection.evidence import fit_evidence
from gpbridge.selection.group_dimension import group_dimensions
from gpbridge.selection.held_out import (
    ConditionalEvidence,
    LeaveOneOut,
    conditional_log_evidence,
    held_out_log_density,
    leave_one_out,
)
from gpbridge.selection.held_out_problem import HeldOutProblem
from gpbridge.selection.hypergradient import Hypergradient, hypergradient
from gpbridge.selection.hypergradient_descent import HypergradientDescent, OuterStep
from gpbridge.selection.inner_training import LBFGSTraining
from gpbridge.selection.invariance import learn_invariance
from gpbridge.selection.invariance_fit import InvarianceFit
from gpbridge.selection.invariance_gp import learn_kernel_invariance
from gpbridge.selection.invariance_starts import learn_invariance_from
from gpbridge.selection.invariance_training import InvarianceStep
from gpbridge.selection.iterative_mll import IterativeFit, fit_iterative
from gpbridge.selection.kernel_invariance_fit import (
    InvarianceStart,
    KernelInvarianceFit,
)
from gpbridge.selection.last_layer import LastLayerFit, learn_last_layer_invariance
from gpbridge.selection.loss_curvature import CompositeLoss
from gpbridge.selection.marginal_likelihood import (
    EvidenceParts,
    evidence_parts,
    log_evidence,
)
from gpbridge.selection.mll import LaplaceEvidence
from gpbridge.selection.multi_start import fit_matern_plus_kernel, multi_start
from gpbridge.selection.neumann import NeumannSeries, SeriesDivergedError
from gpbridge.selection.online import OnlineFit, fit_online
from gpbridge.selection.online_training import OnlineStep
from gpbridge.selection.prefix_posteriors import LinearModel
from gpbridge.selection.row_augmentation import RowAugmentation, input_noise
from gpbridge.selection.scan import ScanResult, scan
from gpbridge.selection.sparse_fit import fit_sparse_gp
from gpbridge.selection.speed_bound import SpeedBound, training_speed_bound
from gpbridge.selection.subset_start import SubsetStart
from gpbridge.selection.tangent_blocks import TangentBlocks
from gpbridge.selection.training_speed import TrainingSpeed
from gpbridge.selection.weight_decay import MatchedWeightDecay

__all__ = [
    "Comparison",
    "CompositeLoss",
    "ConditionalEvidence",
    "Diagnostics",
    "EMStep",
    "EvidenceGradient",
    "EvidenceParts",
    "HeldOutProblem",
    "Hypergradient",
    "HypergradientDescent",
    "InvarianceFit",
    "InvarianceStart",
    "InvarianceStep",
    "IterativeFit",
    "KernelInvarianceFit",
    "LBFGSTraining",
    "LaplaceEvidence",
    "LastLayerFit",
    "LeaveOneOut",
    "LinearModel",
    "MatchedWeightDecay",
    "NeumannSeries",
    "OnlineFit",
    "OnlineStep",
    "OrbitVariationalELBO",
    "OuterStep",
    "RowAugmentation",
    "SampleBasedEM",
    "ScanResult",
    "SeriesDivergedError",
    "SpeedBound",
    "SubsetStart",
    "TangentBlocks",
    "TrainingSpeed",
    "augerino_penalty",
    "compare",
    "conditional_log_evidence",
    "evidence_gradient",
    "evidence_parts",
    "fit_deep_kernel",
    "fit_evidence",
    "fit_iterative",
    "fit_matern_plus_kernel",
    "fit_online",
    "fit_sparse_gp",
    "group_dimensions",
    "held_out_log_density",
    "hypergradient",
    "input_noise",
    "learn_invariance",
    "learn_invariance_from",
    "learn_kernel_invariance",
    "learn_last_layer_invariance",
    "leave_one_out",
    "log_evidence",
    "multi_start",
    "scan",
    "training_speed_bound",
]
