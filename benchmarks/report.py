"""Write the tables of docs/results.md and README.md, and the plots in docs/, from the committed result files."""

import os
import sys

if __name__ == "__main__":
    # With -m, Python also finds a checkout that is not installed, if it is the working directory.
    os.execv(sys.executable, [sys.executable, "-m", "t2t_fast.bench.report", *sys.argv[1:]])
