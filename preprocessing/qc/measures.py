"""The measures of a slide: their keys in `qc.csv`, their words, and which are compared."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One number a slide.

    Attributes:
        key: column of `qc.csv`.
        label: words for a table.
        unit: "" none, "%" for a share that is shown times 100, else the unit.
        decimals: digits after the point.
        compared: whether a slide far from the others is marked.
        log: compared on the logarithm.
        least: no value nearer to the median than this is marked.
    """

    key: str
    label: str
    unit: str = ""
    decimals: int = 0
    compared: bool = True
    log: bool = False
    least: float = 0.0


def _share(reason: str) -> Measure:
    return Measure(
        f"share_{reason.replace(' ', '_')}", f"share of spots, {reason}", "%", 1, least=0.05
    )


def _vector(stain: str) -> tuple[Measure, ...]:
    return tuple(
        Measure(f"{stain}_{channel}", f"{stain}, {channel}", "", 3)
        for channel in ("red", "green", "blue")
    )


MEASURES: tuple[Measure, ...] = (
    Measure("n_spots", "spots", log=True),
    Measure("n_left_out", "spots left out by prepare", compared=False),
    Measure("n_genes_panel", "genes of the panel", compared=False),
    Measure("mpp", "scale of the image", "um/px", 3, compared=False),
    Measure("depth_median", "depth, median", "a spot", log=True),
    Measure("genes_median", "genes, median", "a spot", log=True),
    Measure("mito_median", "mito. share, median", "%", 1, least=0.02),
    Measure("tissue_median", "tissue in the patch, median", "%", 1, least=0.05),
    Measure("focus_median", "focus, median", "grey²", log=True),
    Measure("share_flagged", "spots flagged for any reason", "%", 1, least=0.05),
    _share("low depth"),
    _share("few genes"),
    _share("high mitochondrial share"),
    _share("little tissue"),
    _share("blank patch"),
    _share("pen mark"),
    _share("out of focus"),
    Measure("optical_density", "optical density, mean", "", 3),
    *(
        Measure(f"{channel}_{kind}", f"{channel}, {words}", "of 255", 1)
        for channel in ("red", "green", "blue")
        for kind, words in (("mean", "mean"), ("sd", "standard deviation"))
    ),
    *_vector("hematoxylin"),
    *_vector("eosin"),
)
