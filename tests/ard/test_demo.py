"""The demo from end to end, and the embedded students that its report has beside its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from ard.assets import ASSETS
from ard.checkpoints import load_student, read_json
from ard.demo import DemoConfig, _embedded, _seconds, demo


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ard.demo._seconds", partial(_seconds, repeats=1)
        )  # 50 samples of the teacher take long
        demo(DemoConfig(folder, iterations=4, samples=24, held_out=200, curve_points=1))
    return folder


def test_the_report_has_every_picture_and_row(out: Path) -> None:
    report, result = (out / "report.html").read_text(), read_json(out / "demo.json")
    assert report.count("data:image/png;base64,") == len([*(out / "pictures").iterdir()]) == 7
    assert len(result["rows"]) == 8
    assert all(row["name"] in report for row in result["rows"])
    assert all(f"{row['frechet']:.2f}" in report for row in result["rows"])


def test_ours_starts_as_the_teachers_solver_and_the_published_recipe_elsewhere(out: Path) -> None:
    """After 4 iterations without warm-up: near the untrained solver; direct heads are far from anything."""
    result = read_json(out / "demo.json")
    rows = {row["name"]: row for row in result["rows"]}
    untrained = rows["solver, untrained"]
    for name in ("ours, no history", "ours, history (N=8)"):
        assert rows[name]["errors"][-1] < 2 * untrained["errors"][-1]
        assert [point["step"] for point in result["curves"][name]] == [0, 4]
        assert result["curves"][name][0]["errors"] == untrained["errors"]
        assert rows[name]["training_seconds"] > 0
    assert rows["published recipe, ARD (N=8)"]["errors"][-1] > 5 * untrained["errors"][-1]
    student, trained = load_student(out / "ours-history" / "student")
    assert (student.head, trained["grid"], trained["state"]) == ("solver", result["grid"], "xt")
    published, trained = load_student(out / "published" / "student")
    assert (published.head, published.history_gates, trained["state"]) == ("direct", None, "x0")
    assert trained["grid"] == [25, 15, 10, 5, 0]


def test_the_embedded_students_show_what_history_and_gan_do(out: Path) -> None:
    """200 samples make every distance larger, and leave the order."""
    rows = {row["name"]: row for row in read_json(out / "demo.json")["rows"]}
    plain, ard, gan = (rows[f"{name}, embedded"] for name in
                       ("step distillation (N=0)", "ARD (N=2)", "ARD (N=2) + GAN"))  # fmt: skip
    assert gan["frechet"] + 3 < ard["frechet"] < plain["frechet"] - 5
    assert ard["errors"][-1] < plain["errors"][-1] / 3


def test_the_embedded_students_are_what_they_are_called() -> None:
    layers = {"step-distillation": 0, "ard": 2, "ard-gan": 2}
    assert {folder.name for folder in (ASSETS / "students").iterdir()} == set(layers)
    for name, count in layers.items():
        student, trained = load_student(ASSETS / "students" / name)
        assert (student.steps, student.history_layers, student.mask) == (4, count, "causal")
        assert (trained["seed"], trained["samples"], trained["state"]) == (0, 40_000, "x0")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"history_layers": 9}, r"history_layers is 9, accepted are 1\.\.8"),
        ({"history_layers": 0}, r"history_layers is 0, accepted are 1\.\.8"),
        ({"held_out": 3}, "held_out is 3, accepted is an integer >= 4"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_made(
    option: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"demo: {message}"):
        demo(DemoConfig(tmp_path / "demo", **option))  # type: ignore[arg-type]
    assert not (tmp_path / "demo").exists()


def test_another_teacher_has_no_embedded_students(tmp_path: Path) -> None:
    copy = tmp_path / "teacher"
    copy.mkdir()
    for file in (ASSETS / "teacher").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert len(_embedded(DemoConfig(teacher=copy))) == 3
    assert not _embedded(DemoConfig(teacher=copy, steps=2))
    (copy / "model.safetensors").write_bytes(b"another")
    assert not _embedded(DemoConfig(teacher=copy))
