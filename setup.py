"""What pyproject.toml cannot say: where `t2t_fast.kernels` lives, and the optional C++ extension."""

import os
import shutil
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup


def extensions() -> dict[str, Any]:
    """The arguments of `setup` that build `csrc/`; none where it cannot or shall not be built."""
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    skip = os.environ.get("T2T_FAST_NO_EXT") or "0"
    if skip not in ("0", "1"):
        raise SystemExit(f"T2T_FAST_NO_EXT={skip!r} in the environment; accepted: 0, 1")
    if not sources or not compiler or skip == "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    return {"ext_modules": [CppExtension("t2t_fast._C", sources)], "cmdclass": {"build_ext": BuildExtension}}


setup(
    packages=[*find_packages(include=["t2t_fast", "t2t_fast.*"]), "t2t_fast.kernels"],
    package_dir={"t2t_fast.kernels": "kernels"},
    package_data={"t2t_fast": ["py.typed"]},
    **extensions(),
)
