"""Parquet tables, which need pyarrow (not installed with HiBio)."""

import importlib.util
from pathlib import Path

import pandas as pd

from preprocessing.errors import DataError


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a parquet table.

    Raises:
        DataError: pyarrow is missing, or the file is damaged.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(
            f"{path} is a parquet file, which needs pyarrow: pip install pyarrow (or hibio with "
            "its extra 'parquet')"
        )
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a complete parquet file ({error})") from error
