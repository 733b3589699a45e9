"""Run ``cifar-fast`` as ``python -m cifar_fast``."""

import sys

from cifar_fast.cli.main import main

sys.exit(main())
