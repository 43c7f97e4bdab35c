"""The diagnosis against its definition in whole passes over all states, and on a student whose answer is
known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import randomise, tiny_teacher
from torch import Tensor

import ard
from ard.checkpoints import load_student, save_student, save_teacher
from ard.data import Stream, index_noise
from ard.diagnosis import DiagnoseConfig, _picture, diagnose, perturbed_rollout, print_report
from ard.diffusion import Diffusion
from ard.models import ARDTransformer
from ard.recording import RecordConfig, record
from ard.trajectories import State, TrajectoryStore

_SIZES = (0.3, 0.1)
Make = Callable[..., Path]


@pytest.fixture
def make(store: TrajectoryStore, tmp_path: Path) -> Make:
    """Write a student of the session's teacher with random weights."""

    def make(name: str, steps: int = 4, state: State = "x0", blank: bool = False, **options: Any) -> Path:
        options = {"history_layers": 2, **options}
        model = ARDTransformer.from_teacher(tiny_teacher(), steps=steps, **options)
        randomise(model, 2)
        if blank:
            for layer in model.final_layers:
                torch.nn.init.zeros_(layer.linear.weight)  # type: ignore[union-attr, arg-type]
                torch.nn.init.zeros_(layer.linear.bias)  # type: ignore[union-attr, arg-type]
        trained = {**store.summary(store.grid(steps), state), "seed": 7}
        save_student(tmp_path / name, model, trained)
        return tmp_path / name

    return make


def _definition(folder: Path, store: TrajectoryStore, count: int, seed: int) -> dict[str, Tensor]:
    """Of each sample and step, by whole passes over all S states alone; perturbed and gain have a size
    first, and nothing at step 1."""
    student, trained = load_student(folder)
    indices = torch.arange(count)
    states, labels = store.states(indices, tuple(trained["grid"]), trained["state"])
    targets, steps = states[:, 1:], student.steps
    path = ard.sample(student, states[:, 0], labels)
    inputs = torch.cat([states[:, :1], path[:, :-1]], 1)
    noise = index_noise(indices, (steps - 1, *states.shape[2:]), seed, Stream.DIAGNOSE)
    perturbed, gain = torch.zeros(2, len(_SIZES), count, steps, dtype=torch.float64)

    def square(x: Tensor) -> Tensor:
        return x.double().square().flatten(-3).mean(-1)

    with torch.no_grad():
        for k, size in enumerate(_SIZES):
            for s in range(1, steps):
                moved = inputs.clone()
                moved[:, s] += size * noise[:, s - 1]
                prediction = student(moved, labels)[:, s]
                perturbed[k, :, s] = square(prediction - targets[:, s])
                gain[k, :, s] = square(prediction - path[:, s]) / square(size * noise[:, s - 1])
        return {
            "teacher_history": square(student(states[:, :-1], labels) - targets),
            "own_history": square(student(inputs, labels) - targets),
            "perturbed": perturbed,
            "gain": gain,
        }


def _close(found: dict[str, list[float]], values: Tensor) -> None:
    """Mean and standard error over samples of (n, steps)."""
    wide = values.numpy()
    assert found["mean"] == pytest.approx(wide.mean(0).tolist(), rel=1e-5, abs=1e-12)
    sem = np.std(wide, axis=0, ddof=1) / np.sqrt(len(wide))
    assert found["sem"] == pytest.approx(sem.tolist(), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "state", "options"),
    [(4, "x0", {"history_layers": 2}), (4, "xt", {"history_layers": 0}),
     (5, "x0", {"history_layers": 1, "mask": "window"}),
     (2, "xt", {"history_layers": 2, "per_step_final": False}), (1, "x0", {"history_layers": 2})],
    ids=["causal", "none", "window", "S=2", "S=1"],
)  # fmt: skip
def test_the_numbers_are_the_definition(
    make: Make, store: TrajectoryStore, tmp_path: Path, steps: int, state: State, options: dict[str, Any]
) -> None:
    """Every error and gain; batches of 4 of 10 samples, so that noise belongs to samples, not to batches."""
    folder = make("student", steps, state, **options)
    config = DiagnoseConfig(
        (folder,),
        store.folder,
        tmp_path / "out",
        samples=10,
        batch_size=4,
        sizes=_SIZES,
        seed=3,
        precision="no",
    )
    (row,) = diagnose(config)["students"]
    wanted = _definition(folder, store, 10, seed=3)
    _close(row["teacher_history"], wanted["teacher_history"])
    _close(row["own_history"], wanted["own_history"])
    assert [entry["size"] for entry in row["perturbed"]] == [*_SIZES]
    for k, entry in enumerate(row["perturbed"]):
        assert entry["steps"] == list(range(2, steps + 1))
        _close(entry["error"], wanted["perturbed"][k, :, 1:])
        _close(entry["gain"], wanted["gain"][k, :, 1:])
    # The excess has the standard error of the differences, not that of two independent means.
    excess = wanted["own_history"] - wanted["teacher_history"]
    assert row["excess"]["mean"] == pytest.approx(excess.mean(0).tolist(), abs=1e-6)
    assert row["excess"]["sem"] == pytest.approx((excess.std(0) / 10**0.5).tolist(), abs=1e-6)


