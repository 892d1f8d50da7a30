"""Count-weighted attention's two forms, mask and channel, beside attention without a bias: which is faster where.

    python -m benchmarks.vision.attention_forms                                  # fp32, CPU
    python -m benchmarks.vision.attention_forms --device cuda --dtype bf16

`ailurus_hf.attention.preferred_form` chooses by device and type: "× the other" is the time of the form that it chooses
over that of the other one. "Differs": the largest difference to the plain formula in fp32.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ailurus_hf.attention import biased_attention, preferred_form

from ..harness import DTYPES, environment, interleaved, log, markdown, save

# Images, heads, queries, keys, channels a head.
SHAPES = {
    "ViT-B 512, 256 kept": (1, 12, 257, 257, 64),
    "ViT-B 512, 256 kept, 16 images": (16, 12, 257, 257, 64),
    "ViT-L 640, 400 kept": (1, 16, 401, 401, 64),
    "SD 1.5 512, blocks": (2, 8, 1024, 1024, 40),
    "SD 1.5 512, keys": (2, 8, 4096, 256, 40),
    "SDXL 1024, blocks": (2, 10, 1024, 1024, 64),
    "SD 1.5 1024, blocks": (2, 8, 4096, 4096, 40),
}
COLUMNS = {
    "shape": "shape",
    "plain_ms": "no bias|{:.3f} ms",
    "mask_ms": "mask|{:.3f} ms",
    "channel_ms": "channel|{:.3f} ms",
    "chosen": "chosen",
    "chosen_over_other": "× the other|{:.2f}",
    "differs": "differs|{:.1e}",
}
# So that a call is no shorter than what starting it takes.
CALLS = 10


@torch.no_grad()
def measure(
    name: str, repeats: int, *, device: torch.device | str = "cpu", precision: str = "fp32"
) -> list[dict[str, Any]]:
    """One row: milliseconds of a call in each form."""
    images, heads, queries, keys, channels = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def random(length: int) -> Tensor:
        made = torch.randn(images, heads, length, channels, generator=generator)
        return made.to(device, DTYPES[precision])

    q, k, v = random(queries), random(keys), random(keys)
    bias = torch.randint(1, 9, (images, keys), generator=generator).float().log().to(device)
    calls = {
        "plain": lambda: F.scaled_dot_product_attention(q, k, v),
        **{form: lambda form=form: biased_attention(q, k, v, bias, form=form) for form in ("mask", "channel")},
    }
    scores = q.float() @ k.float().transpose(-1, -2) * channels**-0.5 + bias[:, None, None]
    want = scores.softmax(-1) @ v.float()
    differs = max((calls[form]().float() - want).abs().max().item() for form in ("mask", "channel"))
    turns = {form: lambda _, call=call: [call() for _ in range(CALLS)] for form, call in calls.items()}
    seconds = interleaved(turns, repeats, warmup=2, device=torch.device(device))
    chosen = preferred_form(q)
    other = "mask" if chosen == "channel" else "channel"
    row = {"shape": name, "chosen": chosen, "chosen_over_other": seconds[chosen] / seconds[other], "differs": differs}
    return [{**row, **{f"{form}_ms": 1e3 * taken / CALLS for form, taken in seconds.items()}}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--name", default="attention_forms", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for name in args.shapes:
        rows += measure(name, args.repeats, device=args.device, precision=args.dtype)
        log.info("%s done", name)
    save(args.name, rows, environment(args.device, args.dtype))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
