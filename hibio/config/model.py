"""The model section of a configuration: both towers, and how the image of a spot is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from hibio.config.files import ConfigError
from hibio.config.schema import Dropout, Range, Size, Temperature
from preprocessing.stain import StainMethod

#: Value of ``data.image`` that reads patches from the store (for a timm tower).
PATCHES = "patches"


@dataclass(frozen=True)
class ImageInput:
    """What a vision tower asks of the data.

    Attributes:
        key: a stored feature key ("handcrafted"), or ``patches``.
        context: read the wider patches of each spot too.
        stain: none | macenko | reinhard: bring the patches of each slide to one stain as they are
            read.

    Raises:
        ConfigError: context or stain of stored features, which nothing can be done to.
    """

    key: str
    context: bool = False
    stain: StainMethod = "none"

    def __post_init__(self) -> None:
        if self.key == PATCHES:
            return
        if self.context:
            raise ConfigError(
                f"model.vision.context is patch, but data.image reads the stored features "
                f"{self.key!r}; set data.image: {PATCHES}, or store features of both scales: hibio "
                "features --scale both"
            )
        if self.stain != "none":
            raise ConfigError(
                f"model.vision.stain is {self.stain}, but data.image reads the stored features "
                f"{self.key!r}, whose patches are past changing; set data.image: {PATCHES}, or "
                f"store features of normalised patches: hibio features --stain {self.stain}"
            )


def _refuse_settings(name: str, settings: Mapping[str, Any]) -> None:
    if settings and ":" not in name:
        raise ValueError(
            f"settings ({', '.join(settings)}) are of an encoder package.module:Class; {name!r} "
            "has its keys in this section"
        )


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    Attributes:
        name: features (stored ones, e.g. handcrafted or a frozen backbone's) | timm |
            package.module:Class.
        width: hidden and output width of the features tower.
        dropout: of the features tower, on its input and hidden layer.
        timm_name: model of the timm tower: an encoder of ``hibio features --list``, or a timm name
            such as ``vit_small_patch16_224``, ``resnet50``, ``hf-hub:ORG/NAME``.
        pretrained: ask the hub for its weights (needs them cached, or the network).
        weights: local weights file (safetensors, or a plain state dict) instead.
        input_px: side of the square that the backbone reads, pixels; null: what it was made for
            (position embeddings are resampled, patches always).
        tune: what of the backbone is trained: all | none | last_n (its last ``tune_blocks``
            blocks) | lora (additions of rank ``lora_rank`` to its attention layers).
        tune_blocks: of tune: last_n.
        lora_rank: of tune: lora.
        lr_scale: learning rate of the backbone over that of the rest; 0.1 is usual for pretrained
            weights that are trained themselves, 1 for LoRA.
        checkpoint: compute the backbone's blocks again in the backward pass instead of keeping
            what they computed: less memory for about a third more time.
        standardise: slide (per-slide stain mean and sd) | pretrained (the model's own constants).
        stain: none | macenko | reinhard: the patches of every slide are brought to one stain when
            they are read; measured on the slide alone.
        context: none | neighbours (the features tower also reads the mean of the spatial
            neighbours' features; the retrieved item is then a niche on both sides, see
            docs/method.md) |
            patch (the timm tower also encodes the wider patch of the spot, from stores prepared
            with a context, and puts both side by side).
        feature_dim: F, filled in from the stores.
        settings: arguments of the constructor of a package.module:Class.
    """

    name: str = "features"
    width: Size = 256
    dropout: Dropout = 0.2
    timm_name: str = "resnet10t"
    pretrained: bool = False
    weights: Path | None = None
    input_px: Annotated[int, Range(14, 8192)] | None = None
    tune: Literal["all", "none", "last_n", "lora"] = "all"
    tune_blocks: Annotated[int, Range(1, 1000)] = 2
    lora_rank: Annotated[int, Range(1, 1024)] = 8
    lr_scale: Annotated[float, Range(0, 10, "low")] = 1.0
    checkpoint: bool = False
    standardise: Literal["slide", "pretrained"] = "slide"
    stain: StainMethod = "none"
    context: Literal["none", "neighbours", "patch"] = "none"
    feature_dim: Annotated[int, Range(1, 65_536)] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_settings(self.name, self.settings)
        of_tower = {"tune": self.tune in ("last_n", "lora"), "checkpoint": self.checkpoint}
        of_tower |= {"input_px": self.input_px is not None, "lr_scale": self.lr_scale != 1.0}
        given = [name for name, used in of_tower.items() if used]
        if given and self.name != "timm":
            raise ValueError(
                f"{', '.join(given)}: of a backbone that reads patches, and name is {self.name!r}; "
                "set name: timm with data.image: patches, or leave it out"
            )
        if self.tune == "none" and (self.checkpoint or self.lr_scale != 1.0):
            raise ValueError(
                "checkpoint and lr_scale are of a backbone that is trained, and tune is none; "
                "leave them out, or set tune to lora, last_n or all"
            )

    def require_weights(self) -> None:
        """Refuse to train a part of a backbone whose rest would stay random.

        Raises:
            ValueError: ``tune`` is last_n or lora, and there are no weights.
        """
        if self.tune in ("last_n", "lora") and not self.pretrained and self.weights is None:
            raise ValueError(
                f"model.vision.tune: {self.tune} keeps most of the backbone as it is, and it has "
                "no weights: set model.vision.weights: FILE (or pretrained: true), or tune: all"
            )

    def image_input(self, key: str | None) -> ImageInput | None:
        """How a slide is to be read, for ``data.image: key`` of the run; None: without its image.

        Raises:
            ConfigError: context or stain of stored features.
        """
        return None if key is None else ImageInput(key, self.context == "patch", self.stain)


