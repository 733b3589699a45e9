"""Run ``cifar-fast compare`` as ``python -m cifar_fast.compare``."""

import sys

from cifar_fast.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
