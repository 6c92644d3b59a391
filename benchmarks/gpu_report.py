"""Test and measure everything on a GPU in one call: the most important first, within a time limit."""

import os
import sys

if __name__ == "__main__":
    # With -m, Python also finds a checkout that is not installed, if it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.gpu_report", *sys.argv[1:]])
