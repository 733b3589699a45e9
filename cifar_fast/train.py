"""``python -m cifar_fast.train``: as the command ``cifar-fast train``."""

import sys

from cifar_fast.cli import train as main

if __name__ == "__main__":
    sys.exit(main())
