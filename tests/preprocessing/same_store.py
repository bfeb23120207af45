"""Two stores of one slide: the same content, wherever HDF5 put its bytes."""

from pathlib import Path

import h5py

from preprocessing.store import verify_store
from preprocessing.store.layout import SEAL


def sealed(path: Path) -> str:
    """The seal of a store that is whole and agrees with it."""
    found = {f.level for f in verify_store(path)}
    assert "FAIL" not in found, f"{path}: {found}"
    with h5py.File(path) as file:
        return str(file.attrs[SEAL])


def assert_same_store(one: Path, two: Path) -> None:
    assert one.name == two.name
    assert sealed(one) == sealed(two)
