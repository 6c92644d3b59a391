"""Python time of one block, in units of timm's."""

import os
import sys

if __name__ == "__main__":
    # With -m an uninstalled checkout is found, too, when it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.overhead", *sys.argv[1:]])
