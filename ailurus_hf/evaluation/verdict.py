"""What to think of a measurement, in words: whether the reduction pays, why not, and what to do."""

from __future__ import annotations

# 224² in patches of 16 are 196 tokens: on a CPU every setting of `ailurus-hf benchmark` was slower than plain there.
FEW_TOKENS = 256


def verdict(num_tokens: int, speed_up: float | None = None) -> list[str]:
    """Lines of advice; none where there is nothing to say.

    Args:
        num_tokens: N, 0 where it is not known.
        speed_up: plain time by reduced time; None where plain did not run.
    """
    lines = []
    few = 0 < num_tokens < FEW_TOKENS
    if speed_up is not None and speed_up < 1:
        cause = f"{num_tokens} tokens are too few to pay" if few else "clustering takes longer than the layers save"
        lines.append(f"slower than plain, {speed_up:.2f}x: {cause}")
    elif few:
        lines.append(f"{num_tokens} tokens are few: clustering may take as long as it saves")
    if few:
        lines.append("larger images pay (512² in patches of 16 are 1024 tokens); else leave AiluRus off for this model")
    elif lines:
        lines.append("try a smaller keep ratio, an earlier location, or the clustering pairs; else leave it off")
    return lines
