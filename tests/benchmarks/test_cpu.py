"""The CPU benchmark's rows."""

from __future__ import annotations

import pytest

from benchmarks import cpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_compares_with_the_fastest_of_the_others(dtype: str) -> None:
    row = cpu._attention(dtype, 64, 64, 1)
    assert set(row["ms"]) == {"native", "eager", "sdpa", "matmul"}
    others = [ms for name, ms in row["ms"].items() if name != "native"]
    assert row["ratio"] == pytest.approx(min(others) / row["ms"]["native"])
    # Its results alone are 4 times 3 MiB in bfloat16, 6 in float32; scores, 3 or 6 MiB several times over.
    results = 12 if dtype == "bfloat16" else 24
    assert 0.9 * results < row["mib"]["native"] < row["mib"]["matmul"]
    # 7 products of 2 x 64 x 64 x 64 operations for each of 64 samples and 6 heads.
    assert row["rate"] * row["ms"]["native"] * 1e6 == pytest.approx(7 * 2 * 64**3 * 64 * 6)
