"""``python -m hibio.cli``: the same as ``hibio``."""

import sys

from hibio.cli import main

if __name__ == "__main__":
    sys.exit(main())
