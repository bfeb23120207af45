"""A format of source files: what it asks of a manifest row, how its slides are found and read."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import numpy as np

from pathways.files import odd_names
from preprocessing.errors import DataError
from preprocessing.files import files_in
from preprocessing.findings import SlideWarning, collected_doubts
from preprocessing.image_transform import image_matrix
from preprocessing.patches import PatchConfig, measured_pitch_um
from preprocessing.readers import READERS
from preprocessing.readers.alignment import aligned, find_alignments
from preprocessing.scale import IMAGE_FILE, check_patch, check_ranges, compare_scale, stated
from preprocessing.slide_row import IMAGE_ONLY, SlideRow
from preprocessing.slides.pixels import Slide
from preprocessing.spot_table import PROTEIN, SpotTable, even_total, unique_gene_names

NO_BINS = {"bin_um": "has no bins of Visium HD"}
NO_LAYERS = {"layer": "has no layers"}
CONTROL = re.compile(  # names of probes that measure no gene
    r"(Neg(Prb|Control|ative)|SystemControl|FalseCode|Blank|UnassignedCodeword|DeprecatedCodeword"
    r"|GenomicControl|(deprecated|antisense|intergenic)_)",
    re.IGNORECASE,
)
_GENOMES = {  # names of genomes, without version -> the organism, as the manifest may call it
    r"GRCh\d+|hg\d+|T2T-CHM13": ("human", "homo sapiens"),
    r"GRCm\d+|mm\d+": ("mouse", "mus musculus"),
    r"mRatBN[\d.]+|Rnor_[\d.]+|rn\d+": ("rat", "rattus norvegicus"),
    r"GRCz\d+|danRer\d+": ("zebrafish", "danio rerio"),
    r"Sscrofa[\d.]+|susScr\d+": ("pig", "sus scrofa"),
    r"Mmul_[\d.]+|rheMac\d+": ("macaque", "macaca mulatta"),
}
#: Seurat writes "-" for every "_" in names of genes.
_PREFIX = re.compile(rf"({'|'.join(_GENOMES)})(?:(?:-[A-Za-z0-9.-]+)?_+|-+)(?=.)")
SLIDE_IMAGES = (".tif", ".tiff", ".ome.tif", ".svs", ".ndpi")
PICTURES = (".jpg", ".jpeg", ".png", *SLIDE_IMAGES)
_SHOWN = 4


def counts_file(row: SlideRow) -> dict[str, Path]:
    """Return the sources of a format of one file, and its spot table where the row names one."""
    return {"counts": row.counts_path} | ({} if row.spots is None else {"spots": row.spots})


@dataclass(frozen=True)
class Format:
    """One format; the file of its reader defines it as ``FORMAT``.

    Attributes:
        name: in the manifest's column format.
        read: row, and um per level-0 px that its image file states (or None) -> spots; DataError
            where a file is missing or unusable, no spot has its place, or the scale is unknown.
        sources: row -> the files that `read` reads (image and labels excluded), by role; a store
            is up to date while their hashes stay.
        detect: counts, and the spot table of the row (or None) -> whether they are of this format;
            by names, and at most the beginning of a text.
        discover: folder -> rows of the slides that lie in it.
        layout: what `discover` looks for, for messages.
        whole: nothing else is looked for in and below a folder in which `discover` finds slides.
        cells: the rows are cells, which a pitch_um sums into pseudo-spots.
        needs: column that must be filled -> what it names.
        forbids: column that must be empty -> why, as it follows "format NAME".
        no_protein: why the modality cannot be "protein", as it follows "format NAME"; "": it can.
        complain: values of a row by column (None: empty, absent: unusable) -> sentences on what
            ``needs`` and ``forbids`` cannot say.
        applies: ending of files of image_transform that `read` applies itself.
        loupe: alignment files of Loupe and Space Ranger may lie beside the image.
        lay: row, open slide and edge of a patch in um -> spots, for slides without counts.
    """

    name: str
    read: Callable[[SlideRow, float | None], SpotTable]
    sources: Callable[[SlideRow], dict[str, Path]] = counts_file
    detect: Callable[[Path, Path | None], bool] = lambda counts, spots: False
    discover: Callable[[Path], list[SlideRow]] = lambda folder: []
    layout: str = ""
    whole: bool = False
    cells: bool = False
    needs: Mapping[str, str] = field(default_factory=dict)
    forbids: Mapping[str, str] = field(default_factory=lambda: {**NO_BINS, **NO_LAYERS})
    no_protein: str = ""
    complain: Callable[[Mapping[str, object]], list[str]] = lambda columns: []
    applies: str | None = None
    loupe: bool = False
    lay: Callable[[SlideRow, Slide, float], SpotTable] | None = None

    def misfits(self, columns: Mapping[str, object], filled: set[str]) -> list[str]:
        """Return a sentence for every column of a row that does not fit this format.

        Args:
            columns: usable values of the row by column.
            filled: columns in which anything stands.
        """
        found = []
        if self.lay is None and "counts" not in filled:
            found.append(f"counts is empty; a slide without counts has the format {IMAGE_ONLY!r}")
        found += [
            f"format {self.name} {why}; leave the column {name!r} empty"
            for name, why in self.forbids.items()
            if name in filled
        ]
        if columns.get("modality") == PROTEIN and self.no_protein:
            found.append(f"format {self.name} {self.no_protein}")
        if "image_transform" in filled and (self.lay or "image" not in filled):
            lacks = "counts" if self.lay else "an image"
            found.append(f"image_transform has no use without {lacks}; leave it empty")
        found += [
            f"format {self.name} needs the column {name!r} ({what})"
            for name, what in self.needs.items()
            if name not in filled
        ]
        return found + self.complain(columns)


def format_of(name: str) -> Format:
    """Return the format of a name, and import its reader.

    Raises:
        DataError: there is no such format.
    """
    if name not in READERS:
        raise DataError(f"unknown format {name!r}; formats are {', '.join(READERS)}")
    found: Format = import_module(READERS[name]).FORMAT
    return found


def detect_format(counts: Path | None, image: Path | None, spots: Path | None) -> str | None:
    """Tell the format of a slide's files by their names, hardly looking inside.

    Returns:
        A name of the table, or None where nothing fits (or the files are missing).
    """
    if counts is None:
        return None if image is None else IMAGE_ONLY
    try:
        return next((name for name in READERS if format_of(name).detect(counts, spots)), None)
    except (OSError, ValueError):  # a name the system cannot hold, or no permission
        return None


@contextmanager
def _reading(row: SlideRow) -> Iterator[dict[Path, SlideWarning]]:
    """Collects what its files are doubted for, by file; errors name the slide."""
    try:
        with collected_doubts() as doubts:
            yield doubts
    except DataError as error:
        known = row.counts is None or str(row.counts) in str(error)
        place = "" if known else f" ({row.counts})"
        raise DataError(f"slide {row.slide_id}{place}: {error}") from error


def read_spots(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one slide; ``image_mpp`` is um per level-0 px that its image states, if it does.

    Raises:
        DataError: names the slide and what is wrong with its files.
    """
    with _reading(row) as doubts:
        table = _measured(format_of(row.format).read(row, image_mpp), row.organism)
        table = warned(table, [*doubts.values()])
        return table if table.image_only else _with_scale(table, None)


