"""Every name that crosses a module border, once: AnnData keys, levels, loss terms."""

OBSM_IMAGE = "X_hibio_image"
OBSM_OMICS = "X_hibio_omics"
OBSM_REGION = "X_hibio_region"
OBSM_SPATIAL = "spatial"  # level-0 pixels of the image, (x, y), as scanpy and squidpy want them
OBSM_UM = "spatial_um"  # micrometres, (x, y)
OBS_SLIDE = "slide_id"
OBS_REGION = "hibio_region_"  # + level name, e.g. hibio_region_600um
OBS_SHAPES = "hibio_shapes"  # in SpatialData: the element that a row is a shape of, and which one
OBS_SPOT = "hibio_spot"
UNS = "hibio"
#: Formats of the tables that `embed`, `query` and `predict` write -> how their names end.
TABLES = {"h5ad": ".h5ad", "zarr": ".zarr", "spatialdata": ".sdata.zarr"}
MAIN = "hibio"  # the main variant of a run, and its row in results.json
TERM_SPOT = "spot/contrastive"
TERM_PATHWAY = "pathway/kl"
TERM_REGION = "region/contrastive"
TERM_MEMBER = "region/member"
TERM_MASKED = "omics/masked"
TERM_PROFILE = "omics/profile"
TERM_NEIGHBOUR = "omics/neighbour"
TERM_SPATIAL = "omics/spatial"
TERM_DECORRELATION = "omics/decorrelation"
TERM_EXPRESSION = "image/expression"
#: What each loss term does; a stage's ``weights`` may name these and nothing else.
TERMS: dict[str, str] = {
    TERM_SPOT: "patch <-> profile InfoNCE",
    TERM_PATHWAY: "KL of soft pathway targets against cosine to the pathway anchors, both towers",
    TERM_REGION: "image region <-> omics region InfoNCE at every level of the tree",
    TERM_MEMBER: "spot -> own region of the other tower, other regions as negatives",
    TERM_MASKED: "reconstruction of masked keyword-gene values",
    TERM_PROFILE: "the spot's own vector from its unmasked genes",
    TERM_NEIGHBOUR: "expression of the spot and its neighbours together, from the masked spot",
    TERM_SPATIAL: "two views of a spot and its similar spatial neighbours against the others",
    TERM_DECORRELATION: "off-diagonal covariance penalty on the omics embedding",
    TERM_EXPRESSION: "expression of the target genes from the image tower",
}

#: Terms that read the image tower; a stage that names one trains on slides with images only.
IMAGE_TERMS = frozenset({TERM_SPOT, TERM_REGION, TERM_MEMBER, TERM_EXPRESSION})
#: Terms that read the plain embeddings of the spots, of whatever towers there are.
EMBEDDING_TERMS = IMAGE_TERMS | {TERM_PATHWAY, TERM_DECORRELATION}
#: Terms that read the masked view of the omics branch.
MASKED_TERMS = frozenset({TERM_MASKED, TERM_PROFILE, TERM_NEIGHBOUR})


def level_name(diameter_um: float) -> str:
    """Name of a region level from its equivalent diameter in micrometres, e.g. ``600um``."""
    return f"{diameter_um:g}um"