@dataclass(frozen=True)
class OmicsConfig:
    """The omics tower.

    Attributes:
        name: graph_hierarchy | mlp (baseline) | package.module:Class.
        variant: of graph_hierarchy: hibio (docs/method.md 3) | heist (the arithmetic of the
            published v2 encoder, for comparison; it reads a whole slide at once).
        width: d.
        layers: L.
        heads: attention heads; divides width.
        dropout: everywhere.
        identity: what tells genes apart: factors (vocabulary-free) | table (learned, bound to the
            vocabulary) | none.
        skip: the spot vector enters the spot token (docs/method.md 3).
        gene_graph: co-expression as attention bias.
        spatial_graph: attention over the spatial neighbours.
        cross: messages between genes and spots.
        init_from: a checkpoint, omics-only or multimodal, whose omics tower is the start.
        checkpoint: keep only the tokens between layers while training, and compute the layers
            again in the backward pass: less memory for about a third more time (graph_hierarchy).
        rank_code: of variant heist, how a gene's rank is written: fixed (the published switch
            ``rank_pe_fixed``, a sinusoid of the rank) | released (of the released checkpoint).
        settings: arguments of the constructor of a package.module:Class.
    """

    name: str = "graph_hierarchy"
    variant: Literal["hibio", "heist"] = "hibio"
    width: Size = 192
    layers: Annotated[int, Range(1, 256)] = 4
    heads: Annotated[int, Range(1, 1024)] = 6
    dropout: Dropout = 0.1
    identity: Literal["factors", "table", "none"] = "factors"
    skip: bool = True
    gene_graph: bool = True
    spatial_graph: bool = True
    cross: bool = True
    init_from: Path | None = None
    checkpoint: bool = False
    rank_code: Literal["fixed", "released"] = "fixed"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_settings(self.name, self.settings)
        if self.checkpoint and (self.name, self.variant) != ("graph_hierarchy", "hibio"):
            raise ValueError(
                "checkpoint is of the layers of name: graph_hierarchy, variant: hibio; leave it out"
            )
        if self.rank_code != "fixed" and (self.name, self.variant) != ("graph_hierarchy", "heist"):
            raise ValueError("rank_code is of name: graph_hierarchy, variant: heist; leave it out")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True)
class ModelConfig:
    """Both towers and the shared space.

    Attributes:
        vision: see :class:`VisionConfig`; ``name: none`` for counts alone.
        omics: see :class:`OmicsConfig`.
        embed_dim: D.
        dropout: of the projections.
        temperature: first value of the learned contrast temperature.
        anchor_temperature: first value of the learned anchor temperature.
        anchor: omics (a pathway goes through the omics branch) | table (learned, the baseline).
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    omics: OmicsConfig = field(default_factory=OmicsConfig)
    embed_dim: Size = 128
    dropout: Dropout = 0.1
    temperature: Temperature = 0.1
    anchor_temperature: Temperature = 0.1
    anchor: Literal["omics", "table"] = "omics"
