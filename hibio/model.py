"""HiBio: two towers, their projections into one space, pooling into regions; no loss inside.

Nothing here depends on how spots are batched: a tile carries the halo that its core spots need.

Legend: S spots, K keyword genes, Q genes imputed together, V gene factors, R regions, M gene sets,
H target genes, D shared width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hibio.artifacts import Artifacts, read_artifacts
from hibio.batch import LevelPair, MaskedView, SlideBatch
from hibio.checkpoint import ARTIFACTS, CONFIG, MODEL_FILES, READOUT, WEIGHTS, renewed, verify_files
from hibio.config.files import ConfigError, load_saved
from hibio.config.model import ModelConfig
from hibio.data.collate import iter_tiles, with_queries
from hibio.data.dataset import image_batch, slide_of_anndata, warn_of_one
from hibio.data.fold_in import fold_in_genes
from hibio.data.slide import PreparedSlide
from hibio.encoders.base import AttentionPool, OmicsContext, mlp, refuse_code, unit_variance
from hibio.encoders.genes import OmicsMask
from hibio.encoders.omics import AnchorTable, build_omics_encoder, set_batch, sets_matrix
from hibio.encoders.vision import build_vision_encoder
from hibio.readout import predicted, read_readout
from hibio.share import (
    HUB,
    fetch_pretrained,
    push_folder,
    require_hub_name,
    share_checkpoint,
)
from preprocessing.coexpression.fold_in import FoldInReport

if TYPE_CHECKING:
    from anndata import AnnData

QUERIES = 32  # genes imputed together
MAX_SCALE = 100.0  # cap of 1 / temperature


@dataclass(frozen=True)
class SlideEmbedding:
    """Embeddings of every spot of a slide, float32, unit rows.

    Attributes:
        image: (S, D), or None without an image.
        omics: (S, D), or None without counts.
        tower: (S, width) output of the omics tower before the projection, or None.
    """

    image: np.ndarray | None
    omics: np.ndarray | None
    tower: np.ndarray | None


class HiBio(nn.Module):
    """The model of docs/method.md 3-5, on what was fitted on the training slides."""

    value_mean_G: Tensor
    value_spread_G: Tensor
    omics: Any  # towers are user-replaceable: see encoders.base
    vision: Any

    def __init__(self, config: ModelConfig, artifacts: Artifacts) -> None:
        super().__init__()
        self.config = config
        self.artifacts = artifacts
        self.folder: Path | None = None  # of the checkpoint that it was loaded from
        self.stain = config.vision.stain
        width = config.embed_dim
        n_factors = artifacts.factors.components.shape[1]
        self.omics = build_omics_encoder(config.omics, OmicsContext.of(artifacts))
        self.omics_head = mlp(self.omics.embed_dim, 2 * width, width, config.dropout)
        self.vision = None
        if config.vision.name != "none":
            self.vision = build_vision_encoder(config.vision)
            self.image_head = mlp(self.vision.embed_dim, 2 * width, width, config.dropout)
            self.expression_head = nn.Linear(width, len(artifacts.target_genes))
        self.pool = AttentionPool(width)
        if hasattr(self.omics, "encode"):
            self.decoder = mlp(2 * self.omics.embed_dim, self.omics.embed_dim, 1, 0.0)
        scales = artifacts.scales
        size = artifacts.n_genes + 1  # the last is padding
        for name, fill in (("value_mean_G", 0.0), ("value_spread_G", 1.0)):
            table_G = torch.full((size,), fill)
            if scales is not None:
                fitted = scales.mean if name == "value_mean_G" else scales.spread
                table_G[:-1] = torch.from_numpy(fitted)
            self.register_buffer(name, table_G, persistent=False)
        self.own_head = nn.Linear(width, n_factors)
        self.niche_head = nn.Linear(width, len(artifacts.target_genes))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self.log_scale_anchor = nn.Parameter(torch.tensor(-math.log(config.anchor_temperature)))
        self.anchors = AnchorTable(artifacts, width, learned=config.anchor == "table")

    @property
    def temperature(self) -> Tensor:
        """Learned temperature of the contrast, at least 0.01."""
        return 1.0 / self.log_scale.exp().clamp(max=MAX_SCALE)

    @property
    def anchor_temperature(self) -> Tensor:
        """Learned temperature of the pathway softmax, at least 0.01."""
        return 1.0 / self.log_scale_anchor.exp().clamp(max=MAX_SCALE)

    def project_omics(self, batch: SlideBatch) -> Tensor:
        """Omics embedding before normalisation, (S, D)."""
        return self.omics_head(self.omics(batch))

    def project_image(self, batch: SlideBatch) -> Tensor:
        """Image embedding before normalisation, (S, D)."""
        if self.vision is None:
            raise ConfigError("this model has no vision tower (model.vision.name is none)")
        return self.image_head(self.vision(batch))

    def forward(self, batch: SlideBatch, *, image: bool = True) -> LevelPair:
        """Unit embeddings of the core spots.

        Args:
            batch: core spots and halo.
            image: whether the image tower runs, where it finds something to read.
        """
        core = batch.core_S
        omics_SD = F.normalize(self.project_omics(batch)[core], dim=1)
        image_SD = None
        if image and self.vision is not None and batch.has_image:
            image_SD = F.normalize(self.project_image(batch)[core], dim=1)
        return LevelPair(image_SD, omics_SD, batch.slide_of_spot_S[core])

    def regions(self, spot: LevelPair, region_S: Tensor) -> tuple[LevelPair, Tensor]:
        """Embeddings of the regions ``region_S`` of the spots, by rising id; each spot's place."""
        ids, index_S = torch.unique(region_S, return_inverse=True)
        group_R = index_S.new_zeros(len(ids)).scatter_(0, index_S, spot.group)
        image_RD, omics_RD = (
            None if one is None else self.pooled(one, index_S, len(ids))
            for one in (spot.image, spot.omics)
        )
        assert omics_RD is not None
        return LevelPair(image_RD, omics_RD, group_R), index_S

    def pooled(self, spot_SD: Tensor, region_S: Tensor, n_regions: int) -> Tensor:
        """Unit region embeddings (R, D) from unit spot embeddings; the same for both towers."""
        return F.normalize(self.pool(spot_SD, region_S, n_regions), dim=1)

    def standardised(self, value_SK: Tensor, gene_SK: Tensor) -> Tensor:
        """Relative values on the scale of what the masked view predicts: each gene's own, (S, K).

        Mean 0 and standard deviation 1 over the training spots; as they are in a model of an older
        HiBio, which was trained so.
        """
        return (value_SK - self.value_mean_G[gene_SK]) / self.value_spread_G[gene_SK]

    def masked_view(self, batch: SlideBatch, mask: OmicsMask) -> MaskedView:
        """Predictions from the masked omics view (docs/method.md 3.1)."""
        if not hasattr(self.omics, "encode"):
            raise ConfigError(
                f"encoder {self.config.omics.name!r} has no masked view; leave the omics/ terms out"
            )
        spot_SD, gene_SKD = self.omics.encode(batch, mask)
        joint = torch.cat([gene_SKD, spot_SD[:, None, :].expand_as(gene_SKD)], dim=2)
        embedding_SD = self.omics_head(spot_SD)
        return MaskedView(
            self.decoder(joint).squeeze(2),
            self.own_head(embedding_SD),
            self.niche_head(unit_variance(embedding_SD)),
        )

    def expression(self, image_SD: Tensor) -> Tensor:
        """Target genes from the normalised image embedding, (S, H) standardised per slide."""
        return self.expression_head(unit_variance(image_SD))

    def anchor_embeddings(self, fresh_m: Tensor | None = None) -> Tensor:
        """Unit anchor embeddings (M, D).

        Args:
            fresh_m: pathways to encode anew, with gradient; the others come from the cache. All
                when None.
        """
        if self.anchors.table_MD is not None:
            return F.normalize(self.anchors.table_MD, dim=1)
        return self.anchors.embed(
            lambda sets: F.normalize(self.project_omics(sets), dim=1), fresh_m
        )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients; the mode before comes back."""
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.train(was_training)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.log_scale.device

    @property
    def halo(self) -> int:
        """Hops of the spatial graph that an embedding depends on."""
        return int(getattr(self.omics, "hops", 1))

    def encode_slide(
        self, slide: PreparedSlide, tile_spots: int = 1024, image_SD: np.ndarray | None = None
    ) -> SlideEmbedding:
        """Embed every spot; the result does not depend on ``tile_spots``.

        ``image_SD`` are its image embeddings where they are at hand.
        """
        image, omics, tower = [], [], []
        with self._evaluating():
            for _, batch in iter_tiles(slide, self.halo, tile_spots):
                batch = batch.to(self.device)
                if slide.has_counts:
                    tower_SD = self.omics(batch)[batch.core_S]
                    tower.append(tower_SD)
                    omics.append(F.normalize(self.omics_head(tower_SD), dim=1))
                if self.vision is not None and batch.has_image and image_SD is None:
                    image.append(F.normalize(self.project_image(batch)[batch.core_S], dim=1))
        found = [_numpy(torch.cat(x)) if x else None for x in (image, omics, tower)]
        return SlideEmbedding(found[0] if image_SD is None else image_SD, *found[1:])

    def impute(
        self, slide: PreparedSlide, genes: Sequence[str], tile_spots: int = 1024
    ) -> np.ndarray:
        """Values (S, H) that the masked decoder predicts for genes that a slide does not show.

        Args:
            slide: prepared with ``hidden=genes``, or of a panel without them.
            genes: (H,) names of the vocabulary.
            tile_spots: core spots of a tile.

        Returns:
            TF-IDF values relative to the mean of the spot's keyword genes. Trained for it with
            ``objective.query_genes`` above 0.

        Raises:
            ConfigError: a gene outside the vocabulary, or an encoder without a masked view.
        """
        position = {name: column for column, name in enumerate(self.artifacts.genes)}
        unknown = [name for name in genes if name not in position]
        if unknown:
            raise ConfigError(
                f"{len(unknown)} genes are not in the model's vocabulary ({', '.join(unknown[:3])}"
                "); fold them in first, or ask for others"
            )
        column_H = torch.tensor([position[name] for name in genes], dtype=torch.long)
        tiles = []
        with self._evaluating():
            for _, batch in iter_tiles(slide, self.halo, tile_spots):
                parts = [self._imputed(batch, column) for column in column_H.split(QUERIES)]
                tiles.append(torch.cat(parts, dim=1)[batch.core_S.to(self.device)])
        return _numpy(torch.cat(tiles))

    def _imputed(self, batch: SlideBatch, column_Q: Tensor) -> Tensor:
        """Predicted values (S, Q) of some genes for every spot of a batch."""
        gene_SQ = column_Q.expand(batch.n_spots, -1)
        value_SQ = torch.zeros(gene_SQ.shape)
        asked = dataclasses.replace(batch, query_gene_SQ=gene_SQ, query_value_SQ=value_SQ)
        asked = with_queries(asked).to(self.device)
        hidden_SK = torch.zeros(asked.gene_SK.shape, dtype=torch.bool, device=self.device)
        hidden_SK[:, -len(column_Q) :] = True
        nobody_S = torch.zeros(asked.n_spots, dtype=torch.bool, device=self.device)
        view = self.masked_view(asked, OmicsMask(hidden_SK, nobody_S))
        column_Q = column_Q.to(self.device)
        found_SQ = view.value_SK[:, -len(column_Q) :]
        return found_SQ * self.value_spread_G[column_Q] + self.value_mean_G[column_Q]

    def encode_gene_sets(self, sets: Mapping[str, Sequence[str]]) -> np.ndarray:
        """Unit embeddings (M, D) of gene sets, also ones never seen in training.

        Args:
            sets: name -> gene names of the vocabulary's id type.

        Raises:
            ConfigError: a set shares no gene with the vocabulary.
        """
        matrix = sets_matrix(sets, self.artifacts)
        k = self.artifacts.settings.genes.keyword_genes
        gene, value, vector = self.artifacts.set_inputs(matrix, k)
        batch = set_batch(gene, value, vector, self.artifacts.groups).to(self.device)
        with self._evaluating():
            embedding = F.normalize(self.project_omics(batch), dim=1)
        return _numpy(embedding)

    def encode_omics(self, adata: Any, spatial: str | None = None, layer: str = "") -> np.ndarray:
        """Unit omics embeddings (S, D) of one slide given as AnnData, in memory or backed.

        Args:
            adata: raw counts in ``X`` (else in ``layers['counts']``), gene names in ``var_names``,
                centres in micrometres in ``obsm[spatial]``.
            spatial: the key in ``obsm``; None: ``spatial_um`` where there is one, else ``spatial``.
            layer: the layer with the counts; "": as said above.

        Raises:
            ConfigError: no raw counts, no centres, or centres in pixels or millimetres.
        """
        slide = slide_of_anndata(adata, self.artifacts, spatial, layer)
        embedding = self.encode_slide(slide).omics
        assert embedding is not None
        return embedding

    def encode_image(self, image: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
        """Unit image embeddings (S, D) of the spots of ONE slide.

        Args:
            image: stored features (S, F) for a features tower, or uint8 patches (S, h, w, 3) for
                a timm tower. Both are standardised over the rows given, as in training, and
                patches are brought to the one stain that a model with one was trained on.
            context: the wider patches of the same spots, for a model that reads them.
        """
        batch = image_batch(image, self.artifacts, context, self.stain).to(self.device)
        warn_of_one(image)
        with self._evaluating():
            embedding = F.normalize(self.project_image(batch), dim=1)
        return _numpy(embedding)

    def predict(
        self, image: Any, context: np.ndarray | None = None, genes: Sequence[str] | None = None
    ) -> AnnData:
        """Expression of the spots of ONE slide from its image (docs/predict.md).

        Args:
            image: what `encode_image` takes, or an AnnData whose ``obsm`` holds the stored features
                that the tower reads under their name; its ``obs``, ``obsm`` and ``uns`` are kept.
            context: the wider patches of the same spots, for a model that reads them.
            genes: which; all that the model knows when None.

        Returns:
            ``X`` (S, T) log expression on the scale of the training spots, ``layers`` lower and
            upper, ``var`` what is known of each gene, ``obs["familiarity"]`` (NaN for patches, of
            which the model keeps no look).

        Raises:
            ConfigError: the model was not loaded from a checkpoint with a read-out, or knows a gene
                not, or the features are not there.
        """
        if self.folder is None:
            raise ConfigError("predictions need a read-out; load the model with from_checkpoint")
        readout = read_readout(self.folder / READOUT)
        return predicted(readout, image, lambda rows: self.encode_image(rows, context), genes)

    @staticmethod
    def fit(adatas: Any, images: Any = None, config: Any = None, **options: Any) -> HiBio:
        """Train on slides in memory: `hibio.fit.fit`, which says the arguments (docs/python.md)."""
        trained = import_module("hibio.fit").fit  # a door: that room stands above this one
        return cast("HiBio", trained(adatas, images, config, **options))

    @classmethod
    def from_pretrained(cls, name: Path | str) -> HiBio:
        """Load a shared model: a folder, or ``hf-hub:ORG/NAME[@REVISION]`` (docs/share.md).

        Raises:
            ConfigError: see `from_checkpoint`; or the hub has no such model.
        """
        text = str(name)
        return cls.from_checkpoint(fetch_pretrained(text) if text.startswith(HUB) else name)

    def save_pretrained(self, directory: Path | str, **options: Any) -> Path:
        """Write the model as a folder to pass on, with a card and without ids (docs/share.md).

        Args:
            directory: new or empty.
            options: ``licence`` and ``keep_ids`` of `share_checkpoint`, which also says the errors.
        """
        return share_checkpoint(self.folder, Path(directory), state=self.state_dict(), **options)

    def push_to_hub(self, name: str, *, private: bool = True, **options: Any) -> str:
        """Upload what `save_pretrained` writes as the model ``ORG/NAME``.

        Returns:
            ``hf-hub:ORG/NAME@REVISION``, for `from_pretrained`.
        """
        with TemporaryDirectory() as folder:
            place = self.save_pretrained(Path(folder) / require_hub_name(name), **options)
            return push_folder(place, name, private=private)

    @classmethod
    def from_checkpoint(cls, directory: Path | str) -> HiBio:
        """Load a checkpoint's three files; where a backbone's weights came from is not asked.

        They are compared with their checksums first (about 1 s for 1 GB).

        Raises:
            ConfigError: a file is missing, was changed or does not fit the others, or the
                settings name code that nobody here allowed (see ``encoders.base.refuse_code``).
        """
        directory = Path(directory)
        for name in MODEL_FILES:
            if not (directory / name).is_file():
                raise ConfigError(
                    f"{directory}: no {name}, so this is not a HiBio checkpoint; give the folder "
                    "that `hibio train` printed (it ends in /checkpoint)"
                )
        verify_files(directory, MODEL_FILES)
        settings, weights = directory / CONFIG, directory / WEIGHTS
        config = load_saved(ModelConfig, settings, "model")
        for encoder in (config.vision.name, config.omics.name):
            refuse_code(encoder, settings)
        vision = dataclasses.replace(config.vision, weights=None, pretrained=False)
        config = dataclasses.replace(config, vision=vision)
        artifacts = read_artifacts(directory / ARTIFACTS)
        try:
            model = cls(config, artifacts)
        except ConfigError as error:
            raise ConfigError(f"{settings}: {error}") from error
        try:
            state = load_file(weights)
            wrong = [name for name, values in state.items() if not values.isfinite().all()]
            if wrong:
                raise ConfigError(f"{len(wrong)} tensors hold NaN or infinity, such as {wrong[0]}")
            model.load_state_dict(renewed(state, model.niche_head))
        except ConfigError as error:
            raise ConfigError(f"{weights}: {error}") from error
        except Exception as error:
            raise ConfigError(
                f"{weights}: does not fit config.yaml ({error}); the checkpoint is torn: use its "
                ".previous sibling or train again"
            ) from error
        model.folder = directory
        return model.eval()

    def empty_copy(self) -> HiBio:
        """A model of the same settings and artifacts, to load a state dict into."""
        vision = dataclasses.replace(self.config.vision, weights=None, pretrained=False)
        return HiBio(dataclasses.replace(self.config, vision=vision), self.artifacts)

    def fold_in(
        self, bridge: Sequence[Path], genes: Collection[str] | None = None
    ) -> tuple[HiBio, FoldInReport]:
        """This model with genes that it never saw, and what became of each; see docs/method.md 3.

        Args:
            bridge: stores that measure known genes and the new ones.
            genes: genes of interest; all of the bridge when None.
        """
        artifacts, report = fold_in_genes(self.artifacts, bridge, genes)
        return self.with_artifacts(artifacts), report

    def with_artifacts(self, artifacts: Artifacts) -> HiBio:
        """The same weights on a larger vocabulary (genes folded in after training).

        A learned identity table has no row for a new gene: it gets the zero row of padding.
        """
        model = HiBio(self.config, artifacts).to(self.device)
        state = self.state_dict()
        table = state.get("omics.identity.weight")
        if self.config.omics.identity == "table" and table is not None:
            new_GD = table.new_zeros(artifacts.n_genes + 1, table.shape[1])
            new_GD[: len(table) - 1] = table[:-1]
            state["omics.identity.weight"] = new_GD
        model.load_state_dict(state)
        return model.train(self.training)

    def start_omics_from(self, source: HiBio) -> None:
        """Take over the omics tower and its decoder, of an omics-only or a multimodal model.

        Raises:
            ConfigError: the towers differ in a setting that shapes their weights.
        """
        own, other = (
            dataclasses.replace(c.config.omics, init_from=None, dropout=0.0, checkpoint=False)
            for c in (self, source)
        )
        if own != other:
            differ = [
                f"{f.name}: {getattr(own, f.name)} here, {getattr(other, f.name)} there"
                for f in dataclasses.fields(own)
                if getattr(own, f.name) != getattr(other, f.name)
            ]
            raise ConfigError(
                f"model.omics differs from that of model.omics.init_from ({'; '.join(differ)}); "
                "copy its model.omics section"
            )
        self.omics.load_state_dict(source.omics.state_dict())
        if hasattr(self.omics, "encode"):
            self.decoder.load_state_dict(source.decoder.state_dict())


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
