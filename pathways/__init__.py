"""Gene sets: files, databases, and how well spots match them. No torch, no hibio."""

from .anchors import PathwayAnchors, fit_anchors, soft_targets
from .catalog import DatabaseEntry, concatenate, list_databases, load_pathways
from .controls import matched_random
from .coverage import CoverageReport
from .database import OverlapReport, PathwayDatabase
from .errors import PathwayError
from .genes import detect_id_type, strip_versions
from .gmt import GeneSet, read_gmt, write_gmt
from .queries import raw_score, score_set, set_vector
from .recipes import fetch

__all__ = [
    "CoverageReport",
    "DatabaseEntry",
    "GeneSet",
    "OverlapReport",
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
    "raw_score",
    "read_gmt",
    "score_set",
    "set_vector",
    "soft_targets",
    "strip_versions",
    "write_gmt",
]
