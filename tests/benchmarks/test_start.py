"""The table of heads and histories: its rows, its numbers, and what is not made again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ard.checkpoints import load_student, read_json
from ard.evaluation import EvaluateConfig, evaluate
from benchmarks import start
from benchmarks.start import ROWS


def test_every_combination_is_a_row() -> None:
    assert len({row.key for row in ROWS}) == len({row.name for row in ROWS}) == len(ROWS) == 24
    assert {(row.head, row.state) for row in ROWS} == {("direct", "x0"), ("direct", "xt"), ("solver", "xt")}


def test_a_small_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        f"start --out {tmp_path} --iterations 2 --samples 64 --held-out 8 --batch-size 4 --seeds 2 --jobs 1 "
        "--points 2 --precision no --rows direct-x0-n0 solver-xt-n2-closed"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    start.main()
    result = json.loads((tmp_path / "start.json").read_text())
    assert [row["key"] for row in result["rows"]] == ["direct-x0-n0", "solver-xt-n2-closed"]
    assert [point["step"] for point in result["rows"][0]["curves"]["1"]] == [1, 2]
    folder = tmp_path / "solver-xt-n2-closed" / "seed-1"
    report = evaluate(
        EvaluateConfig(folder / "student", tmp_path / "held-out", out=tmp_path / "again", precision="no")
    )
    point = result["rows"][1]["curves"]["1"][-1]
    assert point["frechet"] == pytest.approx(report["student"]["frechet"], rel=1e-5)
    student, trained = load_student(folder / "student")
    assert (student.head, student.history_layers, trained["seed"]) == ("solver", 2, 0)
    assert read_json(tmp_path / "held-out" / "manifest.json")["seed"] == 5
    untrained, _ = load_student(tmp_path / "untrained" / "student")
    assert untrained.transitions == student.transitions
    excess = report["student"]["frechet"] - result["teacher"]["frechet"]
    other = result["rows"][1]["curves"]["0"][-1]["frechet"] - result["teacher"]["frechet"]
    assert f"{(excess + other) / 2:.2f} ± " in (tmp_path / "start.md").read_text()
    assert "solver, untrained" in capsys.readouterr().out
    assert (tmp_path / "start.png").stat().st_size > 1000

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    start.main()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files


def test_rows_that_are_none_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", f"start --out {tmp_path} --rows solver-x0-n0".split())
    with pytest.raises(SystemExit, match="solver-x0-n0"):
        start.main()
