"""``python -m cifar_fast``: as the command ``cifar-fast``."""

import sys

from cifar_fast.cli import main

sys.exit(main())
