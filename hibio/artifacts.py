"""What was fitted on the training slides and is not a weight, in one file (``artifacts.h5``).

Genes, TF-IDF, gene factors, gene graph and pathway anchors (docs/method.md 1-3). A store depends
on neither the pathway database nor the split; everything that does is here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from hibio.config.data import GenesConfig, PathwaysConfig
from hibio.config.files import RENAMED, ConfigError, to_dict, without_renamed
from hibio.config.schema import build_section
from pathways.anchors import PathwayAnchors, soft_targets
from pathways.database import PathwayDatabase
from preprocessing.coexpression import GeneFactors, GeneGraph, spot_vectors, standardise_global
from preprocessing.coexpression.spot_groups import SpotGroups
from preprocessing.errors import DataError
from preprocessing.files import atomic_path
from preprocessing.graphs import spatial_graph
from preprocessing.hdf5 import hdf5_writer, open_guarded
from preprocessing.selection import KeywordOverlap
from preprocessing.tfidf import TfidfReweighter, keyword_genes

SCHEMA_VERSION = 3  # 3: with scales, on which the weights depend
LARGE_BYTES = 2**20  # an array above is compressed: lists of edges are padded
_NOT_OURS = (AttributeError, TypeError, ValueError)  # a group for an array, texts for numbers...


@dataclass(frozen=True)
class FitSettings:
    """What artifacts were fitted with.

    Attributes:
        genes, pathways: sections of the configuration.
        patch_um: patch width of the training stores; None without images.
        context_um: widths of their context patches (mostly one, or none).
        modality: rna or protein.
        pretrain_slides: slides of the checkpoint that the omics tower started from.
    """

    genes: GenesConfig
    pathways: PathwaysConfig
    patch_um: float | None = None
    context_um: tuple[float, ...] = ()
    modality: str = "rna"
    pretrain_slides: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeywordScales:
    """What keyword genes look like on the training spots (docs/method.md 3, 3.1).

    Values are TF-IDF values over the mean of the spot's keyword genes.

    Attributes:
        use: (G,) training spots of which each gene is a keyword.
        mean: (G,) float32 mean of what the masked term asks of each gene.
        spread: (G,) float32 its standard deviation, above 0.
        edge_spread: spread of |r| over the pairs of a spot's keyword genes, above 0.
        edge_share: share of these pairs with an edge.
    """

    use: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    edge_spread: float
    edge_share: float

    def __post_init__(self) -> None:
        """Refuses spreads that cannot divide."""
        if not (self.spread.min(initial=1.0) > 0.0 and 0.0 < self.edge_spread < np.inf):
            raise ValueError("scales: a spread is not above 0")

    def with_genes(self, n_new: int) -> KeywordScales:
        """The same with genes behind that were no keyword of any training spot."""
        mean, spread = (
            np.append(one, np.full(n_new, np.average(one, weights=self.use + 1e-9), one.dtype))
            for one in (self.mean, self.spread)
        )
        use = np.append(self.use, np.zeros(n_new, self.use.dtype))
        return replace(self, use=use, mean=mean, spread=spread)


@dataclass(frozen=True)
class Artifacts:
    """Fitted state of one training split.

    Attributes:
        genes: (G,) vocabulary, gene names in column order.
        tfidf: fitted weighting of keyword genes, anchors and queries.
        vector_tfidf: that of the spot vector; the same object where it is the same.
        factors: gene factors F (G, r) with their training statistics.
        groups: label-free groups of spots.
        gene_graphs: strongest co-expression edges of each gene, one graph a group.
        database: the pathway database restricted to the vocabulary; None for no pathways.
        anchors: its match statistics on the training spots.
        target_genes: (H,) columns predicted from the image tower.
        node_genes: columns that may be keyword genes, or None for all (docs/method.md 1).
        train_slides: ids of the slides that everything here was fitted on.
        settings: what it was fitted with.
        n_folded_in: the last so many genes of the vocabulary were folded in after training.
        scales: of keyword genes; None in artifacts of an older HiBio.
        overlap: how well the keyword genes of training spots reproduce; None: not measured.
        seals: slide id -> its patient and the checksums of its parts, of every slide of the run
            and of the run that the omics tower started from; none in files of older versions.
    """

    genes: np.ndarray
    tfidf: TfidfReweighter
    vector_tfidf: TfidfReweighter
    factors: GeneFactors
    groups: SpotGroups
    gene_graphs: tuple[GeneGraph, ...]
    database: PathwayDatabase | None
    anchors: PathwayAnchors
    target_genes: np.ndarray
    node_genes: np.ndarray | None
    train_slides: tuple[str, ...]
    settings: FitSettings
    n_folded_in: int = 0
    scales: KeywordScales | None = None
    overlap: KeywordOverlap | None = None
    seals: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def modality(self) -> str:
        """What was measured: rna (counts) or protein (intensities)."""
        return self.settings.modality

    @property
    def trained_seals(self) -> dict[str, Mapping[str, str]]:
        """Seals of the slides that it was trained on, those before a warm start included."""
        trained = {*self.train_slides, *self.settings.pretrain_slides}
        return {slide: seal for slide, seal in self.seals.items() if slide in trained}

    @property
    def n_genes(self) -> int:
        """Size of the vocabulary; also the padding index of keyword genes."""
        return len(self.genes)

    @property
    def n_pathways(self) -> int:
        """Number of pathway anchors."""
        return len(self.anchors.names)

    def weigh(
        self, counts: sparse.csr_matrix, near: np.ndarray | None = None
    ) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """Counts (S, G) by `tfidf` and by `vector_tfidf`, (n, G) each; see `transform`."""
        tfidf = self.tfidf.transform(counts, near)
        if self.vector_tfidf is self.tfidf:
            return tfidf, tfidf
        return tfidf, self.vector_tfidf.transform(counts, near)

    def niche(self, xy_um: np.ndarray) -> np.ndarray | None:
        """Neighbours (S, N; -1 pads) whose counts weigh a spot's genes; None where none do."""
        return niche(self.settings.genes, (self.tfidf, self.vector_tfidf), xy_um)

    def keywords(self, tfidf: sparse.csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Keyword genes of each row: index (S, k) padded with G, TF-IDF value (S, k) padded 0."""
        return keywords_among(tfidf, k, self.node_genes)

    def pathway_targets(self, tfidf: sparse.csr_matrix) -> np.ndarray:
        """Soft targets (S, M) of TF-IDF rows; M may be 0."""
        if self.n_pathways == 0:
            return np.zeros((tfidf.shape[0], 0), dtype=np.float32)
        pathways = self.settings.pathways
        return soft_targets(
            self.anchors.match(tfidf),
            temperature=pathways.temperature,
            top=pathways.top,
            threshold=pathways.threshold,
        )

    def set_inputs(self, sets_MG: sparse.csr_matrix, k: int) -> tuple[np.ndarray, ...]:
        """Gene sets as the omics branch reads a spot (docs/method.md 2, anchor embedding).

        Args:
            sets_MG: unit rows, idf * weight of each set's genes, e.g. ``anchors.matrix.T``. The
                spot vector reads them by its own idf.
            k: number of keyword genes.

        Returns:
            gene (M, k), value (M, k) and vector (M, r): training statistics, then rescaled to
            the length of a typical training spot vector so that a pure profile is no outlier.
        """
        gene, value = keyword_genes(sets_MG, k)
        if sets_MG.shape[0] == 0:
            return gene, value, np.zeros((0, self.factors.rank), dtype=np.float32)
        raw = spot_vectors(self._by_vector_idf(sets_MG), self.factors)
        vector = standardise_global(raw, self.factors)
        typical = float(np.sqrt(np.sum(self.factors.spread / self.factors.spread.max())))
        length = np.linalg.norm(vector, axis=1, keepdims=True)
        return gene, value, (vector * (typical / np.maximum(length, 1e-8))).astype(np.float32)

    def _by_vector_idf(self, sets_MG: sparse.csr_matrix) -> sparse.csr_matrix:
        if self.vector_tfidf is self.tfidf:
            return sets_MG
        old, new = self.tfidf.idf, self.vector_tfidf.idf
        ratio = np.divide(new, old, out=np.zeros_like(new), where=old > 0)
        rows = sparse.csr_matrix(sets_MG @ sparse.diags_array(ratio))
        length = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
        return sparse.csr_matrix(sparse.diags_array(1 / np.where(length > 0, length, 1)) @ rows)


def niche(
    genes: GenesConfig, tfidf: Sequence[TfidfReweighter], xy_um: np.ndarray
) -> np.ndarray | None:
    """Spatial neighbours (S, N; -1 pads) if one of the weightings reads them, else None.

    The control ``graph: random`` has no niche: its spots are weighed alone.
    """
    if genes.graph == "random" or not any(one.reads_neighbours for one in tfidf):
        return None
    return spatial_graph(genes.graph, genes.neighbours, xy_um).neighbours(genes.neighbours)[0]


def keywords_among(
    tfidf: sparse.csr_matrix, k: int, node_genes: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """`Artifacts.keywords`, while artifacts are being fitted; ``node_genes`` None: of all genes."""
    if node_genes is not None:
        keep = np.zeros(tfidf.shape[1], dtype=np.float32)
        keep[node_genes] = 1.0
        tfidf = sparse.csr_matrix(tfidf @ sparse.diags(keep))
        tfidf.eliminate_zeros()
    return keyword_genes(tfidf, k)


def write_artifacts(path: Path, artifacts: Artifacts) -> None:
    """Write ``artifacts`` to one HDF5 file, atomically.

    Raises:
        OSError: the disk is full or not writable; an old file stays.
    """
    with atomic_path(path) as temporary, hdf5_writer(temporary) as (file, _):
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["settings"] = json.dumps(to_dict(artifacts.settings))
        file.attrs["train_slides"] = json.dumps(list(artifacts.train_slides))
        file["seals"] = json.dumps({slide: dict(seal) for slide, seal in artifacts.seals.items()})
        file["genes"] = artifacts.genes.astype(h5py.string_dtype())
        file["target_genes"] = artifacts.target_genes
        if artifacts.node_genes is not None:
            file["node_genes"] = artifacts.node_genes
        _write(file.create_group("tfidf"), artifacts.tfidf.state())
        if artifacts.vector_tfidf is not artifacts.tfidf:
            _write(file.create_group("vector_tfidf"), artifacts.vector_tfidf.state())
        if artifacts.overlap is not None:
            file.attrs["overlap"] = json.dumps(vars(artifacts.overlap))
        _write(file.create_group("factors"), vars(artifacts.factors))
        file.attrs["n_folded_in"] = artifacts.n_folded_in
        file["groups"] = artifacts.groups.centroids
        for number, graph in enumerate(artifacts.gene_graphs):
            _write(file.create_group(f"gene_graphs/{number}"), vars(graph))
        _write(file.create_group("anchors"), artifacts.anchors.to_arrays())
        if artifacts.scales is not None:
            _write(file.create_group("scales"), vars(artifacts.scales))
        file.attrs["has_database"] = artifacts.database is not None
        if artifacts.database is not None:
            _write_database(file.create_group("database"), artifacts.database)


def read_artifacts(path: Path) -> Artifacts:
    """Read what :func:`write_artifacts` wrote.

    Raises:
        ConfigError: the file is missing, truncated, of another schema version, or its parts do not
            fit together.
    """
    try:
        with open_guarded(path) as file:
            version = int(file.attrs["schema_version"])
            _check_version(path, version)
            artifacts = _read(file, version)
            _require_fit(artifacts)
            return artifacts
    except ConfigError:
        raise
    except (OSError, RuntimeError, LookupError, *_NOT_OURS) as error:  # torn or incomplete
        raise ConfigError(
            f"{path}: cannot be read as HiBio artifacts ({error}); "
            "the checkpoint is incomplete: use its .previous sibling or train again"
        ) from error


def _check_version(path: Path, version: int) -> None:
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{path}: artifacts schema {version}, this HiBio reads up to {SCHEMA_VERSION}; update "
            "HiBio, or use the version that wrote it"
        )
    if version < 1:
        raise ConfigError(
            f"{path}: artifacts schema {version}, and the first was 1; use the .previous sibling "
            "or train again"
        )


def _seals(text: str) -> dict[str, dict[str, str]]:
    """Slide -> part -> checksum."""
    found = json.loads(text)
    for slide, seal in found.items():
        if not all(isinstance(one, str) for one in seal.values()):
            raise ValueError(f"the seal of slide {slide} is not of texts")
    return dict(found)


def _read(file: h5py.File, version: int) -> Artifacts:
    """Schema 1 had one gene graph for all spots, always pathways, and nothing folded in."""
    first = version == 1
    factors = GeneFactors(**_read_group(file["factors"]))
    if first:
        graphs = [file["gene_graph"]]
    else:
        graphs = [file[f"gene_graphs/{number}"] for number in range(len(file["gene_graphs"]))]
    groups = np.zeros((1, factors.rank), dtype=np.float32) if first else file["groups"][:]
    settings = without_renamed(json.loads(file.attrs["settings"]), dict.fromkeys(RENAMED))
    # before genes.spot_vector, one weighting was that of all
    settings["genes"].setdefault("spot_vector", settings["genes"].get("tfidf", "log"))
    tfidf = TfidfReweighter.from_state(_read_group(file["tfidf"]))
    own = "vector_tfidf" in file
    overlap = file.attrs.get("overlap")
    return Artifacts(
        genes=file["genes"].asstr()[:].astype(str),
        tfidf=tfidf,
        vector_tfidf=TfidfReweighter.from_state(_read_group(file["vector_tfidf"]))
        if own
        else tfidf,
        factors=factors,
        groups=SpotGroups(groups),
        gene_graphs=tuple(GeneGraph(**_read_group(graph)) for graph in graphs),
        database=_read_database(file["database"]) if first or file.attrs["has_database"] else None,
        anchors=PathwayAnchors.from_arrays(_read_group(file["anchors"])),
        target_genes=file["target_genes"][:],
        node_genes=file["node_genes"][:] if "node_genes" in file else None,
        train_slides=tuple(json.loads(file.attrs["train_slides"])),
        settings=build_section(FitSettings, settings),
        n_folded_in=0 if first else int(file.attrs["n_folded_in"]),
        scales=KeywordScales(**_read_group(file["scales"])) if "scales" in file else None,
        overlap=None if overlap is None else KeywordOverlap(**json.loads(overlap)),
        seals=_seals(file["seals"].asstr()[()]) if "seals" in file else {},
    )


def _require_fit(artifacts: Artifacts) -> None:
    """Compare every part with the vocabulary; an index beyond it would read other memory.

    Raises:
        DataError: names the part.
    """
    n_genes, factors, anchors = artifacts.n_genes, artifacts.factors, artifacts.anchors
    if n_genes == 0 or len(set(artifacts.genes.tolist())) != n_genes:
        raise DataError(f"genes: {n_genes} names, expected different ones")
    graphs = {f"gene_graphs/{i}": graph for i, graph in enumerate(artifacts.gene_graphs)}
    scales = {} if artifacts.scales is None else vars(artifacts.scales)
    by_gene = {
        "tfidf": artifacts.tfidf.idf,
        "vector_tfidf": artifacts.vector_tfidf.idf,
        "factors": factors.components,
        "anchors": anchors.matrix,
        **{name: graph.weight for name, graph in graphs.items()},
        **{f"scales/{name}": scales[name] for name in ("use", "mean", "spread") if name in scales},
    }
    for name, values in by_gene.items():
        wide = 1 if name.endswith("tfidf") or name.startswith("scales") else 2
        if values.ndim != wide or values.shape[0] != n_genes:
            raise DataError(f"{name} has shape {values.shape}, the vocabulary has {n_genes} genes")
        least = 0.0 if name.endswith("tfidf") else -np.inf
        _require_finite(name, values.data if sparse.issparse(values) else values, least)
    for part in (factors, anchors):
        for name, values in vars(part).items():
            if isinstance(values, np.ndarray):
                _require_finite(name, values)
    _require_genes("target_genes", artifacts.target_genes, n_genes)
    _require_genes("node_genes", artifacts.node_genes, n_genes)
    for name, graph in graphs.items():
        _require_genes(name, graph.neighbour, n_genes + 1)  # n_genes pads
    if artifacts.groups.centroids.shape[1] != factors.rank or not graphs:
        raise DataError(f"groups are not of the {factors.rank} gene factors, or without a graph")
    if not 0 <= artifacts.n_folded_in < n_genes:
        raise DataError(f"{artifacts.n_folded_in} of {n_genes} genes were folded in")


def _require_finite(name: str, values: np.ndarray, least: float = -np.inf) -> None:
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise DataError(f"{name}: not all are finite numbers")
    if values.min(initial=0.0) < least:
        raise DataError(f"{name}: {values.min()} is below {least:g}")


def _require_genes(name: str, index: np.ndarray | None, end: int) -> None:
    """Refuse indices that are not from 0 to ``end`` - 1."""
    if index is None or (index.dtype.kind in "iu" and not index.size):
        return
    if index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= end:
        raise DataError(f"{name} names genes beyond the vocabulary")


def _write(group: h5py.Group, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            text = value.dtype.kind in "UO"
            data = value.astype(h5py.string_dtype()) if text else value
            large = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
            group.create_dataset(name, data=data, **(large if value.nbytes > LARGE_BYTES else {}))
        else:
            group.attrs[name] = json.dumps(value)


def _read_group(group: h5py.Group) -> dict[str, Any]:
    values: dict[str, Any] = {name: json.loads(text) for name, text in group.attrs.items()}
    for name, data in group.items():
        values[name] = data.asstr()[()].astype(str) if data.dtype.kind == "O" else data[()]
    return values


def _write_database(group: h5py.Group, database: PathwayDatabase) -> None:
    table = database.table
    for column in ("source", "target"):
        group[column] = table[column].to_numpy().astype(h5py.string_dtype())
    group["weight"] = table["weight"].to_numpy(dtype=np.float64)
    names = ("name", "organism", "id_type", "licence", "version", "sha256")
    meta = {name: getattr(database, name) for name in names}
    group.attrs["meta"] = json.dumps({**meta, "descriptions": dict(database.descriptions)})


def _read_database(group: h5py.Group) -> PathwayDatabase:
    table = pd.DataFrame(
        {
            "source": group["source"].asstr()[:].astype(str),
            "target": group["target"].asstr()[:].astype(str),
            "weight": group["weight"][:],
        }
    )
    meta = json.loads(group.attrs["meta"])
    sealed = meta.pop("sha256")
    database = PathwayDatabase(table=table, **meta)
    if database.sha256 != sealed:
        raise ValueError(f"the gene sets have sha256 {database.sha256}, expected {sealed}")
    return database