def read_slide_spots(
    row: SlideRow, slide: Slide, patch: PatchConfig
) -> tuple[SpotTable, PatchConfig]:
    """Read a slide with an image, and the patches of this run on its array.

    Without counts the spots are windows over the tissue, as wide as the patches.

    Raises:
        DataError: names the slide and what is wrong with its files, or with the context's width.
    """
    with _reading(row) as doubts:
        form = format_of(row.format)
        if form.lay is not None:
            patch = patch.on_array(row.pitch_um)
            table = _with_scale(form.lay(row, slide, patch.um), slide)
            return warned(table, check_patch(patch.um, table.mpp)), patch
        table = _measured(form.read(row, slide.mpp), row.organism)
        table, patch = _sized(_with_scale(_on_image(row, form, slide, table), slide), patch)
        return warned(table, [*doubts.values(), *check_patch(patch.um, table.mpp)]), patch


def _on_image(row: SlideRow, form: Format, slide: Slide, table: SpotTable) -> SpotTable:
    """The spots where the manifest or an alignment file of Loupe says that the image shows them."""
    size, told = slide.level_dimensions[0], row.image_transform
    ending = Path(told).suffix.lower()
    if isinstance(told, Path) and ending == form.applies:
        return table
    if told and ending != ".json":
        name = getattr(told, "name", told)
        return table.transformed(image_matrix(told, size), f"image_transform {name}")
    return aligned(row, table, size, slide.mpp) if told or form.loupe else table


