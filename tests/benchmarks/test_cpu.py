"""The CPU benchmark's rows."""

from __future__ import annotations

import re

import pytest
import torch

from ard.checkpoints import read_json
from ard_kernels import BlockLayout
from benchmarks import cpu
from benchmarks.common import RESULTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_compares_with_the_fastest_of_the_others(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # 10 seconds
    (row,) = cpu._attention(dtype, 64, 64, 1)
    assert set(row["ms"]) == {"native", "eager", "sdpa", "matmul", "compile"}
    others = [ms for name, ms in row["ms"].items() if name != "native"]
    assert row["ratio"] == pytest.approx(min(others) / row["ms"]["native"])
    # Its results alone are 4 times 3 MiB in bfloat16, 6 in float32; scores, 3 or 6 MiB several times over.
    results = 12 if dtype == "bfloat16" else 24
    assert 0.9 * results < row["mib"]["native"] < row["mib"]["matmul"]
    # 7 products of 2 x 64 x 64 x 64 operations for each of 64 samples and 6 heads.
    assert row["rate"] * row["ms"]["native"] * 1e6 == pytest.approx(7 * 2 * 64**3 * 64 * 6)


@pytest.mark.parametrize(("block", "pairs", "times"), [(None, 3 * 3 + 4 * 7, 3.5), (1, 4 * 7, 1)])
def test_a_row_of_attention_between_blocks(
    block: int | None, pairs: int, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_TOKENS", 28)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    (row,) = cpu._block_attention("bfloat16", BlockLayout((3, 4)), "causal", 1, block)
    masked = {"sdpa dense mask"} if block is None else set()
    assert set(row["ms"]) == {"native", "eager", "sdpa flash", "matmul", "compile"} | masked
    work = times * 4 * 64 * pairs * 4 * 6  # two products of head dim 64 a pair, four samples of six heads
    assert row["rate"] * row["ms"]["native"] * 1e6 == pytest.approx(work)
    assert "| attention bfloat16 causal, B4 S2 L3+4 H6 Dh64" in cpu._line(row, {"bfloat16": 1.0})


def test_the_table_in_the_docs_is_the_recorded_one() -> None:
    recorded = read_json(RESULTS / "cpu.json")
    lines = (RESULTS.parents[1] / "docs" / "kernels.md").read_text().splitlines()
    rows = [cpu._line(row, recorded["ceilings"]) for row in recorded["rows"]]
    assert rows == [line for line in lines if re.search(r"\| native \d", line)]
