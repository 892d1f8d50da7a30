"""`python -m ailurus_hf.cli` is `ailurus-hf`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
