"""Try other block sizes, warps and stages for the Triton kernels."""

import os
import sys

if __name__ == "__main__":
    # With -m, Python also finds a checkout that is not installed, if it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.tune", *sys.argv[1:]])
