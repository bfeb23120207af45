"""Slides and counts become slide stores; TF-IDF, gene selection and spot graphs read them."""

from importlib import import_module
from typing import Any

__all__ = [
    "DataError",
    "SlideStore",
    "SpotTable",
    "TfidfReweighter",
    "open_slide",
    "prepare",
    "read_manifest",
    "stores_in",
]

_HOME = {
    "DataError": "errors",
    "SlideStore": "store",
    "SpotTable": "spot_table",
    "TfidfReweighter": "tfidf",
    "open_slide": "slides",
    "prepare": "run",
    "read_manifest": "manifest",
    "stores_in": "store.read",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import preprocessing`` is cheap."""
    if name not in _HOME:
        raise AttributeError(f"module 'preprocessing' has no attribute {name!r}")
    return getattr(import_module(f"preprocessing.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
