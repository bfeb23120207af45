"""The read-out of a checkpoint: expression from an image, and how far each gene can be trusted.

One linear map a gene, fitted on the training slides by `eval.predict` (docs/predict.md) and kept as
``readout.h5`` beside the weights, so that a model answers without its training data.

Legend: S spots of ONE slide, F inputs (stored features that the tower reads, then the embedding),
T genes (or gene sets), P axes, R reference spots, C held-out distances.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from scipy.special import softmax

from hibio.checkpoint import READOUT, verify_file
from hibio.config.files import ConfigError
from hibio.data.stored_features import standardise_columns
from hibio.keys import UNS
from preprocessing.errors import DataError, did_you_mean
from preprocessing.files import atomic_path
from preprocessing.hdf5 import hdf5_writer, open_guarded, require_arrays
from preprocessing.hest_layout import obs_columns

GENE, GENE_SET = "gene", "gene set"
NEAREST = 5  # reference spots in a distance
MIN_RELIABILITY, MIN_PATIENTS = 0.1, 3  # genes of less are marked
FOREIGN, MOST = 0.05, 0.5  # a spot this unfamiliar is foreign; a slide of which so many are
_TEXTS = ("names", "kinds", "ids")
_COLUMNS = ("mean", "spread", "reliability", "low", "high", "n_units", "width", "covered")


@dataclass(frozen=True)
class Look:
    """What the patches of the training slides look like, before a slide is standardised.

    Attributes:
        mean, scale: (F,) of the stored features over the reference spots.
        axes: (F, P) principal axes of the scaled features.
        reference: (R, P) reference spots on them.
        held_out: (C,) sorted distances of spots to the reference spots of the other patients.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    reference: np.ndarray
    held_out: np.ndarray

    def place(self, features_SF: np.ndarray) -> np.ndarray:
        """Spots on the axes, (S, P)."""
        return np.asarray(((features_SF - self.mean) * self.scale) @ self.axes)

    def familiarity(self, features_SF: np.ndarray) -> np.ndarray:
        """Share (S,) of held-out training spots that lay at least as far from the other patients.

        Near 1: in the midst of the cohort; a spot of a patient like those is below .05 in one case
        of twenty (a conformal p-value).
        """
        distance = distances(self.reference, self.place(features_SF))
        farther = len(self.held_out) - np.searchsorted(self.held_out, distance, side="left")
        return np.asarray((farther + 1.0) / (len(self.held_out) + 1.0))


def distances(reference_RP: np.ndarray, spots_SP: np.ndarray) -> np.ndarray:
    """Mean distance (S,) to the `NEAREST` reference spots."""
    k = min(NEAREST, len(reference_RP))
    found = cKDTree(reference_RP).query(spots_SP, k=k)[0]
    return np.asarray(found.reshape(len(spots_SP), k).mean(axis=1))


def verdict(familiarity_S: np.ndarray) -> str:
    """One sentence on a slide that does not look like the training slides; "" for one that does."""
    if not np.isfinite(familiarity_S).all():
        return ""
    share = float((familiarity_S < FOREIGN).mean())
    if share <= MOST:
        return ""
    return (
        f"{share:.0%} of the patches look like nothing in the training slides (familiarity below "
        f"{FOREIGN}): another organ, stain or scanner, so take no reliability for granted here"
    )


@dataclass(frozen=True)
class LabelProbe:
    """Classes of a label from an image: a linear softmax whose probabilities are calibrated.

    Attributes:
        name: column of the training slides' labels.
        classes: (C,) names, sorted.
        weights, bias: (F, C) and (C,) on the inputs of the read-out, temperature included.
        temperature: what the logits were divided by, so that held-out units are told as often as
            said; above 1: the probe was too sure.
        accuracy, low, high, n_units: balanced accuracy of held-out units (by their stored features
            alone, as the reliability of a gene), its 95 % interval, and their number.
        error: expected calibration error there, in ten bins of the largest probability.
        unit: what was held out: patients, slides or blocks.
    """

    name: str
    classes: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    temperature: float
    accuracy: float
    low: float
    high: float
    n_units: int
    error: float
    unit: str

    def probabilities(self, x_nF: np.ndarray) -> np.ndarray:
        """Probability (n, C) float32 of each class."""
        return np.asarray(softmax(x_nF @ self.weights + self.bias, axis=1), dtype=np.float32)

    @property
    def told(self) -> dict[str, Any]:
        """What a user has to know of it, as AnnData holds it."""
        few = self.n_units < MIN_PATIENTS or self.unit != "patients"
        note = f"fewer than {MIN_PATIENTS} patients were held out" if few else ""
        numbers = ("temperature", "accuracy", "low", "high", "n_units", "error", "unit")
        known = {name: getattr(self, name) for name in numbers}
        return {**known, "label": self.name, "chance": 1.0 / len(self.classes), "note": note}


