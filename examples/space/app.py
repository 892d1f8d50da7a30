"""The page of `ailurus-hf app` as a Hugging Face Space; its variable MODEL names another model."""

import os
from pathlib import Path

from ailurus_hf.app import launch

MODEL = os.environ.get("MODEL", "depth-anything/Depth-Anything-V2-Small-hf")
EXAMPLE = Path(__file__).with_name("example.jpg")

launch(MODEL, host="0.0.0.0", port=7860, example=EXAMPLE if EXAMPLE.is_file() else None)
