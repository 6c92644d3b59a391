"""Every environment variable that this package reads, parsed strictly, in one place.

``T2T_FAST_BACKEND``
    The backend if neither the call nor :func:`t2t_fast.use_backend` names one. Read once, at import.
``TRITON_INTERPRET``
    Triton's variable: if it is ``1`` when the kernels are imported, they run in Triton's interpreter on the CPU.
``T2T_FAST_NO_EXT``
    ``1`` skips the build of the C++/CUDA extension. Read by ``setup.py`` alone, like the next.
``T2T_FAST_CPU_CAPABILITY``
    ``DEFAULT``, ``AVX2`` or ``AVX512``: instructions that the extension is built for; by default this machine's.
"""

from __future__ import annotations

import os

BACKENDS: tuple[str, ...] = ("auto", "reference", "aten", "triton", "native")


def read_choice(variable: str, choices: tuple[str, ...], default: str) -> str:
    """The value of an environment variable that must be one of ``choices``; unset or empty gives ``default``.

    Raises:
        ValueError: The variable holds anything else.
    """
    value = os.environ.get(variable) or default
    if value not in choices:
        raise ValueError(f"{variable}={value!r} in the environment; accepted: {', '.join(choices)}")
    return value


BACKEND: str = read_choice("T2T_FAST_BACKEND", BACKENDS, default="auto")


def triton_is_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` has one of the values that Triton reads as true."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
