"""Numbers about models and reductions: FLOPs, similarity, assignments. Latency is in `analysis.latency`: it needs models."""

from ..vision.flops import layer_flops, layers_flops
from .assignments import AssignmentStatistics, assignment_statistics
from .flops import counted_flops
from .similarity import PairPreservation, pair_preservation, reconstruction_similarity

__all__ = [
    "AssignmentStatistics",
    "PairPreservation",
    "assignment_statistics",
    "counted_flops",
    "layer_flops",
    "layers_flops",
    "pair_preservation",
    "reconstruction_similarity",
]
