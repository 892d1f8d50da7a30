"""Segmenter (Strudel et al. 2021, arXiv:2105.05633): transformers' ViT or DeiT, then a decoder on its patch tokens.

The encoder is `ViTModel` / `DeiTModel` itself; only the resizing of its position embeddings differs (bilinear, and
from and to grids that are not square). The decoder maps tokens to class scores one by one or among themselves and
never asks where a token lies, so that a token reduction can hand it fewer tokens than the grid has.
"""

import operator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeiTModel, PreTrainedConfig, PreTrainedModel, ViTConfig, ViTModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.deit.modeling_deit import DeiTEmbeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTLayer, ViTPreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_segmenter import SegmenterConfig


def resize_position_embeddings(
    position_embeddings: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Position embeddings [1, P + h*w, C] of one grid, bilinearly resized to another: [1, P + H*W, C].

    P prefix rows (class and distillation token) pass unchanged; equal grids return the input itself.
    """
    if old_grid == new_grid:
        return position_embeddings
    num_prefix = position_embeddings.shape[1] - old_grid[0] * old_grid[1]
    prefix, patches = position_embeddings[:, :num_prefix], position_embeddings[:, num_prefix:]
    patches = patches.transpose(1, 2).unflatten(2, old_grid)
    patches = F.interpolate(patches, size=new_grid, mode="bilinear", align_corners=False)
    return torch.cat((prefix, patches.flatten(2).transpose(1, 2)), dim=1)


class _BilinearPositions:
    """Mixed into an embeddings class: its position embeddings resize as the original Segmenter's do."""

    patch_size: int
    image_size: tuple[int, int]
    position_embeddings: Tensor

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings [1, P + N, C] for an image of height x width pixels."""
        patch = self.patch_size
        old_grid = (self.image_size[0] // patch, self.image_size[1] // patch)
        return resize_position_embeddings(self.position_embeddings, old_grid, (height // patch, width // patch))


class SegmenterViTEmbeddings(_BilinearPositions, ViTEmbeddings):
    """ViT embeddings with bilinear position embeddings on grids of any shape."""


class SegmenterDeiTEmbeddings(_BilinearPositions, DeiTEmbeddings):
    """DeiT embeddings (class and distillation token) with bilinear position embeddings on grids of any shape."""


def _build_encoder(config: PreTrainedConfig) -> ViTModel | DeiTModel:
    model_class, embeddings_class = {
        "vit": (ViTModel, SegmenterViTEmbeddings),
        "deit": (DeiTModel, SegmenterDeiTEmbeddings),
    }[config.model_type]
    encoder = model_class(config, add_pooling_layer=False)
    encoder.embeddings = embeddings_class(config)
    return encoder


class LinearDecoder(nn.Module):
    """One linear layer: tokens Tensor[B, L, C] -> class scores Tensor[B, L, num_labels]."""

    def __init__(self, config: SegmenterConfig):
        super().__init__()
        self.head = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(tokens)


class MaskTransformerDecoder(ViTPreTrainedModel):
    """Class tokens beside the patch tokens: tokens Tensor[B, L, C] -> class scores Tensor[B, L, num_labels].

    A patch's score for a class is the cosine between the two tokens after the last layer, normalized over the
    classes. In `layers` the class tokens are the last num_labels of the sequence. A PreTrainedModel so that
    transformers chooses the attention function of its layers as it does the encoder's.
    """

    def __init__(self, config: SegmenterConfig):
        decoder: ViTConfig = config.decoder_config
        super().__init__(decoder)
        self.num_labels = config.num_labels
        self.proj_dec = nn.Linear(config.hidden_size, decoder.hidden_size)
        self.cls_emb = nn.Parameter(torch.zeros(1, config.num_labels, decoder.hidden_size))
        self.layers = nn.ModuleList([ViTLayer(decoder) for _ in range(decoder.num_hidden_layers)])
        self.decoder_norm = nn.LayerNorm(decoder.hidden_size, eps=decoder.layer_norm_eps)
        # Applied from the right (x @ proj), as in the original: not Linear weights.
        self.proj_patch = nn.Parameter(torch.zeros(decoder.hidden_size, decoder.hidden_size))
        self.proj_classes = nn.Parameter(torch.zeros(decoder.hidden_size, decoder.hidden_size))
        self.mask_norm = nn.LayerNorm(config.num_labels, eps=decoder.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.trunc_normal_(self.cls_emb, std=self.config.initializer_range)
            init.normal_(self.proj_patch, std=self.config.hidden_size**-0.5)
            init.normal_(self.proj_classes, std=self.config.hidden_size**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden_states = self.proj_dec(tokens)
        class_tokens = self.cls_emb.expand(hidden_states.shape[0], -1, -1)
        hidden_states = torch.cat((hidden_states, class_tokens.to(hidden_states.dtype)), dim=1)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        hidden_states = self.decoder_norm(hidden_states)
        patches = hidden_states[:, : -self.num_labels] @ self.proj_patch
        classes = hidden_states[:, -self.num_labels :] @ self.proj_classes
        scores = F.normalize(patches, dim=-1) @ F.normalize(classes, dim=-1).transpose(1, 2)
        return self.mask_norm(scores)


class SegmenterPreTrainedModel(PreTrainedModel):
    """What transformers may do with the model: attention functions, checkpointing, compilation.

    Example:
        >>> issubclass(SegmenterForSemanticSegmentation, SegmenterPreTrainedModel)
        True
    """

    config_class = SegmenterConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # The loss is a mean over a batch's pixels; else Trainer takes forward's **kwargs for a sum that it need not divide
    # among accumulated batches and processes.
    accepts_loss_kwargs = False
    _no_split_modules = ["SegmenterViTEmbeddings", "SegmenterDeiTEmbeddings", "ViTLayer", "DeiTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class SegmenterForSemanticSegmentation(SegmenterPreTrainedModel):
    """Semantic segmentation with a plain ViT: `encoder` (ViTModel or DeiTModel) and `decoder`.

    Source: Strudel et al. 2021, arXiv:2105.05633.

    Args:
        config: says which encoder and decoder: a `MaskTransformerDecoder` or a `LinearDecoder`.

    Example:
        model = SegmenterForSemanticSegmentation.from_pretrained("examples/assets/segmenter-camvid")
        logits = model(pixel_values).logits  # Tensor[B, num_labels, H, W]
    """

    def __init__(self, config: SegmenterConfig):
        super().__init__(config)
        self.encoder = _build_encoder(config.encoder_config)
        self.num_prefix_tokens = 2 if config.encoder_config.model_type == "deit" else 1
        decoder_class = LinearDecoder if config.decoder_type == "linear" else MaskTransformerDecoder
        self.decoder = decoder_class(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embeddings.patch_embeddings

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> SemanticSegmenterOutput:
        """Images Tensor[B, 3, H, W], any H and W -> logits Tensor[B, num_labels, H, W] at full resolution.

        labels: LongTensor[B, H, W] of class ids; adds `loss`, the mean cross entropy over all pixels except those of
        `config.semantic_loss_ignore_index`. Keyword arguments (output_hidden_states, output_attentions) go to the
        encoder. Raises ValueError where the labels' shape is not the images'.
        """
        # Plain numbers: padding to a multiple of a symbolic size is more than torch.compile can reason about.
        height, width = (operator.index(side) for side in pixel_values.shape[-2:])
        if labels is not None and labels.shape != (len(pixel_values), height, width):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not match images of shape {tuple(pixel_values.shape)}: "
                f"expected {(len(pixel_values), height, width)}"
            )

        patch = self.config.patch_size
        # Zero is the mean color after normalizing; the original pads right and bottom with it too.
        pixel_values = F.pad(pixel_values, (0, -width % patch, 0, -height % patch))
        padded_size = pixel_values.shape[-2:]
        grid = (padded_size[0] // patch, padded_size[1] // patch)

        encoded = self.encoder(pixel_values, interpolate_pos_encoding=True, **kwargs)
        # By the prefix's length and not the grid's: a token reduction may hand the decoder fewer tokens.
        scores = self.decoder(encoded.last_hidden_state[:, self.num_prefix_tokens :])

        logits = scores.transpose(1, 2).unflatten(2, grid)
        logits = F.interpolate(logits, size=padded_size, mode="bilinear", align_corners=False)
        logits = logits[..., :height, :width]

        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels, ignore_index=self.config.semantic_loss_ignore_index)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


__all__ = ["SegmenterForSemanticSegmentation", "SegmenterPreTrainedModel"]
