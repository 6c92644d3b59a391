"""Compute how long training on ImageNet-1k would take on 8, 64 and 512 GPUs."""

import os
import sys

if __name__ == "__main__":
    # With -m, Python also finds a checkout that is not installed, if it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.scaling", *sys.argv[1:]])
