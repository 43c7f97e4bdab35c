"""Folders that an earlier version wrote go on: `folders/`, whose README.md says how they were made."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from ard import cli
from ard.checkpoints import load_student, load_teacher, read_tensors
from ard.data import LatentStore
from ard.evaluation import TrainClassifierConfig
from ard.runs import Run, begun, newest_checkpoint, read_log
from ard.trajectories import TrajectoryStore

_FOLDERS = Path(__file__).parent / "folders"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in; the folders name each other by relative paths."""
    shutil.copytree(_FOLDERS, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


def _command(name: str) -> str:
    """A command of the README, with the variables of its shell put in."""
    text = (_FOLDERS / "README.md").read_text().replace("\\\n", " ")
    for variable, value in re.findall(r'^(\w+)="(.*)"$', text, re.MULTILINE):
        text = text.replace(f"${variable}", value)
    (line,) = re.findall(rf"^ard (.*--out {name} .*?)(?:#.*)?$", text, re.MULTILINE)
    return " ".join(line.split())


@pytest.mark.parametrize("name", ["distill", "distill-bf16", "finetune", "train-teacher"])
def test_a_run_goes_on(name: str, there: Path) -> None:
    """Without --precision it keeps what it began with, on any machine."""
    command = _command(name).replace("--precision no", "").replace("--iterations 2", "--iterations 4")
    optimiser = newest_checkpoint(there / name)
    before = read_log(there / name)
    if name == "train-teacher":  # a cosine ends where it was planned to
        command = command.replace("--iterations 4", "--iterations 2")
    cli.main(command.split())
    done = 2 if name == "train-teacher" else 4
    found = newest_checkpoint(there / name)
    assert optimiser is not None
    assert found is not None
    assert (optimiser[0], found[0]) == (2, done)
    log = read_log(there / name)
    assert log[:2] == before
    assert [line["step"] for line in log] == list(range(1, done + 1))
    began = "bf16" if name == "distill-bf16" else "no"
    assert json.loads((there / name / "run.json").read_text())["config"]["optimisation"]["precision"] == began


def test_a_run_that_goes_on_is_the_run_that_did_not_stop(there: Path) -> None:
    """From the old checkpoint to the bits of a run from the start, where both are made on this machine."""
    command = _command("distill").replace("--iterations 2", "--iterations 4")
    cli.main(command.split())
    cli.main(command.replace("--out distill", "--out anew --head direct").split())
    for part in ("model", "ema", "optimiser"):
        one, two = (
            read_tensors(there / run / f"checkpoints/step-00000004/{part}.safetensors")
            for run in ("distill", "anew")
        )
        assert set(one) == set(two)
        for key in one:  # other processors round otherwise
            torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)


def test_stores_go_on_and_are_read(there: Path) -> None:
    recording = {path.name: path.read_bytes() for path in (there / "trajectories").iterdir()}
    (there / "trajectories" / "shard-000001.safetensors").unlink()
    cli.main(_command("trajectories").split())
    assert set(recording) == {path.name for path in (there / "trajectories").iterdir()}
    whole = there / "trajectories" / "manifest.json"
    assert whole.read_bytes() == recording[whole.name]
    states, labels = TrajectoryStore(there / "trajectories").states(torch.arange(12), (5, 3, 0), "x0")
    assert states.shape == (12, 3, 1, 28, 28)
    assert labels.tolist() == [i % 10 for i in range(12)]
    cli.main(_command("latents").split())
    assert len(LatentStore(there / "latents")) == 3


def test_models_load_and_are_sampled(there: Path) -> None:
    assert load_teacher(there / "train-teacher/teacher")[0].depth == 1
    for name in ("distill", "distill-bf16", "finetune"):
        assert load_student(there / name / "student")[0].steps == 2
        cli.main(["sample", "--student", f"{name}/student", "--out", f"samples-{name}", "--samples", "4"])
        cli.main(["diagnose", "--students", f"{name}/student", "--trajectories", "trajectories", "--out",
                  f"diagnosis-{name}", "--samples", "4"])  # fmt: skip


def test_runs_of_the_other_commands_are_the_same_runs(there: Path) -> None:
    """Their configuration is made from the command as it was given then."""
    words = _command("train-classifier")
    config = cli.parse(words.split())
    assert isinstance(config, TrainClassifierConfig)
    Run(config.out, "train-classifier", config)
    demo = cli.parse(
        ["demo", "--out", "demo", "--iterations", "1200", "--samples", "4000", "--held-out", "1000",
         "--teacher", "ard/assets/teacher"]
    )  # fmt: skip
    assert begun(demo.out, demo, "precision") == "bf16"
    Run(demo.out, "demo", dataclasses.replace(demo, precision="bf16"))
    with pytest.raises(ValueError, match="precision was 'bf16', is 'no'"):
        Run(demo.out, "demo", dataclasses.replace(demo, precision="no"))


@dataclass(frozen=True)
class _Before:
    out: Path
    width: int = 3


@dataclass(frozen=True)
class _Nested:
    depth: int = 2


@dataclass(frozen=True)
class _After(_Before):
    height: int = 5
    changed: str = field(default="auto", metadata={"absent": "plain"})
    nested: _Nested = _Nested()


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({}, "changed was 'plain', is 'auto'"),
        ({"changed": "plain"}, None),
        ({"changed": "plain", "height": 6}, "height was 5, is 6"),
        ({"changed": "plain", "nested": _Nested(4)}, "depth was 2, is 4"),
        ({"changed": "plain", "width": 4}, "width was 3, is 4"),
    ],
    ids=str,
)
def test_an_option_that_a_run_lacks_had_its_default(
    config: dict[str, object], refused: str | None, tmp_path: Path
) -> None:
    Run(tmp_path, "sample", _Before(tmp_path))
    if refused is None:
        Run(tmp_path, "sample", _After(tmp_path, **config))  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match=re.escape(refused)):
        Run(tmp_path, "sample", _After(tmp_path, **config))  # type: ignore[arg-type]
