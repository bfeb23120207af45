"""Tests of hibio."""
