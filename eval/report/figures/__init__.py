"""Figures of the report: each function returns a `Figure(title, caption, png)`."""
