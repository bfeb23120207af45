"""Names of the rows that one checkpoint gives, and the fold that holds no slide out."""

MAIN = "hibio"
RAW = "raw_features"
TOWER_SUFFIX = "_tower"
DECODER_SUFFIX = "_decoder"
SEED_MEAN = "_seed_mean"
NO_FOLD = "none"  # trained on every slide
