"""The image half of a prepared slide: stored features, or how its patches are read.

Legend: S spots, F image features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hibio.config import ConfigError
from hibio.image_input import PATCHES, ImageInput
from preprocessing.errors import DataError
from preprocessing.slide_stain import sample_patches, stain_normaliser
from preprocessing.store import SlideStore


def standardise_columns(values: np.ndarray) -> np.ndarray:
    """Columns to mean 0 and sd 1 over the spots of one slide; constant columns become 0."""
    values = np.asarray(values, dtype=np.float64)
    sd = values.std(axis=0)
    centred = values - values.mean(axis=0)
    return (centred / np.where(sd > 1e-8, sd, np.inf)).astype(np.float32)


def colour_statistics(patches: np.ndarray) -> np.ndarray:
    """Mean and sd of R, G, B over all pixels of uint8 (n, px, px, 3), (6,) float32 in 0..1."""
    pixels = patches.reshape(-1, 3).astype(np.float32) / 255.0
    return np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)])


def check_widths(store: SlideStore, image: ImageInput, settings: Mapping[str, Any]) -> None:
    """Compare the physical patch widths with those that the model was trained on.

    Args:
        store: of the slide.
        image: how it is read.
        settings: of the artifacts.

    Raises:
        ConfigError: another width, or no context although it is read.
    """
    _check_width(store.path, "patches", store.attrs["patch_um"], settings["patch_um"], "--patch-um")
    if not image.context:
        return
    if store.context_um is None:
        raise ConfigError(
            f"store {store.path}: no context patches, which model.vision.context: patch reads; "
            "prepare again with --context-um UM, or set it to none"
        )
    for trained_um in settings.get("context_um", ()):
        _check_width(store.path, "context", store.context_um, trained_um, "--context-um")


def _check_width(
    path: Path, what: str, own_um: float, trained_um: float | None, option: str
) -> None:
    if trained_um is not None and abs(own_um - trained_um) > 0.01 * trained_um:
        raise ConfigError(
            f"store {path}: {what} are {own_um:g} um wide, the model was trained on "
            f"{trained_um:g} um; prepare again with {option} {trained_um:g}"
        )


def image_fields(store: SlideStore, image: ImageInput) -> dict[str, Any]:
    """Fields of a `PreparedSlide`: standardised features (S, F), or how its patches are read.

    Raises:
        ConfigError: no such features, or a slide whose stain cannot be measured.
    """
    if image.key == PATCHES:
        sample = sample_patches(store)
        try:
            normaliser = stain_normaliser(image.stain, sample)
        except DataError as error:
            raise ConfigError(
                f"store {store.path}: {error}: set model.vision.stain: none, or leave the slide out"
            ) from error
        return {
            "use_patches": True,
            "use_context": image.context,
            "stain": image.stain,
            "normaliser": None if image.stain == "none" else normaliser,
            "stain_6": colour_statistics(normaliser(sample)),
        }
    if image.key not in store.feature_names:
        raise ConfigError(
            f"store {store.path}: no features {image.key!r} (it has: "
            f"{', '.join(store.feature_names) or 'none'}); prepare again, or set data.image to "
            f"one of these or to {PATCHES!r}"
        )
    return {"features_SF": standardise_columns(store.features(image.key))}
