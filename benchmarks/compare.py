"""Compare two result files of throughput.py, with confidence intervals."""

import os
import sys

if __name__ == "__main__":
    # With -m, Python also finds a checkout that is not installed, if it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.compare", *sys.argv[1:]])
