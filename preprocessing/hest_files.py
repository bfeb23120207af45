"""Where the files of HEST-1k lie, and what its metadata say; what HiBio adds to them.

A sample <id> is st/<id>.h5ad (counts, obsm spatial in pixels), wsis/<id>.tif, patches/<id>.h5 and
metadata/<id>.json below one root.
"""

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from preprocessing.errors import DataError

ST, WSIS, PATCHES, METADATA = "st", "wsis", "patches", "metadata"
OWN = "hibio"  # key of the metadata with what HEST-1k has no field for
_IMAGES = (".tif", ".tiff", ".svs")
_MPP = ("pixel_size_um_estimated", "pixel_size_um_embedded")


def st_file(counts: Path, slide_id: str) -> Path:
    """Return the counts of a sample.

    Args:
        counts: the root of HEST-1k, or st/<id>.h5ad itself.
        slide_id: the sample, where the root is given.

    Raises:
        DataError: there is no such sample; names the nearest.
    """
    if counts.is_file():
        return counts
    found = counts / ST / f"{slide_id}.h5ad"
    if found.is_file():
        return found
    there = [path.stem for path in sorted((counts / ST).glob("*.h5ad"))]
    near = get_close_matches(slide_id, there, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"found {', '.join(there[:6]) or 'none'}"
    raise DataError(
        f"{counts} has no {ST}/{slide_id}.h5ad ({hint}); the slide_id must be the id of a sample "
        "of HEST-1k, or counts the path of its .h5ad file"
    )


def metadata_file(st: Path) -> Path | None:
    """The metadata of the sample whose counts are ``st``, if they are there."""
    path = st.parent.parent / METADATA / f"{st.stem}.json"
    return path if path.is_file() else None


def image_file(st: Path) -> Path | None:
    """The slide image of a sample, else its patches; None: neither is there."""
    root = st.parent.parent
    places = [root / WSIS / f"{st.stem}{ending}" for ending in _IMAGES]
    places.append(root / PATCHES / f"{st.stem}.h5")
    return next((path for path in places if path.is_file()), None)


def read_metadata(path: Path | None) -> dict[str, Any]:
    """Read the metadata of a sample; fields that are NaN or null are left out.

    Raises:
        DataError: not a JSON object.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object; expected the metadata of a HEST-1k sample")
    return {key: value for key, value in content.items() if not _is_missing(value)}


def pixel_sizes(known: Mapping[str, Any], path: Path) -> list[float]:
    """Um per pixel: the estimated one, then the one embedded in the image, where they are given.

    Raises:
        DataError: not a positive number.
    """
    found = []
    for name in _MPP:
        value = known.get(name)
        if value is None:
            continue
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        if not usable or not (math.isfinite(value) and value > 0):
            raise DataError(f"{path}: {name} is {value!r}; expected um per pixel, a number above 0")
        found.append(float(value))
    return found


def patient_of(known: Mapping[str, Any], slide_id: str) -> str:
    """The patient; HEST-1k numbers them anew in each data set, so its title stands in front."""
    patient = str(known.get("patient", "")).strip()
    if not patient:
        return slide_id
    title = str(known.get("dataset_title", "")).strip()
    return f"{title}: {patient}" if title else patient


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
