"""Makes a video of a prompt that moves as a clip does, with AiluRus: ControlVideo on the edges of the clip's frames.

python examples/controlvideo.py clip.mp4 "a red panda walking through snow" --output panda.mp4
"""

import argparse
from typing import get_args

import torch
from diffusers import ControlNetModel, DDIMScheduler
from PIL import ImageOps

from ailurus_hf import AiluRusDiffusionConfig, ailurus_status, apply_ailurus
from ailurus_hf.pipelines import ControlVideoPipeline
from ailurus_hf.presets import DiffusionPreset
from ailurus_hf.video import load_condition, open_clip, write_video

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("video", help="video file, GIF, or folder of pictures")
parser.add_argument("prompt")
parser.add_argument("--output", default="controlvideo.mp4", help=".mp4, .mov, .gif, or a new folder for PNGs")
parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--controlnet", default="lllyasviel/sd-controlnet-canny")
parser.add_argument("--frames", type=int, default=15)
parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("WIDTH", "HEIGHT"))
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--preset", default="balanced", choices=get_args(DiffusionPreset), help="of AiluRus (%(default)s)")
args = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.float16 if device.type == "cuda" else torch.float32
controlnet = ControlNetModel.from_pretrained(args.controlnet)
pipe = ControlVideoPipeline.from_pretrained(args.model, controlnet=controlnet).to(device, dtype)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
apply_ailurus(pipe, AiluRusDiffusionConfig.preset(args.preset))

clip = open_clip(args.video, max_frames=args.frames, min_frames=2)
draw_edges = load_condition("canny")
edges = [draw_edges(ImageOps.fit(frame, args.size)) for frame in clip]
frames = pipe(
    args.prompt,
    edges,
    num_inference_steps=args.steps,
    generator=torch.Generator().manual_seed(0),
    smooth_steps=(args.steps * 3 // 5, args.steps * 3 // 5 + 1),  # as the paper: 30 and 31 of 50
).frames
write_video(args.output, frames, clip.fps or 8)
print(ailurus_status(pipe))
print(f"{args.output}: {len(frames)} frames")
