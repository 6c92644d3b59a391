"""Measure images per second of T2T-ViT in each variant, beside timm's models."""

import os
import sys

if __name__ == "__main__":
    # With -m, Python also finds a checkout that is not installed, if it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.throughput", *sys.argv[1:]])