@dataclass(frozen=True)
class Readout:
    """Linear maps from an image to genes, and what is known of each.

    Attributes:
        names: (T,) genes or gene sets.
        kinds: (T,) `GENE` or `GENE_SET`.
        ids: (T,) ids of the genes on the training slides; "" where none is known.
        weights: (F, T) on inputs standardised over the slide.
        mean, spread: (T,) of the training spots; the spread is that within a slide.
        reliability: (T,) Pearson r of held-out training spots within their slides, mean over the
            units that were held out, by their stored features alone: what the encoder adds on a new
            patient is not known from patients that it was trained on. NaN for a gene that never
            varied.
        low, high: (T,) 95 % interval of that mean (t); NaN below three units.
        n_units: (T,) units that have a value.
        width: (T,) half width of the interval of a spot; NaN where nothing was held out.
        covered: (T,) share of held-out spots inside when the width came from other units.
        unit: what was held out: patients, slides or blocks.
        coverage: that the width was made for.
        features: stored features that stand before the embedding among the inputs; "" for none.
        look: of the training slides; None where it is not known.
        untrained: (n, P) principal axes of the stored features of the training spots, those of the
            reference bank, standardised within slides; gene sets are measured on them.
        labels: probes of the labels that the training slides have.
        source: how the stored features were made (`hibio features`), and the pixels of a patch.
    """

    names: np.ndarray
    kinds: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    reliability: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n_units: np.ndarray
    width: np.ndarray
    covered: np.ndarray
    unit: str
    coverage: float
    features: str = ""
    look: Look | None = None
    untrained: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    labels: tuple[LabelProbe, ...] = ()

    def inputs(self, features_SF: np.ndarray | None, embedding_SD: np.ndarray) -> np.ndarray:
        """Inputs (S, F) float32 of one slide, each column standardised over it.

        Raises:
            ConfigError: features are missing, or the widths are not those of the read-out.
        """
        features = None if features_SF is None else standardise_columns(features_SF)
        return self.joined(features, standardise_columns(embedding_SD))

    def joined(self, features_nF: np.ndarray | None, embedding_nD: np.ndarray) -> np.ndarray:
        """`inputs` of some spots of a slide, from columns that are standardised over all of it."""
        parts = [embedding_nD] if not self.features else [features_nF, embedding_nD]
        x_nF = np.hstack([part for part in parts if part is not None])
        if x_nF.shape[1] != len(self.weights):
            raise ConfigError(
                f"the read-out was fitted on {len(self.weights)} inputs (features "
                f"{self.features or 'none'}, then the embedding), here are {x_nF.shape[1]}; give "
                "what the checkpoint was trained on"
            )
        return x_nF

    def values(self, x_SF: np.ndarray) -> np.ndarray:
        """Predictions (S, T) float32 on the scale of the training spots."""
        return np.asarray((x_SF @ self.weights) * self.spread + self.mean, dtype=np.float32)

    def of(self, wanted: Sequence[str]) -> Readout:
        """Some genes of it, in the order asked for.

        Raises:
            ConfigError: genes that the model does not know; names the nearest.
        """
        place = {str(name): column for column, name in enumerate(self.names)}
        unknown = [name for name in dict.fromkeys(wanted) if name not in place]
        if unknown:
            shown = [f"{n!r}{did_you_mean(n, place, ' (nearest:', n=3)}" for n in unknown[:5]]
            told = ", ".join(text.replace("?", ")") for text in shown)
            more = f" and {len(unknown) - 5} more" * (len(unknown) > 5)
            raise ConfigError(
                f"the model does not know the gene(s) {told}{more}; it knows {len(place)} (--genes "
                "all writes them); leave the others out, or train on slides that measure them"
            )
        return self._columns(np.array([place[name] for name in dict.fromkeys(wanted)], dtype=int))

    def _columns(self, index: np.ndarray) -> Readout:
        kept: dict[str, Any] = {name: getattr(self, name)[index] for name in (*_TEXTS, *_COLUMNS)}
        return dataclasses.replace(self, weights=self.weights[:, index], **kept)

    def beside(self, other: Readout) -> Readout:
        """This and one that reads the embedding alone (gene sets), as one.

        Raises:
            ConfigError: a set has the name of a gene.
        """
        both = np.intersect1d(self.names, other.names)
        if len(both):
            raise ConfigError(
                f"gene set {str(both[0])!r} has the name of a gene that is predicted beside it, so "
                "that the two cannot be told apart; rename the set"
            )
        above = np.zeros((len(self.weights) - len(other.weights), len(other.names)), np.float32)
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in (*_TEXTS, *_COLUMNS)
        }
        weights = np.hstack([self.weights, np.vstack([above, other.weights])])
        return dataclasses.replace(self, weights=weights, **joined)

    def var(self, min_reliability: float) -> pd.DataFrame:
        """What is known of each gene, one row a gene.

        Trusted: as reliable as asked for, over at least three patients; two, or slides of one, say
        in which order genes are, but far too much of each (docs/predict.md).
        """
        known = np.isfinite(self.reliability)
        low = np.nan_to_num(self.reliability) < min_reliability
        few = (self.n_units < MIN_PATIENTS) | (self.unit != "patients")
        told = f"fewer than {MIN_PATIENTS} patients were held out: its reliability is an order only"
        why = np.where(few, told, "")
        why = np.where(low, f"reliability below {min_reliability:g}", why)
        why = np.where(known, why, "not predictable: it does not vary on the training slides")
        return pd.DataFrame(
            {
                "gene_id": self.ids.astype(str),
                "feature_type": self.kinds.astype(str),
                "reliability": self.reliability,
                "reliability_low": self.low,
                "reliability_high": self.high,
                "reliability_n": self.n_units.astype(np.int64),
                "coverage": self.covered,
                "trusted": why == "",
                "note": why.astype(str),
            },
            index=pd.Index(self.names.astype(str)),
        )

    @property
    def words(self) -> str:
        """What the reliability speaks of, and what it cannot."""
        n = int(self.n_units.max(initial=0))
        caveat = "by the stored features alone, since the encoder was trained on all of them"
        if self.unit == "patients":
            few = "" if n > 2 else " (of fewer than three no interval can be given)"
            return f"{n} patients held out in turn{few}; {caveat}"
        if self.unit == "slides":
            few = "of one patient: how far it carries over to another one cannot be known"
            return f"{n} slides held out in turn ({few}); {caveat}"
        return (
            "blocks of the only slide held out in turn, so nothing is known of other slides and "
            f"patients; {caveat}"
        )


