"""Run ``cifar-fast train`` as ``python -m cifar_fast.train``."""

import sys

from cifar_fast.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