def test_before_the_first_step_there_is_no_history_of_ones_own(
    student: Path, store: TrajectoryStore, tmp_path: Path
) -> None:
    """The first state is the noise, whoever looks: teacher forced and rolled out are one there, and differ
    from then on."""
    config = DiagnoseConfig((student,), store.folder, tmp_path / "out", samples=8, precision="no")
    (row,) = diagnose(config)["students"]
    forced, own = row["teacher_history"]["mean"], row["own_history"]["mean"]
    assert own[0] == pytest.approx(forced[0], rel=1e-6)
    assert all(abs(a - b) > 1e-3 * b for a, b in zip(own[1:], forced[1:], strict=True))


@pytest.mark.parametrize("variants", [0, 1, 3])
def test_perturbed_passes_leave_the_path_alone(student: Path, store: TrajectoryStore, variants: int) -> None:
    """Bit for bit the path of `sample`: no perturbation stays in the cache."""
    model, _ = load_student(student)
    states, labels = store.states(torch.arange(6), store.grid(4), "x0")
    perturbations = 100 * torch.randn(6, variants, 3, 1, 28, 28)
    path, perturbed = perturbed_rollout(model, states[:, 0], labels, perturbations)
    assert torch.equal(path, ard.sample(model, states[:, 0], labels))
    for variant in range(variants):
        assert (perturbed[:, variant] - path[:, 1:]).flatten(2).norm(dim=2).gt(1e-3).all()


def test_a_student_that_looks_at_nothing(make: Make, store: TrajectoryStore, tmp_path: Path) -> None:
    """It predicts zero: every error is the mean square of the teacher's state, no bias, no gain."""
    config = DiagnoseConfig((make("blank", blank=True),), store.folder, tmp_path / "out")
    (row,) = diagnose(config)["students"]
    states, _ = store.states(torch.arange(len(store)), store.grid(4), "x0")
    power = states[:, 1:].double().square().mean((0, 2, 3, 4)).tolist()
    assert row["teacher_history"]["mean"] == pytest.approx(power)
    assert row["own_history"]["mean"] == pytest.approx(power)
    assert row["excess"] == {"mean": [0] * 4, "sem": [0] * 4}
    for entry in row["perturbed"]:
        assert entry["error"]["mean"] == pytest.approx(power[1:])
        assert entry["gain"] == {"mean": [0] * 3, "sem": [0] * 3}


def test_perturbations_are_not_the_noise_of_the_samples(
    make: Make, store: TrajectoryStore, tmp_path: Path
) -> None:
    """With the seed of the trajectories, too, they are independent of what the sample started from."""
    seen = []

    def spy(student: ARDTransformer, noise: Tensor, labels: Tensor, perturbations: Tensor) -> Any:
        seen.append((noise, perturbations))
        return perturbed_rollout(student, noise, labels, perturbations)

    config = DiagnoseConfig((make("a"),), store.folder, tmp_path / "out", sizes=(1.0,), seed=0)
    assert config.seed == store.manifest["seed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ard.diagnosis.perturbed_rollout", spy)
        diagnose(config)
    ((noise, perturbations),) = seen
    for step in range(3):
        directions = perturbations[:, 0, step]
        # 44 samples of 784 elements: a correlation of independent ones is 0 +- 0.0054.
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), directions.flatten()]))[0, 1]) < 0.025
        assert float(directions.square().mean()) == pytest.approx(1, abs=0.04)


