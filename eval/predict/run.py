"""Virtual spatial transcriptomics: stores or slide images in, expression with its reliability out.

Shapes: S spots, T genes or gene sets.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from tqdm import tqdm

from eval.embed import (
    Checkpoint,
    checked,
    image_embedding,
    image_regions,
    load_checkpoint,
    one_checkpoint,
)
from eval.predict.fit import gene_set_readout, readout_of
from eval.tables import (
    H5AD,
    hashes_of,
    lay_out,
    open_folder,
    refuse_folder,
    require_finite,
    table_path,
    write_table,
)
from hibio.backbones.features import features_report
from hibio.config.files import ConfigError
from hibio.data.splits import SlideEntry, read_entries, with_images
from hibio.data.stored_features import StoredFeatures, blocks, standardise_columns
from hibio.keys import UNS
from hibio.readout import (
    MIN_RELIABILITY,
    Readout,
    add_labels,
    verdict,
)
from pathways.files import read_text
from preprocessing import prepare
from preprocessing.errors import DataError
from preprocessing.files import file_sha256, files_in
from preprocessing.patches import PatchConfig
from preprocessing.readers.tissue_grid import SLIDE_SUFFIXES
from preprocessing.run.preparation import HANDCRAFTED
from preprocessing.scale import MPP
from preprocessing.slide_row import IMAGE_ONLY, SlideRow, drafted_row
from preprocessing.slides import open_slide
from preprocessing.slides.ome_zarr import is_zarr
from preprocessing.store import SlideStore
from preprocessing.workers import each

PICTURES = (
    *SLIDE_SUFFIXES,
    ".tif",
    ".tiff",
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".jp2",
    ".j2k",
    ".czi",
)
ALL = "all"


@dataclass(frozen=True)
class Wanted:
    """What `hibio predict` is asked for.

    Attributes:
        genes: "all", a file with a gene a line, or names.
        gene_sets: anything that `pathways.load_pathways` takes; None for no sets.
        min_reliability: genes below are written and marked as not trusted.
        mpp: micrometres per pixel of slide images that do not say it.
        labels: predict the labels of the training slides too.
        regions: the region of each spot at every level too, as the image alone gives them.
        weights: of the frozen encoder whose features the model reads, for slide images.
        form: of the tables, one of `keys.TABLES`.
    """

    genes: tuple[str, ...] = (ALL,)
    gene_sets: str | None = None
    min_reliability: float = MIN_RELIABILITY
    mpp: float | None = None
    labels: bool = False
    regions: bool = False
    weights: Path | None = None
    form: str = H5AD

    @property
    def names(self) -> tuple[str, ...] | None:
        """The genes asked for; None for all.

        Raises:
            ConfigError: no gene is named, or a number that is asked for is none that can be.
            PathwayError: a file that is no text.
        """
        low, high = MPP
        if self.mpp is not None and not low <= self.mpp <= high:
            raise ConfigError(
                f"--mpp is {self.mpp}, expected micrometres a pixel from {low:g} to {high:g}"
            )
        if not -1.0 <= self.min_reliability <= 1.0:
            raise ConfigError(f"--min-reliability is {self.min_reliability}, expected -1 to 1")
        if self.genes == (ALL,):
            return None
        if len(self.genes) == 1 and Path(self.genes[0]).is_file():
            found = tuple(re.findall(r"[^\s,]+", read_text(self.genes[0])))
        else:
            named = (name.strip() for text in self.genes for name in text.split(","))
            found = tuple(filter(None, named))
        if not found:
            raise ConfigError(f"{self.genes[0]!r} names no gene; write one a line")
        return found


def predict_folder(
    checkpoint_path: Path,
    data: Sequence[Path],
    out: Path,
    wanted: Wanted | None = None,
    *,
    workers: int = 0,
    scheduler: str | None = None,
) -> list[Path]:
    """Write ``<out>/<slide_id>.predict.h5ad`` for every slide with an image; whole ones are kept.

    Args:
        checkpoint_path: one checkpoint, or a run that holds one.
        data: folders of stores, stores, slide images, folders of images.
        out: folder; stores of slide images are made in ``<out>/stores``.
        wanted: what to predict.
        workers: processes, each on one slide at a time; see `preprocessing.workers.each`.
        scheduler: address of a Dask cluster that takes their place.

    Raises:
        ConfigError: no slide with an image, an unknown gene, a checkpoint without what it needs, or
            a file in ``out`` that `predict` did not make.
        DataError: slide images that cannot be prepared; the others are predicted first.
    """
    wanted = wanted or Wanted()
    names = wanted.names
    checkpoint = load_checkpoint(one_checkpoint(checkpoint_path))
    refuse_folder(out, wanted.form)
    readout = readout_of(checkpoint)
    if wanted.labels and not readout.labels:
        raise ConfigError(
            f"{checkpoint.path} predicts no labels: none of its training slides has two classes of "
            "one, or its read-out is of an older HiBio (then remove readout.h5: it is fitted again "
            "where the training stores are); leave --labels out, or train on annotated slides"
        )
    chosen = readout if names is None else readout.of(names)
    if wanted.gene_sets is not None:
        chosen = chosen.beside(gene_set_readout(checkpoint, readout, wanted.gene_sets))
    open_folder(out, wanted.form)
    elsewhere = (workers, scheduler)
    stores, failed = _stores(checkpoint, readout, data, out / "stores", wanted, elsewhere)
    entries = with_images(read_entries(stores) if stores else (), "predict")
    if not entries and not failed:
        raise ConfigError(f"{', '.join(map(str, data))}: no slide with an image")
    checked(checkpoint, entries)
    if workers or scheduler:
        rest = replace(wanted, mpp=None, weights=None)  # the stores were made with them
        call = partial(predict_folder, checkpoint_path, out=out, wanted=rest)
        each({e.slide_id: partial(call, [e.path]) for e in entries}, *elsewhere, "predict")
    written = [
        _predict_slide(checkpoint, entry, chosen, out, wanted)
        for entry in tqdm(entries, desc="predict", unit="slide", disable=None)
    ]
    if failed:
        raise DataError(f"{len(failed)} slide(s) could not be read: {'; '.join(failed)}")
    return written


def _predict_slide(
    checkpoint: Checkpoint, entry: SlideEntry, readout: Readout, out: Path, wanted: Wanted
) -> Path:
    target = table_path(out, f"{entry.slide_id}.predict", wanted.form)
    asked = [readout.names.tolist(), wanted.gene_sets, wanted.min_reliability]
    asked += ["labels"] * wanted.labels + ["regions"] * wanted.regions
    with SlideStore(entry.path) as store:
        made_of = {
            "checkpoint_sha256": checkpoint.sha256,
            "store_sha256": store.sha256,
            "asked_sha256": hashlib.sha256(
                json.dumps(asked).encode() + readout.weights.tobytes()
            ).hexdigest(),
        }
        if hashes_of(target, "asked_sha256") == made_of:
            return target
        features = StoredFeatures.of(store, readout.features) if readout.features else None
        familiarity = _familiarity(store, readout)
        adata = anndata.AnnData(
            obs=pd.DataFrame(index=pd.Index(store.barcodes)),
            var=readout.var(wanted.min_reliability),
        )
        lay_out(adata, store)
    embedding = image_embedding(checkpoint, entry.path)
    require_finite(entry.slide_id, {"image embedding": embedding})
    if wanted.regions:
        for column, names in image_regions(checkpoint, entry.path, embedding).items():
            adata.obs[column] = names
    embedding = standardise_columns(embedding)
    adata.obs["familiarity"] = familiarity
    told = verdict(familiarity)
    if told:
        tqdm.write(f"{entry.slide_id}: {told}")
    adata.uns[UNS] = {
        **made_of,
        "slide_id": entry.slide_id,
        "trained_on": sorted(checkpoint.model.artifacts.train_slides),
        "values": "log expression, on the scale of the training spots",
        "coverage": readout.coverage,
        "reliability": readout.words,
        "familiarity": told,
    }

    def inputs(part: slice) -> np.ndarray:
        read = None if features is None else features[part]
        return readout.joined(read, embedding[part])

    if wanted.labels:
        add_labels(adata, readout, map(inputs, blocks(len(embedding))))

    def rows(part: slice) -> Mapping[str, np.ndarray]:
        found = readout.values(inputs(part))
        width = readout.width.astype(np.float32)
        return {"X": found, "layers/lower": found - width, "layers/upper": found + width}

    write_table(target, adata, rows)
    return target


def _familiarity(store: SlideStore, readout: Readout) -> np.ndarray:
    """How much each patch (S,) looks like the training slides; NaN where that is not known."""
    if readout.look is None:
        return np.full(store.n_spots, np.nan)
    name = readout.features or HANDCRAFTED
    parts = (store.features(name, part) for part in blocks(store.n_spots))
    return np.concatenate([readout.look.familiarity(part) for part in parts])


def _stores(
    checkpoint: Checkpoint,
    readout: Readout,
    data: Sequence[Path],
    folder: Path,
    wanted: Wanted,
    elsewhere: tuple[int, str | None],
) -> tuple[list[Path], list[str]]:
    """Stores of what was given, made where it is a slide image; and what could not be read."""
    stores, pictures = _given(data)
    if not pictures:
        unused = {"mpp": wanted.mpp, "weights": wanted.weights}
        for option in (name for name, value in unused.items() if value is not None):
            raise ConfigError(
                f"--{option} is for slide images, and of {', '.join(map(str, data))} stores are "
                "read, which were prepared with theirs; leave it out"
            )
        return stores, []
    computed = readout.features not in ("", HANDCRAFTED)
    if wanted.weights is not None and not computed:
        raise ConfigError(
            f"--weights is for an encoder, and {checkpoint.path} reads "
            f"{readout.features or 'patches'}; leave it out"
        )
    rows = _rows(pictures, wanted.mpp)
    _refuse_trained(checkpoint, rows)
    _refuse_another(rows, folder)
    made, failed = _prepared(checkpoint, readout, rows, folder, elsewhere)
    if made and computed:
        source = readout.source
        report = features_report(
            made,
            source.get("encoder", readout.features),
            weights=wanted.weights,
            scale=source.get("scale", "spot"),
            stain=source.get("stain", "none"),
            input_px=source.get("input_px"),
            workers=elsewhere[0],
            scheduler=elsewhere[1],
        )
        failed += [f"{row.path.stem}: {row.note}" for row in report.failed]
        made = [path for path in made if path not in [row.path for row in report.failed]]
    return stores + made, failed


def _given(data: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Stores, and slide images; of a folder that holds both the stores alone.

    Raises:
        DataError: a path that is not there, or a folder that holds neither.
    """
    stores: list[Path] = []
    pictures: list[Path] = []
    for path in data:
        if path.is_dir() and not is_zarr(path):
            found = files_in(path, "*.h5")
            stores += found
            inside = [p for p in files_in(path) if p.suffix.lower() in PICTURES]
            inside += sorted(p for p in path.glob("[!.]*") if is_zarr(p))
            pictures += [] if found else inside
            if found and inside:
                tqdm.write(
                    f"{path}: its {len(found)} stores are read, not its {len(inside)} pictures"
                )
            if not found and not inside:
                raise DataError(f"{path}: neither stores (*.h5) nor slide images in there")
        elif path.suffix == ".h5":
            stores.append(path)
        elif not path.exists():
            raise DataError(f"{path} is not there; --data takes stores, slide images, or folders")
        else:
            pictures.append(path)
    return stores, pictures


