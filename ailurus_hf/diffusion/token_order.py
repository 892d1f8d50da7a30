"""Where the image's tokens stand in the sequence that attention sees: alone, before the text's, or after them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..clusters import TokenClusters


@dataclass(frozen=True)
class TokenOrder:
    """The order of image and text tokens in a network's attention.

    Args:
        text_first: whether text tokens stand before the image's. With no text tokens it makes no difference.

    Example:
        >>> text, image = torch.zeros(1, 2, 4), torch.ones(1, 3, 4)
        >>> TEXT_FIRST.join(text, image)[0, :, 0]
        tensor([0., 0., 1., 1., 1.])
    """

    text_first: bool = False

    def split(self, tokens: Tensor, num_image_tokens: int) -> tuple[Tensor, Tensor]:
        """Text and image of Tensor[B, T + N, ...]."""
        if self.text_first:
            num_text_tokens = tokens.shape[1] - num_image_tokens
            return tokens[:, :num_text_tokens], tokens[:, num_text_tokens:]
        return tokens[:, num_image_tokens:], tokens[:, :num_image_tokens]

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """Tensor[B, T, ...] and Tensor[B, N, ...] as one sequence."""
        return torch.cat([text, image] if self.text_first else [image, text], 1)

    def key_bias(self, clusters: TokenClusters, num_text_tokens: int) -> Tensor:
        """Log counts of the image's representatives and zeros for the text, Tensor[B, T + M]."""
        if self.text_first:
            return clusters.log_counts(prefix=num_text_tokens)
        return clusters.log_counts(suffix=num_text_tokens)


IMAGE_ONLY = IMAGE_FIRST = TokenOrder()
TEXT_FIRST = TokenOrder(text_first=True)
