"""``python -m t2t_fast``: the command line, also installed as ``t2t-fast``."""

import sys

from .cli import main

sys.exit(main())
