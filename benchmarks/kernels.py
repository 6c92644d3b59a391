"""Every op as T2T-ViT-14 uses it: work, floor, and the time of each implementation over that floor."""

import os
import sys

if __name__ == "__main__":
    # With -m an uninstalled checkout is found, too, when it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.kernels", *sys.argv[1:]])
