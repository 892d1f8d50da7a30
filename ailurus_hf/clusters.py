"""TokenClusters: which token belongs to which cluster, and the two maps between N tokens and M representatives."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AiluRusError
from .exporting import is_exporting
from .grid_cache import constant, multiples
from .profiling import recorded

INT32_MAX = 2**31 - 1


@dataclass(eq=False)
class TokenClusters:
    """An assignment of N tokens to M clusters, per image (AiluRus, section 3.2).

    Args:
        assignment: LongTensor[B, N], the cluster of each token, in [0, M).
        centers: LongTensor[B, M], the token index of each center, ascending; None where centers are no tokens.
        counts: Tensor[B, M], tokens per cluster (fp32). A cluster may be empty only where `centers` is None.

    Example:
        >>> clusters = TokenClusters.from_assignment(torch.tensor([[0, 0, 1]]), num_clusters=2)
        >>> clusters.merge(torch.tensor([[[1.0], [3.0], [7.0]]])).flatten()
        tensor([2., 7.])
    """

    assignment: Tensor
    centers: Tensor | None
    counts: Tensor
    _flat_assignment: Tensor | None = field(default=None, init=False, repr=False)
    _bags: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    # Made once for all layers that ask.
    _biases: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_assignment(cls, assignment: Tensor, num_clusters: int, centers: Tensor | None = None) -> TokenClusters:
        """Clusters from the assignment alone: tokens are counted here.

        Args:
            assignment: LongTensor[B, N], in [0, M).
            num_clusters: M.
            centers: LongTensor[B, M], if they are tokens.
        """
        zeros = constant(0.0, assignment.device).expand(assignment.shape[0], num_clusters)
        counts = zeros.scatter_add(1, assignment, constant(1.0, assignment.device).expand_as(assignment))
        return cls(assignment, centers, counts)

    @property
    def num_tokens(self) -> int:
        return self.assignment.shape[1]

    @property
    def num_clusters(self) -> int:
        return self.counts.shape[1]

    def merge(self, tokens: Tensor) -> Tensor:
        """Means of the clusters; differentiable, and the same on every run: summed in order of cluster, then token.

        Args:
            tokens: Tensor[B, N, C].

        Returns:
            Tensor[B, M, C], zeros for an empty cluster.

        Raises:
            AiluRusError: the shape is another.
        """
        self._check(tokens, self.num_tokens, "merge")
        return recorded("ailurus::merge", self._means, tokens)

    def _means(self, tokens: Tensor) -> Tensor:
        batch, _, channels = tokens.shape
        if torch.onnx.is_in_onnx_export():
            # ONNX has no bags of rows: they become a loop over clusters, slow, and unknown to most runtimes.
            number = torch.arange(self.num_clusters, device=tokens.device)
            member = (self.assignment[:, None] == number[:, None]).to(tokens.dtype)
            return member @ tokens / self.counts.clamp_min(1)[..., None].to(tokens.dtype)
        order, offsets = self._tokens_by_cluster()
        # Rows that lie apart in memory, as convolutions leave them, take several times longer to sum than to copy.
        rows = tokens.reshape(-1, channels).contiguous()
        if not is_exporting():
            means = F.embedding_bag(order, rows, offsets, mode="mean")
            return means.view(batch, self.num_clusters, channels)
        # Where the last clusters are empty, they begin past the last token, which OpenVINO refuses: one more follows.
        end = offsets[-1:] + self.counts.flatten()[-1:].long()
        means = F.embedding_bag(F.pad(order, (0, 1)), rows, torch.cat([offsets, end]), mode="mean")
        return means[:-1].view(batch, self.num_clusters, channels)

    def unmerge(self, representatives: Tensor) -> Tensor:
        """Each token's representative; differentiable.

        Args:
            representatives: Tensor[B, M, C].

        Returns:
            Tensor[B, N, C].

        Raises:
            AiluRusError: the shape is another.
        """
        self._check(representatives, self.num_clusters, "unmerge")
        return recorded("ailurus::unmerge", self._rows_of_each, representatives)

    def _rows_of_each(self, representatives: Tensor) -> Tensor:
        batch, _, channels = representatives.shape
        rows = representatives.reshape(-1, channels).index_select(0, self._cluster_of_each())
        return rows.view(batch, self.num_tokens, channels)

    def log_counts(self, prefix: int = 0, suffix: int = 0) -> Tensor:
        """The attention bias of each key: log count, 0 for extra tokens, -inf for empty clusters (AiluRus, Eq. 5).

        Args:
            prefix, suffix: extra tokens before and after the M representatives.

        Returns:
            Tensor[B, prefix + M + suffix], fp32.
        """
        if (prefix, suffix) not in self._biases:
            self._biases[prefix, suffix] = F.pad(self.counts.log(), (prefix, suffix))
        return self._biases[prefix, suffix]

    def centroids(self, grid: tuple[int, ...]) -> Tensor:
        """The mean grid position of each cluster's tokens, Tensor[B, M, axes] (fp32)."""
        sides = (torch.arange(side, device=self.assignment.device, dtype=torch.float32) for side in grid)
        return self.merge(torch.cartesian_prod(*sides).expand(self.assignment.shape[0], -1, -1))

    # Tokens and clusters are numbered across the batch, so that it is one flat table: a row gather and a bag sum are
    # several times faster than gather and scatter with an index expanded over channels.
    def _cluster_of_each(self) -> Tensor:
        if self._flat_assignment is None:
            self._flat_assignment = (self.assignment + self._first(self.num_clusters)).flatten()
        return self._flat_assignment

    def _tokens_by_cluster(self) -> tuple[Tensor, Tensor]:
        """Tokens sorted by cluster, and where each cluster begins."""
        # Not a cached_property, whose lock does not compile.
        if self._bags is None:
            order = stable_argsort(self.assignment) + self._first(self.num_tokens)
            counts = self.counts.flatten().long()
            self._bags = order.flatten(), counts.cumsum(0) - counts
        return self._bags

    def _first(self, per_image: int) -> Tensor:
        return multiples(self.assignment.shape[0], per_image, self.assignment.device)

    def _check(self, tensor: Tensor, length: int, verb: str) -> None:
        expected = (self.assignment.shape[0], length)
        if tensor.ndim != 3 or tuple(tensor.shape[:2]) != expected:
            raise AiluRusError(
                f"{verb} expects a tensor of shape ({expected[0]}, {expected[1]}, C), got {tuple(tensor.shape)}"
            )