def add_labels(adata: anndata.AnnData, readout: Readout, inputs: Iterable[np.ndarray]) -> None:
    """Put predicted labels into AnnData: class and its probability in ``obs``, all in ``obsm``.

    Args:
        adata: of S spots.
        readout: with probes.
        inputs: (n, F) of the read-out, block by block of spots.
    """
    parts = [[probe.probabilities(x_nF) for probe in readout.labels] for x_nF in inputs]
    names = list(obs_columns(probe.name for probe in readout.labels))
    for number, (name, probe) in enumerate(zip(names, readout.labels, strict=True)):
        share_SC = np.concatenate([part[number] for part in parts])
        likeliest = pd.Categorical(probe.classes[share_SC.argmax(axis=1)], probe.classes.tolist())
        adata.obs[f"predicted_{name}"] = likeliest
        adata.obs[f"predicted_{name}_probability"] = share_SC.max(axis=1)
        columns = list(obs_columns(probe.classes.tolist()))
        table = pd.DataFrame(share_SC, index=adata.obs_names, columns=columns)
        adata.obsm[f"probability_{name}"] = table
    told = {name: probe.told for name, probe in zip(names, readout.labels, strict=True)}
    adata.uns[UNS] = {**adata.uns[UNS], "labels": told}


def predicted(
    readout: Readout,
    image: Any,
    encode: Callable[[np.ndarray], np.ndarray],
    genes: Sequence[str] | None = None,
) -> anndata.AnnData:
    """`HiBio.predict`: expression of the spots of one slide.

    Args:
        readout: of the model.
        image: features (S, F), patches (S, h, w, 3), or AnnData with the features in ``obsm``.
        encode: rows of features or patches -> image embedding (S, D).
        genes: which; None: all.

    Raises:
        ConfigError: an unknown gene, or AnnData without the features.
    """
    chosen = readout if genes is None else readout.of(genes)
    kept: dict[str, Any] = {}
    if isinstance(image, anndata.AnnData):
        if not readout.features or readout.features not in image.obsm:
            raise ConfigError(
                f"adata.obsm has no {readout.features or 'features'!r} (it has: "
                f"{', '.join(image.obsm) or 'nothing'}); put the features that the tower reads "
                "there, or give patches"
            )
        kept = {"obs": image.obs.copy(), "obsm": dict(image.obsm), "uns": dict(image.uns)}
        image = image.obsm[readout.features]
    image = np.asarray(image)
    features = image if image.ndim == 2 else None
    x_SF = chosen.inputs(features, encode(image))
    found = chosen.values(x_SF)
    width = chosen.width.astype(np.float32)
    layers = {"lower": found - width, "upper": found + width}
    adata = anndata.AnnData(X=found, layers=layers, var=chosen.var(MIN_RELIABILITY), **kept)
    familiarity = np.full(len(found), np.nan)
    if features is not None and readout.look is not None:
        familiarity = readout.look.familiarity(features)
    adata.obs["familiarity"] = familiarity
    adata.uns[UNS] = {"coverage": readout.coverage, "reliability": readout.words}
    if readout.labels:
        add_labels(adata, readout, [x_SF])
    return adata


