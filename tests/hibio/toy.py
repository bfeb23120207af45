"""Small models, slides and runs for the tests of the HiBio core."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from scipy import sparse

from hibio import cli, keys
from hibio.artifacts import Artifacts
from hibio.batch import LossOutput, SlideBatch
from hibio.config.data import GenesConfig, PathwaysConfig, RegionsConfig
from hibio.config.model import ModelConfig, OmicsConfig, VisionConfig
from hibio.config.run import DataConfig, RunConfig
from hibio.config.training import SamplerConfig, StageConfig
from hibio.data.collate import Views, collate
from hibio.data.slide import ExpressionRows, PreparedSlide, prepare_slide
from hibio.model import HiBio
from hibio.training.objective import Objective
from hibio.training.step_outputs import MicroBatch

GENES = GenesConfig(
    tfidf="log", keyword_genes=16, min_spots=3, rank=8, target_genes=30, graph_edges=8
)
PATHWAYS = PathwaysConfig(min_genes=5)
OMICS = OmicsConfig(width=16, layers=2, heads=2)
VISION = VisionConfig(width=24)
MODEL = ModelConfig(vision=VISION, omics=OMICS, embed_dim=16)
LEVELS = (250.0, 400.0, 800.0)
REGIONS = RegionsConfig(diameters_um=LEVELS)
FEATURES = 184  # of the handcrafted features, at two scales

MASKED = {keys.TERM_MASKED: 1.0, keys.TERM_PROFILE: 1.0, keys.TERM_NEIGHBOUR: 0.5}
SPOT = {keys.TERM_SPOT: 1.0, keys.TERM_EXPRESSION: 1.0}
REGION = {**SPOT, keys.TERM_PATHWAY: 0.25, keys.TERM_REGION: 0.25, keys.TERM_MEMBER: 0.25}


def replace_command(monkeypatch: Any, name: str, run: Callable[..., int]) -> None:
    """Let a command of ``hibio`` run something else."""
    command = dataclasses.replace(cli.COMMANDS[name], run=run)
    monkeypatch.setitem(cli.COMMANDS, name, command)


def run_config(stores: Path, out: Path, **changes: Any) -> RunConfig:
    """One epoch of the masked terms and three of all alignment terms, 2 steps an epoch."""
    stages = (
        StageConfig("omics", 1, MASKED),
        StageConfig("region", 3, REGION, rebuild_every=1),
    )
    config = RunConfig(
        out=out,
        data=DataConfig(stores),
        stages=stages,
        folds=("patient03",),
        genes=GENES,
        pathways=PATHWAYS,
        sampler=SamplerConfig(batch_spots=70),
        regions=REGIONS,
        model=MODEL,
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


def make_model(artifacts: Artifacts, *, seed: int = 0, **changes: Any) -> HiBio:
    """A random model on the handcrafted features in evaluation mode, every message switched on."""
    torch.manual_seed(seed)
    vision = dataclasses.replace(VISION, feature_dim=FEATURES)
    config = dataclasses.replace(MODEL, **{"vision": vision, **changes})
    model = HiBio(config, artifacts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "distance_bias" in name or "gate" in name:  # (nearly) off at the start
                parameter.normal_(std=0.7)
    return model.eval()


def make_slide(
    stores: Path, artifacts: Artifacts, name: str = "sim001", image: str | None = "handcrafted"
) -> PreparedSlide:
    """One prepared slide of the toy cohort."""
    return prepare_slide(stores / f"{name}.h5", artifacts, image)


def all_rows(slide: PreparedSlide) -> ExpressionRows:
    """Expression rows of every spot."""
    return slide.expression.rows(np.arange(slide.n_spots))


def regions_of(slide: PreparedSlide, width_um: float = 250.0) -> np.ndarray:
    """Squares of two sizes as regions, (2, S), numbered from 0 without gaps."""
    levels = []
    for factor in (1.0, 2.0):
        cell = np.floor(slide.xy_um / (width_um * factor)).astype(np.int64)
        levels.append(np.unique(cell, axis=0, return_inverse=True)[1].reshape(-1))
    return np.stack(levels)


def whole_batch(*slides: PreparedSlide, views: Views | None = None) -> SlideBatch:
    """Every spot of the slides as core."""
    return collate([(s, regions_of(s), np.arange(s.n_spots)) for s in slides], views=views)


def loss_of(objective: Objective, batch: SlideBatch, stage: StageConfig) -> LossOutput:
    """The stage's terms on one batch alone; draws go on from torch's global generator."""
    number_B = torch.arange(len(batch.slide_ids))
    micro = MicroBatch(
        batch, number_B, torch.zeros(len(batch.region_of_spot_LS), len(number_B)).long(), 0, 0
    )
    return objective.terms(objective.outputs(micro, stage), stage)


def permuted(batch: SlideBatch, order: np.ndarray) -> SlideBatch:
    """The same batch with its spots in another order (neighbours renumbered)."""
    place = torch.from_numpy(np.argsort(order))
    index = torch.from_numpy(order)
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value[:, index] if value.shape[0] != len(order) else value[index]
    neighbour = moved["neighbour_SN"]
    moved["neighbour_SN"] = torch.where(neighbour >= 0, place[neighbour.clamp(min=0)], -1)
    moved["region_of_spot_LS"] = batch.region_of_spot_LS[:, index]
    return dataclasses.replace(batch, **moved)


def edit_store(source: Path, target: Path, edit: Callable[[h5py.File], None]) -> Path:
    """A copy of a store with something changed inside."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    with h5py.File(target, "r+") as file:
        edit(file)
    return target


def redraw_counts(file: h5py.File) -> None:
    """Other counts of the same shape."""
    group = file["counts"]
    data = group["data"][:]
    group["data"][:] = np.random.default_rng(5).integers(1, 50, len(data)).astype(data.dtype)


def rename_genes(names: Iterable[str]) -> Callable[[h5py.File], None]:
    """An edit that gives a store's genes other names."""

    def edit(file: h5py.File) -> None:
        for key in ("name", "id"):
            del file[f"genes/{key}"]
            file[f"genes/{key}"] = np.array(list(names), dtype=h5py.string_dtype())

    return edit


def keep_genes(file: h5py.File, n_genes: int) -> None:
    """Only the first genes of a store."""
    group = file["counts"]
    shape = tuple(group.attrs["shape"])
    parts = (group["data"][:], group["indices"][:], group["indptr"][:])
    counts = sparse.csr_matrix(parts, shape=shape)[:, :n_genes].tocsr()
    for name in ("data", "indices", "indptr"):
        del group[name]
        group[name] = getattr(counts, name)
    group.attrs["shape"] = counts.shape
    for key in ("genes/name", "genes/id"):
        names = file[key].asstr()[:n_genes]
        del file[key]
        file[key] = names.astype(h5py.string_dtype())


def make_protein(file: h5py.File) -> None:
    """Counts become intensities of proteins."""
    group = file["counts"]
    data = group["data"][:].astype(np.float32) * 1.5
    del group["data"]
    group["data"] = data
    file.attrs["modality"] = "protein"


def dense(matrix: sparse.spmatrix) -> np.ndarray:
    """A sparse matrix as an array of float64."""
    return np.asarray(matrix.toarray(), dtype=np.float64)


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 1 and one line that says all of this."""
    code, _, told = result
    assert code == 1, told
    lines = [line for line in told.splitlines() if line.startswith("hibio:")]
    assert len(lines) == 1, told
    assert told.splitlines()[-1] == lines[0]
    assert "Traceback" not in told
    for word in words:
        assert word in lines[0]
