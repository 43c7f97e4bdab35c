"""The benchmark that a newcomer runs first, on a tiny shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ard.checkpoints import read_json
from ard_kernels import BlockLayout
from ard_kernels.layout import MASKS
from benchmarks import attn_mask
from benchmarks.suite.attention import Shape


@pytest.mark.usefixtures("eager_only")
def test_every_mask_is_timed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny = Shape(1, BlockLayout.uniform(2, 8), 2, 16)
    monkeypatch.setitem(attn_mask.SHAPES, ("cpu", "small"), (tiny,))
    attn_mask.main(["--shapes", "small", "--out", str(tmp_path / "times.json")])
    found = read_json(tmp_path / "times.json")
    assert [row["mask"] for row in found["times"]] == [*MASKS]
    for row in found["times"]:
        assert {"eager", "sdpa", "flex"} == set(row["forward"])
        assert {"eager", "sdpa"} == set(row["forward_backward"])
        assert "not support backward on CPU" in row["reasons"]["flex forward_backward"]
    assert max(max(row["epsilons"]) for row in found["accuracy"]) <= attn_mask.TOLERANCE
    assert (tmp_path / "times.png").stat().st_size > 10_000
    attn_mask.main(["--masks", str(tmp_path / "masks.png")])
    assert (tmp_path / "masks.png").stat().st_size > 10_000