def _measured(table: SpotTable, organism: str) -> SpotTable:
    """The genes that were measured, with warnings of names and values that can be none."""
    table = measured_genes(table, organism)
    odd = [SlideWarning(*told) for told in odd_names(map(str, table.gene_names))]
    return warned(table, odd + _normalised(table))


def _normalised(table: SpotTable) -> list[SlideWarning]:
    total = None if table.modality == PROTEIN else even_total(table.counts)
    if total is None:
        return []
    told = f"all spots have a total of about {total:,.0f}, which counts hardly have"
    fix = "give the raw counts, if these are normalised values that were rounded"
    return [SlideWarning(told, fix)]


def measured_genes(table: SpotTable, organism: str = "") -> SpotTable:
    """Leave out control probes and genes of another organism; both are noted with their numbers.

    Names that begin with a genome (``GRCh38_``, ``mm10___``: Space Ranger's references of several
    species) lose that prefix; of several genomes the one of ``organism`` stays.

    Raises:
        DataError: only controls, or genes of several genomes and no organism that tells them apart.
    """
    names, notes = list(map(str, table.gene_names)), list(table.notes)
    control = np.array([CONTROL.match(name) is not None for name in names], dtype=bool)
    if control.any():
        shown = [name for name, one in zip(names, control, strict=True) if one]
        more = ", ..." if len(shown) > _SHOWN else ""
        notes.append(
            f"{len(shown)} control probes left out ({', '.join(shown[:_SHOWN])}{more}; negative "
            "controls, blanks and deprecated probes measure no gene)"
        )
    kept, prefixed = _one_genome(table, ~control, organism, notes)
    if kept.all() and not prefixed:
        return table
    if not kept.any():
        raise DataError(f"{len(names)} genes and all are control probes; give the genes")
    ids, names = (
        [_PREFIX.sub("", str(text), count=1) if prefixed else str(text) for text in texts[kept]]
        for texts in (table.gene_ids, table.gene_names)
    )
    unique = unique_gene_names(np.array(names, dtype=object), notes)
    return replace(
        table,
        counts=table.counts[:, np.flatnonzero(kept)],
        gene_ids=np.array(ids, dtype=object),
        gene_names=unique,
        notes=tuple(notes),
    )


