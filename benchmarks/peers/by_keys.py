"""What ToMe and PiToMe share: layers merge tokens by their keys, and means and attention are weighted by size."""

from __future__ import annotations

import torch
from torch import Tensor

from .hooks import Peer, copy_back


class MergesByKeys(Peer):
    """Between attention and MLP of every layer that `merges_in`, a part of the tokens is merged; `merge` says which.

    A forward's state is what the tokens hold by then. sizes: Tensor[B, L], patches a token holds. source: LongTensor
    [B, N], the token that holds each patch.
    """

    proportional = True

    def merges_in(self, index: int) -> bool:
        """Whether a layer (0 is the first) merges any."""
        return True

    def merge(self, sequence: Tensor, index: int) -> Tensor:
        """The sequence Tensor[B, L, C] between attention and MLP of a layer to the shorter one, or itself."""
        raise NotImplementedError

    def add_hooks(self) -> None:
        self.keys = {}
        for index in range(len(self.layers)):
            if self.merges_in(index):
                self.keys[index] = self.watch(index, "k_proj")
                self.merge_inside(index, self.merge)

    def begin(self) -> None:
        self.sizes: Tensor | None = None
        self.source: Tensor | None = None

    def sizes_of(self, tokens: Tensor) -> Tensor:
        """Patches that each token holds: Tensor[B, L]."""
        return torch.ones(tokens.shape[:2], device=tokens.device) if self.sizes is None else self.sizes

    def mean_keys(self, index: int) -> Tensor:
        """The keys of a layer's last forward, averaged over heads: Tensor[B, L, C / heads]."""
        keys = self.split(self.keys[index]["output"])[1]
        return keys.unflatten(2, (self.found.encoder.config.num_attention_heads, -1)).mean(2)

    def merged(self, prefix: Tensor, tokens: Tensor, sizes: Tensor, to: Tensor) -> Tensor:
        """The new sequence, after noting the new sizes and, by the new index of each old token, where patches are."""
        self.sizes = sizes
        self.source = to if self.source is None else to.gather(1, self.source)
        self.unmerge = copy_back(self.source)
        if self.proportional:
            self.bias = sizes.log()
        return torch.cat([prefix, tokens], 1)
