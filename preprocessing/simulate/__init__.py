"""A cohort with planted truth, written as real files (slides, counts, labels, manifest).

Used by the demo, by tests and to measure methods where the answer is known: which programme is
active where, which domain every spot lies in, and how much of it the image shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

from preprocessing.errors import DataError
from preprocessing.files import atomic_path
from preprocessing.hdf5 import hdf5_writer
from preprocessing.simulate.config import TURNS, SimulateConfig, random_stream
from preprocessing.simulate.layout import (
    COARSE_NAMES,
    FINE_NAMES,
    N_LAYERED,
    Domains,
    Lattice,
    draw_domains,
    draw_lattice,
    scatter,
)
from preprocessing.simulate.programmes import (
    RAISE,
    Outcomes,
    Panel,
    Programmes,
    build_panel,
    draw_activity,
    draw_counts,
    draw_depth,
    draw_outcomes,
    gene_shares,
    leak_matrix,
    plant_programmes,
    texture_map,
    visibility,
    visible_programmes,
)
from preprocessing.simulate.texture import (
    TEXTURES,
    Stain,
    draw_stain,
    lay_wrongly,
    parameter_maps,
    render,
)

__all__ = ["SimulateConfig", "simulate_cohort"]

_TILE = 256
_SMALLEST_LEVEL_PX = 400
_JPEG_QUALITY = 90
_MAX_PIXELS = 120_000_000  # of a slide, which is drawn in memory
_SPOT_DIAMETER = 0.55  # in pitches of the array
_BARCODE_SPACE = 4**16
_BARCODE_STEP = 2_654_435_769
_RAISED = 0.8  # activity from which on a domain is said to raise a programme


def write_pyramid(path: Path, picture: NDArray[np.uint8], mpp: float) -> None:
    """Tiled JPEG pyramid that OpenSlide opens, with micrometres per pixel in its resolution.

    Every further level halves the picture (H, W, 3), while its short side stays above 400 px, and
    at least once.
    """
    levels = [picture]
    while len(levels) < 2 or min(levels[-1].shape[:2]) > 2 * _SMALLEST_LEVEL_PX:
        levels.append(_halve(levels[-1]))
    with atomic_path(path) as part, tifffile.TiffWriter(part) as writer:
        for number, level in enumerate(levels):
            per_cm = 1e4 / (mpp * 2**number)
            writer.write(
                level,
                tile=(_TILE, _TILE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": _JPEG_QUALITY},
                subfiletype=1 if number else 0,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def _halve(level: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mean of 2 x 2 pixels; an odd last row or column is left out."""
    height, width = level.shape[0] // 2 * 2, level.shape[1] // 2 * 2
    even = level[:height, :width].astype(np.uint16)
    total = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


def barcodes(lattice: Lattice) -> NDArray[np.str_]:
    """(L,) barcodes of 16 bases and ``-1``; as on a Visium array, they depend on the position only.

    Multiplication by an odd number modulo 4^16 is one-to-one, so they are unique.
    """
    position = lattice.array_row.astype(np.uint64) * np.uint64(65_536)
    position = position + lattice.array_col.astype(np.uint64) + np.uint64(77_777)
    code = (position * np.uint64(_BARCODE_STEP)) % np.uint64(_BARCODE_SPACE)
    digits = (code[:, None] >> (2 * np.arange(16, dtype=np.uint64))) & np.uint64(3)
    letters = np.array(list("ACGT"))[digits.astype(np.int64)]
    return np.array(["".join(row) + "-1" for row in letters])


def write_matrix(
    path: Path, counts: sparse.csr_matrix, barcode: NDArray[np.str_], panel: Panel
) -> None:
    """Counts (S, G) in the 10x v3 layout of an ``.h5``: genes x spots, compressed columns."""
    counts = counts.tocsr()
    counts.sort_indices()
    n_genes = len(panel.ids)
    with atomic_path(path) as part, hdf5_writer(part) as (file, _):
        matrix = file.create_group("matrix")
        arrays: dict[str, Any] = {
            "barcodes": barcode.astype("S"),
            "data": counts.data.astype(np.int32),
            "indices": counts.indices.astype(np.int64),
            "indptr": counts.indptr.astype(np.int64),
        }
        for name, array in arrays.items():
            matrix.create_dataset(name, data=array, compression="gzip", compression_opts=4)
        matrix.create_dataset("shape", data=np.array([n_genes, len(barcode)], dtype=np.int32))
        features = matrix.create_group("features")
        columns = {
            "id": panel.ids.astype("S"),
            "name": panel.names.astype("S"),
            "feature_type": np.full(n_genes, b"Gene Expression"),
            "genome": np.full(n_genes, b"SIM"),
        }
        for name, column in columns.items():
            features.create_dataset(name, data=column, compression="gzip", compression_opts=4)
        features.create_dataset("_all_tag_keys", data=np.array([b"genome"]))


