"""What is known of each patch encoder: architecture, input, normalisation, pooling and licence.

Everything is data; nothing here imports timm. Sources: the model cards and hub configurations;
licences were compared with them in November 2026, or, where the card cannot be read without an
account, with the lists of other projects (``second_hand``). No published weights were run here but
those of natural images: architectures are tested on random weights, and a file that does not fit
is refused by the names of its tensors.
``init_values`` only switches the layer scale on, its values come with the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

#: cls: class token; cls+mean: class token beside the mean of the patch tokens; none: as timm pools;
#: attention: a learned query over the tokens.
Pooling = Literal["cls", "cls+mean", "attention", "none"]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
_CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
_HIBOU_MEAN: Triple = (0.7068, 0.5755, 0.722)
_HIBOU_STD: Triple = (0.195, 0.2316, 0.1816)
_LUNIT_MEAN: Triple = (0.70322989, 0.53606487, 0.66096631)
_LUNIT_STD: Triple = (0.21716536, 0.26081574, 0.20723464)
_OPTIMUS_MEAN: Triple = (0.707223, 0.578729, 0.703617)
_OPTIMUS_STD: Triple = (0.211883, 0.230117, 0.177517)
_NON_COMMERCIAL = "CC-BY-NC-ND-4.0"
_OWKIN = "Owkin non-commercial"
_LUNIT = "Lunit non-commercial"
_GIGAPATH = "Apache-2.0, research only"  # the card names the licence, its access form the limit
#: Arguments whose values are classes; they are named here and looked up when the model is built.
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
LEAST_PX = 14  # one token of the usual transformers


@dataclass(frozen=True)
class Backbone:
    """One patch encoder.

    Attributes:
        encoder: id; the features are stored as ``features/<encoder>``.
        timm_name: architecture.
        arguments: further arguments of ``timm.create_model``.
        dim: length of the feature vector; None: as the built model says.
        pooling: see :data:`Pooling`.
        input_px: side of the square that the encoder reads, pixels.
        mpp: resolutions that it was trained at, um per pixel; empty for natural images.
        mean: of the normalised channels, on 0..1.
        std: as ``mean``.
        interpolation: bicubic | bilinear, for patches of another size.
        hub: ``ORG/NAME`` on the Hugging Face hub; "" for none.
        gated: the licence has to be accepted on the hub before the weights can be had.
        licence: of the weights.
        second_hand: the licence was read in other projects' lists, not on the model card.
        fixed_px: it is built for one input size; others take any.
    """

    encoder: str
    timm_name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dim: int | None = None
    pooling: Pooling = "cls"
    input_px: int = 224
    mpp: tuple[float, ...] = (0.5,)
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    interpolation: str = "bicubic"
    hub: str = ""
    gated: bool = True
    licence: str = _NON_COMMERCIAL
    second_hand: bool = False
    fixed_px: bool = True

    def at(self, input_px: int | None) -> Backbone:
        """The same with an input of another size; position embeddings are resampled on loading."""
        if input_px is None or input_px == self.input_px:
            return self
        arguments = {**self.arguments, "img_size": input_px} if self.fixed_px else self.arguments
        return replace(self, input_px=input_px, arguments=arguments)


_TABLE = (
    Backbone(
        "uni",
        "vit_large_patch16_224",
        {"init_values": 1e-5, "dynamic_img_size": True},
        1024,
        hub="MahmoodLab/UNI",
        second_hand=True,
    ),
    Backbone(
        "uni2-h",
        "vit_giant_patch14_224",
        {
            "img_size": 224,
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 5.33334,
            "init_values": 1e-5,
            "no_embed_class": True,
            "reg_tokens": 8,
            "dynamic_img_size": True,
            **_SWIGLU,
        },
        1536,
        hub="MahmoodLab/UNI2-h",
        second_hand=True,
    ),
    Backbone(
        "conch",
        "vit_base_patch16_224",
        {"img_size": 448, "dynamic_img_size": True},
        512,
        "attention",
        input_px=448,
        mean=_CLIP_MEAN,
        std=_CLIP_STD,
        hub="MahmoodLab/CONCH",
    ),
    Backbone(
        "virchow",
        "vit_huge_patch14_224",
        {"mlp_ratio": 5.3375, "init_values": 1e-5, **_SWIGLU},
        2560,
        "cls+mean",
        hub="paige-ai/Virchow",
        licence="Apache-2.0",
    ),
    Backbone(
        "virchow2",
        "vit_huge_patch14_224",
        {"mlp_ratio": 5.3375, "init_values": 1e-5, "reg_tokens": 4, **_SWIGLU},
        2560,
        "cls+mean",
        mpp=(0.25, 0.5, 1.0, 2.0),
        hub="paige-ai/Virchow2",
    ),
    Backbone(
        "h-optimus-0",
        "vit_giant_patch14_reg4_dinov2",
        {"img_size": 224, "init_values": 1e-5},
        1536,
        mean=_OPTIMUS_MEAN,
        std=_OPTIMUS_STD,
        hub="bioptimus/H-optimus-0",
        licence="Apache-2.0",
        second_hand=True,
    ),
    Backbone(
        "h-optimus-1",
        "vit_giant_patch14_reg4_dinov2",
        {"img_size": 224, "init_values": 1e-5},
        1536,
        mean=_OPTIMUS_MEAN,
        std=_OPTIMUS_STD,
        hub="bioptimus/H-optimus-1",
        second_hand=True,
    ),
    Backbone(
        "h0-mini",
        "vit_base_patch14_reg4_dinov2",
        {"img_size": 224, "mlp_ratio": 5.33334, "init_values": 1e-5, **_SWIGLU},
        768,
        mean=_OPTIMUS_MEAN,
        std=_OPTIMUS_STD,
        hub="bioptimus/H0-mini",
        second_hand=True,
    ),
    Backbone(
        "gigapath",
        "vit_giant_patch14_dinov2",
        {"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334, "init_values": 1e-5},
        1536,
        hub="prov-gigapath/prov-gigapath",
        licence=_GIGAPATH,
    ),
    Backbone(
        "midnight",
        "vit_giant_patch14_dinov2",
        {"img_size": 224},
        3072,
        "cls+mean",
        mpp=(0.25, 0.5, 1.0, 2.0),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        hub="kaiko-ai/midnight",
        gated=False,
        licence="MIT",
    ),
    Backbone(
        "hibou-b",
        "vit_base_patch14_reg4_dinov2",
        {"img_size": 224, "mlp_ratio": 5.33334, "init_values": 1e-5, **_SWIGLU},
        768,
        mean=_HIBOU_MEAN,
        std=_HIBOU_STD,
        hub="histai/hibou-b",
        gated=False,
        licence="Apache-2.0",
        second_hand=True,
    ),
    Backbone(
        "hibou-l",
        "vit_large_patch14_reg4_dinov2",
        {"img_size": 224, "mlp_ratio": 5.34375, "init_values": 1e-5, **_SWIGLU},
        1024,
        mean=_HIBOU_MEAN,
        std=_HIBOU_STD,
        hub="histai/hibou-L",
        licence="Apache-2.0",
        second_hand=True,
    ),
    Backbone(
        "lunit-s16",
        "vit_small_patch16_224",
        {"dynamic_img_size": True},
        384,
        mpp=(0.25, 0.5),
        mean=_LUNIT_MEAN,
        std=_LUNIT_STD,
        hub="1aurent/vit_small_patch16_224.lunit_dino",
        gated=False,
        licence=_LUNIT,
        second_hand=True,
    ),
    Backbone(
        "lunit-s8",
        "vit_small_patch8_224",
        {"dynamic_img_size": True},
        384,
        mpp=(0.25, 0.5),
        mean=_LUNIT_MEAN,
        std=_LUNIT_STD,
        hub="1aurent/vit_small_patch8_224.lunit_dino",
        gated=False,
        licence=_LUNIT,
        second_hand=True,
    ),
    Backbone(
        "phikon",
        "vit_base_patch16_224",
        {},
        768,
        hub="owkin/phikon",
        gated=False,
        licence=_OWKIN,
    ),
    Backbone(
        "phikon-v2",
        "vit_large_patch16_224",
        {"init_values": 1e-5},
        1024,
        hub="owkin/phikon-v2",
        gated=False,
        licence=_OWKIN,
    ),
)

#: Encoder id -> what is known of it.
BACKBONES: Mapping[str, Backbone] = {backbone.encoder: backbone for backbone in _TABLE}


def known_backbone(name: str) -> Backbone | None:
    """The entry that an id or a hub name means (in any case, with or without ``hf-hub:``)."""
    plain = name.lower().removeprefix("hf-hub:").removeprefix("hf_hub:")
    for backbone in _TABLE:
        if plain in (backbone.encoder, backbone.hub.lower()):
            return backbone
    return None


def registry_table() -> str:
    """The known encoders, one line each, for ``hibio features --list``."""
    heads = ("encoder", "dim", "px", "um/px", "pooling", "weights", "licence")
    rows = [
        (
            backbone.encoder,
            str(backbone.dim),
            str(backbone.input_px),
            "/".join(f"{mpp:g}" for mpp in backbone.mpp),
            backbone.pooling,
            f"{backbone.hub}{' (gated)' if backbone.gated else ''}",
            f"{backbone.licence}{' *' if backbone.second_hand else ''}",
        )
        for backbone in _TABLE
    ]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        for row in (heads, *rows)
    ]
    lines.append("* as other projects list it; the model card decides")
    lines.append("or any timm name (resnet50), or hf-hub:ORG/NAME; --weights FILE reads local ones")
    return "\n".join(line.rstrip() for line in lines)
