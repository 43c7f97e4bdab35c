"""The picture of what history has opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from ard.checkpoints import load_student, read_json, read_tensors
from ard.diagnosis import DiagnoseConfig, diagnose
from ard.distilling import DistillConfig, distill
from ard.history_weights import weights_figure, weights_over_training
from ard.recording import RecordConfig
from ard.training import Optimisation


@pytest.fixture(scope="module")
def run(recording: RecordConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("closed") / "run"
    o = Optimisation(
        iterations=6, batch_size=8, lr=1e-2, ema=0.5, precision="no", checkpoint_every=2, keep_checkpoints=3,
        sample_every=0,
    )  # fmt: skip
    distill(DistillConfig(recording.teacher, out, recording.out, history_layers=2, optimisation=o))
    AcceleratorState._reset_state()
    return out


def test_weights_are_those_of_the_checkpoints_and_the_student(run: Path) -> None:
    found = weights_over_training(run / "student")
    assert [name for name, _ in found] == ["step 2", "step 4", "the student"]
    student, _ = load_student(run / "student")
    assert student.history_gates is not None
    torch.testing.assert_close(found[-1][1], student.history_gates.gates.clamp(min=0))
    average = read_tensors(run / "checkpoints" / "step-00000002" / "ema.safetensors")["history_gates.gates"]
    assert average.max() > 0
    for folder in (run / "checkpoints").iterdir():  # the average is taken before
        assert read_tensors(folder / "model.safetensors")["history_gates.gates"].min() == 0
    torch.testing.assert_close(found[0][1], average.clamp(min=0))


def test_the_picture_shows_every_head_and_pair(run: Path) -> None:
    some = weights_over_training(run / "student")
    figure = weights_figure({"one": some, "none": [], "short": some[-1:]}, most=2)
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["step 4", "the student", "the student"]
    shown = torch.as_tensor(panels[1].images[0].get_array())
    torch.testing.assert_close(shown, some[-1][1].flatten(0, 1))
    names = [label.get_text() for label in panels[0].get_xticklabels()]
    assert names == ["2 sees 1", "3 sees 1", "3 sees 2", "4 sees 1", "4 sees 2", "4 sees 3"]


def test_the_diagnosis_has_both(run: Path, student: Path, recording: RecordConfig, tmp_path: Path) -> None:
    config = DiagnoseConfig((run / "student", student), recording.out, tmp_path, samples=4, precision="no")
    report = diagnose(config)
    assert report["students"][0]["history_weights"] == weights_over_training(run / "student")[-1][1].tolist()
    assert report["students"][1]["history_weights"] is None
    assert read_json(tmp_path / "diagnosis.json") == report
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    diagnose(DiagnoseConfig((student,), recording.out, tmp_path / "open", samples=4, precision="no"))
    assert not (tmp_path / "open" / "history.png").exists()
