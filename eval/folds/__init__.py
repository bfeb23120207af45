"""Folds: what an evaluation sees of checkpoints and stores, and what is built from data alone."""
