"""Training: stages as data, objective, engine, regions that are rebuilt, checkpoints, log."""
