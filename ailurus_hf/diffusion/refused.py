"""Which of diffusers' transformers, UNets and ControlNets are refused, and why, by class."""

from __future__ import annotations

_LINEAR = "its attention is linear in the number of tokens: fewer of them gain nothing"
_OWN = "its attention runs on a processor of its own, which none with weighted keys stands in for"
_SOUND = "its tokens are of sound, and no grid"
_PART = "it is a part of UNets, which are reduced as a whole: give the UNet"
_TOKENS = "each of its tokens has a timestep of its own, and how its blocks use them is not declared"
_SEVERAL = "its sequence holds several pictures, or parts of a video at several sizes, which are no one grid"
_PACKED = "texts and pictures are packed into one sequence, in any order, and it is told no grid"
_CAUSAL = "its attention is causal by blocks of tokens, which merged tokens would straddle"
_WINDOWS = "its attention is sparse, in windows of all tokens' grid, which merged tokens have left"
_FRAMES = "its attention is over the frames of one place, which merged tokens have left"
_KEPT = "it keeps keys and values of other tokens from call to call"

REFUSED = {
    # Pictures
    "AuraFlowTransformer2DModel": _OWN,
    "BriaFiboTransformer2DModel": _OWN,
    "BriaFibo2Transformer2DModel": _OWN,
    "CogView4Transformer2DModel": _OWN,
    "ErnieImageTransformer2DModel": _OWN + ", and its sequences stand before its batch, Tensor[L, B, C]",
    "Flux3Transformer2DModel": _OWN,
    "GlmImageTransformer2DModel": _OWN,
    "HiDreamImageTransformer2DModel": _OWN,
    "HunyuanDiT2DModel": "its later blocks take what its first ones gave, of all tokens",
    "HunyuanImageTransformer2DModel": _OWN,
    "Ideogram4Transformer2DModel": _PACKED,
    "JoyImageEditTransformer3DModel": _SEVERAL,
    "JoyImageEditPlusTransformer3DModel": _SEVERAL,
    "Krea2Transformer2DModel": _OWN,
    "LuminaNextDiT2DModel": _OWN,
    "NucleusMoEImageTransformer2DModel": "its experts choose among all tokens of a sequence, and would choose others",
    "OmniGenTransformer2DModel": _OWN + ", under a mask of its own for every pair of tokens",
    "PRXTransformer2DModel": _OWN,
    "PriorTransformer": "it denoises an embedding, and no picture",
    "QwenImage21Transformer2DModel": _CAUSAL,
    "SanaTransformer2DModel": _LINEAR,
    # Videos
    "AllegroTransformer3DModel": _OWN,
    "AnyFlowTransformer3DModel": _TOKENS,
    "AnyFlowFARTransformer3DModel": _CAUSAL,
    "ChronoEditTransformer3DModel": _OWN,
    "CosmosTransformer3DModel": _OWN + ", and each of its blocks may add positions to all tokens",
    "Cosmos3OmniTransformer": _PACKED,
    "EasyAnimateTransformer3DModel": _OWN,
    "HeliosTransformer3DModel": _SEVERAL,
    "HunyuanVideo15Transformer3DModel": _OWN,
    "HunyuanVideoFramepackTransformer3DModel": _SEVERAL,
    "Kandinsky6Transformer3DModel": _OWN,
    "Kandinsky6SRTransformer3DModel": _WINDOWS,
    "LTX2VideoTransformer3DModel": _OWN,
    "LatteTransformer3DModel": _FRAMES + ", in every other block",
    "MiniMaxH3Transformer3DModel": _TOKENS,
    "MochiTransformer3DModel": _OWN,
    "MotifVideoTransformer3DModel": _OWN,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": "most of its layers are a recurrence over all tokens in their order",
    "SanaWMLTX2RefinerTransformer3DModel": _KEPT,
    "WanAnimateTransformer3DModel": "between its blocks the tokens of each frame attend to that frame's face",
    "WanAnimate2Transformer3DModel": _KEPT,
    "WanVACETransformer3DModel": "its control blocks add to all tokens between the others",
    # Sound, and what is no picture
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "UNet1DModel": "its latents have one axis, and no grid",
    "RFD4ProteinaTransformer": "its tokens are of a protein, and no grid",
    # UNets and their parts
    "DreamLiteTransformer2DModel": _PART,
    "DreamLiteUNetModel": _OWN + ": its keys and values have fewer heads than its queries",
    "Kandinsky3UNet": "its attention lies in blocks of its own kind, on maps between convolutions",
    "MotionAdapter": _FRAMES + ": give the UNet that it is in",
    "StableCascadeUNet": "its layers of attention lie between convolutions, and join text to the image's keys",
    "Transformer2DModel": _PART,
    "TransformerTemporalModel": _FRAMES + ": give the UNet that it is in",
    "UNet2DModel": "it has no transformer blocks, only layers of attention between convolutions",
    "UVit2DModel": "it predicts the codes of a picture's tokens, and denoises no latents",
    # ControlNets
    "ControlNetXSAdapter": "it runs inside a UNetControlNetXSModel: give that",
    "CosmosControlNetModel": "it is made of Cosmos's blocks, whose attention runs on a processor of its own",
    "HunyuanDiT2DControlNetModel": _OWN,
    "SanaControlNetModel": _LINEAR,
    "ZImageControlNetModel": "what it gives is for text and image in one sequence, padded as Z-Image has them",
}
# Lists of ControlNets: each is reduced, or left whole, by itself.
LISTS = (
    "FluxMultiControlNetModel",
    "HunyuanDiT2DMultiControlNetModel",
    "MultiControlNetModel",
    "MultiControlNetUnionModel",
    "QwenImageMultiControlNetModel",
    "SD3MultiControlNetModel",
)
