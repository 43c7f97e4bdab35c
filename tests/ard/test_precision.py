"""Every command that runs a network takes --precision, and its network computes in it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from ard import cli, precision, sampling
from ard.diagnosis import DiagnoseConfig, diagnose
from ard.distilling import DistillConfig, distill
from ard.evaluation import EvaluateConfig, evaluate
from ard.models.dit import DiTBlock
from ard.recording import RecordConfig, record
from ard.training import Optimisation
from ard.trajectories import TrajectoryStore

Command = Callable[[str, RecordConfig, Path, Path], Any]

_COMMANDS: dict[str, Command] = {
    "record": lambda p, recording, _, out: record(replace(recording, samples=4, out=out, precision=p)),
    "distill": lambda p, recording, _, out: distill(
        DistillConfig(
            recording.teacher, out, recording.out, history_layers=2,
            optimisation=Optimisation(iterations=1, batch_size=4, precision=p),
        )
    ),
    "distill live": lambda p, recording, _, out: distill(
        DistillConfig(
            recording.teacher, out, history_layers=2, solver_steps=5,
            optimisation=Optimisation(iterations=1, batch_size=4, precision=p),
        )
    ),
    "sample": lambda p, _, student, out: sampling.run(
        sampling.SampleConfig(student, out, samples=4, precision=p)
    ),
    "evaluate": lambda p, recording, student, out: evaluate(
        EvaluateConfig(student, recording.out, out=out, samples=4, precision=p)
    ),
    "diagnose": lambda p, recording, student, out: diagnose(
        DiagnoseConfig((student,), recording.out, out, samples=4, precision=p)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "wanted"),
    [("no", ("highest", False)), ("tf32", ("high", False)), ("bf16", ("highest", True))],
)
@pytest.mark.parametrize("command", _COMMANDS)
def test_networks_compute_in_the_precision_asked_for(
    command: str, precision: str, wanted: tuple[str, bool], recording: RecordConfig, student: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen, forward = set(), DiTBlock.forward

    def spied(self: DiTBlock, *given: Any, **options: Any) -> Any:
        seen.add((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return forward(self, *given, **options)

    monkeypatch.setattr(DiTBlock, "forward", spied)
    _COMMANDS[command](precision, recording, student, tmp_path)
    assert seen == {wanted}
    assert (torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")) == ("highest", False)


def test_bf16_changes_samples_a_little(student: Path, tmp_path: Path) -> None:
    made = []
    config = sampling.SampleConfig(student, tmp_path, samples=6, latents=True)
    for name in ("no", "tf32", "bf16"):
        sampling.run(replace(config, out=tmp_path / name, precision=name))  # type: ignore[arg-type]
        made.append(np.load(tmp_path / name / "samples.npz")["arr_0"])
    for one, other in itertools.combinations(made, 2):
        assert np.abs(one - other).max() < 0.1 * np.abs(one).max()
    assert not np.array_equal(made[0], made[2])
    assert {x.dtype for x in made} == {np.dtype("float32")}


def _machine(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    """A machine whose bf16 products are fast, or emulated."""
    monkeypatch.setattr(precision, "prefers_bf16", lambda device: (bf16, "so says the test"))


@pytest.mark.parametrize(("fast", "wanted"), [(False, "no"), (True, "bf16")])
@pytest.mark.parametrize("command", _COMMANDS)
def test_auto_follows_the_machine_and_is_recorded(
    command: str, fast: bool, wanted: str, recording: RecordConfig, student: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What a folder records is what was computed in, with the reason where it is a run."""
    seen, forward = set(), DiTBlock.forward

    def spied(self: DiTBlock, *given: Any, **options: Any) -> Any:
        seen.add(torch.is_autocast_enabled("cpu"))
        return forward(self, *given, **options)

    monkeypatch.setattr(DiTBlock, "forward", spied)
    _machine(monkeypatch, fast)
    _COMMANDS[command]("auto", recording, student, tmp_path)
    assert seen == {fast}
    if command.startswith("distill"):
        found = json.loads((tmp_path / "run.json").read_text())
        assert found["precision"] == {"asked": "auto", "resolved": wanted, "reason": "so says the test"}
        assert found["config"]["optimisation"]["precision"] == wanted
    elif command == "record":
        assert TrajectoryStore(tmp_path).manifest["precision"] == wanted
    else:
        report = {"sample": "sample", "evaluate": "evaluation", "diagnose": "diagnosis"}[command]
        assert json.loads((tmp_path / f"{report}.json").read_text())["config"]["precision"] == wanted


