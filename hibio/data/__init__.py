"""Stores to batches: fitting on training slides, prepared slides, samplers, collation, splits."""
