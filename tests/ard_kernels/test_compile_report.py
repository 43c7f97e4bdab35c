"""Every production kernel compiles for every architecture without spills, and the report can tell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ard_kernels.backends import native
from ard_kernels.compile_report import ARCHITECTURES, SHARED_LIMIT, Compiled, faults, table

needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux alone")


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: in this one Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@needs_triton
@pytest.mark.parametrize(
    "arch", [arch if arch == 90 else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES]
)
def test_every_kernel_is_fit_for_every_architecture(arch: int, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = _python("-m", "ard_kernels", "compile-report", "--arch", str(arch), "--json", str(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    assert {row["arch"] for row in rows} == {arch}
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))
    for kernel in (
        "attention forward",
        "attention dq",
        "attention dkv",
        "adaln forward",
        "adaln backward",
    ):
        assert any(kernel in name for name in names), kernel
    built = any(name.startswith("adaln cuda backward") for name in names)
    made_for = getattr(native.C, "cuda_architectures", "none")
    assert built == (str(arch) in re.findall("[0-9]+", made_for)), f"CUDA kernels for {made_for}: {built}"
    for row in rows:
        assert row["spilled"] == row["stack"] == 0
        assert row["shared"] <= SHARED_LIMIT[arch]
        assert row["registers"] <= 255
        products = bool(re.match("attention (forward|dq|dkv|fused)", row["name"]))
        assert (row["hgmma"] > 0) == (arch == 90 and products and " fp32" not in row["name"])


_UNFIT = """
import torch
from ard_kernels.backends.attention_triton import Launch, production
from ard_kernels.backends import native
from ard_kernels.compile_report import compile_one, faults
from ard_kernels.tune import is_trap
print(faults(compile_one(production("dkv", 72, torch.bfloat16, Launch(128, 128, 8, 2)), 90)))
print(faults(compile_one(production("fused", 72, torch.bfloat16, Launch(128, 64, 8, 2)), 100)))
print([is_trap("fused", Launch(128, step, 8, 2), 72, True, 10) for step in (32, 64)])
"""


@needs_triton
def test_kernels_that_are_unfit_are_found() -> None:
    """A tile too large for the registers: bytes of stack, and ptxas says that it serialised wgmma. One too
    large for sm_100's tensor memory, of which Triton makes a trap."""
    done = _python("-c", _UNFIT)
    assert done.returncode == 0, done.stderr
    spills, trap, tuned = done.stdout.splitlines()
    assert "bytes of stack" in spills
    assert "C7512" in spills
    assert trap == "['no room for its tiles: compiled to a trap']"
    assert tuned == "[False, True]"


def test_the_table_in_the_docs_is_the_recorded_one() -> None:
    root = Path(__file__).parents[2]
    recorded = [
        f"| {row['name']} | {row['warps']} | {row['registers']} | {row['spilled']} "
        f"| {row['shared'] / 1024:.1f} | {row['hgmma']} | {row['wide_loads']} |"
        for row in json.loads((root / "benchmarks" / "results" / "compile-report.json").read_text())
        if row["arch"] == 90 and re.search(r"\bd=72\b|\bD=1152\b", row["name"]) and "cuda" not in row["name"]
    ]
    lines = (root / "docs" / "kernels.md").read_text().splitlines()
    assert recorded == [line for line in lines if re.match(r"\| \w+ .*\b(d=72|D=1152)\b", line)]


def test_faults_are_named() -> None:
    row = Compiled("attention forward", 90, 8, 255, 8, 16, 300_000, 0, 4, 0)
    assert faults(row) == [
        "8 bytes spilled, 16 bytes of stack",
        "300000 bytes of shared memory, accepted are 232448",
        "no warpgroup matrix instruction",
    ]
    assert "attention forward" in table([row])


def test_no_kernel_of_that_name() -> None:
    done = _python("-m", "ard_kernels", "compile-report", "--only", "nothing")
    assert done.returncode == 2
    assert done.stderr == "compile-report: no kernel's name contains 'nothing'\n"


def test_says_what_exists() -> None:
    done = _python("-m", "ard_kernels")
    assert done.returncode == 0, done.stderr
    for name in ("eager", "native", "triton", "chosen"):
        assert name in done.stdout