def write_spatial(folder: Path, lattice: Lattice, barcode: NDArray[np.str_], mpp: float) -> None:
    """``tissue_positions.csv`` (all lattice positions) and ``scalefactors_json.json``."""
    pixel = np.round(lattice.xy_um / mpp, 3)
    positions = pd.DataFrame(
        {
            "barcode": barcode,
            "in_tissue": lattice.in_tissue.astype(int),
            "array_row": lattice.array_row,
            "array_col": lattice.array_col,
            "pxl_row_in_fullres": pixel[:, 1],
            "pxl_col_in_fullres": pixel[:, 0],
        }
    )
    write_table(folder / "tissue_positions.csv", positions)
    longest_px = max(lattice.size_um) / mpp
    diameter_px = _SPOT_DIAMETER * lattice.pitch_um / mpp
    write_json(
        folder / "scalefactors_json.json",
        {
            "tissue_hires_scalef": min(1.0, 2000 / longest_px),
            "tissue_lowres_scalef": min(1.0, 600 / longest_px),
            "spot_diameter_fullres": diameter_px,
            "fiducial_diameter_fullres": 1.6 * diameter_px,
        },
    )


def write_table(path: Path, table: pd.DataFrame) -> None:
    """A CSV without row numbers."""
    with atomic_path(path) as part:
        table.to_csv(part, index=False, lineterminator="\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, indented."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Cohort:
    """What all slides share."""

    config: SimulateConfig
    programmes: Programmes
    panel: Panel
    shared_mapping: NDArray[np.float64]
    outcomes: Outcomes

    def slide_id(self, slide: int) -> str:
        return f"sim{slide + 1:03d}"

    def patient(self, slide: int) -> int:
        return slide * self.config.n_patients // self.config.n_slides

    def depth_shift(self, slide: int) -> float:
        rng = random_stream(self.config.seed, "depth_shift", slide)
        of_patient = random_stream(self.config.seed, "depth_patient", self.patient(slide))
        shift = self.config.depth_shift * rng.standard_normal()
        return float(shift + self.config.depth_patient * of_patient.standard_normal())

    def mapping(self, slide: int) -> NDArray[np.float64]:
        """(P, T) texture map of the slide's patient: the cohort's mixed with one of its own."""
        config, patient = self.config, self.patient(slide)
        rng = random_stream(config.seed, "texture_map_of_patient", patient)
        own = texture_map(rng, self.programmes, len(TEXTURES))
        share = config.texture_shift
        mixed: NDArray[np.float64] = np.sqrt(1 - share) * self.shared_mapping + np.sqrt(share) * own
        return mixed

    def niche(self, slide: int, lattice: Lattice) -> NDArray[np.bool_]:
        rng = random_stream(self.config.seed, "niche", slide)
        return self.outcomes.niche(rng, lattice, self.patient(slide))

    def stain(self, slide: int) -> Stain:
        return draw_stain(random_stream(self.config.seed, "stain", slide), self.config.stain_shift)

    def pictured(self, slide: int) -> int:
        """The slide whose picture is shown: its own, or with "other" the next patient's first."""
        if self.config.misregister != "other":
            return slide
        n = self.config.n_slides
        following = ((slide + k) % n for k in range(1, n))
        others = [other for other in following if self.patient(other) != self.patient(slide)]
        return others[0] if others else (slide + 1) % n

    def shift_px(self, slide: int) -> tuple[int, int]:
        """By how much the picture is moved to the right and down, pixels."""
        angle = random_stream(self.config.seed, "misregister", slide).uniform(0, 2 * np.pi)
        length = self.config.shift_pitches * self.config.pitch_um / self.config.mpp
        return round(length * np.cos(angle)), round(length * np.sin(angle))

    def section(self, slide: int) -> _Section:
        """The tissue of one slide."""
        rng = random_stream(self.config.seed, "lattice", slide)
        lattice = draw_lattice(rng, self.config.n_spots, self.config.pitch_um)
        domains, activity = _tissue(self, lattice, slide, "tissue")
        niche = self.niche(slide, lattice)
        return _Section(lattice, domains, self.outcomes.raised(activity, niche), niche)


@dataclass(frozen=True)
class _Section:
    """The tissue of one slide: (S,) domains and niche, (S, P) activity."""

    lattice: Lattice
    domains: Domains
    activity: NDArray[np.float64]
    niche: NDArray[np.bool_]


def simulate_cohort(
    out: Path | str,
    programmes: Mapping[str, Sequence[str]],
    config: SimulateConfig | None = None,
) -> Path:
    """Write a cohort of slides whose expression and image follow planted gene programmes.

    Per slide: nested tissue domains (docs/method.md 5, sizes of the region levels), log-activities
    of the programmes from the domains plus smooth fields, negative binomial counts with bleed, and
    an H&E-like picture whose texture is a fixed linear map of the activities mixed with that of an
    unrelated layout (``config.signal``). Every patient has an outcome, which a niche drives where
    ``config.outcome_effect`` is above 0. ``config.misregister`` lays the pictures wrongly; nothing
    but the pictures and ``truth.json`` (``image_transform``: from the spots' pixels to their place
    on the picture as it lies) says so. The manifest is written last.

    Args:
        out: Folder of the cohort; an earlier simulated cohort in it is written over.
        programmes: Gene symbols of each programme; ``config.n_programmes`` of them are planted.
        config: Settings; None takes the defaults.

    Returns:
        Path of ``manifest.csv``.

    Raises:
        DataError: Settings that cannot be met, or ``out`` holds a manifest of other data.
    """
    out, config = Path(out), config or SimulateConfig()
    _check_target(out)
    planted = plant_programmes(programmes, config)
    mapping = texture_map(random_stream(config.seed, "texture_map"), planted, len(TEXTURES))
    outcomes = draw_outcomes(planted, config)
    cohort = _Cohort(config, planted, build_panel(planted, config), mapping, outcomes)
    _check_pixels(config)
    manifest = out / "manifest.csv"
    manifest.unlink(missing_ok=True)
    slides = tqdm(range(config.n_slides), desc="simulate", unit="slide", disable=None)
    rows, transforms = zip(*(_write_slide(out, cohort, slide) for slide in slides), strict=True)
    write_json(out / "truth.json", _truth(cohort, transforms))
    write_table(manifest, pd.DataFrame(rows))
    return manifest


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder for the simulated cohort")
    if (out / "manifest.csv").exists() and not (out / "truth.json").exists():
        raise DataError(
            f"{out} holds a manifest.csv without truth.json, so it is not a simulated cohort; "
            "choose an empty folder"
        )


def _check_pixels(config: SimulateConfig) -> None:
    side_um = config.pitch_um * np.sqrt(config.n_spots) * 1.25 + 500.0
    pixels = (side_um / config.mpp) ** 2
    if pixels > _MAX_PIXELS:
        least = side_um / np.sqrt(_MAX_PIXELS)
        raise DataError(
            f"n_spots={config.n_spots} at mpp={config.mpp:g} needs slides of about "
            f"{pixels / 1e6:.0f} million pixels, drawn in memory, and {_MAX_PIXELS / 1e6:.0f} are "
            f"allowed; lower n_spots or set mpp to at least {least:.2f}"
        )


def _write_slide(
    out: Path, cohort: _Cohort, slide: int
) -> tuple[dict[str, Any], list[list[float]] | None]:
    """Draw and write one slide; returns its manifest row and where its picture lies (`_laid`)."""
    config, name = cohort.config, cohort.slide_id(slide)
    section = cohort.section(slide)
    lattice = section.lattice
    barcode = barcodes(lattice)
    spots = barcode[lattice.in_tissue]

    rng = random_stream(config.seed, "counts", slide)
    depth = draw_depth(rng, len(spots), cohort.depth_shift(slide), config)
    expected = depth[:, None] * gene_shares(cohort.panel, section.activity, cohort.patient(slide))
    leak = leak_matrix(lattice, config.bleed)
    counts = draw_counts(rng, expected, cohort.panel.dispersion, leak)
    write_matrix(out / name / "filtered_feature_bc_matrix.h5", counts, spots, cohort.panel)
    write_spatial(out / name / "spatial", lattice, barcode, config.mpp)
    labels = _labels(cohort, spots, section)
    if config.outcome_effect > 0:
        labels["niche"] = section.niche.astype(np.float64)
    write_table(out / name / "labels.csv", labels)
    picture, transform = _laid(cohort, section, slide)
    write_pyramid(out / "slides" / f"{name}.tif", picture, config.mpp)
    row = {
        "slide_id": name,
        "patient_id": f"patient{cohort.patient(slide) + 1:02d}",
        "image": f"slides/{name}.tif",
        "counts": name,
        "format": "visium",
        "mpp": config.mpp,
        "labels": f"{name}/labels.csv",
        "tissue": "simulated",
        "organism": "human",
        "technology": "Visium (simulated)",
        "outcome": int(cohort.outcomes.outcome[cohort.patient(slide)]),
    }
    return row, transform


def _laid(
    cohort: _Cohort, section: _Section, slide: int
) -> tuple[NDArray[np.uint8], list[list[float]] | None]:
    """The image as it is written, and the (3, 3) matrix that takes the spots' pixels to it.

    The matrix is the identity where the picture lies rightly, None where it is another slide's.
    """
    shown = cohort.pictured(slide)
    if shown != slide:
        return _picture(cohort, cohort.section(shown), shown), None
    picture = _picture(cohort, section, slide)
    turn = TURNS.get(cohort.config.misregister, (False, 1, 1))
    picture, matrix = lay_wrongly(picture, turn, cohort.shift_px(slide))
    return picture, matrix.tolist()


def _tissue(
    cohort: _Cohort, lattice: Lattice, slide: int, stream: str
) -> tuple[Domains, NDArray[np.float64]]:
    rng = random_stream(cohort.config.seed, stream, slide)
    domains = draw_domains(rng, lattice)
    moved = random_stream(cohort.config.seed, f"scatter_{stream}", slide)
    domains = scatter(moved, domains, 1 - cohort.config.contiguity)
    return domains, draw_activity(rng, cohort.programmes, lattice, domains)


def _picture(cohort: _Cohort, section: _Section, slide: int) -> NDArray[np.uint8]:
    """The slide's image; its texture mixes the tissue with an unrelated one of the same kind."""
    config = cohort.config
    _, unrelated = _tissue(cohort, section.lattice, slide, "unrelated_tissue")
    mixed = np.sqrt(config.signal) * section.activity + np.sqrt(1 - config.signal) * unrelated
    parameters = parameter_maps(mixed @ cohort.mapping(slide), section.lattice)
    rng = random_stream(config.seed, "picture", slide)
    return render(rng, parameters, section.lattice, cohort.stain(slide), config.mpp)


def _labels(cohort: _Cohort, spots: NDArray[np.str_], section: _Section) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "barcode": spots,
            "domain_coarse": np.array(COARSE_NAMES)[section.domains.coarse],
            "domain_fine": np.array(FINE_NAMES)[section.domains.fine],
        }
    )
    columns = [f"activity:{name}" for name in cohort.programmes.names]
    activity = pd.DataFrame(np.round(section.activity, 5), columns=columns)
    return pd.concat([table, activity], axis=1)


