"""What lies in the folder of a run and is not of a run is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ard.checkpoints import read_json, write_json
from ard.runs import Run, newest_checkpoint
from ard.training import Optimisation


@pytest.mark.parametrize(
    "content",
    [[], 3, {}, {"command": "distill"}, {"command": "distill", "config": []},
     {"command": "distill", "config": {"lr_schedule": "constant", "iterations": "many"}}],
    ids=str,
)  # fmt: skip
def test_a_run_that_is_not_described_is_refused(tmp_path: Path, content: object) -> None:
    write_json(tmp_path / "run.json", content)
    with pytest.raises(ValueError, match=r"run\.json: does not describe a run \("):
        Run(tmp_path, "distill", Optimisation(lr_schedule="constant"))
    assert read_json(tmp_path / "run.json") == content


@pytest.mark.parametrize("content", [[], {}, {"sha256": 3}], ids=str)
def test_a_checkpoint_that_is_not_described_is_refused(tmp_path: Path, content: object) -> None:
    write_json(tmp_path / "checkpoints" / "step-00000003" / "state.json", content)
    with pytest.raises(ValueError, match=r"state\.json: does not describe a checkpoint \("):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("line", ["[]", "{}", "{", '{"step": "3"}'])
def test_a_log_of_something_else_is_refused(tmp_path: Path, line: str) -> None:
    run, log = Run(tmp_path, "distill", Optimisation()), tmp_path / "log.jsonl"
    log.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl: does not describe a run \("):
        run.open_log(3)
    assert log.read_text() == line + "\n"
