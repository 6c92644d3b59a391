"""Everything a GPU can tell, in order of worth, in one call that ends in time."""

import os
import sys

if __name__ == "__main__":
    # With -m an uninstalled checkout is found, too, when it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.gpu_report", *sys.argv[1:]])
