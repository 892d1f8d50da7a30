"""Frames for text-to-video: clips read and written, conditions drawn from them, frames interpolated and measured.

Needs the extra `video`: Pillow at once, imageio-ffmpeg and OpenCV where they are used. diffusers is not needed.
"""

from ..extras import needs_extra

with needs_extra("video", "ailurus_hf.video"):
    from .conditions import CONDITIONS, load_condition
    from .interpolation import FlowInterpolator, NetworkInterpolator
    from .measures import edge_agreement, psnr, ssim, warping_error
    from .reading import Clip, open_clip, read_comment
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
    "read_comment",
    "ssim",
    "warping_error",
    "write_video",
]
