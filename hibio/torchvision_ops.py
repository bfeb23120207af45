"""Makes `import torchvision` (and so `import timm`) work beside a CPU build of torch.

The ordinary torchvision wheel links its compiled operators to CUDA. Beside a torch without CUDA
they do not load, and torchvision then fails on import because it registers shape functions for
operators that nobody declared. Declaring the two that it asks for is enough: nothing calls them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

_MISSING = "operator torchvision::"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def ensure_torchvision() -> bool:
    """Make torchvision importable; call it before the first import of timm or torchvision.

    Returns:
        Whether torchvision's compiled operators are there (nms, roi_align, decode_jpeg). Without
        them models and transforms work all the same.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: torchvision fails for any other reason than its missing operators.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:  # declared only now: a loadable extension would do it twice
        if _MISSING not in str(error):
            raise
        _declared_operators()
        importlib.import_module("torchvision")
    return bool(importlib.import_module("torchvision.extension")._has_ops())


@functools.cache
def _declared_operators() -> Any:
    """The declarations; they last as long as this object, which the cache keeps."""
    make: Any = torch.library.Library
    library = make("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
