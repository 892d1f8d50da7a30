"""Where the image's tokens stand in the sequence that attention sees: alone, before the text's, after or among them."""

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
        references: with text_first, how many tokens of reference images stand after the image's. They are no tokens of
            the image here, and go with the text's.

    Example:
        >>> text, image = torch.zeros(1, 2, 4), torch.ones(1, 3, 4)
        >>> TEXT_FIRST.join(text, image)[0, :, 0]
        tensor([0., 0., 1., 1., 1.])
    """

    text_first: bool = False
    references: int = 0

    def split(self, tokens: Tensor, num_image_tokens: int) -> tuple[Tensor, Tensor]:
        """Text and image of Tensor[B, T + N, ...]."""
        if self.references:
            # Counted from the end: where the text is apart, nothing stands before the image.
            end = tokens.shape[1] - self.references
            image = tokens[:, end - num_image_tokens : end]
            return torch.cat([tokens[:, : end - num_image_tokens], tokens[:, end:]], 1), image
        if self.text_first:
            num_text_tokens = tokens.shape[1] - num_image_tokens
            return tokens[:, :num_text_tokens], tokens[:, num_text_tokens:]
        return tokens[:, num_image_tokens:], tokens[:, :num_image_tokens]

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """Tensor[B, T, ...] and Tensor[B, N, ...] as one sequence."""
        if self.references:
            before = text.shape[1] - self.references
            return torch.cat([text[:, :before], image, text[:, before:]], 1)
        return torch.cat([text, image] if self.text_first else [image, text], 1)

    def key_bias(self, clusters: TokenClusters, num_text_tokens: int) -> Tensor:
        """Log counts of the image's representatives and zeros for the text, Tensor[B, T + M]."""
        if self.text_first:
            return clusters.log_counts(prefix=num_text_tokens - self.references, suffix=self.references)
        return clusters.log_counts(suffix=num_text_tokens)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageAmongText(TokenOrder):
    """An image whose first token is at another place in each sequence of a batch: after its text and before padding.

    Args:
        starts: those places, Tensor[B].

    Example:
        >>> order = ImageAmongText(starts=torch.tensor([1, 2]))
        >>> order.join(torch.zeros(2, 3, 1), torch.ones(2, 2, 1)).squeeze(-1)
        tensor([[0., 1., 1., 0., 0.],
                [0., 0., 1., 1., 0.]])
    """

    starts: Tensor

    def split(self, tokens: Tensor, num_image_tokens: int) -> tuple[Tensor, Tensor]:
        starts = self.starts[:, None].to(tokens.device)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        others = places[: tokens.shape[1] - num_image_tokens].expand(len(starts), -1)
        others = others + num_image_tokens * (others >= starts)
        return _taken(tokens, others), _taken(tokens, starts + places[:num_image_tokens])

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        starts, size = self.starts[:, None].to(text.device), image.shape[1]
        places = torch.arange(text.shape[1] + size, device=text.device).expand(len(starts), -1)
        # In the image's tokens, then the text's.
        source = torch.where(places < starts, places + size, places)
        source = torch.where((places >= starts) & (places < starts + size), places - starts, source)
        return _taken(torch.cat([image, text], 1), source)

    def key_bias(self, clusters: TokenClusters, num_text_tokens: int) -> Tensor:
        counts = clusters.log_counts()
        return self.join(counts.new_zeros(counts.shape[0], num_text_tokens), counts)


def _taken(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens of Tensor[B, L, ...] by Tensor[B, K]."""
    return tokens.take_along_dim(index.reshape(*index.shape, *(1,) * (tokens.ndim - 2)), 1)


IMAGE_ONLY = IMAGE_FIRST = TokenOrder()
TEXT_FIRST = TokenOrder(text_first=True)
