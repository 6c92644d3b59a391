"""Memory by phase: inference, a training step's forward, backward and update."""

import os
import sys

if __name__ == "__main__":
    # With -m an uninstalled checkout is found, too, when it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.memory", *sys.argv[1:]])
