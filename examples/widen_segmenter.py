"""Make a Segmenter twice as wide that computes the same, to train it on: from a Ti-like model an S-like one.

    python examples/widen_segmenter.py --model run/best --output wide
    python examples/train_segmenter.py --data CAMVID --init wide --output run-wide

Training starts where the narrow model ended (Chen et al. 2016, "Net2Net: Accelerating Learning via Knowledge Transfer",
arXiv 1511.05641). Every channel and every head is there twice, and what reads them takes half of each; a little noise
on the matrices lets the copies part.
"""

import argparse
import copy
import logging
from pathlib import Path

import torch
from transformers import AutoImageProcessor

from ailurus_hf.segmenter import SegmenterForSemanticSegmentation

log = logging.getLogger("widen")
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "pooler_output_size")


@torch.no_grad()
def widened(
    model: SegmenterForSemanticSegmentation, factor: int = 2, noise: float = 0.0
) -> SegmenterForSemanticSegmentation:
    """A model `factor` times as wide with the same outputs.

    noise: standard deviation of what is added to the matrices, as a share of their own; 0: the outputs are equal.
    """
    config = copy.deepcopy(model.config)
    for part in (config.encoder_config, config.decoder_config):
        for name in WIDTHS:
            setattr(part, name, factor * getattr(part, name))
    wide = SegmenterForSemanticSegmentation(config).to(model.dtype)
    for new, old in zip(wide.parameters(), model.parameters(), strict=True):
        times = [many // one for many, one in zip(new.shape, old.shape, strict=True)]
        value = old.repeat(times)
        if value.ndim == 2:
            # The last dimension of a matrix reads channels; of all else it holds them.
            value = value / times[1]
            value = value + noise * value.std() * torch.randn_like(value)
        new.copy_(value)
    return wide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Segmenter folder")
    parser.add_argument("--output", required=True, help="folder of the wide model")
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--noise", type=float, default=0.02, help="on the matrices, as a share of their spread")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    narrow = SegmenterForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32)
    wide = widened(narrow, args.factor, args.noise)
    wide.save_pretrained(Path(args.output))
    AutoImageProcessor.from_pretrained(args.model).save_pretrained(args.output)
    log.info("%.1f to %.1f M parameters", narrow.num_parameters() / 1e6, wide.num_parameters() / 1e6)


if __name__ == "__main__":
    main()
