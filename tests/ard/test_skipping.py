"""Faults put into single steps of training: no folder holds a value that is not finite, and all go on."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from faults import Fault, train
from safetensors.numpy import load_file

from ard.distilling import DistillConfig, HistoryStart
from ard.finetuning import FinetuneConfig
from ard.recording import RecordConfig
from ard.runs import read_log
from ard.training import Optimisation

_SHORT = Optimisation(
    iterations=12, batch_size=8, lr=1e-3, ema=0.9, precision="no", log_every=1, checkpoint_every=1,
    keep_checkpoints=99, sample_every=0, lr_schedule="constant",
)  # fmt: skip
_WARMUP = 3  # steps of the GAN stage without a gradient for the student


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} in a log")


def _check_finite(folder: Path) -> None:
    """Every number in it, read by other code than ours."""
    files = [*folder.rglob("*.safetensors")]
    assert files
    for file in files:
        for name, value in load_file(file).items():
            assert np.isfinite(value).all(), (file, name)
    for file in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(line, parse_constant=_no_constant)
    assert not [*folder.rglob("*.tmp")]


def _checkpoint(out: Path, step: int) -> dict[str, np.ndarray]:
    folder = out / "checkpoints" / f"step-{step:08d}"
    return {
        f"{file.stem}/{name}": value
        for file in folder.glob("*.safetensors")
        if file.stem in ("model", "ema", "optimiser")
        for name, value in load_file(file).items()
    }


def _moved(out: Path, step: int) -> set[str]:
    """What a step changed, except the vectors of the spectral norms, which follow the weights."""
    before, after = _checkpoint(out, step - 1), _checkpoint(out, step)
    return {
        name for name, value in after.items()
        if name not in before or before[name].tobytes() != value.tobytes()
        if not name.endswith(("weight.0._u", "weight.0._v"))
    }  # fmt: skip


def _result(out: Path, last: int) -> dict[str, bytes]:
    files = [out / "log.jsonl", *(out / "checkpoints" / f"step-{last:08d}").iterdir()]
    files += [path for name in ("student", "teacher") for path in (out / name).glob("*")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def _stop_after(out: Path, step: int) -> None:
    for path in (out / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "student")


def _check_case(config: Any, fault: Fault, lead: bool = True) -> None:
    """One run with one fault; once more with the same fault, from the start or from a step before or after
    the fault; then for longer without it.

    Args:
        lead: whether this process looks at the folder, as one of several.
    """
    wait, (step,) = PartialState(cpu=True).wait_for_everyone, fault.steps
    last, out = config.optimisation.iterations, config.out
    train(config, fault)
    wait()
    whole = _result(out, last)
    if lead:
        _check_finite(out)
        if step > 1:
            assert _moved(out, step) == set()
            # A step from the same state as the last, on other samples: Adam's counts go on by one.
            if step < last:
                assert any(n.endswith(".step") for n in _moved(out, step + 1))
                assert any(n.startswith("model/") for n in _moved(out, step + 1))
        log = read_log(out)
        overflow = config.optimisation.precision == "fp16" and fault.kind == "gradient"
        assert [line.get("skipped", 0) for line in log] == [
            int(i >= step and not overflow) for i in range(1, last + 1)
        ]
        assert (log[step - 1]["loss"] is None) == (fault.kind != "gradient")
    wait()
    if lead:
        _stop_after(out, (0, step - 1, min(step, last - 1))[step % 3])
    wait()
    train(config, fault)
    wait()
    assert _result(out, last) == whole
    train(replace(config, optimisation=replace(config.optimisation, iterations=last + 1)), None)
    wait()
    if lead:
        _check_finite(out)
        assert len(_moved(out, last + 1)) > 10
        shutil.rmtree(out)
    wait()


@pytest.fixture(scope="module")
def regression(recording: RecordConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a step left out, which no run that starts from it may count."""
    out = tmp_path_factory.mktemp("regression") / "run"
    o = replace(_SHORT, iterations=2)
    train(DistillConfig(recording.teacher, out, recording.out, history_layers=2, optimisation=o), Fault((2,)))
    AcceleratorState._reset_state()
    return out


