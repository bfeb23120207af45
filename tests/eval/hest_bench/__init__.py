"""Tests of HEST-Bench."""