def ranks(mask: Tensor) -> Tensor:
    """Each True's number among those of its row, from 0: BoolTensor[B, N] to LongTensor[B, N]."""
    # OpenVINO would count booleans in a byte.
    return mask.cumsum(1, dtype=torch.long) - 1


def stable_argsort(values: Tensor, descending: bool = False) -> Tensor:
    """Order of Tensor[..., N] along N, equal values by index: LongTensor[..., N]."""
    is_onnx = torch.onnx.is_in_onnx_export()
    if (is_exporting() or is_onnx) and values.shape[-1] ** 2 <= INT32_MAX:
        return _argsort_by_unique_numbers(values, descending)
    if is_onnx:
        # The exporter knows no stable sort.
        return values.sort(descending=descending).indices
    return values.argsort(descending=descending, stable=True)


def _argsort_by_unique_numbers(values: Tensor, descending: bool) -> Tensor:
    """The same by sorts that need not be stable.

    ONNX has no others, and OpenVINO's stable one takes a hundred times as long (2700 tokens, 2026.4). OpenVINO keeps
    whole numbers in 32 bits, so the square of N has to fit; TensorRT sorts and sums no whole numbers, so that they are
    floats where these are exact.
    """
    count = values.shape[-1]
    dtype = torch.float32 if count**2 <= 2**24 else torch.long
    ordered, index = values.sort(descending=descending)
    is_other = F.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0))
    rank = torch.zeros_like(index, dtype=dtype).scatter(-1, index, is_other.cumsum(-1, dtype=dtype))
    unique = rank * count + torch.arange(count, dtype=dtype, device=values.device)
    return unique.sort().indices
