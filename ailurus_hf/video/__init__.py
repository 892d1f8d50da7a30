"""Frames for text-to-video: clips read and written, conditions drawn from them, frames interpolated and measured.

Needs the extra `video` (imageio-ffmpeg and OpenCV), loaded when first used; diffusers is not needed.
"""

from .conditions import CONDITIONS, load_condition
from .interpolation import FlowInterpolator, NetworkInterpolator
from .measures import edge_agreement, psnr, ssim, warping_error
from .reading import Clip, open_clip
from .writing import check_output, write_video

__all__ = [
    "CONDITIONS",
    "Clip",
    "FlowInterpolator",
    "NetworkInterpolator",
    "check_output",
    "edge_agreement",
    "load_condition",
    "open_clip",
    "psnr",
    "ssim",
    "warping_error",
    "write_video",
]
