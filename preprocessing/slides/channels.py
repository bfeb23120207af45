"""What the samples of a picture's pixels are: colour, light, opacity (TIFF 6.0).

What is not red, green and blue in 8 bits is turned into it, which the slide notes; or it is refused
with a command that does so.
"""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preprocessing.errors import DataError
from preprocessing.slides.pixels import REMEDY, Pixels, to_rgb

_KINDS = {
    "MINISBLACK": "grey",
    "MINISWHITE": "inverted",
    "RGB": "rgb",
    "YCBCR": "rgb",
    "PALETTE": "palette",
    "SEPARATED": "cmyk",
}
_KIND_NOTES = {
    "cmyk": "CMYK turned into RGB without a colour profile",
    "inverted": "grey where zero is white",
    "palette": "colours of a palette",
}


@dataclass(frozen=True)
class Channels:
    """How the samples of a pixel become red, green and blue.

    Attributes:
        path: the file, for messages.
        kind: "grey", "inverted" (white is zero), "rgb", "cmyk" or "palette".
        alpha: place of the sample that says how opaque a pixel is; None: there is none.
        premultiplied: the colours are weighted by it already.
        white: value of full light; 255 of 8 bits.
        palette: (256, 3) uint8 colours of the values, for kind "palette".
        notes: what of this is not as in an ordinary picture.
    """

    path: Path
    kind: str = "rgb"
    alpha: int | None = None
    premultiplied: bool = False
    white: int = 255
    palette: Pixels | None = None
    notes: tuple[str, ...] = ()

    @property
    def colours(self) -> int:
        """How many samples, from the first on, are the colour; others may follow."""
        return {"rgb": 3, "cmyk": 4}.get(self.kind, 1)

    def rgb(self, samples: NDArray[np.integer[Any]]) -> Pixels:
        """Turn samples (h, w, n), uint8 or uint16, into RGB (h, w, 3); transparent parts white.

        Raises:
            DataError: a value over ``white``.
        """
        colour = self._eight_bit(samples[..., : self.colours])
        if self.kind == "inverted":
            colour = 255 - colour
        elif self.kind == "cmyk":
            light = 255 - colour.astype(np.float32)
            colour = np.rint(light[..., :3] * light[..., 3:] / 255).astype(np.uint8)
        elif self.palette is not None:
            colour = self.palette[colour[..., 0]]
        if self.alpha is None:
            return to_rgb(colour)
        alpha = samples[..., self.alpha, None]
        if alpha.dtype != np.uint8:  # opacity has all 16 bits, whatever those of the camera
            alpha = (alpha >> 8).astype(np.uint8)
        if not self.premultiplied:
            return to_rgb(np.concatenate([colour, alpha], axis=2))
        lit = colour.astype(np.int16) + (255 - alpha.astype(np.int16))
        return to_rgb(np.minimum(lit, 255).astype(np.uint8))

    def _eight_bit(self, samples: NDArray[np.integer[Any]]) -> Pixels:
        if samples.dtype == np.uint8:
            return samples.astype(np.uint8, copy=False)
        most = int(samples.max(initial=0))
        if most > self.white:
            code = f"numpy.minimum(a // {(most + 1) // 256 or 1}, 255).astype('uint8')"
            raise DataError(
                f"{self.path}: a value of {most}, but those looked at first are at most "
                f"{self.white}; make 8 bits of it: {run_python(self.path, code)}"
            )
        scaled: Pixels = np.rint(samples * np.float32(255 / self.white)).astype(np.uint8)
        return scaled


def full_light(peak: int) -> int:
    """The value of white where more than 8 bits are stored: that of the bits in use.

    Cameras of 10, 12 or 14 bits write their values into 16; a stained section has bright
    background, so its largest value ``peak`` needs all bits of the camera.
    """
    return int(2 ** max(8, int(peak).bit_length()) - 1)


def deep_note(white: int) -> str:
    """What is said of a picture of more than 8 bits a channel."""
    return f"16 bits a channel, of which {white.bit_length()} are in use: {white} read as white"