def _refuse_trained(checkpoint: Checkpoint, rows: Sequence[SlideRow]) -> None:
    """A picture gets the name of its file as slide id, which may not be that of a training slide.

    Raises:
        ConfigError: it is; says both ways out.
    """
    trained = [row for row in rows if row.slide_id in checkpoint.model.artifacts.train_slides]
    for row in trained[:1]:
        more = f", and {len(trained) - 1} more" * (len(trained) > 1)
        raise ConfigError(
            f"{row.image} would be the slide {row.slide_id!r}, a name that {checkpoint.path} was "
            f"trained on{more}. If it is another slide, rename the file; if it is that one, give "
            f"its store instead: --data STORES/{row.slide_id}.h5"
        )


def _refuse_another(rows: Sequence[SlideRow], folder: Path) -> None:
    """What was predicted of a slide is not lost to another one of the same name.

    Raises:
        ConfigError: the store of a slide was made of another picture.
    """
    for row in rows:
        store, known = folder / f"{row.slide_id}.h5", None
        if store.is_file():
            odd = (DataError, KeyError, AttributeError, TypeError)  # such a store is made anew
            with suppress(*odd), SlideStore(store) as old:
                known = old.attrs["source_sha256"].get("image")
        if known is not None and row.image is not None and known != file_sha256(row.image):
            raise ConfigError(
                f"{row.image} would be the slide {row.slide_id!r}, and {store} was made of another "
                "picture; give another --out, rename the picture, or remove that store"
            )


