"""The layout of the code: imports run one way between floors, without a circle; files and functions stay short."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: a module imports from its own floor and from those below.
FLOORS = (
    "t2t_fast.checks t2t_fast.config t2t_fast.files t2t_fast.numerics t2t_fast.startup t2t_fast.usage",
    "t2t_fast.dispatch",
    "t2t_fast.ops t2t_fast.kernels",  # operators call the launchers, which take the operators' named tuples
    "t2t_fast.layers",
    "t2t_fast.models",
    "t2t_fast.deploy",
    "t2t_fast",  # __init__.py: the public names
    "t2t_fast.env t2t_fast.macs t2t_fast.timm",
    "t2t_fast.bench",
    "t2t_fast.cli",
    "t2t_fast.__main__",
)
# The same within ops.
ROOMS = (
    "t2t_fast.ops.common",
    "t2t_fast.ops.block t2t_fast.ops.soft_splits t2t_fast.ops.softmax_attention",
    "t2t_fast.ops.performer t2t_fast.ops.se",
    "t2t_fast.ops",  # __init__.py: the public functions
)
PACKAGES = {"t2t_fast": ROOT / "t2t_fast", "t2t_fast.kernels": ROOT / "kernels"}
MODULES = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}
SOURCES = [ROOT / "setup.py"]
SOURCES += [path for folder in ("t2t_fast", "kernels", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def imported(name: str) -> Iterator[str]:
    """The package's modules that the module ``name`` imports, also inside functions, and for types alone."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{origin}.{alias.name}"
                found = target if target in MODULES else origin
                if found in MODULES and found != name:
                    yield found


def place(name: str, places: tuple[str, ...]) -> int | None:
    """Which of ``places``, each a list of names, has the longest name that the module is or is inside of."""
    found = [
        (len(owner), number)
        for number, owners in enumerate(places)
        for owner in owners.split()
        if name == owner or (owner != "t2t_fast" and name.startswith(f"{owner}."))
    ]
    return max(found)[1] if found else None


def upwards(places: tuple[str, ...]) -> list[str]:
    """The imports that point from one place to a later one."""
    where = {name: number for name in MODULES if (number := place(name, places)) is not None}
    pairs = [(name, other) for name in where for other in imported(name) if other in where]
    return [f"{name} imports {other}" for name, other in pairs if where[other] > where[name]]


def test_every_module_has_its_place() -> None:
    assert [name for name in MODULES if place(name, FLOORS) is None] == []
    rooms = {name for name in MODULES if name.startswith("t2t_fast.ops.") and MODULES[name].name == "__init__.py"}
    assert rooms | {"t2t_fast.ops"} == {name for names in ROOMS for name in names.split()}


def test_imports_point_down() -> None:
    assert upwards(FLOORS) == []
    assert upwards(ROOMS) == []


def test_imports_have_no_circle() -> None:
    graphlib.TopologicalSorter({name: set(imported(name)) for name in MODULES}).prepare()


def test_imports_are_found() -> None:
    """A test of the test: one import of each kind."""
    assert {"t2t_fast.models", "t2t_fast.startup", "t2t_fast.ops"} <= set(imported("t2t_fast"))
    assert "t2t_fast.checks" in set(imported("t2t_fast.models.t2t_vit"))
    assert "t2t_fast.kernels.launch" in set(imported("t2t_fast.kernels.configs"))
    assert "t2t_fast.bench.common" in set(imported("t2t_fast.bench.throughput"))
    assert "t2t_fast.ops.common.extension" in set(imported("t2t_fast.env"))  # inside a function


def test_files_and_functions_are_short() -> None:
    """At most 500 lines in a file, 80 in a function."""
    too_long = []
    for path in SOURCES:
        text, name = path.read_text(), path.relative_to(ROOT)
        if (lines := text.count("\n")) > 500:
            too_long.append(f"{name}: {lines}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                too_long += [f"{name}, {node.name}: {lines}"] if lines > 80 else []
    assert not too_long, "\n".join(too_long)


def test_reasons_are_constants() -> None:
    """``auto`` asks for them in every call and reads none: no text is made there."""
    built = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "t2t_fast" / "ops").rglob("*.py"))
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and function.name.startswith("why_not")
        if function.name != "why_not_open"  # once, when the extension is loaded
        for node in ast.walk(function)
        if isinstance(node, ast.JoinedStr)
    ]
    assert built == []
