"""The page of a cohort over its slides: in a browser, or as files."""