def _truth(cohort: _Cohort, transforms: Sequence[list[list[float]] | None]) -> dict[str, Any]:
    """What was planted, as written to ``truth.json``."""
    config, programmes, panel = cohort.config, cohort.programmes, cohort.panel
    ceiling = visibility(
        programmes, cohort.shared_mapping, config.signal * (1 - config.texture_shift)
    )
    slides = {}
    for slide in range(config.n_slides):
        stain = cohort.stain(slide)
        patient = cohort.patient(slide)
        n_niche = round(cohort.outcomes.share[patient] * config.n_spots)
        slides[cohort.slide_id(slide)] = {
            "patient_id": f"patient{patient + 1:02d}",
            "outcome": int(cohort.outcomes.outcome[patient]),
            "niche_share": n_niche / config.n_spots,
            "log_depth_shift": cohort.depth_shift(slide),
            "haematoxylin_factor": stain.haematoxylin,
            "eosin_factor": stain.eosin,
            "hue_factors": list(stain.hue),
            "picture_of": cohort.slide_id(cohort.pictured(slide)),
            "image_transform": transforms[slide],
        }
    return {
        "config": asdict(config),
        "programmes": {name: list(genes) for name, genes in programmes.genes.items()},
        "genes_left_out": programmes.left_out,
        "programmes_too_small": list(programmes.too_small),
        "housekeeping": panel.names[panel.kinds == "housekeeping"].tolist(),
        "fillers": panel.names[panel.kinds == "filler"].tolist(),
        "image_visible_programmes": visible_programmes(ceiling),
        "image_correlation_ceiling": ceiling,
        "textures": list(TEXTURES),
        "texture_map": {
            name: np.round(row, 5).tolist()
            for name, row in zip(programmes.names, cohort.shared_mapping, strict=True)
        },
        "domains": _domain_definitions(programmes),
        "niche": {
            "raised_programmes": [programmes.names[p] for p in cohort.outcomes.pair],
            "raised_by": RAISE,
        },
        "slides": slides,
    }


def _domain_definitions(programmes: Programmes) -> dict[str, Any]:
    """Every fine domain: its coarse domain, how that is laid out, and what it raises."""
    definitions = {}
    for f, fine in enumerate(FINE_NAMES):
        effect, rounded = programmes.domain_effect[f], np.round(programmes.domain_effect[f], 4)
        raised = np.flatnonzero(effect >= _RAISED)
        definitions[fine] = {
            "coarse": COARSE_NAMES[f // 2],
            "layout": "layered" if f // 2 < N_LAYERED else "patchy",
            "raised_programmes": [programmes.names[p] for p in raised],
            "mean_activity": dict(zip(programmes.names, rounded.tolist(), strict=True)),
        }
    return definitions
