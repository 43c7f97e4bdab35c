"""Every command that runs a network takes --precision, and its network computes in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ard import sampling
from ard.diagnosis import DiagnoseConfig, diagnose
from ard.evaluation import EvaluateConfig, evaluate
from ard.models.dit import DiTBlock
from ard.training import DistillConfig, Optimisation, distill
from ard.trajectories import RecordConfig, record

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
    for precision in ("no", "tf32", "bf16"):
        sampling.run(
            sampling.SampleConfig(student, tmp_path / precision, samples=6, latents=True, precision=precision)  # type: ignore[arg-type]
        )
        made.append(np.load(tmp_path / precision / "samples.npz")["arr_0"])
    for one, other in itertools.combinations(made, 2):
        assert np.abs(one - other).max() < 0.1 * np.abs(one).max()
    assert not np.array_equal(made[0], made[2])
    assert {x.dtype for x in made} == {np.dtype("float32")}
