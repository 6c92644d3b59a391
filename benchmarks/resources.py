"""Compile every Triton kernel ahead of time, and tabulate what it takes of the chip."""

import os
import sys

if __name__ == "__main__":
    # With -m an uninstalled checkout is found, too, when it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.resources", *sys.argv[1:]])