def _one_genome(
    table: SpotTable, kept: np.ndarray, organism: str, notes: list[str]
) -> tuple[np.ndarray, bool]:
    """Which of the genes ``kept`` (G,) belong to one genome, and whether names begin with it."""
    found = [_PREFIX.match(str(name)) for name in table.gene_names]
    genomes = Counter(match[1] for match, one in zip(found, kept, strict=True) if match and one)
    if 2 * sum(genomes.values()) < kept.sum() or not genomes:
        return kept, False
    listed = ", ".join(f"{name}: {count}" for name, count in genomes.items())
    if len(genomes) == 1:
        notes.append(f"names of genes begin with their genome ({listed} genes): prefix removed")
        return kept, True
    wanted = [name for name in genomes if organism.strip().casefold() in _called(name)]
    if len(wanted) != 1:
        choices = " or ".join(_called(name)[1] for name in genomes)
        raise DataError(
            f"genes of {len(genomes)} genomes, by the prefixes of their names ({listed}): write "
            f"the organism whose genes are meant ({choices}) into the manifest column organism; "
            f"found {organism!r} there"
        )
    own = np.array([match is None or match[1] == wanted[0] for match in found], dtype=bool)
    other = kept & ~own
    share = table.counts[:, np.flatnonzero(other)].sum() / max(1, table.counts.sum())
    notes.append(
        f"of the genomes {listed} the genes of {wanted[0]} ({organism}) stay, prefix removed; "
        f"{int(other.sum())} others with {share:.1%} of the counts left out"
    )
    return kept & own, True


def _called(genome: str) -> tuple[str, ...]:
    """What a genome may be called in the column organism: its own name first."""
    known = (names for form, names in _GENOMES.items() if re.fullmatch(form, genome))
    return (genome.casefold(), *next(known))


def warned(table: SpotTable, warnings: list[SlideWarning]) -> SpotTable:
    """The spots with more warnings."""
    return replace(table, warnings=(*table.warnings, *warnings)) if warnings else table


def _with_scale(table: SpotTable, slide: Slide | None) -> SpotTable:
    """The spots, once everything that is said of their scale was compared.

    A reader knows one number of the image file; the open slide knows where it is said, and what
    else the file says.
    """
    said = list(table.scale) or list(stated(table.mpp, "the reader") if slide else ())
    of_image = () if slide is None else slide.scale
    at = next((i for i, one in enumerate(said) if one.source == IMAGE_FILE), len(said))
    said[at : at + 1] = of_image or said[at : at + 1]
    warnings = compare_scale(said)
    places = table.xy_um[:0] if table.image_only else table.xy_um
    return warned(
        table, warnings + check_ranges(None if slide is None else table.mpp, places, said)
    )


def _sized(table: SpotTable, patch: PatchConfig) -> tuple[SpotTable, PatchConfig]:
    """The spots with a note on the width of their patches, and the patches with that width."""
    if patch.patch_um is not None:
        return table, patch
    stated = table.pitch_um
    pitch = measured_pitch_um(table.xy_um) if stated is None else stated
    patch = patch.on_array(pitch)
    why = "the pitch of the array" if patch.um == pitch else "as for bins and cells: no array"
    return replace(table, notes=(*table.notes, f"patches are {patch.um:g} um wide, {why}")), patch


def source_files(row: SlideRow) -> dict[str, Path]:
    """Return every file that belongs to a slide, by role (counts, spots, image, labels, ...).

    Raises:
        DataError: a file of the format is missing.
    """
    form = format_of(row.format)
    files = form.sources(row)
    if form.loupe and not row.image_transform:
        files |= {f"alignment/{n}/{p.name}": p for n, p in enumerate(find_alignments(row)[0])}
    others = {"image": row.image, "labels": row.labels, "image_transform": row.image_transform}
    return files | {role: path for role, path in others.items() if isinstance(path, Path)}


def file_name(counts: Path) -> str:
    """Return the name of a file in small letters, without .gz; "" of a folder."""
    return "" if counts.is_dir() else counts.name.lower().removesuffix(".gz")


def is_text(counts: Path) -> bool:
    """Whether a file is there and a text table by its name."""
    return file_name(counts).endswith((".csv", ".tsv", ".txt")) and counts.is_file()


def image_named(folder: Path, name: str, endings: Sequence[str] = PICTURES) -> Path | None:
    """The picture of a slide: the first file of its name (a pattern) with one of the endings."""
    return first_file(folder, *(f"{name}{ending}" for ending in endings))


def first_file(folder: Path, *patterns: str) -> Path | None:
    """Return the first file by name of the first pattern that fits any."""
    for pattern in patterns:
        if found := files_in(folder, pattern):
            return found[0]
    return None
