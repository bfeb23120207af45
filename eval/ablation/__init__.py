"""Ablation: a grid of config keys x seeds x patient folds; one table of what each is worth."""

from eval.ablation.run import run as ablate

__all__ = ["ablate"]
