"""What `ard distill` does by default, and the published recipe beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from ard import cli
from ard.checkpoints import load_student, load_teacher, read_json, read_tensors
from ard.diagnosis import DiagnoseConfig, diagnose
from ard.distilling import DistillConfig, distill
from ard.evaluation import EvaluateConfig, evaluate
from ard.finetuning import FinetuneConfig, finetune
from ard.grids import chosen_grid
from ard.layouts import released_checkpoint
from ard.losses import trajectory_loss
from ard.models import ARDTransformer
from ard.recording import RecordConfig
from ard.runs import read_log
from ard.sampling import SampleConfig, run
from ard.training import Optimisation
from ard.trajectories import LiveTrajectories, SolverConfig, TrajectoryStore

_SHORT = Optimisation(
    iterations=6, batch_size=8, lr=1e-3, ema=0.9, precision="no", log_every=1, checkpoint_every=3,
    sample_every=0,
)  # fmt: skip


def _config(recording: RecordConfig, out: Path, **options: Any) -> DistillConfig:
    o = options.pop("optimisation", _SHORT)
    return DistillConfig(
        recording.teacher, out, recording.out, **{"history_layers": 2, **options}, optimisation=o
    )


@pytest.fixture(scope="module")
def default(recording: RecordConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("default") / "run"
    distill(_config(recording, out))
    AcceleratorState._reset_state()
    return out


def test_the_defaults_are_recorded(default: Path, recording: RecordConfig) -> None:
    record = read_json(default / "run.json")
    config = record["config"]
    assert (config["head"], config["state"], config["history_start"]) == ("solver", "xt", "closed")
    assert config["optimisation"]["lr_schedule"] == "cosine"
    assert (config["grid"], config["entry"]) == (None, None)
    student, trained = load_student(default / "student")
    teacher, _ = load_teacher(recording.teacher)
    store = TrajectoryStore(recording.out)
    grid, entry = chosen_grid(teacher, store, 4)
    levels = [entry, *store.levels(grid)[1:]]
    assert record["states"] == {"grid": list(grid), "levels": levels}
    assert (trained["grid"], trained["state"]) == (list(grid), "xt")
    assert (student.head, student.times.tolist()) == ("solver", [float(t) for t in levels])
    assert student.history_gates is not None


def test_the_first_loss_is_that_of_the_teachers_solver(default: Path, recording: RecordConfig) -> None:
    store, (teacher, diffusion) = TrajectoryStore(recording.out), load_teacher(recording.teacher)
    states = read_json(default / "run.json")["states"]
    xt, labels = store.states(store.order(range(8), 0), tuple(states["grid"]), "xt")
    following = [*states["levels"][1:], None]
    made = []
    for s, (t, later) in enumerate(zip(states["levels"], following, strict=True)):
        a, b = diffusion.transition(t, later)
        with torch.no_grad():
            made.append(a * xt[:, s] + b * teacher(xt[:, s], torch.full((8,), float(t)), labels))
    loss, terms = trajectory_loss(torch.stack(made, 1), xt)
    first = read_log(default)[0]
    assert first["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert first["terms"] == pytest.approx(terms.tolist(), rel=1e-4)


def test_the_published_recipe_is_one_option(recording: RecordConfig, tmp_path: Path) -> None:
    """The same bits as when everything about it is said."""
    distill(_config(recording, tmp_path / "one", head="direct"))
    AcceleratorState._reset_state()
    said = replace(_SHORT, lr_schedule="constant")
    distill(
        _config(recording, tmp_path / "all", head="direct", state="x0", history_start="open",
                grid=(25, 15, 10, 5, 0), optimisation=said)
    )  # fmt: skip
    one, every = (tmp_path / name / "student" for name in ("one", "all"))
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (every / name).read_bytes()
    student, trained = load_student(one)
    assert (student.head, student.history_gates, trained["state"]) == ("direct", None, "x0")
    assert student.times.tolist() == [999.0, 749.25, 499.5, 249.75]


def test_a_run_keeps_its_head_and_its_states(recording: RecordConfig, tmp_path: Path) -> None:
    """Whatever the defaults are when it goes on, and whatever grid another machine would choose."""
    for head in ("direct", "solver"):
        out = tmp_path / head
        distill(_config(recording, out, head=head, optimisation=replace(_SHORT, sample_every=0)))
        AcceleratorState._reset_state()
        whole = (out / "student" / "model.safetensors").read_bytes()
        (out / "student" / "model.safetensors").unlink()
        for path in (out / "checkpoints" / "step-00000006").iterdir():
            path.unlink()
        (out / "checkpoints" / "step-00000006").rmdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ard.distilling.chosen_grid", lambda *given, **more: pytest.fail("chosen again"))
            distill(_config(recording, out))
        AcceleratorState._reset_state()
        assert (out / "student" / "model.safetensors").read_bytes() == whole
        other = "direct" if head == "solver" else "solver"
        with pytest.raises(ValueError, match=f"head was '{head}', is '{other}'"):
            distill(_config(recording, out, head=other))
        AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": "x0"}, "state is 'x0', accepted with --head solver is 'xt'"),
        ({"head": "direct", "entry": 900}, "entry is 900, accepted with --head direct is none"),
        ({"grid": (25, 12, 10, 5, 0)}, r"positions \[12\] were not kept"),
        (
            {"grid": (25, 20, 0), "steps": 2, "entry": 800},
            "entry is 800, accepted are times later than .* 832",
        ),
        ({"entry": 1000}, r"accepted are times in 0\.\.999"),
        ({"steps": 6}, r"steps is 6, accepted are 1\.\.5"),
        ({"optimisation": replace(_SHORT, precision="fp16")}, "history_start is 'closed', accepted with"),
    ],
)
def test_what_cannot_be_leaves_no_run(
    recording: RecordConfig, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distill(_config(recording, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [{"steps": 1}, {"history_layers": 0}, {"history_start": "open", "mask": "window"}, {"mask": "anchor"},
     {"rollout": 0.5}, {"head": "direct", "state": "xt"}, {"head": "direct", "history_start": "closed"},
     {"per_step_final": False}, {"grid": (25, 20, 0), "steps": 2, "entry": 900}],
    ids=str,
)  # fmt: skip
def test_variants_learn(recording: RecordConfig, tmp_path: Path, options: dict[str, Any]) -> None:
    o = replace(_SHORT, iterations=40, checkpoint_every=40, lr=3e-4)
    distill(_config(recording, tmp_path, **options, optimisation=o))
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    student, _ = load_student(tmp_path / "student")
    assert student.head == options.get("head", "solver")
    if "entry" in options:
        assert student.times.tolist()[0] == 900


def test_live_trajectories_have_the_whole_choice(recording: RecordConfig, tmp_path: Path) -> None:
    config = DistillConfig(recording.teacher, tmp_path, solver_steps=8, steps=3, optimisation=_SHORT)
    distill(replace(config, history_layers=2))
    live = LiveTrajectories(recording.teacher, SolverConfig(precision="no", solver_steps=8, dtype="float32"))
    expected, _ = chosen_grid(load_teacher(recording.teacher)[0], live, 3)
    assert read_json(tmp_path / "run.json")["states"]["grid"] == list(expected)


def test_everything_that_follows_takes_such_a_student(
    default: Path, recording: RecordConfig, tmp_path: Path
) -> None:
    student = default / "student"
    run(SampleConfig(student, tmp_path / "samples", samples=4, precision="no"))
    report = evaluate(EvaluateConfig(student, recording.out, out=tmp_path / "evaluation", precision="no"))
    assert len(report["errors"]) == 4
    diagnose(DiagnoseConfig((student,), recording.out, tmp_path / "diagnosis", samples=4, precision="no"))
    AcceleratorState._reset_state()
    o = replace(_SHORT, iterations=4, batch_size=8)
    finetune(
        FinetuneConfig(recording.teacher, default, "digits", tmp_path / "gan", recording.out, gan_warmup=1,
                       gradient_steps=2, optimisation=o)
    )  # fmt: skip
    finetuned, trained = load_student(tmp_path / "gan" / "student")
    assert (finetuned.head, trained["finetuned"], trained["state"]) == ("solver", True, "xt")
    assert finetuned.config == load_student(student)[0].config
    before = read_tensors(student / "model.safetensors")["history_gates.gates"]
    assert not torch.equal(finetuned.history_gates.gates, before)  # type: ignore[union-attr]


def test_conversions_keep_it_or_say_why_not(default: Path, tmp_path: Path) -> None:
    student, _ = load_student(default / "student")
    with pytest.raises(ValueError, match="head is 'solver', the released code can only hold 'direct'"):
        released_checkpoint(student)
    cli.main(["convert", "--weights", str(default / "student"), "--out", str(tmp_path / "ours")])
    again = ARDTransformer.from_pretrained(tmp_path / "ours")
    assert again.config == student.config
    states, labels = torch.randn(2, 4, 1, 28, 28), torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.equal(again(states, labels), student(states, labels))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["config"]
    assert len(config["transitions"]) == 4
    assert config["gated_history"] is True