def run_python(path: Path, code: str, more: str = "") -> str:
    """The command that writes a picture anew.

    Args:
        path: the file, which is the array ``a`` of the code.
        code: an expression for its pixels in 8 bits.
        more: modules that it needs beside numpy and tifffile, each after a comma.
    """
    target = str(path.with_name(path.name.partition(".")[0] + "_rgb.tif"))
    grey = "'rgb' if b.ndim == 3 else 'minisblack'"
    text = (
        f"import numpy, tifffile{more}; a = tifffile.imread({str(path)!r}); b = {code}; "
        f"tifffile.imwrite({target!r}, b, photometric={grey}, tile=(256, 256), compression='zlib')"
    )
    return f"`python -c {shlex.quote(text)}`"


def one_of_many(path: Path, number: int, grey: bool) -> str:
    """The remedy where a file holds several pictures, ``grey`` or coloured."""
    if grey and number == 3:
        code = "numpy.moveaxis(a.reshape(3, *a.shape[-2:]), 0, 2)"
        return f"if they are red, green and blue, put them together: {run_python(path, code)}"
    shape = "a.shape[-2:]" if grey else "a.shape[-3:]"
    code = f"a.reshape(-1, *{shape})[0]"
    return f"to take the first (0; others by their number): {run_python(path, code)}"


def page_channels(path: Path, page: Any) -> Channels:
    """What the samples of a TIFF page are (TIFF 6.0: photometric, ExtraSamples, InkSet).

    An extra sample is opacity only where the file declares it (ExtraSamples 1 or 2); others, such
    as infrared or a mask, are left out, which is noted.

    Raises:
        DataError: neither 8 nor 16 bits, or colours that are not read; with the way to RGB.
    """
    colours, told = page.photometric.name, f"{path}: {page.dtype} {page.photometric.name} picture"
    if page.dtype not in (np.uint8, np.uint16) or page.bitspersample not in (8, 16):
        code = "(255.0 * a / a.max()).clip(0, 255).astype('uint8')"
        raise DataError(
            f"{told}, {page.bitspersample} bits a sample; expected 8 or 16; make 8 bits of it, the "
            f"largest value white: {run_python(path, code)}"
        )
    kind = _KINDS.get(colours)
    if colours == "CIELAB" and page.dtype == np.uint8:
        lab = "numpy.dstack([a[..., 0] / 2.55, a[..., 1:3].astype('int8')])"
        code = f"(255 * skimage.color.lab2rgb({lab})).round().astype('uint8')"
        remedy = "make RGB of it: " + run_python(path, code, ", skimage.color")
        raise DataError(f"{told}; expected RGB, grey, palette or CMYK; {remedy}")
    if kind is None or (kind == "palette" and page.dtype != np.uint8):
        raise DataError(f"{told}; expected RGB, grey, palette or CMYK; {REMEDY}")
    found = Channels(path, kind)
    extra = page.samplesperpixel - found.colours
    if extra < 0 or (kind == "cmyk" and page.tags.valueof("InkSet", 1) != 1):
        raise DataError(f"{told} of {page.samplesperpixel} samples; {REMEDY}")
    return _with_extra(found, page, extra)


def _with_extra(found: Channels, page: Any, extra: int) -> Channels:
    """The channels with their palette, opacity and notes."""
    declared = [int(code) for code in page.extrasamples][:extra]
    opaque = next((i for i, code in enumerate(declared) if code in (1, 2)), None)
    notes = [_KIND_NOTES[found.kind]] if found.kind in _KIND_NOTES else []
    others = extra - (opaque is not None)
    if others:
        notes.append(f"{others} extra channels that are not declared as opacity left out")
    palette = None
    if found.kind == "palette":
        table = np.asarray(page.colormap).T  # (256, 3)
        palette = (table if table.max() < 256 else table >> 8).astype(np.uint8)
    return replace(
        found,
        alpha=None if opaque is None else found.colours + opaque,
        premultiplied=opaque is not None and declared[opaque] == 1,
        palette=palette,
        notes=tuple(notes),
    )
