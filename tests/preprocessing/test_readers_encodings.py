"""Legal and rare encodings of HDF5 are read to the value, or refused with their true reason."""

import importlib.util
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from preprocessing import DataError
from preprocessing.readers.format import read_spots
from preprocessing.readers.tenx import read_tenx
from preprocessing.spot_table import native_numbers
from tests.preprocessing.cell_sources import (
    CELLS,
    NAMES,
    cell_row,
    draw_counts,
    draw_xy,
    toy_anndata,
    write_h5ad,
)

COUNTS = draw_counts(CELLS, 5)
TYPES = ["<f2", ">f2", ">f4", ">f8", "<f4", ">i2", ">i4", "u1", ">u8", "longdouble"]


def put(file: h5py.File, name: str, values: np.ndarray) -> None:
    """Other values in the place of a dataset; its attributes stay."""
    attributes = dict(file[name].attrs)
    del file[name]
    file[name] = values
    file[name].attrs.update(attributes)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layout", ["dense", "csr", "csc"])
def test_numbers_of_any_size_and_byte_order(kind: str, layout: str, tmp_path: Path) -> None:
    data = toy_anndata()
    data.X = data.X.toarray() if layout == "dense" else data.X.asformat(layout)
    path = write_h5ad(tmp_path, data)
    with h5py.File(path, "r+") as file:
        name = "X" if layout == "dense" else "X/data"
        put(file, name, file[name][:].astype(kind))
        if layout != "dense":
            for part in ("X/indices", "X/indptr"):
                put(file, part, file[part][:].astype(">i8"))
        put(file, "obsm/spatial", file["obsm/spatial"][:].astype(">f4"))
    table = read_spots(cell_row(path, "h5ad"))
    np.testing.assert_array_equal(table.counts.toarray(), COUNTS)
    np.testing.assert_allclose(table.xy_px0, draw_xy(), rtol=1e-6)


def test_native_numbers_keep_numbers_and_drop_the_byte_order() -> None:
    for kind in TYPES:
        found = native_numbers(np.arange(7).astype(kind))
        assert found.dtype.isnative
        assert found.dtype.itemsize <= 8
        assert found.tolist() == list(range(7))


def zstd_frame(data: bytes) -> bytes:
    """A Zstandard frame of one block that is stored as it is."""
    head = b"\x28\xb5\x2f\xfd\xe0" + len(data).to_bytes(8, "little")
    return head + (len(data) << 3 | 1).to_bytes(3, "little") + data


def lz4_chunk(data: bytes) -> bytes:
    """A chunk of the HDF5 filter LZ4 whose only block is stored as it is."""
    return len(data).to_bytes(8, "big") + len(data).to_bytes(4, "big") * 2 + data


def pack(file: h5py.File, name: str, number: int, packed: Any) -> None:
    """Store a dataset in one chunk that a filter must unpack."""
    values, attributes = file[name][()], dict(file[name].attrs)
    del file[name]
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_chunk(values.shape)
    create.set_filter(number, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple(values.shape)
    kind = h5py.h5t.py_create(values.dtype)
    made = h5py.h5d.create(file.id, name.encode(), kind, space, create)
    made.write_direct_chunk((0,) * values.ndim, packed(values.tobytes()), 0)
    file[name].attrs.update(attributes)


FILTERS = {"zstd": (32015, zstd_frame), "LZ4": (32004, lz4_chunk)}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("form", ["h5ad", "10x"])
def test_filters_of_hdf5plugin(name: str, form: str, tmp_path: Path) -> None:
    number, packed = FILTERS[name]
    if form == "h5ad":
        path = write_h5ad(tmp_path, toy_anndata())
        with h5py.File(path, "r+") as file:
            pack(file, "X/data", number, packed)
    else:
        path = write_early(tmp_path / "a.h5", {"GRCh38": COUNTS})
        with h5py.File(path, "r+") as file:
            pack(file, "GRCh38/data", number, packed)

    def read() -> np.ndarray:
        if form == "10x":
            return read_tenx(path).counts.toarray()
        return read_spots(cell_row(path, "h5ad")).counts.toarray()

    if importlib.util.find_spec("hdf5plugin") is not None:
        np.testing.assert_array_equal(read(), COUNTS)
        return
    words = rf"packed with {name} \(HDF5 filter {number}, of .*data\).*pip install .hibio\[hdf5\]"
    with pytest.raises(DataError, match=words) as error:
        read()
    assert "damaged" not in str(error.value)


# Cell Ranger 2 ----------------------------------------------------------------------------------


def write_early(path: Path, genomes: dict[str, np.ndarray]) -> Path:
    """The matrix as Cell Ranger 1 and 2 wrote it: a group a genome, genes without types."""
    with h5py.File(path, "w") as file:
        for genome, counts in genomes.items():
            matrix, group = csr_matrix(counts), file.create_group(genome)
            group["data"], group["indices"] = matrix.data, matrix.indices
            group["indptr"], group["shape"] = matrix.indptr, counts.shape[::-1]
            group["barcodes"] = np.array([f"c{i}-1" for i in range(len(counts))], "S")
            group["gene_names"] = np.array(NAMES, "S")
            group["genes"] = np.array([f"ENSG{i}" for i in range(len(NAMES))], "S")
    return path


def test_cell_ranger_2(tmp_path: Path) -> None:
    found = read_tenx(write_early(tmp_path / "a.h5", {"mm10": COUNTS}))
    np.testing.assert_array_equal(found.counts.toarray(), COUNTS)
    assert found.gene_names.tolist() == NAMES
    assert found.gene_ids.tolist()[1] == "ENSG1"
    assert found.barcodes.tolist()[0] == "c0-1"


def test_cell_ranger_2_of_two_genomes_and_other_files(tmp_path: Path) -> None:
    two = write_early(tmp_path / "a.h5", {"GRCh38": COUNTS, "mm10": COUNTS})
    with pytest.raises(DataError, match=r"each of 2 genomes \(GRCh38, mm10\).*Cell Ranger 2"):
        read_tenx(two)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["something"] = 1
    with pytest.raises(DataError, match="has the groups something; expected filtered_"):
        read_tenx(tmp_path / "b.h5")
