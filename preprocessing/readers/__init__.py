"""Formats of source files, one file each; `preprocessing.readers.format` uses this table.

The readers are imported when one is needed. The files of a slide whose manifest row names no format
are tried in the order of the table.
"""

#: Name in the manifest -> the module whose ``FORMAT`` it is.
READERS: dict[str, str] = {
    "visium": "preprocessing.readers.visium",
    "visium_hd": "preprocessing.readers.visium_hd",
    "legacy_st": "preprocessing.readers.legacy_st",
    "hest": "preprocessing.readers.hest",
    "h5ad": "preprocessing.readers.h5ad",
    "loom": "preprocessing.readers.loom",
    "csv": "preprocessing.readers.cell_csv",
    "xenium": "preprocessing.readers.xenium",
    "merscope": "preprocessing.readers.merscope",
    "slideseq": "preprocessing.readers.slideseq",
    "stereoseq": "preprocessing.readers.stereoseq",
    "cosmx": "preprocessing.readers.cosmx",
    "spatialdata": "preprocessing.readers.spatialdata",
    "visium_hd_cells": "preprocessing.readers.hd_cells",
    "image": "preprocessing.readers.tissue_grid",
}
