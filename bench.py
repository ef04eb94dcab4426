"""The command line of a checkout: ``python bench.py --attack blend``."""

from __future__ import annotations

import sys

from purebench.cli import main

if __name__ == "__main__":
    sys.exit(main())
