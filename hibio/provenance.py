"""What ran: versions, hardware, commit, command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from preprocessing.atomic import atomic_path

PACKAGES = ("hibio", "torch", "timm", "numpy", "scipy", "scikit-learn", "anndata", "h5py")


def provenance() -> dict[str, Any]:
    """Versions of the packages that decide results, the machine, the commit and the command."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "commit": _commit(),
    }


def write_provenance(path: Path) -> None:
    """Write :func:`provenance` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(provenance(), indent=2) + "\n")


def _version(package: str) -> str:
    """Installed version; HiBio itself may run from a checkout that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Commit of the checkout this package lies in; "" for an installed copy."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()
