"""Patch encoders: what each one is, where its weights are, and how it reads a patch."""
