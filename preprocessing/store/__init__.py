"""The slide store: one prepared slide on disk (docs/architecture.md).

`layout` says where things lie in the file, `write` writes, `read` reads, `verify` checks.
"""

from preprocessing.files import file_sha256
from preprocessing.store.layout import SCHEMA_VERSION
from preprocessing.store.read import SlideStore
from preprocessing.store.verify import verify_store
from preprocessing.store.write import SlidePicture, say_anew, write_store

__all__ = [
    "SCHEMA_VERSION",
    "SlidePicture",
    "SlideStore",
    "file_sha256",
    "say_anew",
    "verify_store",
    "write_store",
]
