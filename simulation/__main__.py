"""Entry of ``python -m simulation``."""

import sys

from simulation.run import main

if __name__ == "__main__":  # worker processes import this module too
    sys.exit(main())
