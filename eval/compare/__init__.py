"""Comparisons: a model beside its baselines, and runs beside each other."""
