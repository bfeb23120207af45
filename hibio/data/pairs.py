"""Pairs of patch and profile over many slides, for a plain torch DataLoader (docs/python.md).

Nothing is fitted: what comes out is what the stores hold, so it serves models of any kind.
Legend: S spots of all slides, G genes, F features.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from hibio.config.files import ConfigError
from hibio.config.model import PATCHES
from hibio.data.counts import align_columns, reading
from hibio.data.splits import SlideEntry, read_entries
from hibio.regions import grid_regions
from preprocessing.errors import did_you_mean
from preprocessing.selection import normalised
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in

OPEN_STORES = 16  # files that a process keeps open


class SlideDataset(Dataset[dict[str, Any]]):
    """One item a spot: its image and its profile, read from its store when asked for.

    A batch is read at once, slide by slide (`__getitems__`, which torch's DataLoader calls), in any
    number of workers; memory is that of a batch. An item is a dict:

    - ``image``: uint8 (3, h, w) patch, or (F,) float32 stored features;
    - ``profile``: (G,) float32, log-normalised over all genes of the slide (proteins: arcsinh), or
      the counts as measured; a gene that a slide did not measure is NaN;
    - ``xy_um``: (2,) float32 place on the slide in micrometres;
    - ``slide``: number of the slide in ``slides``; ``spot``: row of the spot in its store.

    Args:
        stores: the folder that `hibio prepare` wrote, or stores. Slides without an image or without
            counts are left out.
        image: ``patches``, or the name of stored features such as ``handcrafted``.
        genes: columns of the profile, in this order; None: those that every slide measures.
        counts: profiles are raw counts (or intensities).

    Attributes:
        slides: what is known of each slide (`hibio.data.splits.SlideEntry`): id, patient, ...
        genes: (G,) names.
        slide_of_spot: (S,) number of the slide of each item.

    Raises:
        ConfigError: no slide with both, no gene in common, a gene that no slide measures, or
            patches of several widths.
        DataError: a store that cannot be read; when an item is asked for as well.
    """

    def __init__(
        self,
        stores: str | Path | Sequence[str | Path],
        image: str = PATCHES,
        genes: Sequence[str] | None = None,
        *,
        counts: bool = False,
    ) -> None:
        given = [stores] if isinstance(stores, str | Path) else list(stores)
        paths = [Path(one) for one in given]
        files = [file for p in paths for file in (stores_in(p) if p.is_dir() else [p])]
        entries = read_entries(files)
        self.slides: tuple[SlideEntry, ...] = tuple(
            entry for entry in entries if entry.has_image and entry.has_counts
        )
        if not self.slides:
            raise ConfigError(f"none of the {len(entries)} slides has both an image and counts")
        wide = {entry.patch_um: entry.slide_id for entry in self.slides}
        if image == PATCHES and len(wide) > 1:
            told = ", ".join(f"{um:g} um on {slide_id}" for um, slide_id in wide.items())
            raise ConfigError(f"patches are of several widths ({told}); prepare all slides alike")
        self.image = image
        self.counts = counts
        self.genes = self._chosen(genes)
        sizes = [entry.n_spots for entry in self.slides]
        self._first = np.cumsum([0, *sizes])
        self.slide_of_spot = np.repeat(np.arange(len(sizes)), sizes)
        self._open: OrderedDict[int, SlideStore] = OrderedDict()
        self._process = os.getpid()

    def _chosen(self, genes: Sequence[str] | None) -> np.ndarray:
        panels: list[np.ndarray] = []
        for entry in self.slides:
            with SlideStore(entry.path) as store:
                panels.append(store.gene_names)
                if self.image != PATCHES:
                    store.features(self.image, slice(0, 1))  # an unknown name is told now
        if genes is None:
            everywhere = set.intersection(*(set(panel.tolist()) for panel in panels))
            if not everywhere:
                raise ConfigError("no gene is measured on every slide; name genes=[...]")
            return np.array([name for name in panels[0] if name in everywhere])
        known = {name for panel in panels for name in panel.tolist()}
        unknown = [name for name in genes if name not in known]
        if unknown:
            hint = did_you_mean(unknown[0], sorted(known))
            raise ConfigError(
                f"{len(unknown)} gene(s) are measured on no slide, such as {unknown[0]!r}{hint}"
            )
        return np.array(list(dict.fromkeys(genes)))

    def __len__(self) -> int:
        return len(self.slide_of_spot)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Items by number, in their order."""
        index = np.asarray(indices, dtype=np.int64)
        wrong = index[(index < -len(self)) | (index >= len(self))]
        if len(wrong):
            raise IndexError(f"item {wrong[0]} of a data set of {len(self)} spots")
        index = index % len(self)
        items: list[dict[str, Any]] = [{} for _ in indices]
        slide_of = self.slide_of_spot[index]
        for slide in np.unique(slide_of).tolist():
            places = np.flatnonzero(slide_of == slide)
            read = self._read(slide, index[places] - self._first[slide])
            for number, place in enumerate(places.tolist()):
                items[place] = {name: values[number] for name, values in read.items()}
        return items

    def _read(self, slide: int, spots: np.ndarray) -> dict[str, Any]:
        entry = self.slides[slide]
        with reading(entry.path, entry.slide_id):
            store = self._store(slide)
            if self.image == PATCHES:
                image = np.ascontiguousarray(np.moveaxis(store.patches(spots), 3, 1))
            else:
                image = store.features(self.image, spots)
            counts, names = store.counts(spots), store.gene_names
            values = counts if self.counts else normalised(counts, entry.modality)
            profile = align_columns(values, names, self.genes).toarray().astype(np.float32)
            profile[:, ~np.isin(self.genes, names)] = np.nan
            xy_um = store.xy_um[spots].astype(np.float32)
        return {
            "image": torch.from_numpy(image),
            "profile": torch.from_numpy(profile),
            "xy_um": torch.from_numpy(xy_um),
            "slide": [slide] * len(spots),
            "spot": spots.tolist(),
        }

    def _store(self, slide: int) -> SlideStore:
        """The open store; files of another process are not touched (HDF5 would mix its reads)."""
        if self._process != os.getpid():
            self._open, self._process = OrderedDict(), os.getpid()
        if slide not in self._open:
            self._open[slide] = SlideStore(self.slides[slide].path)
        self._open.move_to_end(slide)
        while len(self._open) > OPEN_STORES:
            self._open.popitem(last=False)[1].close()
        return self._open[slide]

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, for workers that are started anew."""
        return {**self.__dict__, "_open": OrderedDict()}


class RegionBatches(Sampler[list[int]]):
    """Batches of whole regions of one slide: squares as large as a circle of a diameter.

    For ``DataLoader(dataset, batch_sampler=RegionBatches(dataset, 600.0))``.

    Args:
        dataset: of spots.
        diameter_um: of a region in micrometres.
        least: regions of fewer spots are left out.
        shuffle: other order in every pass; else as the slides and their regions come.
        seed: of the order.
    """

    def __init__(
        self,
        dataset: SlideDataset,
        diameter_um: float,
        *,
        least: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.regions: list[list[int]] = []
        self.shuffle = shuffle
        self.rng = np.random.default_rng(seed)
        first = 0
        for entry in dataset.slides:
            with SlideStore(entry.path) as store:
                label = grid_regions(store.xy_um, diameter_um)
            order = np.argsort(label, kind="stable")
            found = np.split(order + first, np.bincount(label).cumsum()[:-1])
            self.regions += [one.tolist() for one in found if len(one) >= least]
            first += len(label)
        if not self.regions:
            raise ConfigError(f"no region of {diameter_um:g} um has {least} spots; ask for fewer")

    def __len__(self) -> int:
        return len(self.regions)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(len(self.regions))
        return (self.regions[i] for i in (self.rng.permutation(order) if self.shuffle else order))
