"""GMT files: round trip, everything tolerated, and every error with file and line."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathways import GeneSet, PathwayError, read_gmt, write_gmt

LETTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\t\n\r\0\ufeff")
FIELD = st.text(LETTERS, min_size=1, max_size=12).map(str.strip).filter(bool)
DESCRIPTION = st.text(LETTERS, max_size=30)
GENES = st.lists(FIELD, min_size=1, max_size=8, unique=True).map(tuple)
SETS = st.lists(
    st.builds(GeneSet, FIELD, DESCRIPTION, GENES),
    min_size=1,
    max_size=6,
    unique_by=lambda s: s.name,
)


def _write(folder: Path, text: str, name: str = "sets.gmt") -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8"))
    return path


@given(sets=SETS, zipped=st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, sets: list[GeneSet], zipped: bool
) -> None:
    folder = tmp_path_factory.mktemp("gmt")
    path = folder / ("sets.gmt.gz" if zipped else "sets.gmt")
    write_gmt(path, sets)
    assert read_gmt(path) == sets
    assert [p.name for p in folder.iterdir()] == [path.name]  # no temporary file stays


def test_spaces_stay_in_names_and_descriptions(tmp_path: Path) -> None:
    path = _write(tmp_path, "T cells (GO:1)\tcells of the thymus\tCD3D\tCD3E\n")
    assert read_gmt(path) == [GeneSet("T cells (GO:1)", "cells of the thymus", ("CD3D", "CD3E"))]


def test_tolerated_variants_read_alike(tmp_path: Path) -> None:
    plain = _write(tmp_path, "A\tfirst set\tX\tY\nB\t\tZ\n")
    odd = _write(
        tmp_path, "\ufeffA\tfirst set\tX\tY\t\t\r\n\r\n  \r\n\t\t\r\nB\t\tZ\t\r\n", "odd.gmt"
    )
    inner = _write(tmp_path, "A\tfirst set\tX\t\t Y \nB\t\tZ", "inner.gmt")
    mac = _write(tmp_path, "A\tfirst set\tX\tY\rB\t\tZ\r", "mac.gmt")
    zipped = tmp_path / "zipped.gmt"  # gzip is told by its bytes, not by its name
    zipped.write_bytes(gzip.compress(odd.read_bytes()))
    expected = [GeneSet("A", "first set", ("X", "Y")), GeneSet("B", "", ("Z",))]
    for path in (plain, odd, inner, mac, zipped):
        assert read_gmt(path) == expected, path.name


def test_gene_written_twice_counts_once_and_is_reported(tmp_path: Path) -> None:
    path = _write(tmp_path, "A\tx\tG1\tG2\tG1\n")
    with pytest.warns(UserWarning, match="1 gene.* written twice"):
        assert read_gmt(path)[0].genes == ("G1", "G2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A\tx\tG\nB\ty\tG\n\nA\tz\tG\n", ["'A'", "line 1", "line 4"]),
        ("A\tx\tG\nB\ty\n", ["line 2", "2 field"]),
        ("A\tx\t\t\n", ["line 1", "2 field"]),
        ("A first G1 G2\n", ["line 1", "GMT is tab-separated"]),
        ("A\n", ["line 1", "one field"]),
        ("\tx\tG\n", ["line 1", "empty"]),
        ("\n \n", ["no gene set"]),
        ("", ["no gene set"]),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(PathwayError) as caught:
        read_gmt(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_gzip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gmt.gz"
    path.write_bytes(gzip.compress(b"A\tx\t" + b"G" * 200_000))
    assert path.stat().st_size < 2_000
    with pytest.raises(PathwayError, match="more than 100,000 bytes"):
        read_gmt(path, max_bytes=100_000)
    plain = _write(tmp_path, "A\tx\tGENE\n")
    assert len(read_gmt(plain, max_bytes=9)) == 1
    with pytest.raises(PathwayError, match="more than 8 bytes"):
        read_gmt(plain, max_bytes=8)


def test_damaged_gzip_binary_and_missing_files(tmp_path: Path) -> None:
    good = gzip.compress(b"A\tx\tG\n" * 50)
    cut = tmp_path / "cut.gmt.gz"
    cut.write_bytes(good[:-12])
    flipped = tmp_path / "flipped.gmt.gz"
    flipped.write_bytes(good[:12] + bytes([good[12] ^ 255]) + good[13:])
    for path in (cut, flipped):
        with pytest.raises(PathwayError, match="damaged or cut short"):
            read_gmt(path)
    binary = tmp_path / "binary.gmt"
    binary.write_bytes(b"A\tx\t\xff\xfe")
    with pytest.raises(PathwayError, match="byte 4 is not UTF-8"):
        read_gmt(binary)
    with pytest.raises(PathwayError, match="does not exist"):
        read_gmt(tmp_path / "none.gmt")
    with pytest.raises(PathwayError, match="is a folder"):
        read_gmt(tmp_path)


@pytest.mark.parametrize(
    ("name", "description", "genes", "word"),
    [
        ("", "x", ("G",), "empty"),
        ("A ", "x", ("G",), "spaces around"),
        ("A", "x\ty", ("G",), "tab"),
        ("A", "x", ("G\nH",), "line end"),
        ("A", "x", (), "no genes"),
        ("A", "x", ("G", "G"), "twice"),
        ("A", "x", ("G", None), "as text"),
    ],
)
def test_gene_set_refuses_what_gmt_cannot_hold(
    name: str, description: str, genes: tuple[str, ...], word: str
) -> None:
    with pytest.raises(PathwayError, match=word):
        GeneSet(name, description, genes)


def test_write_refuses_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "sets.gmt"
    write_gmt(path, [GeneSet("A", "x", ("G",))])
    before = path.read_bytes()
    for wrong in ([], [GeneSet("A", "", ("G",))] * 2, [GeneSet("A", "", ("\ud800",))]):
        with pytest.raises(PathwayError):
            write_gmt(path, wrong)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
