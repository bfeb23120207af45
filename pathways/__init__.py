"""Gene sets: files, databases, and how well spots match them. No torch, no hibio."""

from pathways.anchors import (
    PathwayAnchors,
    fit_anchors,
    score_sets,
    set_matrix,
    soft_targets,
)
from pathways.catalog import concatenate, fetch, list_databases, load_pathways
from pathways.controls import matched_random
from pathways.coverage import CoverageReport, detect_id_type, strip_versions
from pathways.database import PathwayDatabase
from pathways.errors import PathwayError
from pathways.files import GeneSet, read_gmt, write_gmt

__all__ = [
    "CoverageReport",
    "GeneSet",
    "PathwayAnchors",
    "PathwayDatabase",
    "PathwayError",
    "concatenate",
    "detect_id_type",
    "fetch",
    "fit_anchors",
    "list_databases",
    "load_pathways",
    "matched_random",
    "read_gmt",
    "score_sets",
    "set_matrix",
    "soft_targets",
    "strip_versions",
    "write_gmt",
]
