"""What every benchmark needs: timing rounds, FLOPs and memory, data sets, result files, plots."""

from ailurus_hf.evaluation.timing import interleaved, markdown

from .counting import high_water_mark, launches, model_flops, peak_bytes, peak_on_shapes
from .results import DTYPES, RESULTS, ROOT, SPEED_COLUMNS, device_folder, environment, log, measured_columns, save
from .rounds import methods_in_turn, reductions_in_turn, switched

__all__ = [
    "DTYPES",
    "RESULTS",
    "ROOT",
    "SPEED_COLUMNS",
    "device_folder",
    "environment",
    "high_water_mark",
    "interleaved",
    "launches",
    "log",
    "markdown",
    "measured_columns",
    "methods_in_turn",
    "model_flops",
    "peak_bytes",
    "peak_on_shapes",
    "reductions_in_turn",
    "save",
    "switched",
]
