"""Makes `python -m superweights` the same as `superweights`."""

import sys

from superweights.cli import main

if __name__ == "__main__":
    sys.exit(main())
