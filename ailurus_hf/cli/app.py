"""`ailurus-hf app`: a page in the browser where an image or a clip goes through a model, plain beside reduced."""

from __future__ import annotations

import argparse

from .arguments import add_device

EXAMPLES = """
  ailurus-hf app
  ailurus-hf app --model depth-anything/Depth-Anything-V2-Small-hf --port 8080
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="model folder or Hub name (default: the Segmenter of a checkout's examples)")
    parser.add_argument(
        "--task",
        choices=("segment", "classify", "depth", "detect"),
        help="what the model has to be for (default: what its architecture is for)",
    )
    add_device(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: for other machines, too")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--share", action="store_true", help="a public address through Gradio's servers (default: none)"
    )


def run(args: argparse.Namespace) -> int:
    from ..extras import require

    require("gradio", "app")  # before the libraries that the model needs
    from ..app import launch

    launch(
        args.model,
        task=args.task,
        device=args.device,
        dtype=args.dtype,
        host=args.host,
        port=args.port,
        share=args.share,
        ready=lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True),
    )
    return 0
