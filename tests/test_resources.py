"""The kernels compiled ahead of time: the table in the repository belongs to them, and nothing spills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import triton

from t2t_fast.bench import bounds, resources, sass
from t2t_fast.bench.bounds import CHIPS
from t2t_fast.bench.launches import MODULE

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "resources.py"
TABLE = json.loads((ROOT / "benchmarks" / "resources.json").read_text())


# KiB that a block gets at most; at 80, what 8.6 gives, but for TF32's backward, which 8.6 does not take.
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kernel"], row["use"], row["arch"], row["kind"]


def test_the_table_is_complete_and_clean() -> None:
    rows = TABLE["rows"]
    assert {row["arch"] for row in rows} == {80, 89, 90, 100, 120}
    assert {row["kind"] for row in rows} == {"float16", "bfloat16", "tf32", "float32"}
    assert len({key(row) for row in rows}) == len(rows)
    counts = Counter((row["arch"], row["kind"]) for row in rows)
    for (arch, kind), count in counts.items():
        # What is not built there: see None in kernels/configs.py.
        inference, training = kind != "float32", kind != "float32" and arch != 120 and (arch, kind) != (89, "tf32")
        assert count == 40 + 4 * inference + 4 * training, (arch, kind)
    for row in rows:
        assert row["spilled_bytes"] == 0, key(row)
        assert row["registers"] <= 255
        assert row["shared_bytes"] <= SHARED[row["arch"]] * 1024, key(row)
        assert bool(row["tensor_cores"]) == (row["multiplies"] and row["kind"] != "float32"), key(row)
        if row["arch"] == 90 and row["tensor_cores"] and row["kernel"].startswith("soft_split_linear"):
            assert row["tensor_cores"] == ["wgmma.mma_async"]  # the Performer's tiles are too small for it


def test_the_table_belongs_to_the_kernels() -> None:
    assert TABLE["kernels"] == resources.source_digest(), "the kernels have changed: run python benchmarks/resources.py"


@pytest.mark.slow
def test_compiling_again_gives_the_table() -> None:
    rows = {}
    for selection in (("--arch", "90", "--kind", "bfloat16"), ("--arch", "80", "--kind", "bfloat16", "tf32")):
        done = run(*selection, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr  # a spill, or a matmul without tensor cores
        rows |= {key(row): row for row in json.loads(done.stdout)}
    kept = {key(row): row for row in TABLE["rows"] if key(row) in rows}
    assert rows.keys() == kept.keys()
    if TABLE["triton"] != triton.__version__:
        pytest.skip(f"the table was made with Triton {TABLE['triton']}, and this is {triton.__version__}")
    assert rows == kept


def test_ranges_are_counted_for_programs_that_fit() -> None:
    for row in TABLE["rows"]:
        if row["arch"] in CHIPS:
            assert row["assumed"] <= row["resident"], key(row)


def test_instructions() -> None:
    rows = {key(row): row for row in TABLE["rows"]}
    for kernel, use in {launch for launches in MODULE.values() for launch in launches}:
        for arch in CHIPS:
            row = rows[kernel, use, arch, "bfloat16"]
            counts = [row["outside"], *row["loops"]]
            assert not any("local memory" in count for count in counts), key(row)
            assert row["images"].keys() == {"1", "8", "32", "128", "200"}
            assert all(at["bound"] > 0 and at["floor"] > 0 for at in row["images"].values())
    for arch in CHIPS:
        loop = rows["soft_split_linear forward", "image to 192", arch, "bfloat16"]["loops"][0]
        assert "load 2" not in loop
        assert "shuffle" not in loop
        assert "asynchronous load 16" in loop


COMPILE = """
import torch, triton
from t2t_fast.bench.launches import shipped_launches
from t2t_fast.bench.resources import Ahead

triton.runtime.driver.set_active(Ahead(90))
compiled = set()
for batch in (128, 1, 2, 7, 8, 17, 64, 264):
    before = len(compiled)
    for shipped in shipped_launches(torch.bfloat16, batch):
        compiled.add(shipped.launch.compile().hash)
    print(batch, len(compiled) - before)
"""


@pytest.mark.slow
def test_no_batch_compiles_again() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    first, *others = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert first[0] == 128
    assert first[1] > 20
    assert others == [(1, 0), (2, 0), (7, 0), (8, 0), (17, 0), (64, 0), (264, 0)]


SASS = """
        .text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/                   LDS.U16 R4, [R5] ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4], R24 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/              @!P2 BRA `(.L_x_2) ;
        /*0080*/                   SHFL.BFLY PT, R4, R4, 0x1, 0x1f ;
.L_x_2:
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_instructions_are_counted_in_their_loops() -> None:
    outside, outer, inner = sass.parse(SASS).walk()
    assert outside.counts == {"integer": 1, "control": 3, "shuffle": 1}
    assert outer.counts == {"load 16": 1, "tensor core": 1, "control": 1}
    assert inner.counts == {"asynchronous load 16": 1, "shared load 2": 1, "control": 1}


def test_residents() -> None:
    chip = CHIPS[90]
    assert bounds.resident(chip, 8, 255, 1024) == 1
    assert bounds.resident(chip, 4, 128, 1024) == 4
    assert bounds.resident(chip, 4, 128, 100 * 1024) == 2
    assert bounds.resident(chip, 1, 16, 0) == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "90"], "no whole table: .*--dry-run"),
        (["--dry-run"], "TRITON_INTERPRET is set.*unset it"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit:
        resources.main(arguments)
    assert exit.value.code == 2
    assert re.match(f"resources.py: error: .*{message}", capsys.readouterr().err)
