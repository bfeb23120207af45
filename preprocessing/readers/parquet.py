"""Parquet tables, a file or a folder of files, read within bounds."""

import importlib.util
from pathlib import Path

import pandas as pd

from preprocessing.errors import DataError
from preprocessing.readers.tables import MOST_RATIO, most_unpacked


def require_pyarrow(path: Path) -> None:
    """Raise DataError where the parquet file ``path`` cannot be read for want of pyarrow."""
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(
            f"{path} is a parquet file, which needs pyarrow: pip install 'hibio[parquet]'"
        )


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a parquet table, a file or a folder of files.

    Raises:
        DataError: pyarrow is missing, or the file is damaged, or claims more than it can hold.
    """
    require_pyarrow(path)
    try:
        require_sound_parquet(path)
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a complete parquet file ({error})") from error


def require_sound_parquet(path: Path) -> None:
    """Refuse a parquet file, or a folder of them, whose values would fill the memory.

    A few bytes can stand for millions of equal values. Only what the file says of itself is read.

    Raises:
        DataError: its values, 8 bytes each, are more than `MOST_RATIO` times its size.
        OSError: damaged (so is ValueError).
    """
    from pyarrow.parquet import read_metadata

    parts = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for part in parts:
        if part != path and part.name.startswith(("_", ".")):
            continue
        known, size = read_metadata(part), part.stat().st_size
        groups = [known.row_group(i) for i in range(known.num_row_groups)]
        values = sum(g.column(c).num_values for g in groups for c in range(g.num_columns))
        claimed = max(8 * values, sum(group.total_byte_size for group in groups))
        if claimed > most_unpacked(size):
            raise DataError(
                f"{part}: {values:,} values in {size / 2**20:,.2f} MiB of parquet; expected at "
                f"most {MOST_RATIO} times its size once read: it is damaged, or made to fill the "
                "memory; if it is right, write it as .csv and give that file"
            )
