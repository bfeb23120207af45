"""Pictures that are decoded as a whole: JPEG, PNG, WebP and JPEG 2000."""

import struct
from typing import Any

import numpy as np
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from preprocessing.errors import DataError
from preprocessing.slides.channels import Channels, deep_note, full_light
from preprocessing.slides.pixels import Pixels, PlainSlide, check_size, to_rgb

_JPEG, _PNG, _WEBP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"
_JP2, _CODESTREAM = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"  # with boxes, or without any
# The classes themselves, because Image.open would apply Pillow's process-wide size limit.
_PLUGINS: dict[bytes, Any] = {
    _JPEG: JpegImageFile,
    _PNG: PngImageFile,
    _WEBP: WebPImageFile,
    _JP2: Jpeg2KImageFile,
    _CODESTREAM: Jpeg2KImageFile,
}
_HEAD = 1 << 16  # bytes at the beginning in which a JPEG 2000 file says what it holds


def is_picture(head: bytes) -> bool:
    """Whether a file with these first bytes (12) is one of the pictures."""
    return head.startswith(tuple(_PLUGINS)) and (head[:4] != _WEBP or head[8:12] == b"WEBP")


class PlainPicture(PlainSlide):
    """A JPEG, PNG, WebP or JPEG 2000 picture; a level is decoded when it is first read.

    The coarsest is decoded when the file is opened, which needs all of its bytes: a picture that
    is cut off is refused then. A JPEG has levels 2, 4 and 8 for free, since its decoder scales
    down. The dpi of these formats says nothing about the specimen, so mpp is None.
    """

    def _open(self) -> tuple[int, int]:
        self._levels: dict[int, Pixels] = {}
        with self.path.open("rb") as file:
            head = file.read(_HEAD)
        self._kind = next(magic for magic in _PLUGINS if head.startswith(magic))
        self._plugin = _PLUGINS[self._kind]
        with self._plugin(self.path) as image:
            mode, orientation = image.mode, image.getexif().get(0x0112, 1)
            size: tuple[int, int] = image.size
            frames = getattr(image, "n_frames", 1)
        check_size(self.path, size)
        if orientation != 1:
            raise DataError(
                f"{self.path}: EXIF orientation {orientation}, so x and y are ambiguous; save the "
                "picture upright, in the frame of the spots, without EXIF"
            )
        if frames > 1:
            raise DataError(f"{self.path}: {frames} pictures in one file; save one of them alone")
        if self._kind == _JPEG and min(size) >= 64:
            self.level_downsamples = (1.0, 2.0, 4.0, 8.0)
        if mode == "CMYK":
            self.notes = ("CMYK turned into RGB without a colour profile",)
        jp2 = self._kind in (_JP2, _CODESTREAM)
        self._opaque = mode == "RGBA" and jp2 and not _declares_opacity(head)
        if self._opaque:
            self.notes = ("a fourth channel that is not declared as opacity left out",)
        if self._bits(head) > 8:
            self._levels[0] = self._deep()
        self._decoded(len(self.level_downsamples) - 1)
        return size

    def _bits(self, head: bytes) -> int:
        """Bits of a sample."""
        if self._kind == _PNG:
            return head[24]
        at = head.find(_CODESTREAM)
        if self._kind not in (_JP2, _CODESTREAM) or at < 0 or len(head) < at + 43:
            return 8
        return (head[at + 42] & 0x7F) + 1  # Ssiz of the first component

    def _deep(self) -> Pixels:
        """All pixels of a picture with more than 8 bits a sample, (h, w, 3)."""
        import imagecodecs

        data = self.path.read_bytes()
        if self._kind == _PNG:
            samples = imagecodecs.png_decode(data)
        else:
            samples = imagecodecs.jpeg2k_decode(data)
        samples = samples[..., None] if samples.ndim == 2 else samples
        count = samples.shape[2]
        colours = 1 if count < 3 else 3
        white = full_light(int(samples[..., :colours].max()))
        alpha = colours if count > colours and self._kind == _PNG else None
        self.notes = (*self.notes, deep_note(white))
        kind = "grey" if colours == 1 else "rgb"
        return Channels(self.path, kind, alpha, white=white).rgb(samples)

    def _decoded(self, level: int) -> Pixels:
        """All pixels of a level, (h, w, 3)."""
        if level not in self._levels:
            with self._plugin(self.path) as image:
                if level:  # it takes the strongest reduction that is not smaller than asked for
                    image.draft(None, tuple(n >> level for n in image.size))
                clear = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
                samples = np.asarray(image.convert("RGBA" if clear else "RGB"))
            self._levels[level] = to_rgb(samples[..., :3] if self._opaque else samples)
        return self._levels[level]

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        target[:] = self._decoded(level)[y : y + target.shape[0], x : x + target.shape[1]]

    def close(self) -> None:
        """Release the decoded pixels."""
        self._levels.clear()


def _declares_opacity(head: bytes) -> bool:
    """Whether the box cdef of a JPEG 2000 file says that a channel is opacity (type 1)."""
    at = head.find(b"cdef")
    if at < 0 or len(head) < at + 6:
        return False
    (count,) = struct.unpack_from(">H", head, at + 4)
    entries = head[at + 6 : at + 6 + 6 * count]
    return any(kind == 1 for _, kind, _ in struct.iter_unpack(">3H", entries))
