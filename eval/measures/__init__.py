"""Measures: pure functions of arrays, and what is fitted on top of a frozen embedding."""
