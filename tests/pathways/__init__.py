"""Tests of the pathways package."""
