"""Numbers about models and reductions.

timing: contenders in turn. benchmark: speed and fidelity of settings. comparison: plain beside reduced, with mIoU.
latency: time by part. similarity, assignments: what clustering keeps. flops: of whole models. loading, folders,
writing, image_size: models and images in, results out.
"""

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
