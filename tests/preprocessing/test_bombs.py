"""Small files that claim or unpack to far more than they hold are refused before that is read."""

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from preprocessing import DataError
from preprocessing.hdf5 import oversized, require_sound_sizes
from preprocessing.readers import tables as unpacked
from preprocessing.readers.hdf5 import open_hdf5
from preprocessing.readers.parquet import read_parquet
from preprocessing.readers.tables import (
    is_gzip,
    most_bytes,
    open_text,
    open_unpacked,
    read_header,
    read_table,
    read_wide_table,
)
from preprocessing.readers.tenx import read_tenx
from preprocessing.slides import open_slide
from tests.preprocessing.cell_sources import xenium_folder

HARMLESS, LINE = 1 << 16, b"7" + b"\t0" * 4000 + b"\n"
HEAD = b"id\t" + b"\t".join(b"G%d" % i for i in range(4000)) + b"\n"


@pytest.fixture(autouse=True)
def small_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a bomb of the tests is of some megabytes, and a block of a table of less."""
    monkeypatch.setattr(unpacked, "HARMLESS_BYTES", HARMLESS)
    monkeypatch.setattr(unpacked, "_BLOCK", 200_000)


def bomb(path: Path, lines: int = 4000) -> Path:
    path.write_bytes(gzip.compress(HEAD) + gzip.compress(LINE * lines, 9))
    return path


def lines_of(path: Path) -> None:
    with open_text(path) as text:
        for _ in text:
            pass


@pytest.mark.parametrize(
    "read",
    [lines_of, read_table, lambda path: read_wide_table(read_header(path), 1)],
    ids=["lines", "table", "wide table"],
)
def test_a_gzip_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    path = bomb(tmp_path / "a.tsv.gz")  # 32 MB
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.tsv\.gz: .*at most 200 times.*unpack it with gunzip"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24e6


def test_what_is_within_the_bound_is_read_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = "\n".join("\t".join(map(str, row)) for row in rng.integers(0, 9, (3000, 40))) + "\n"
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert len(text) > HARMLESS
    with open_unpacked(path) as content:
        assert content.read() == text.encode()
    small = bomb(tmp_path / "b.tsv.gz", lines=1)  # a high ratio alone is no reason
    lines_of(small)
    assert (is_gzip(path), is_gzip(Path(__file__))) == (True, False)


def test_the_absolute_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "MOST_BYTES", 1 << 18)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(np.random.default_rng(0).bytes(1 << 19)))
    with pytest.raises(DataError, match=r"and more to come"), open_unpacked(path) as content:
        content.read()
    assert most_bytes(path) == 1 << 18
    plain = tmp_path / "b.txt"
    plain.write_bytes(b"x" * (1 << 19))
    with open_unpacked(plain) as content:
        assert len(content.read()) == most_bytes(plain) == 1 << 19


def test_one_long_line_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",".join(["x"] * 4096) + "\n" + ",".join(["1"] * 4096) + "\n")
    assert read_table(path).shape == (1, 4096)
    path.write_text(",".join(["x"] * 300_000))
    with pytest.raises(DataError, match=r"first line has 300,000 cells; expected .* at most 4,096"):
        read_table(path)


@pytest.mark.parametrize("name", ["matrix.mtx", "barcodes.tsv", "features.tsv"])
def test_bombs_in_a_10x_folder(tmp_path: Path, name: str) -> None:
    xenium_folder(tmp_path, h5=False)
    folder = tmp_path / "cell_feature_matrix"
    old = folder / name
    old.with_name(f"{name}.gz").write_bytes(
        gzip.compress(old.read_bytes()) + gzip.compress(b"1 1 1\n" * 4_000_000, 9)
    )
    with pytest.raises(DataError, match=rf"{name}\.gz: .*more to come"):
        read_tenx(folder)


@pytest.mark.parametrize(
    ("head", "size"),
    [("coordinate integer general", "9 9 99999999999"), ("array real general", "999999 999999")],
)
def test_a_matrix_that_claims_more_entries_than_it_holds(
    tmp_path: Path, head: str, size: str
) -> None:
    xenium_folder(tmp_path, h5=False)
    folder = tmp_path / "cell_feature_matrix"
    (folder / "matrix.mtx").write_text(f"%%MatrixMarket matrix {head}\n% a\n{size}\n1 1 1\n")
    with pytest.raises(DataError, match=r"matrix\.mtx claims .* more than it can hold"):
        read_tenx(folder)


def huge(file: h5py.File, name: str, values: int = 10**12) -> None:
    file.create_dataset(name, (values,), "f8", chunks=(min(values, 1 << 16),), compression="gzip")


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_parquet_file_that_stands_for_more_than_it_holds(tmp_path: Path, as_folder: bool) -> None:
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    path = tmp_path / "a.parquet"
    if as_folder:
        path.mkdir()
    part = path / "part.0.parquet" if as_folder else path
    for values in (np.zeros(400_000), np.random.default_rng(0).random(20_000)):
        frame = pd.DataFrame({"x": values})
        frame.to_parquet(part)
        if values.any():
            pd.testing.assert_frame_equal(read_parquet(path), frame)
        else:
            with pytest.raises(DataError, match=rf"{part.name}: 400,000 values in 0\.00 MiB"):
                read_parquet(path)


def test_an_hdf5_file_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w") as file:
        file["obs/x"] = np.arange(5)
        huge(file, "obs/y")
    words = r"a\.h5ad: obs/y claims 7,450\.6 GiB in 0 bytes of the file"
    with pytest.raises(DataError, match=words), open_hdf5(path, "an AnnData file"):
        pytest.fail("it was opened")
    with pytest.raises(DataError, match=words), h5py.File(path) as file:
        require_sound_sizes(path, file)


def test_sizes_that_are_sound(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("zeros", data=np.zeros((3000, 1000)), compression="gzip", shuffle=True)
        huge(file, "never written", 1000)
        file.create_dataset("texts", data=["a", "b"], dtype=h5py.string_dtype())
        file["empty"] = h5py.Empty("f8")
        file["one"] = 3
        require_sound_sizes(path, file)
        assert oversized(file, 0) == ["never written"]


def test_claims_of_10x_and_hest_files(tmp_path: Path) -> None:
    xenium_folder(tmp_path)
    path = tmp_path / "cell_feature_matrix.h5"
    with h5py.File(path, "r+") as file:
        del file["matrix/data"]
        huge(file, "matrix/data")
    with pytest.raises(DataError, match="matrix/data claims"):
        read_tenx(path)
    patches = tmp_path / "patches.h5"
    with h5py.File(patches, "w") as file:
        huge(file, "coords")
    with pytest.raises(DataError, match="coords claims"):
        open_slide(patches)
