"""The instructions of a compiled kernel, counted in each of its loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LABEL = re.compile(r"\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_TARGET = re.compile(r"`\(\.(L_x_\d+)\)")
# By the first part of an instruction's name. What is in no class is counted as "integer".
_CLASSES = {
    "tensor core": "HMMA HGMMA IMMA DMMA QGMMA WARPGROUP",
    "asynchronous load": "LDGSTS UTMALDG",
    "load": "LDG LD",
    "store": "STG ST RED ATOMG UTMASTG",
    "shared load": "LDS LDSM",
    "shared store": "STS STSM",
    "local memory": "LDL STL",
    "shuffle": "SHFL",
    "barrier": "BAR SYNCS DEPBAR LDGDEPBAR",
    "special": "MUFU",
    "float": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 FMNMX FSEL FSETP FSET FCHK HFMA2 HADD2 HMUL2 DFMA DADD DMUL",
    "conversion": "F2FP F2F I2F F2I FRND I2FP",
    "control": "BRA EXIT BSSY BSYNC WARPSYNC CALL RET NOP FENCE MEMBAR YIELD ELECT BREAK VOTE",
}
_CLASS_OF = {name: kind for kind, names in _CLASSES.items() for name in names.split()}
_BITS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
_WITH_BYTES = ("asynchronous load", "load", "store", "shared load", "shared store")


@dataclass(frozen=True)
class Loop:
    """Instructions between two addresses, without those of the loops inside."""

    first: int
    last: int
    counts: Counter[str]
    inner: tuple[Loop, ...]

    @property
    def instructions(self) -> int:
        return sum(self.counts.values())

    def walk(self) -> list[Loop]:
        """The loop itself and all those inside, in the order of their addresses."""
        return [self, *(loop for inner in self.inner for loop in inner.walk())]


def inspect(cubin: bytes, tool: str, option: str) -> str:
    """What a tool that comes with Triton prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> str:
    """The text of the instructions."""
    return inspect(cubin, "nvdisasm", "-c")


def parse(text: str) -> Loop:
    """The whole kernel as a loop that runs once."""
    instructions: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            pending.append(label[1])
        elif found := _INSTRUCTION.match(line):
            address, name = int(found[1], 16), found[2]
            labels |= dict.fromkeys(pending, address)
            pending.clear()
            instructions.append((address, name))
            if name.split(".")[0] == "BRA" and (target := _TARGET.search(found[3])):
                jumps.append((address, target[1]))
    spans = {(labels[label], address) for address, label in jumps if labels.get(label, address) < address}
    return _loop(0, instructions[-1][0], instructions, sorted(spans, key=lambda span: (span[0], -span[1])))


def _loop(first: int, last: int, instructions: list[tuple[int, str]], spans: list[tuple[int, int]]) -> Loop:
    """The loop from ``first`` to ``last``; ``spans`` are those that begin inside of it, the outer ones first."""
    inner: list[Loop] = []
    for index, (begin, end) in enumerate(spans):
        if not inner or begin > inner[-1].last:
            within = [span for span in spans[index + 1 :] if begin <= span[0] and span[1] <= end]
            inner.append(_loop(begin, end, instructions, within))
    own = (name for at, name in instructions if first <= at <= last and not any(i.first <= at <= i.last for i in inner))
    return Loop(first, last, Counter(map(class_of, own)), tuple(inner))


def class_of(name: str) -> str:
    """The class of an instruction, with the bytes that it moves per thread: ``load 16``."""
    head, *parts = name.split(".")
    kind = "conversion" if name.startswith("HADD2.F32") else _CLASS_OF.get(head, "integer")
    if kind not in _WITH_BYTES:
        return kind
    if head in ("LDSM", "STSM"):
        return f"{kind} matrix"
    return f"{kind} {next((_BITS[part] for part in parts if part in _BITS), 4)}"
