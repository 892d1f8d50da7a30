"""diffusers' networks that can be reduced: where their blocks are, where their grid comes from, how they attend."""

from __future__ import annotations

from functools import partial

import diffusers
from diffusers.models.attention_processor import (
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_bria import BriaAttnProcessor
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor
from diffusers.models.transformers.transformer_longcat_image import LongCatImageAttnProcessor
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
from diffusers.models.transformers.transformer_ovis_image import OvisImageAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

from . import refusals
from .declaration import DiffusionNetwork, OwnProcessor
from .flops import joint_block_flops, kandinsky_block_flops, wan_block_flops
from .flux2 import Flux2Processor
from .grids import IdGrid, LatentGrid
from .joint import JointProcessor, rotary_of_ids
from .kandinsky import KandinskyProcessor
from .ltx import LTXProcessor, SidesGrid, rotary_of_coordinates
from .padded import ListGrid, LuminaProcessor, ZImageProcessor, image_after_its_text
from .qwen import QwenProcessor, ShapesGrid
from .token_order import IMAGE_FIRST, TEXT_FIRST
from .wan import WanProcessor, rotary_of_centroids

UNETS = (
    DiffusionNetwork(diffusers.UNet2DConditionModel, layout="maps"),
    DiffusionNetwork(diffusers.ControlNetModel, layout="maps"),
    DiffusionNetwork(diffusers.ControlNetUnionModel, layout="maps"),
    DiffusionNetwork(diffusers.UNetControlNetXSModel, layout="maps"),
    # Their motion modules are of another class: their tokens are frames.
    DiffusionNetwork(diffusers.UNetMotionModel, layout="maps"),
    DiffusionNetwork(diffusers.SparseControlNetModel, layout="maps"),
    DiffusionNetwork(diffusers.UNet3DConditionModel, layout="maps"),
    DiffusionNetwork(diffusers.I2VGenXLUNet, layout="maps"),
    # Its spatial blocks: between them are temporal ones.
    DiffusionNetwork(diffusers.UNetSpatioTemporalConditionModel, layout="maps"),
)

PATCHES = (
    DiffusionNetwork(diffusers.PixArtTransformer2DModel),
    DiffusionNetwork(diffusers.DiTTransformer2DModel),
)

SINGLE_AND_DOUBLE = ("transformer_blocks", "single_transformer_blocks")
OF_FLUX = OwnProcessor(stands_in_for=(FluxAttnProcessor,), rotary=rotary_of_ids)
OF_COGVIDEO = OwnProcessor(
    JointProcessor, (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0), kwargs="attention_kwargs"
)

JOINT = (
    DiffusionNetwork(
        diffusers.SD3Transformer2DModel,
        grid=partial(LatentGrid, kwargs="joint_attention_kwargs"),
        token_order=IMAGE_FIRST,
        attention=OwnProcessor(),
        unmerge_before="norm_out",
        flops=joint_block_flops,
    ),
    DiffusionNetwork(
        diffusers.FluxTransformer2DModel,
        blocks=SINGLE_AND_DOUBLE,
        # Its pipelines make one token of so many rows and columns of the latents.
        patch=2,
        grid=partial(IdGrid, references=True),
        token_order=TEXT_FIRST,
        attention=OF_FLUX,
        unmerge_before="norm_out",
        flops=joint_block_flops,
    ),
    DiffusionNetwork(
        diffusers.ChromaTransformer2DModel,
        blocks=SINGLE_AND_DOUBLE,
        patch=2,
        grid=IdGrid,
        token_order=TEXT_FIRST,
        attention=OF_FLUX,
        unmerge_before="norm_out",
        guides_by_halves=False,
        flops=joint_block_flops,
    ),
    *(
        DiffusionNetwork(
            network,
            blocks=SINGLE_AND_DOUBLE,
            patch=2,
            grid=partial(IdGrid, kwargs, references),
            token_order=TEXT_FIRST,
            attention=OwnProcessor(
                stands_in_for=(processor,), kwargs=kwargs or "joint_attention_kwargs", rotary=rotary_of_ids
            ),
            unmerge_before="norm_out",
            guides_by_halves=halves,
            flops=joint_block_flops,
        )
        for network, processor, kwargs, halves, references in (
            (diffusers.BriaTransformer2DModel, BriaAttnProcessor, "attention_kwargs", True, False),
            # It takes no arguments for its attention.
            (diffusers.LongCatImageTransformer2DModel, LongCatImageAttnProcessor, None, False, True),
            (diffusers.OvisImageTransformer2DModel, OvisImageAttnProcessor, "joint_attention_kwargs", False, False),
        )
    ),
    DiffusionNetwork(
        diffusers.Flux2Transformer2DModel,
        blocks=SINGLE_AND_DOUBLE,
        patch=2,
        grid=partial(IdGrid, references=True),
        token_order=TEXT_FIRST,
        attention=OwnProcessor(
            Flux2Processor, (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor), rotary=rotary_of_ids
        ),
        unmerge_before="norm_out",
        refuses=refusals.refuse_kept_references,
        guides_by_halves=False,
        flops=joint_block_flops,
    ),
    DiffusionNetwork(
        diffusers.QwenImageTransformer2DModel,
        grid=partial(ShapesGrid, references=True),
        token_order=TEXT_FIRST,
        attention=OwnProcessor(QwenProcessor, (QwenDoubleStreamAttnProcessor2_0,), "attention_kwargs"),
        unmerge_before="norm_out",
        by_token=("modulate_index",),
        guides_by_halves=False,
        flops=joint_block_flops,
    ),
    DiffusionNetwork(
        diffusers.CogView3PlusTransformer2DModel,
        token_order=TEXT_FIRST,
        attention=OF_COGVIDEO,
        gives_image_first=True,
        unmerge_before="norm_out",
        flops=joint_block_flops,
    ),
    DiffusionNetwork(
        diffusers.Lumina2Transformer2DModel,
        blocks=("layers",),
        token_order=image_after_its_text,
        attention=OwnProcessor(LuminaProcessor, (Lumina2AttnProcessor2_0,), "attention_kwargs"),
        unmerge_before="norm_out",
        guides_by_halves=False,
        flops=joint_block_flops,
    ),
    DiffusionNetwork(
        diffusers.ZImageTransformer2DModel,
        blocks=("layers",),
        patch=2,
        grid=ListGrid,
        token_order=IMAGE_FIRST,
        attention=OwnProcessor(ZImageProcessor, (ZSingleStreamAttnProcessor,)),
        refuses=refusals.refuse_several_images,
        flops=joint_block_flops,
    ),
)

VIDEO = (
    DiffusionNetwork(
        diffusers.WanTransformer3DModel,
        blocks=("blocks",),
        grid=partial(LatentGrid, axes=3, kwargs="attention_kwargs"),
        attention=OwnProcessor(WanProcessor, (WanAttnProcessor,), "attention_kwargs", rotary_of_centroids),
        unmerge_before="norm_out",
        modulation="temb",
        guides_by_halves=False,
        flops=wan_block_flops,
    ),
    DiffusionNetwork(
        diffusers.SkyReelsV2Transformer3DModel,
        blocks=("blocks",),
        grid=partial(LatentGrid, axes=3, kwargs="attention_kwargs"),
        attention=OwnProcessor(WanProcessor, (SkyReelsV2AttnProcessor,), "attention_kwargs", rotary_of_centroids),
        unmerge_before="norm_out",
        refuses=refusals.refuse_diffusion_forcing,
        guides_by_halves=False,
        flops=wan_block_flops,
    ),
    DiffusionNetwork(
        diffusers.LTXVideoTransformer3DModel,
        grid=SidesGrid,
        attention=OwnProcessor(LTXProcessor, (LTXVideoAttnProcessor,), "attention_kwargs", rotary_of_coordinates),
        unmerge_before="norm_out",
        modulation="temb",
        flops=wan_block_flops,
    ),
    DiffusionNetwork(
        diffusers.HunyuanVideoTransformer3DModel,
        blocks=SINGLE_AND_DOUBLE,
        grid=partial(LatentGrid, axes=3, kwargs="attention_kwargs"),
        token_order=IMAGE_FIRST,
        attention=OwnProcessor(JointProcessor, (HunyuanVideoAttnProcessor2_0,), "attention_kwargs"),
        gives_image_first=True,
        unmerge_before="norm_out",
        refuses=refusals.refuse_replaced_tokens,
        guides_by_halves=False,
        flops=joint_block_flops,
    ),
    *(
        DiffusionNetwork(
            network,
            # Their latents are Tensor[B, frames, C, H, W].
            grid=partial(LatentGrid, axes=3, kwargs="attention_kwargs", sides=(1, 3, 4)),
            token_order=TEXT_FIRST,
            attention=OF_COGVIDEO,
            gives_image_first=True,
            unmerge_before="norm_final",
            flops=joint_block_flops,
        )
        for network in (diffusers.CogVideoXTransformer3DModel, diffusers.ConsisIDTransformer3DModel)
    ),
    DiffusionNetwork(
        diffusers.Kandinsky5Transformer3DModel,
        blocks=("visual_transformer_blocks",),
        # Its latents are Tensor[B, frames, H, W, C].
        grid=partial(LatentGrid, axes=3, sides=(1, 2, 3)),
        attention=OwnProcessor(KandinskyProcessor, (Kandinsky5AttnProcessor,)),
        refuses=refusals.refuse_sparse_attention,
        guides_by_halves=False,
        flops=kandinsky_block_flops,
    ),
)

CONTROLS = (
    DiffusionNetwork(
        diffusers.SD3ControlNetModel,
        grid=partial(LatentGrid, kwargs="joint_attention_kwargs"),
        token_order=IMAGE_FIRST,
        attention=OwnProcessor(),
        unmerge_before_each=("controlnet_blocks",),
        flops=joint_block_flops,
    ),
    DiffusionNetwork(
        diffusers.FluxControlNetModel,
        blocks=SINGLE_AND_DOUBLE,
        patch=2,
        grid=IdGrid,
        token_order=TEXT_FIRST,
        attention=OF_FLUX,
        unmerge_before_each=("controlnet_blocks", "controlnet_single_blocks"),
        flops=joint_block_flops,
    ),
    DiffusionNetwork(
        diffusers.QwenImageControlNetModel,
        grid=ShapesGrid,
        token_order=TEXT_FIRST,
        attention=OwnProcessor(QwenProcessor, (QwenDoubleStreamAttnProcessor2_0,)),
        unmerge_before_each=("controlnet_blocks",),
        guides_by_halves=False,
        flops=joint_block_flops,
    ),
)

DECLARATIONS = UNETS + PATCHES + JOINT + VIDEO + CONTROLS
