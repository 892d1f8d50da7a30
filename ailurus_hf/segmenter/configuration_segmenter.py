"""SegmenterConfig: a ViT or DeiT encoder and the decoder that turns its patch tokens into class scores."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, ViTConfig

# What differs from transformers' ViT defaults in every official Segmenter checkpoint.
LAYER_NORM_EPS = 1e-5
ENCODER_TYPES = ("vit", "deit")


@strict
class SegmenterConfig(PreTrainedConfig):
    """Configuration of `SegmenterForSemanticSegmentation` (Strudel et al. 2021, arXiv:2105.05633).

    Args:
        encoder_config: a `ViTConfig`, a `DeiTConfig` (with distillation token), or a dict with "model_type" "vit" or
            "deit"; default ViT-B/16 for 512 x 512 images. `image_size` is (height, width) of the position embeddings'
            grid: they are resized bilinearly for any other image.
        decoder_type: "mask_transformer" (default) or "linear".
        decoder_config: a `ViTConfig` giving the mask transformer's hidden_size, num_hidden_layers, num_attention_heads
            and intermediate_size; default 2 layers as wide as the encoder. None with the linear decoder.
        semantic_loss_ignore_index: label that counts in no loss; default 255.
        initializer_range: standard deviation of new weights.
        num_labels, id2label: as in every transformers config.

    Raises:
        ValueError: an encoder that is neither ViT nor DeiT, an unknown decoder, a decoder_config with the linear
            decoder, or a width that its number of heads does not divide.

    Example:
        >>> config = SegmenterConfig(encoder_config={"model_type": "vit", "hidden_size": 192, "num_attention_heads": 3})
        >>> config.patch_size, config.decoder_config.num_hidden_layers
        (16, 2)
    """

    model_type = "segmenter"
    sub_configs: ClassVar = {"encoder_config": AutoConfig, "decoder_config": ViTConfig}

    encoder_config: Any = None
    decoder_type: Literal["mask_transformer", "linear"] = "mask_transformer"
    decoder_config: Any = None
    semantic_loss_ignore_index: int = 255
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.encoder_config = _encoder_config(self.encoder_config)
        if self.decoder_type == "linear" and self.decoder_config is not None:
            raise ValueError('decoder_type="linear" has no layers: leave decoder_config out')
        if self.decoder_type == "mask_transformer":
            self.decoder_config = _decoder_config(self.decoder_config, self.encoder_config)
        for part, config in (("encoder", self.encoder_config), ("decoder", self.decoder_config)):
            if config is not None and config.hidden_size % config.num_attention_heads:
                raise ValueError(
                    f"the {part}'s hidden_size {config.hidden_size} is not a multiple of its num_attention_heads "
                    f"{config.num_attention_heads}"
                )
        super().__post_init__(**kwargs)

    @property
    def patch_size(self) -> int:
        return self.encoder_config.patch_size

    @property
    def hidden_size(self) -> int:
        return self.encoder_config.hidden_size


def _encoder_config(given: dict[str, Any] | PreTrainedConfig | None) -> Any:
    if given is None:
        return ViTConfig(image_size=512, layer_norm_eps=LAYER_NORM_EPS)
    model_type = given.get("model_type", "vit") if isinstance(given, dict) else given.model_type
    if model_type not in ENCODER_TYPES:
        raise ValueError(f"a Segmenter encoder is one of {', '.join(ENCODER_TYPES)}, not {model_type!r}")
    config: Any = given
    if isinstance(given, dict):
        fields = {"layer_norm_eps": LAYER_NORM_EPS} | {k: v for k, v in given.items() if k != "model_type"}
        config = AutoConfig.for_model(model_type, **fields)
    if not isinstance(config.patch_size, int):
        raise ValueError(f"Segmenter's patches are square: patch_size must be one integer, not {config.patch_size}")
    return config


def _decoder_config(given: dict[str, Any] | PreTrainedConfig | None, encoder: Any) -> Any:
    if isinstance(given, PreTrainedConfig):
        return given
    fields = {k: v for k, v in (given or {}).items() if k != "model_type"}
    width = fields.get("hidden_size", encoder.hidden_size)
    # The original decoder keeps the encoder's head width: as many heads of 64 as fit.
    defaults = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": max(1, width * encoder.num_attention_heads // encoder.hidden_size),
        "intermediate_size": 4 * width,
        "layer_norm_eps": LAYER_NORM_EPS,
    }
    return ViTConfig(**(defaults | fields))
