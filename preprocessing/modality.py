"""What was measured: RNA counts (integers) or protein intensities (numbers from 0 on)."""

from typing import Literal

Modality = Literal["rna", "protein"]
RNA: Modality = "rna"
PROTEIN: Modality = "protein"
MODALITIES: tuple[Modality, ...] = (RNA, PROTEIN)
