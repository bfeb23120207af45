"""Encoders: vision and omics towers, their layers, pooling."""