def _config(stage: str, recording: Any, regression: Path, out: Path, o: Optimisation) -> Any:
    if stage == "distill":
        start: HistoryStart | None = "open" if o.precision == "fp16" else None
        return DistillConfig(
            recording.teacher, out, recording.out, history_layers=2, history_start=start, optimisation=o
        )
    return FinetuneConfig(
        recording.teacher, regression, "digits", out, recording.out, gan_warmup=_WARMUP, history="teacher",
        optimisation=o,
    )  # fmt: skip


_PRECISIONS = {"distill": ("no", "bf16", "fp16"), "finetune": ("no", "tf32", "bf16")}
_VALUES = (math.nan, math.inf, -math.inf)


def _cases(stage: str, precision: str, processes: int, steps: range) -> list[dict[str, Any]]:
    """A fault in the gradient of every step, and in the loss as well of every third."""
    cases = []
    for step in steps:
        learns = stage == "finetune" and step > _WARMUP and step % 2
        part = "" if stage == "distill" else "student." if learns else "discriminator."
        for kind in ("gradient", "both") if step % 3 == 0 else ("gradient",):
            value = _VALUES[step // 3 % 3] if kind == "both" else math.nan
            fault = Fault((step,), kind, value, rank=step % processes, part=part)
            cases.append({"stage": stage, "precision": precision, "fault": asdict(fault)})
    return cases


def _in_two_processes(
    cases: list[dict[str, Any]], recording: RecordConfig, regression: Path, out: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folders = {
        "teacher": recording.teacher,
        "trajectories": recording.out,
        "regression": regression,
        "out": out,
    }
    task = out / "task.json"
    task.write_text(json.dumps({"cases": cases, "folders": {k: str(v) for k, v in folders.items()}}))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run(
        [sys.executable, *launch, __file__, task], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-6000:]


def _work(task: Path) -> None:
    """What each of two processes does."""
    given = json.loads(task.read_text())
    folders = {name: Path(path) for name, path in given["folders"].items()}
    recording = RecordConfig(folders["teacher"], folders["trajectories"])
    lead = PartialState(cpu=True).is_main_process
    for i, case in enumerate(given["cases"]):
        o = replace(_SHORT, precision=case["precision"], batch_size=16, **case.get("options", {}))
        config = _config(case["stage"], recording, folders["regression"], folders["out"] / str(i), o)
        fault = Fault(**{**case["fault"], "steps": tuple(case["fault"]["steps"])})
        _check_case(config, fault, lead)
    torch.distributed.destroy_process_group()


def _check_matrix(cases: list[dict[str, Any]], recording: Any, regression: Path, out: Path) -> None:
    for i, case in enumerate(cases):
        o = replace(_SHORT, precision=case["precision"], **case.get("options", {}))
        config = _config(case["stage"], recording, regression, out / str(i), o)
        _check_case(config, Fault(**case["fault"]))


@pytest.mark.parametrize("precision", range(3))
@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_a_fault_leaves_its_step_out(
    recording: RecordConfig, regression: Path, tmp_path: Path, stage: str, precision: int
) -> None:
    """A diagonal of the matrix."""
    step = {"distill": (1, 6, 12), "finetune": (12, 3, 7)}[stage][precision]
    cases = _cases(stage, _PRECISIONS[stage][precision], 1, range(step, step + 1))
    _check_matrix(cases[-1:], recording, regression, tmp_path)


def test_a_fault_of_one_process_leaves_the_step_of_both_out(
    recording: RecordConfig, regression: Path, tmp_path: Path
) -> None:
    cases = _cases("finetune", "bf16", 2, range(7, 8))
    # The loss of one process, with finite gradients on both; in one pass of two.
    accumulated = Fault((5,), "loss", rank=1, call=0)
    cases.append({
        "stage": "distill", "precision": "no", "fault": asdict(accumulated), "options": {"accumulate": 2}
    })  # fmt: skip
    _in_two_processes(cases, recording, regression, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("precision", range(3))
@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_a_fault_in_any_step_leaves_it_out(
    recording: RecordConfig, regression: Path, tmp_path: Path, stage: str, precision: int, processes: int
) -> None:
    cases = _cases(stage, _PRECISIONS[stage][precision], processes, range(1, 13))
    check: Callable[..., None] = _check_matrix if processes == 1 else _in_two_processes
    check(cases, recording, regression, tmp_path)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
