"""Quality control: measures of a slide, flags, and the pages that show them."""

from preprocessing.qc.pages import qc_folder

__all__ = ["qc_folder"]
