"""Time every op as T2T-ViT-14 uses it, in every implementation, and compare with a floor."""

import os
import sys

if __name__ == "__main__":
    # With -m, Python also finds a checkout that is not installed, if it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.kernels", *sys.argv[1:]])
