"""Frozen patch encoders: what each one is, where its weights are, and how it reads a patch."""

from hibio.backbones.features import features_report

__all__ = ["features_report"]
