"""Deep zoom of a slide: its image file by whatever reader fits, else the thumbnail of its store."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from hibio.config.files import ConfigError
from preprocessing.run.sifting import BLACK_AS_WHITE
from preprocessing.slides import Slide, open_slide
from preprocessing.store import SlideStore

TILE, OVERLAP = 510, 1  # pixels; a tile with its overlap is 512 wide
QUALITY = 80  # of the JPEG of a tile
SAME_SIZE = 2  # pixels of level 0 by which an image may differ from that of the store
BLANK = 256  # pixels, of the white ground of a slide without image


class SlideLevels:
    """A slide as OpenSlide's `DeepZoomGenerator` reads one."""

    properties: dict[str, str] = {}  # noqa: RUF012 - never written

    def __init__(self, slide: Slide) -> None:
        self.slide = slide
        self.level_dimensions, self.level_downsamples = (
            slide.level_dimensions,
            slide.level_downsamples,
        )

    def get_best_level_for_downsample(self, downsample: float) -> int:
        """The coarsest level that is at least as fine."""
        fine = [i for i, d in enumerate(self.level_downsamples) if d <= downsample * 1.01]
        return max(fine, default=0)

    def read_region(self, xy_px0: tuple[int, int], level: int, size: tuple[int, int]) -> Any:
        """RGBA picture of a rectangle of a level."""
        return Image.fromarray(self.slide.read_region(xy_px0, level, size)).convert("RGBA")


class DeepZoom:
    """Tiles of one slide.

    Attributes:
        size_px0: (width, height) that the tiles cover, in level-0 pixels of the slide.
        words: what is shown in place of the slide image; "" for the image itself.
    """

    def __init__(self, store: SlideStore, folder: Path | None = None) -> None:
        """Open the image of a store in ``folder``, by the name that `hibio prepare` read it by.

        Raises:
            ConfigError: the image there has another size than the one that was prepared.
            DataError: it cannot be read.
        """
        self._lock = threading.Lock()
        self._slide: Slide | None = None
        name = Path(str(store.attrs.get("settings", {}).get("image_name", ""))).name
        path = folder / name if folder is not None and name else None
        self.words = ""
        if path is not None and path.exists():
            black = BLACK_AS_WHITE in store.attrs.get("notes", ())
            self._slide = open_slide(path, black_is_background=black)
            self.size_px0 = self._checked(store, path)
            source: Any = SlideLevels(self._slide)
        elif store.thumbnail is not None and store.thumbnail_downsample is not None:
            picture = Image.fromarray(store.thumbnail)
            down = store.thumbnail_downsample
            self.size_px0 = (picture.width * down, picture.height * down)
            where = f"no {name!r} in {folder.name}" if folder else "name its folder with --slides"
            self.words = f"the thumbnail of the store, not the slide ({where})"
            source = openslide.ImageSlide(picture)
        else:
            low, high = store.xy_px0.min(axis=0), store.xy_px0.max(axis=0)
            width, height = np.maximum(high + np.maximum(low, 1.0), 1.0)
            self.size_px0 = (float(width), float(height))
            shape = (BLANK, max(1, round(BLANK * height / width)))
            self.words = "no image: the slide has counts alone"
            source = openslide.ImageSlide(Image.new("RGB", shape, "white"))
        self._zoom = DeepZoomGenerator(source, TILE, OVERLAP)

    def _checked(self, store: SlideStore, path: Path) -> tuple[float, float]:
        assert self._slide is not None
        width, height = self._slide.level_dimensions[0]
        said = store.attrs.get("slide_size_px0", (width, height))
        if max(abs(width - int(said[0])), abs(height - int(said[1]))) > SAME_SIZE:
            raise ConfigError(
                f"{path} has {width} x {height} pixels, slide {store.slide_id!r} was prepared from "
                f"an image of {int(said[0])} x {int(said[1])}; give the folder of that one as "
                "--slides"
            )
        return float(width), float(height)

    @property
    def facts(self) -> dict[str, Any]:
        """What the page must know: pixels, and size and number of the tiles."""
        width, height = self._zoom.level_dimensions[-1]
        return {
            "width": width,
            "height": height,
            "tile": TILE,
            "overlap": OVERLAP,
            "levels": self._zoom.level_count,
            "size_px0": list(self.size_px0),
            "words": self.words,
        }

    def tile(self, level: int, column: int, row: int) -> bytes:
        """One tile as JPEG.

        Raises:
            ConfigError: there is no such tile.
        """
        try:
            with self._lock:
                picture = self._zoom.get_tile(level, (column, row))
        except ValueError as error:
            raise ConfigError(f"no tile {column}, {row} of level {level}") from error
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=QUALITY)
        return data.getvalue()

    def addresses(self) -> Iterator[tuple[int, int, int]]:
        """(level, column, row) of every tile that a page may ask for."""
        for level, (columns, rows) in enumerate(self._zoom.level_tiles):
            yield from ((level, c, r) for c in range(columns) for r in range(rows))
