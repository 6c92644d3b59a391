"""``python -m t2t_fast.timm SCRIPT ...``: run one of timm's scripts with this package's models registered."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

USAGE = "usage: python -m t2t_fast.timm SCRIPT [ARGUMENT ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the Python file ``arguments[0]`` as ``python`` does, with the other arguments.

    This package is imported first, which registers its models with timm. Then every script that creates models by name
    knows them: timm's ``validate.py``, ``benchmark.py``, ``inference.py``, ``onnx_export.py`` and others.

    Args:
        arguments: The script and its arguments; None takes the command line's.

    Returns:
        The exit status: 2 if no script is given or it does not exist, otherwise 0. Exceptions of the script, including
        ``SystemExit``, are passed on.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    script = words[0]
    if not os.path.isfile(script):
        print(f"t2t_fast.timm: error: there is no script {script!r}; {USAGE}", file=sys.stderr)
        return 2
    import t2t_fast  # noqa: F401

    sys.argv = words
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # as for `python SCRIPT`: the script's neighbours
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
