"""HiBio: histology and spatial omics in one embedding space."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["HiBio", "SlideBatch", "__version__"]

__version__ = "0.2.0"

_BESIDE = ("pathways", "preprocessing", "eval")  # packages that come with this one


def _refuse_hidden() -> None:
    """Say which file stands before a package of ours, or was installed over it.

    Raises:
        ImportError: one does; names it and says what to do.
        SystemExit: the same for the command, which shows no traceback.
    """
    ours = Path(__file__).resolve().parent.parent
    came = _as_installed(ours / f"hibio-{__version__}.dist-info" / "RECORD")
    for name in _BESIDE:
        loaded = sys.modules.get(name)
        found = getattr(loaded, "__spec__", None) if loaded else find_spec(name)
        if found is None or found.origin is None or not (ours / name).is_dir():
            continue
        origin = Path(found.origin)
        size = came.get(f"{name}/__init__.py")
        if origin.resolve().parent == ours / name and size in (None, origin.stat().st_size):
            continue
        told = _who_hides(name, origin)
        if sys.argv[0] == "-m" or Path(sys.argv[0]).stem == "hibio":  # -m: of hibio.cli
            sys.exit(f"error: {told}")
        raise ImportError(told)


def _as_installed(record: Path) -> dict[str, int]:
    """Size in bytes of each file that the wheel brought; empty for a checkout."""
    if not record.is_file():
        return {}
    lines = [line.rsplit(",", 2) for line in record.read_text(encoding="utf-8").splitlines()]
    return {path: int(size) for path, _, size in lines if size}


def _who_hides(name: str, origin: Path) -> str:
    """One sentence: the file, what it hides, the remedy."""
    beside = origin.parent.parent == Path(__file__).parent.parent
    if beside or {"site-packages", "dist-packages"} & set(origin.parts):
        from importlib.metadata import packages_distributions

        owners = packages_distributions().get(name, ())
        owner = " ".join(sorted({one for one in owners if one not in (None, "hibio")}))
        whose = f"of another project ({owner})" if owner else "not what was installed"
        remove = f"pip uninstall {owner}, then " if owner else ""
        return (
            f"{origin} is {whose}, where HiBio needs its own package {name!r}; "
            f"{remove}pip install --force-reinstall --no-deps hibio"
        )
    kind, path = ("folder", origin.parent) if origin.stem == "__init__" else ("file", origin)
    return (
        f"{path} hides the package {name!r} that HiBio needs (Python looks beside the "
        f"script and in the working folder first); rename or move that {kind}"
    )


_refuse_hidden()

_HOMES = {"HiBio": "hibio.model", "SlideBatch": "hibio.batch"}


def __getattr__(name: str) -> Any:
    """Load public classes and doors when they are first asked for (torch takes seconds)."""
    import importlib

    if name in _BESIDE:
        return importlib.import_module(f"hibio.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'hibio' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
