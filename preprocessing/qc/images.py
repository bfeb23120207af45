"""Small pictures of a quality page as bytes and as text that HTML can hold."""

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_JPEG_QUALITY = 82
_TILE_PX = 96


def patch_strip(patches: NDArray[np.uint8]) -> bytes:
    """Put patches (n, px, px, 3) side by side, each 96 px wide with a white rim; JPEG."""
    strip = Image.new("RGB", (len(patches) * (_TILE_PX + 4), _TILE_PX), "white")
    for number, patch in enumerate(patches):
        small = Image.fromarray(patch).resize((_TILE_PX, _TILE_PX), Image.Resampling.BOX)
        strip.paste(small, (number * (_TILE_PX + 4), 0))
    return encode(strip, "JPEG")


def small_picture(picture: NDArray[np.uint8], edge_px: int = 140) -> bytes:
    """Return a thumbnail of a thumbnail; JPEG."""
    image = Image.fromarray(picture)
    image.thumbnail((edge_px, edge_px))
    return encode(image, "JPEG")


def data_uri(data: bytes) -> str:
    """Return a PNG or JPEG as text that a page can hold."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def encode(picture: Image.Image, form: str) -> bytes:
    """Encode a picture as "PNG" or "JPEG"."""
    stream = io.BytesIO()
    how: dict[str, Any] = {"quality": _JPEG_QUALITY} if form == "JPEG" else {"optimize": True}
    picture.save(stream, format=form, **how)
    return stream.getvalue()
