"""Train from Python on slides in memory: what `hibio prepare` and `hibio train` do, in one call.

The slides become files and stores in the folder of the run, so a run from Python is a run like any
other: it can be resumed, evaluated, queried and shared (docs/python.md).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from PIL import Image

from eval.embed import load_checkpoint
from eval.predict import readout_of
from hibio import keys
from hibio.bank import has_bank
from hibio.checkpoint import WEIGHTS
from hibio.config.files import ConfigError, load_config, merge, to_dict
from hibio.config.run import RunConfig
from hibio.config.schema import SchemaError, build_section
from hibio.data.splits import read_entries
from hibio.model import HiBio
from hibio.run import train_all
from preprocessing import prepare
from preprocessing.errors import DataError
from preprocessing.files import atomic_path
from preprocessing.hdf5 import write_h5ad
from preprocessing.manifest import parse_cell
from preprocessing.patches import PatchConfig
from preprocessing.slide_row import COLUMNS, SlideRow, drafted_row
from preprocessing.store.read import stores_in

STORES, SLIDES = "stores", "slides"  # folders of a run from Python
_TERMS = {keys.TERM_SPOT: 1.0, keys.TERM_EXPRESSION: 1.0}
_OMICS = {keys.TERM_MASKED: 1.0, keys.TERM_PROFILE: 1.0, keys.TERM_NEIGHBOUR: 0.5}


def fit(
    adatas: anndata.AnnData | Sequence[anndata.AnnData] | Mapping[str, anndata.AnnData],
    images: Any = None,
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path | None = None,
    patch: PatchConfig | None = None,
    resume: bool = False,
    **columns: Any,
) -> HiBio:
    """Train one model; `HiBio.fit` is the same.

    Args:
        adatas: one section each, as `hibio prepare` reads an .h5ad: raw counts, genes in
            ``var_names``, centres in ``obsm["spatial"]`` in pixels of the image (or in
            ``obsm["spatial_um"]``). By slide id, or in order: slide1, slide2, ...
        images: the slide images, by slide id or in order: files, or uint8 arrays (h, w, 3). None:
            the pictures in ``uns["spatial"]`` where there are any, else counts alone.
        config: settings of the run, as a file, a mapping of those that differ from the defaults, or
            typed; None: towers of the default size on spots alone.
        out: folder of the run; None: that of the settings, else ``runs/python``.
        patch: size of the patches.
        resume: go on in a folder that holds a run.
        columns: further columns of the manifest (docs/data.md): one value for all slides, or by
            slide id, or in order, such as ``mpp=0.5, patient_id=["A", "B"]``; None or NaN is not
            said. Each slide is a patient of its own unless said.

    Returns:
        The model, in evaluation mode, with its reference bank and read-out where it reads images.

    Raises:
        ConfigError: settings or columns that cannot be used, something that is no AnnData, more
            than one model asked for, or a folder that holds a run of other slides, or this one.
        DataError: a slide that cannot be prepared; the others are, and kept.
    """
    said = _said(config)
    out = Path(out or said.get("out", "runs/python"))
    _config(said, out, True)  # what cannot be is told before the work
    slides = _by_slide("adatas", [adatas] if hasattr(adatas, "obsm") else adatas)
    trained = any(out.glob(f"*/fold-*/seed-*/**/{WEIGHTS}")) and any((out / STORES).glob("*.h5"))
    with tempfile.TemporaryDirectory(prefix=".fit-", dir=out if trained else None) as beside:
        place = Path(beside) if trained else out
        rows = _rows(slides, images, place / SLIDES, columns)
        pictured = _prepare(rows, place / STORES, patch)
        if trained:  # so what is there stays as it is
            _require_same(out, place)
    checkpoints = train_all(_config(said, out, pictured), resume=resume)
    write_readouts(checkpoints)
    return HiBio.from_checkpoint(checkpoints[0])


def _prepare(rows: Sequence[SlideRow], stores: Path, patch: PatchConfig | None) -> bool:
    """Whether a slide has a picture; all of them are stores then."""
    report = prepare(rows, stores, patch=patch)
    if report.failed:
        told = "; ".join(f"{row.slide_id}: {row.reason}" for row in report.failed)
        raise DataError(f"{len(report.failed)} of {len(rows)} slides cannot be prepared: {told}")
    return any(row.patch_um for row in report.rows)


def _require_same(run: Path, given: Path) -> None:
    """The slides that are given must be those that the run has.

    Raises:
        ConfigError: names those that are not, or no longer.
    """
    was, now = (
        {one.slide_id: (one.patient_id, one.parts) for one in read_entries(stores_in(of / STORES))}
        for of in (run, given)
    )
    odd = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    if odd:
        raise ConfigError(
            f"{run} holds a run of other slides ({', '.join(odd[:4])}: gone, new, or of other "
            "content); give those that it was trained on, or another folder with out=DIR"
        )


def write_readouts(checkpoints: Sequence[Path]) -> None:
    """What `hibio predict` reads, into every checkpoint that has a reference bank."""
    for path in checkpoints:
        if has_bank(path):
            readout_of(load_checkpoint(path))


def _by_slide(what: str, given: Any, slides: Sequence[str] | None = None) -> dict[str, Any]:
    """Values by slide id; those in order are named, or get the names of ``slides``."""
    if not isinstance(given, Mapping):
        values = list(given)
        names = [f"slide{n}" for n in range(1, len(values) + 1)] if slides is None else slides
        if len(values) != len(names):
            raise ConfigError(f"{what}: {len(values)} given for {len(names)} slides; one a slide")
        return dict(zip(names, values, strict=True))
    unknown = [] if slides is None else [name for name in given if name not in slides]
    if unknown:
        raise ConfigError(f"{what}: no slide {unknown[0]!r} (slides: {', '.join(slides or ())})")
    return dict(given)


def _rows(
    slides: Mapping[str, anndata.AnnData], images: Any, folder: Path, columns: Mapping[str, Any]
) -> list[SlideRow]:
    """The manifest: a file a slide, written into the folder, and its picture."""
    names = list(slides)
    if not names:
        raise ConfigError("adatas is empty; give one AnnData a section")
    for name, adata in slides.items():
        if not isinstance(adata, anndata.AnnData):
            raise ConfigError(
                f"adatas: {name} is a {type(adata).__name__}, expected AnnData (anndata.read_h5ad)"
            )
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise ConfigError(f"{unknown[0]}: no column of a manifest ({', '.join(COLUMNS)})")
    several = (Mapping, list, tuple, np.ndarray, pd.Series)
    known = {
        name: _by_slide(name, value if isinstance(value, several) else [value] * len(names), names)
        for name, value in columns.items()
    }
    pictures = {} if images is None else _by_slide("images", images, names)
    rows = []
    for name, adata in slides.items():
        path = folder / f"{name}.h5ad"
        with atomic_path(path) as temporary:
            write_h5ad(temporary, adata.to_memory())  # a copy, whose texts become categories
        more = {
            column: _cell(column, of[name])
            for column, of in known.items()
            if name in of and not pd.isna(of[name])
        }
        if name in pictures:
            more["image"] = _picture(pictures[name], folder / f"{name}.tif")
        rows.append(dataclasses.replace(drafted_row(name, path, "h5ad"), slide_id=name, **more))
    return rows


def _cell(column: str, value: Any) -> Any:
    """What a value says in a column of the manifest."""
    try:
        return parse_cell(column, str(value), Path())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _picture(image: Any, path: Path) -> Path:
    """A picture as a file."""
    if isinstance(image, str | Path):
        return Path(image)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ConfigError(
            f"images: {pixels.dtype} {pixels.shape}; expected a file, or an array uint8 (h, w, 3)"
        )
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary)
    return path


def _said(config: RunConfig | Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """The settings that were given, as plain values."""
    if isinstance(config, str | Path):
        config = load_config(RunConfig, config)
    return to_dict(config) if isinstance(config, RunConfig) else dict(config or {})


def _config(said: Mapping[str, Any], out: Path, pictured: bool) -> RunConfig:
    """The settings of the one training that is asked for."""
    stage = {"name": "spot", "epochs": 30, "lr": 1e-3, "weights": _TERMS if pictured else _OMICS}
    base: dict[str, Any] = {"folds": ["none"], "stages": [stage]}
    place = {"out": str(out), "data": {"stores": str(out / STORES)}}
    try:
        config = build_section(RunConfig, merge(merge(base, said), place))
    except SchemaError as problem:
        raise ConfigError(f"config: {problem}") from problem
    if config.folds == ("each",):
        config = dataclasses.replace(config, folds=("none",))
    asked = (len(config.folds), len(config.seeds), 1 + len(config.variants))
    if asked != (1, 1, 1):
        raise ConfigError(
            f"config asks for {asked[0]} folds, {asked[1]} seeds and {asked[2] - 1} variants, and "
            "HiBio.fit trains one model: leave one of each and no variant, or use `hibio train`"
        )
    return config
