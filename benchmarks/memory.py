"""Measure memory: of inference, and of forward, backward and update in training."""

import os
import sys

if __name__ == "__main__":
    # With -m, Python also finds a checkout that is not installed, if it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.memory", *sys.argv[1:]])