@pytest.mark.parametrize("fast", [False, True])
def test_a_run_that_moves_to_another_kind_of_machine_keeps_its_precision(
    fast: bool, recording: RecordConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Its bits are those of a run that never moved, and it says what it keeps."""
    began, other = ("bf16", "no") if fast else ("no", "bf16")
    o = Optimisation(iterations=2, batch_size=4, checkpoint_every=1, sample_every=0, lr_schedule="constant")
    config = DistillConfig(recording.teacher, tmp_path / "moved", recording.out, optimisation=o)
    _machine(monkeypatch, fast)
    distill(replace(config, history_layers=2, out=tmp_path / "stayed"))
    distill(replace(config, history_layers=2, optimisation=replace(o, iterations=1)))
    capsys.readouterr()
    _machine(monkeypatch, not fast)
    distill(replace(config, history_layers=2))
    said = capsys.readouterr().out
    assert f"moved: precision stays {began!r}, begun so; a new one would have {other!r} here" in said
    one, two = ((tmp_path / name / "student/model.safetensors").read_bytes() for name in ("stayed", "moved"))
    assert one == two
    AcceleratorState._reset_state()  # which keeps the first precision that it was asked for
    with pytest.raises(ValueError, match=f"precision was '{began}', is '{other}'"):
        distill(replace(config, history_layers=2, optimisation=replace(o, precision=other)))  # type: ignore[arg-type]


def test_a_recording_that_moves_keeps_its_precision(
    recording: RecordConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _machine(monkeypatch, True)
    config = replace(recording, samples=32, out=tmp_path / "moved", precision="auto")
    record(config)
    whole = {path.name: path.read_bytes() for path in config.out.iterdir() if path.is_file()}
    (config.out / "shard-000001.safetensors").unlink()
    _machine(monkeypatch, False)
    record(config)
    assert "precision stays 'bf16', begun so; a new one would have 'no' here" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in config.out.iterdir() if path.is_file()} == whole


def test_every_command_that_runs_a_network_leaves_the_precision_to_the_machine() -> None:
    found = {}
    for name, (config, _) in cli._COMMANDS.items():
        options = {f.name: f for f in fields(config)}
        if "precision" in options:
            found[name] = options["precision"].default
        elif "optimisation" in options:
            found[name] = options["optimisation"].default_factory().precision
    assert found == dict.fromkeys(
        ("demo", "train-teacher", "record", "encode", "distill", "finetune", "sample", "evaluate", "diagnose",
         "train-classifier"), "auto",
    )  # fmt: skip


def test_fp16_without_a_gpu_says_that_it_is_float32(
    recording: RecordConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: accelerate has no autocast for it on CPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on a machine that has one, too
    o = Optimisation(iterations=2, batch_size=4, sample_every=0)
    config = DistillConfig(
        recording.teacher, tmp_path / "no", recording.out, history_layers=2, history_start="open"
    )
    distill(replace(config, optimisation=replace(o, precision="no")))
    AcceleratorState._reset_state()
    with pytest.warns(UserWarning, match="fp16', which needs a GPU: this trains in float32"):
        distill(replace(config, out=tmp_path / "fp16", optimisation=replace(o, precision="fp16")))
    one, two = ((tmp_path / name / "student/model.safetensors").read_bytes() for name in ("no", "fp16"))
    assert one == two