def _rows(pictures: Sequence[Path], mpp: float | None) -> list[SlideRow]:
    """A manifest row a slide image.

    Raises:
        ConfigError: two of one name, or one that does not say its resolution.
    """
    rows: dict[str, SlideRow] = {}
    for path in pictures:
        row = drafted_row(path.stem, None, IMAGE_ONLY, image=path, mpp=mpp)
        if row.slide_id in rows:
            raise ConfigError(
                f"{path} and {rows[row.slide_id].image} are two slides of the name "
                f"{row.slide_id!r}, which names the output; rename one, or give each an --out"
            )
        with open_slide(path) as slide:
            if mpp is None and slide.mpp is None:
                raise ConfigError(
                    f"{path} does not say how large a pixel is. Three ways out: --mpp UM "
                    "(micrometres a pixel: about 0.25 for a scan at 40x, 0.5 at 20x); a file that "
                    "states it, as the scanner wrote it; or a manifest with the column mpp, "
                    "prepared with `hibio prepare`, and its stores as --data"
                )
        rows[row.slide_id] = row
    return list(rows.values())


def _prepared(
    checkpoint: Checkpoint,
    readout: Readout,
    rows: Sequence[SlideRow],
    folder: Path,
    elsewhere: tuple[int, str | None],
) -> tuple[list[Path], list[str]]:
    settings = checkpoint.model.artifacts.settings
    assert checkpoint.image_input is not None
    wide = settings.context_um[0] if checkpoint.image_input.context else None
    patch = PatchConfig(settings.patch_um, int(readout.source["patch_px"]), wide)
    workers, scheduler = elsewhere
    report = prepare(rows, folder, patch=patch, workers=workers, scheduler=scheduler)
    made = [folder / f"{row.slide_id}.h5" for row in report.rows if row.status != "failed"]
    for path in made:
        with SlideStore(path) as store:
            for doubt in store.warnings:
                told = f"{path}: {doubt.message}; {doubt.fix}"
                for column in ("the manifest column mpp", "this column of the manifest"):
                    told = told.replace(column, "--mpp")  # which is all that is said here
                warnings.warn(told, stacklevel=2)
    return made, [f"{row.slide_id}: {row.reason}" for row in report.failed]
