"""Images per second of T2T-ViT in each variant, beside timm's models, on the same images."""

import os
import sys

if __name__ == "__main__":
    # With -m an uninstalled checkout is found, too, when it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.throughput", *sys.argv[1:]])
