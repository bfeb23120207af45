"""The page of a cohort as files that need no server: the same one, with its answers beside it."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from eval.view.cohort import Cohort
from eval.view.page import page_files
from eval.view.slide import Heat, Kind, ViewedSlide
from hibio.config.files import ConfigError
from preprocessing.files import atomic_path, not_ours
from preprocessing.store.layout import encode_jpeg

MADE = "hibio-view.json"  # says that a folder was written here
SPOTS, EDGE = 1024, 64  # in a file of spots; pixels of a patch in its sheet
COLUMNS = 32  # patches in a row of a sheet
GENES, SETS = 24, 24  # exported where nothing is named


def export_page(cohort: Cohort, out: Path, names: Sequence[str] = ()) -> Path:
    """Write the page of a cohort as files, to be opened from a disk or any server.

    Args:
        cohort: what it shows.
        out: a folder; one that an earlier export wrote is replaced.
        names: genes and gene sets of the heatmaps; when empty the genes of the largest reliability
            and the first sets.

    Returns:
        ``<out>/index.html``.

    Raises:
        ConfigError: an unknown name, or files of other commands that are not of these slides.
        DataError: files of someone else in ``out``.
    """
    files = page_files()
    asked = list(dict.fromkeys(names)) or default_names(cohort)
    for name in asked:
        cohort.model.question(name)
    if out.is_dir() and any(out.iterdir()) and not (out / MADE).is_file():
        raise not_ours(out)
    for slide_id in cohort.entries:
        cohort.slide(slide_id).files()
    out.mkdir(parents=True, exist_ok=True)
    (out / MADE).write_text(
        json.dumps({"checkpoint_sha256": cohort.model.checkpoint.sha256}) + "\n"
    )
    (out / "index.html").unlink(missing_ok=True)  # there when all is
    for part in ("page", "data"):
        shutil.rmtree(out / part, ignore_errors=True)
        (out / part).mkdir()
    for name, path in files.items():
        shutil.copyfile(path, out / "page" / name)
    page = (out / "page" / "index.html").read_text(encoding="utf-8")
    (out / "page" / "index.html").unlink()
    page = page.replace("<html ", "<html data-files ", 1)
    facts = cohort.facts() | {"exported": asked}
    facts |= _kept(facts, asked)
    _script(out / "data", "cohort", facts)
    for slide_id in tqdm(cohort.entries, desc="export", unit="slide", disable=None):
        _slide_files(cohort, cohort.slide(slide_id), asked, out / "data" / "slides" / slide_id)
    with atomic_path(out / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out / "index.html"


def default_names(cohort: Cohort) -> list[str]:
    """The genes of the largest reliability (else the first ones), then the first sets."""
    readout = cohort.model.readout
    if readout is None:
        genes = list(cohort.model.genes)[:GENES]
    else:
        best = np.argsort(-np.nan_to_num(readout.reliability, nan=-1.0), kind="stable")[:GENES]
        genes = readout.names[best].tolist()
    return genes + list(cohort.model.database.names[:SETS] if cohort.model.bank is not None else ())


def _kept(facts: dict[str, Any], asked: Sequence[str]) -> dict[str, Any]:
    """Genes and sets of the facts that were exported, and what is known of them."""
    place = {name: column for column, name in enumerate(facts["genes"])}
    genes = [name for name in asked if name in place]
    known = {n: [v[place[g]] for g in genes] for n, v in facts["known"].items()}
    sets = {name: facts["sets"].get(name, []) for name in asked if name not in place}
    return {"genes": genes, "known": known, "sets": sets}


def _slide_files(cohort: Cohort, slide: ViewedSlide, asked: Sequence[str], folder: Path) -> None:
    slide_id, n = slide.entry.slide_id, slide.entry.n_spots
    places = slide.xy_px0.round(1).ravel().tolist()
    _script(folder, "slide", slide.facts() | {"xy": places})
    for name in cohort.model.levels:
        _script(folder / "regions", name, _base64(slide.regions(name)))
    kinds: tuple[Kind, ...] = ("measured", "predicted")
    for kind in kinds:
        _script(folder, kind, _heats(slide, asked, kind))
    for start in range(0, n, SPOTS):
        numbers = range(start, min(start + SPOTS, n))
        content = [
            spot | {"within": within}
            for spot, within in zip(slide.spots(numbers), slide.within(numbers), strict=True)
        ]
        for by in cohort.embedded_by(slide_id):
            for spot, near in zip(content, cohort.near(slide_id, numbers, by), strict=True):
                spot[f"near_{by}"] = near
        _script(folder / "spots", str(start // SPOTS), content)
        if slide.entry.has_image:
            sheet = folder / "spots" / f"{start // SPOTS}.jpg"
            sheet.write_bytes(_sheet(cohort.patches(slide_id, numbers)))
    for level, column, row in slide.zoom.addresses():
        tile = folder / "tiles" / str(level) / f"{column}_{row}.jpg"
        tile.parent.mkdir(parents=True, exist_ok=True)
        tile.write_bytes(slide.zoom.tile(level, column, row))


def _heats(slide: ViewedSlide, asked: Sequence[str], kind: Kind) -> dict[str, Any]:
    """What heatmaps of a kind are, and float32 (names, S) in base64; and why others are not."""
    heats: dict[str, Heat] = {}
    missing: dict[str, str] = {}
    for name in asked:
        try:
            heats[name] = slide.heat(name, kind)
        except ConfigError as error:
            missing[name] = str(error)
    for why in dict.fromkeys(missing.values()):
        names = ", ".join(name for name in asked if missing.get(name) == why)
        tqdm.write(f"{slide.entry.slide_id}: without {names} {kind}: {why}")
    return {
        "names": list(heats),
        "about": {name: heat.about for name, heat in heats.items()},
        "values": _base64(b"".join(heat.values.astype("<f4").tobytes() for heat in heats.values())),
        "missing": missing,
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _sheet(patches: np.ndarray) -> bytes:
    """Patches (n, px, px, 3) as one JPEG, `COLUMNS` in a row, `EDGE` pixels each."""
    rows = -(-len(patches) // COLUMNS)
    sheet = np.full((rows * EDGE, COLUMNS * EDGE, 3), 255, dtype=np.uint8)
    for i, patch in enumerate(patches):
        small = np.asarray(Image.fromarray(patch).resize((EDGE, EDGE)))
        top, left = i // COLUMNS * EDGE, i % COLUMNS * EDGE
        sheet[top : top + EDGE, left : left + EDGE] = small
    return encode_jpeg(sheet)


def _script(folder: Path, name: str, value: Any) -> None:
    """A value as a script, since a page from a disk may read nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    (folder / f"{name}.js").write_text(f"hibioFile({text});\n", encoding="utf-8")
