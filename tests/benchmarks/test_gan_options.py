"""What the options of the GAN stage do: each run differs from the table's in its options alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ard.finetuning import FinetuneConfig
from benchmarks import fashion_table, gan_options
from benchmarks.gan_options import OPTIONS, main


def _evaluated(run: Path, steps: tuple[int, ...], frechet: float) -> None:
    for step in steps:
        folder = run / "evaluations" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        student = {"frechet": frechet + step, "precision": 0.5, "recall": 0.25, "consistency": 0.75}
        (folder / "evaluation.json").write_text(json.dumps({"student": student, "errors": [0.1, 0.2]}))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, FinetuneConfig]:
    """Trainings that only say what they would be, beside a table."""
    seen: dict[Path, FinetuneConfig] = {}

    def finetune(config: FinetuneConfig) -> None:
        seen[config.out] = config

    monkeypatch.setattr(gan_options, "finetune", finetune)
    monkeypatch.setattr(gan_options, "evaluate_checkpoints", lambda run, *_, **__: _evaluated(run, (1, 2), 7))
    monkeypatch.setattr(fashion_table, "ProcessPoolExecutor", lambda jobs, _: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(gan_options.torch, "set_num_threads", lambda _: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # and as it was afterwards
    _evaluated(tmp_path / "table" / "s4-n2-causal" / "seed-0", (10, 20), 20)
    return seen


def _run(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    words = ["gan_options", "--table", folder / "table", "--out", folder / "out", "--iterations", 2, *more]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    main()


def test_each_run_differs_from_the_tables_in_its_options_alone(
    tmp_path: Path, runs: dict[Path, FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "table" / "s4-n2-causal-gan" / "seed-0"
    _evaluated(run, (1, 2, 3, 4), 5)
    log = [{"step": step, "real": 1.0, "made": -1.0, "regression": 0.1} for step in (1, 2)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    _run(tmp_path, monkeypatch)
    # The table's run, as it trains it.
    monkeypatch.setattr(fashion_table, "finetune", lambda config: runs.setdefault(Path("table"), config))
    monkeypatch.setattr(fashion_table, "evaluate_checkpoints", lambda *_, **__: None)
    monkeypatch.setattr(fashion_table.torch, "set_num_threads", lambda _: None)
    fashion_table._train(fashion_table.TableConfig(tmp_path / "table"), gan_options._ROW, 0)
    table = dataclasses.asdict(runs.pop(Path("table")))
    for name in ("out", "optimisation"):
        table.pop(name)
    assert len(runs) == len(OPTIONS)
    changed = []
    for config in runs.values():
        own = dataclasses.asdict(config)
        changed.append(json.dumps({k: own[k] for k in sorted(table) if own[k] != table[k]}, default=str))
        o = config.optimisation
        assert (o.iterations, o.checkpoint_every, o.lr, o.lr_schedule) == (2, 1, 1e-4, "constant")
    assert sorted(changed) == sorted(json.dumps(o, sort_keys=True) for o in OPTIONS.values())

    result = json.loads((tmp_path / "out" / "gan_options.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["before", "the defaults", *OPTIONS]
    assert result["rows"][1]["log"] == log
    assert (tmp_path / "out" / "gan_options.png").stat().st_size > 10_000
    text = (tmp_path / "out" / "gan_options.md").read_text().splitlines()
    assert text[2] == "| before | 0 | 40.00 | 0.250 | 0.750 | 0.1000 | 0.2000 |"
    assert text[3:5] == ["| the defaults | 1 | 6.00 | 0.250 | 0.750 | 0.1000 | 0.2000 |",
                         "|  | 2 | 7.00 | 0.250 | 0.750 | 0.1000 | 0.2000 |"]  # fmt: skip
    assert len(text) == 2 + 1 + 2 + 2 * len(OPTIONS)


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--only", "weight 5"), r"only: \['weight 5'\] are unknown, accepted are weight 3, "),
     (("--points", "3"), "points is 3, accepted are divisors of iterations, 2"),
     ((), r"table: .*table has no evaluation of s4-n2-causal-gan at \[1, 2\]")],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path,
    runs: dict[Path, FinetuneConfig],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match=message):
        _run(tmp_path, monkeypatch, *more)
    assert not runs, "before hours of training"


def test_names_are_folders_of_their_own() -> None:
    config: Any = gan_options.OptionsConfig()
    assert len({gan_options._out(config, name) for name in OPTIONS}) == len(OPTIONS)
