"""Configuration: every key of a YAML file, its type and its rules."""
