"""The table: every published row is in it, what is there is not made again, and means are over seeds."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ard.checkpoints import read_json
from ard.costs import PUBLISHED
from ard.evaluation import EvaluateConfig, evaluate
from benchmarks import fashion_table
from benchmarks.common import RESULTS
from benchmarks.fashion_table import ROWS, TableConfig, _collect, _make, _markdown, _runs, main


def test_every_published_student_is_a_row() -> None:
    """By steps, history (some or all layers), mask and cost; and beside them the two with a discriminator."""
    layers = {0: 0, 6: 2, 28: 8}
    published = {
        (p.steps, layers[p.history_layers], p.mask, p.gmacs)
        for p in PUBLISHED
        if p.history_layers is not None
    }
    rows = {(r.steps, r.history_layers, r.mask, r.published[3]) for r in ROWS if r.published and not r.gan}
    assert rows == published
    assert [r.published[0] for r in ROWS if r.gan and r.published] == [3.84, 1.84]
    assert len({row.key for row in ROWS}) == len(ROWS)
    assert all(r.claim for r in ROWS if r.gan)


def test_a_small_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        f"fashion_table --out {tmp_path} --iterations 2 --samples 8 --held-out 8 --batch-size 4 --seeds 2 "
        "--rows s1-n0 s4-n2-causal --jobs 1 --points 2 --no-compile --precision no"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    main()
    result = json.loads((tmp_path / "table.json").read_text())
    teacher, students = result["rows"][:2], result["rows"][2:]
    assert [row["name"] for row in teacher] == ["teacher, 250 steps", "teacher, 25 steps"]
    assert teacher[0]["mmac"] == pytest.approx(10 * teacher[1]["mmac"])
    assert [(row["key"], len(row["seeds"])) for row in students] == [("s1-n0", 1), ("s4-n2-causal", 2)]
    # Reports are those of `ard evaluate`, at the end and on the way.
    folder = tmp_path / "s4-n2-causal" / "seed-1"
    report = evaluate(
        EvaluateConfig(folder / "student", tmp_path / "held-out", out=tmp_path / "again", precision="no")
    )
    assert students[1]["seeds"][1]["frechet"] == pytest.approx(report["student"]["frechet"], rel=1e-5)
    assert students[1]["seeds"][1]["errors"] == pytest.approx(report["errors"], rel=1e-5)
    assert [point["step"] for point in students[1]["curves"]["1"]] == [1, 2]
    assert students[1]["curves"]["0"] != students[1]["curves"]["1"], "two seeds are two trainings"
    distances = [seed["frechet"] for seed in students[1]["seeds"]]
    wanted = f"{statistics.mean(distances):.2f} ± {statistics.stdev(distances):.2f}"
    assert f"| ARD, some layers | 4 | 2 | {wanted} |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.png").stat().st_size > 1000
    assert wanted in capsys.readouterr().out

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    monkeypatch.setattr(sys, "argv", command.replace("--seeds 2", "--seeds 1").split())
    main()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files

    # One can be collected while a recording is under way.
    next((tmp_path / "held-out-250").glob("shard-*.safetensors")).unlink()
    names = [row["name"] for row in _collect(TableConfig(tmp_path, iterations=2))["rows"]]
    assert names == ["teacher, 25 steps", "KD", "ARD, some layers"]


def _earlier(folder: Path, **curves: list[int]) -> TableConfig:
    """A table.json with these seeds of these rows, and a table that knows it."""
    points = {"frechet": 2.0, "precision": 0.5, "recall": 0.5, "consistency": 0.5, "errors": [0.1], "step": 1}
    rows = [{"key": "held-out", "seeds": [{**points, "errors": []}], "curves": {}}]
    for key, seeds in curves.items():
        rows.append({"key": key.replace("_", "-"), "curves": {str(seed): [points] for seed in seeds}})
    config = TableConfig(folder / "out", known=folder / "earlier.json")
    earlier = {"rows": rows, "config": dataclasses.asdict(config)}
    (folder / "earlier.json").write_text(json.dumps(earlier, default=str))
    return config


def test_what_an_earlier_table_knows_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_table, "_milliseconds", lambda *_: {})
    config = _earlier(tmp_path, s4_n0=[1], s4_n8_causal=[0, 1, 2])
    keys = ("s4-n0", "s4-n8-causal")
    assert [(row.key, seed) for row, seed in _runs(dataclasses.replace(config, rows=keys))] == [
        ("s4-n0", 0), ("s4-n0", 2)]  # fmt: skip
    # The GAN stage starts from a regression, of which an earlier table holds the numbers alone.
    keys = ("s4-n8-causal", "s4-n8-causal-gan")
    assert len([*_runs(dataclasses.replace(config, rows=keys))]) == 6

    # A training that is there as well is the one shown.
    folder = config.out / "s4-n0" / "seed-0"
    (folder / "student").mkdir(parents=True)

    def evaluated(step: int) -> dict[str, Any]:
        (folder / "evaluations" / f"step-{step:08d}").mkdir(parents=True)
        own = {"student": {"frechet": 4.0}, "errors": [0.2]}
        (folder / "evaluations" / f"step-{step:08d}" / "evaluation.json").write_text(json.dumps(own))
        return _collect(config)["rows"][1]["curves"]

    assert evaluated(10_000).keys() == {"1"}, "checkpoints are evaluated in order, after the training"
    assert evaluated(20_000).keys() == {"0", "1"}
    teacher, row, _ = _collect(config)["rows"]
    assert teacher["seeds"][0]["frechet"] == 2.0
    assert {seed: points[0]["frechet"] for seed, points in row["curves"].items()} == {"0": 4.0, "1": 2.0}
    assert [seed["frechet"] for seed in row["seeds"]] == [4.0, 2.0]


def test_only_what_is_needed_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []
    monkeypatch.setattr(fashion_table, "_record", lambda _, folder: recorded.append(folder))
    monkeypatch.setattr(fashion_table, "_train", lambda *_: None)
    monkeypatch.setattr(fashion_table, "ProcessPoolExecutor", lambda jobs, _: ThreadPoolExecutor(jobs))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # and as it was afterwards
    config = dataclasses.replace(_earlier(tmp_path, s1_n0=[0], s2_n0=[0]), rows=("s1-n0",))
    _make(config)
    assert recorded == ["held-out-250"]
    _make(dataclasses.replace(config, known=None))
    assert recorded == ["held-out-250", "trajectories", "held-out", "held-out-250"]


def test_an_earlier_table_of_other_trainings_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(_earlier(tmp_path), iterations=30)
    with pytest.raises(SystemExit, match=r"known: .*earlier.json is of iterations 20000, accepted is 30"):
        _collect(config)


def test_without_held_out_trajectories_there_is_no_table() -> None:
    with pytest.raises(SystemExit, match="table: the held-out trajectories are not there yet"):
        _markdown({"rows": []})


def test_a_table_of_nothing_holds_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TableConfig(tmp_path)
    monkeypatch.setattr(fashion_table, "_recorded", lambda _: True)
    monkeypatch.setattr(fashion_table, "_teacher_metrics", lambda *_: {
        "frechet": 1.0, "precision": 0.5, "recall": 0.5, "consistency": 0.5})  # fmt: skip
    monkeypatch.setattr(fashion_table, "_milliseconds", lambda *_: {})
    text = _markdown(_collect(config))
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == [
        "teacher, 250 steps", "teacher, 25 steps"]  # fmt: skip


def test_unknown_rows_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", f"fashion_table --out {tmp_path} --rows s9-n9".split())
    with pytest.raises(SystemExit, match=r"\['s9-n9'\] are unknown, accepted are s1-n0, s2-n0"):
        main()
    assert not [*tmp_path.iterdir()]


def test_the_table_in_the_docs_is_the_recorded_one() -> None:
    made = _markdown(read_json(RESULTS / "fashion_table.json")).rstrip("\n")
    assert made in (RESULTS.parents[1] / "docs" / "table.md").read_text()
