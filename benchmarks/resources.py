"""Compile every Triton kernel ahead of time, and tabulate its registers, spills and shared memory."""

import os
import sys

if __name__ == "__main__":
    # With -m, Python also finds a checkout that is not installed, if it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.resources", *sys.argv[1:]])