def write_readout(path: Path, readout: Readout) -> None:
    """Write ``readout.h5`` atomically.

    Raises:
        OSError: the disk is full or not writable; an old file stays.
    """
    with atomic_path(path) as temporary, hdf5_writer(temporary) as (file, _):
        for name in _TEXTS:
            file[name] = getattr(readout, name).astype(h5py.string_dtype())
        file.create_dataset("weights", data=readout.weights.astype(np.float32), compression="lzf")
        for name in _COLUMNS:
            file[name] = np.asarray(getattr(readout, name), dtype=np.float32)
        settings = {name: getattr(readout, name) for name in ("unit", "coverage", "features")}
        file.attrs["settings"] = json.dumps({**settings, "source": readout.source})
        file["untrained"] = readout.untrained.astype(np.float16)
        if readout.look is not None:
            for name, values in vars(readout.look).items():
                file[f"look/{name}"] = values.astype(np.float32)
        for number, probe in enumerate(readout.labels):
            group = file.create_group(f"labels/{number}")
            known = dict(vars(probe))
            group["classes"] = known.pop("classes").astype(h5py.string_dtype())
            for name in ("weights", "bias"):
                group[name] = known.pop(name).astype(np.float32)
            group.attrs["settings"] = json.dumps(known)


def read_readout(path: Path) -> Readout:
    """Read what `write_readout` wrote, after comparing it with the checkpoint's checksums.

    Raises:
        ConfigError: the file is missing, was changed, or cannot be read.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path.parent}: no {READOUT}, which predictions need (an older HiBio, bank: false, or "
            "a model without images); `hibio predict` fits it where the training stores are at the "
            "place that config.yaml names as data.stores"
        )
    verify_file(path)
    try:
        with open_guarded(path) as file:
            return _read(file)
    except (OSError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: no read-out can be read ({error}); remove the file, and `hibio predict` fits "
            "it again from the training stores"
        ) from error


def _read(file: h5py.File) -> Readout:
    n = int(file["names"].shape[0])
    texts = [name for name in _TEXTS if name in file or name != "ids"]  # of an older HiBio
    require_arrays(
        file,
        {
            **dict.fromkeys(texts, ("text", (n,))),
            "weights": ("number", (None, n)),
            "untrained": ("number", (None, None)),
            **dict.fromkeys(_COLUMNS, ("number", (n,))),
        },
    )
    look = None
    if "look" in file:
        width, n_axes = map(int, file["look/axes"].shape)
        shapes: dict[str, tuple[int | None, ...]] = {
            **dict.fromkeys(("look/mean", "look/scale"), (width,)),
            "look/axes": (width, n_axes),
            "look/reference": (None, n_axes),
            "look/held_out": (None,),
        }
        require_arrays(file, {name: ("number", shape) for name, shape in shapes.items()})
        look = Look(**{name: file[f"look/{name}"][:] for name in Look.__dataclass_fields__})
        if not len(look.reference) or not all(np.isfinite(x).all() for x in vars(look).values()):
            raise DataError("look is empty or not finite")
    known: dict[str, Any] = {name: file[name][:] for name in ("weights", *_COLUMNS, "untrained")}
    known["ids"] = np.full(n, "")
    for name in texts:
        known[name] = file[name].asstr()[:].astype(str)
    labels = tuple(_read_label(file[f"labels/{n}"]) for n in range(len(file.get("labels", ()))))
    readout = Readout(**known, look=look, labels=labels, **json.loads(file.attrs["settings"]))
    if not all(np.isfinite(x).all() for x in (readout.weights, readout.mean, readout.spread)):
        raise DataError("weights are not finite")
    words = (readout.unit, readout.features, readout.source.get("encoder", ""))
    size, coverage = readout.source["patch_px"], readout.coverage
    if not all(isinstance(word, str) for word in words) or not (int(size) > 0 < coverage < 1):
        raise DataError(f"settings are {file.attrs['settings']}")
    return readout


def _read_label(group: h5py.Group) -> LabelProbe:
    n = int(group["classes"].shape[0])
    expected = {"weights": ("number", (None, n)), "bias": ("number", (n,))}
    require_arrays(group, {"classes": ("text", (n,)), **expected})
    arrays: dict[str, Any] = {name: group[name][:] for name in expected}
    if not all(np.isfinite(one).all() for one in arrays.values()):
        raise DataError("weights of a label are not finite")
    classes = group["classes"].asstr()[:].astype(str)
    return LabelProbe(classes=classes, **arrays, **json.loads(group.attrs["settings"]))
