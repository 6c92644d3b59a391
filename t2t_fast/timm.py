"""``python -m t2t_fast.timm SCRIPT ...``: runs one of timm's scripts, to which this package's models are known."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

USAGE = "usage: python -m t2t_fast.timm SCRIPT [ARGUMENT ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the Python file ``arguments[0]`` as ``python`` does, with the rest as its own arguments.

    This package is imported first, which registers its models with timm. So every script that creates models by name
    takes ours: timm's ``validate.py``, ``benchmark.py``, ``inference.py``, ``onnx_export.py`` and others.

    Args:
        arguments: The script and its arguments; None takes the command line's.

    Returns:
        The exit status: 2 where no script is named or there is none, otherwise 0. What the script raises is passed on,
        ``SystemExit``, too.
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
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # as for `python SCRIPT`: where its own modules are
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