def test_files_and_table_hold_what_was_measured(
    make: Make, store: TrajectoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Students of different S side by side, named by what differs; the curves in the picture are theirs."""
    folders = (make("a", history_layers=0), make("b", 2, "xt", history_layers=1), make("c", 1),
               make("d", history_layers=0))  # fmt: skip
    out = tmp_path / "out"
    report = diagnose(DiagnoseConfig(folders, store.folder, out, samples=12, sizes=_SIZES))
    assert {path.name for path in out.iterdir()} == {"diagnosis.json", "diagnosis.png"}
    assert json.loads((out / "diagnosis.json").read_text()) == report
    rows = report["students"]
    same = "N=0 (step distillation), S=4, x0 states, "
    assert [row["name"] for row in rows] == [
        f"{same}{folders[0]}", "N=1 causal, S=2, xt states", "KD, S=1, x0 states", f"{same}{folders[3]}"
    ]  # fmt: skip
    assert not any(row["trained_with_the_same_noise"] for row in rows)

    figure = _picture(report)
    errors, excess, gains, final = figure.axes

    def drawn(axes: Any, x: list[float], y: list[float]) -> bool:
        return any(
            np.array_equal(line.get_xdata(), x) and np.array_equal(line.get_ydata(), y) for line in axes.lines
        )

    for row, at in zip(rows, ([0.25, 0.5, 0.75, 1], [0.5, 1], [1], [0.25, 0.5, 0.75, 1]), strict=True):
        assert drawn(errors, at, row["teacher_history"]["mean"])
        assert drawn(errors, at, row["own_history"]["mean"])
        assert drawn(excess, at, row["excess"]["mean"])
        if row["steps"] > 1:
            small, large = reversed(row["perturbed"])
            for entry in (small, large):
                assert drawn(gains, at[1:], entry["gain"]["mean"])
            ends = [row["own_history"], small["error"], large["error"]]
            assert drawn(final, [0, 0.1, 0.3], [values["mean"][-1] for values in ends])
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {row["name"] for row in rows}
    with Image.open(out / "diagnosis.png") as picture:
        assert np.asarray(picture).std() > 10  # something is drawn

    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(rows[1]["name"])
    means = [f"{value:.4f}" for value in rows[1]["own_history"]["mean"]]
    assert lines[start + 2].split()[:2] == ["own", "history"]
    assert lines[start + 2].split()[2::2] == means
    # A gain stands under the step that it belongs to.
    (gain,) = (
        line for line in lines[start : lines.index(rows[2]["name"])] if "gain" in line and "0.3" in line
    )
    assert gain.index(f"{rows[1]['perturbed'][0]['gain']['mean'][0]:.4f}") > lines[1].index("step 1")
    assert not any("held-out" in line for line in lines)


def test_names_and_training_noise_are_said(
    student: Path, store: TrajectoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = diagnose(DiagnoseConfig((student,), store.folder, tmp_path / "out", names=("mine",), samples=4))
    (row,) = report["students"]
    assert row["name"] == "mine"
    assert row["trained_with_the_same_noise"]
    print_report(report)
    assert "mine: was trained from noise of the same seed" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"students": ()}, r"students are \[\], accepted are one or more"),
     ({"students": ("a", "b", "a")}, "accepted are one or more folders, each once"),
     ({"names": ("x",)}, r"names are \('x',\), accepted are 2 different ones"),
     ({"names": ("x", "x")}, "accepted are 2 different ones"),
     ({"sizes": ()}, r"sizes are \(\), accepted are one or more numbers > 0"),
     ({"sizes": (0.1, 0.0)}, r"sizes are \(0.1, 0.0\)"),
     ({"sizes": (float("nan"),)}, r"sizes are \(nan,\)"),
     ({"samples": 1}, r"samples is 1, accepted are 2\.\.44"),
     ({"samples": 45}, r"samples is 45, accepted are 2\.\.44"),
     ({"batch_size": 0}, "batch_size is 0, accepted"),
     ({"seed": -1}, "seed is -1, accepted"),
     ({"out": "a/config.json"}, "a file; accepted is a folder")],
)  # fmt: skip
def test_bad_arguments_are_named(
    make: Make, store: TrajectoryStore, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = DiagnoseConfig((make("a"), make("b", history_layers=0)), store.folder, tmp_path / "out")
    paths: dict[str, Any] = {}
    if "students" in change:
        paths["students"] = tuple(tmp_path / name for name in change["students"])
    if "out" in change:
        paths["out"] = tmp_path / change["out"]
    with pytest.raises(ValueError, match=message):
        diagnose(replace(config, **{**change, **paths}))
    assert not (tmp_path / "out").exists()


def test_a_student_of_another_teacher_is_refused(make: Make, recording: RecordConfig, tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", tiny_teacher(5), Diffusion("linear", "v"))
    other = replace(recording, teacher=tmp_path / "teacher", out=tmp_path / "store", samples=8)
    record(other)
    with pytest.raises(ValueError, match=r"was recorded from another teacher than that of .*/a$"):
        diagnose(DiagnoseConfig((make("a"),), other.out, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_predictions_that_are_not_finite_are_refused(
    make: Make, store: TrajectoryStore, tmp_path: Path
) -> None:
    good, bad = make("good"), make("bad")
    model, trained = load_student(bad)
    with torch.no_grad():
        model.final_layers[3].linear.weight.fill_(3e38)  # type: ignore[union-attr, operator]
    save_student(bad, model, trained)
    with pytest.raises(ValueError, match=r"/bad: the student's predictions are not finite"):
        diagnose(DiagnoseConfig((good, bad), store.folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
