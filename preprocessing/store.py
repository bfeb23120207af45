"""The slide store: one prepared slide on disk (ARCHITECTURE section 2).

`store_layout` knows the HDF5 paths, `store_write` writes, `store_read` reads, `store_verify`
checks; everything else imports from here.
"""

from preprocessing.file_hash import file_sha256
from preprocessing.store_layout import SCHEMA_VERSION
from preprocessing.store_read import SlideStore
from preprocessing.store_verify import verify_store
from preprocessing.store_write import SlidePicture, write_store

__all__ = [
    "SCHEMA_VERSION",
    "SlidePicture",
    "SlideStore",
    "file_sha256",
    "verify_store",
    "write_store",
]
