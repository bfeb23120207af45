"""Ablation: a grid of config keys x seeds x patient folds; one table of what each is worth."""
