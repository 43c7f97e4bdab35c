"""The files of `ard sample` are the same from any number of processes, in memory that does not grow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ard import precision, sampling
from ard.checkpoints import save_student
from ard.models import ARDTransformer, DiT
from ard.sample_files import write_npz
from ard.sampling import SampleConfig, run

# A shard and a half per process of four.
_SAMPLES, _BATCH = 45, 8


def _command(student: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "ard", "sample", "--student", str(student), "--out", str(out), "--samples",
        str(_SAMPLES), "--batch-size", str(_BATCH), "--precision", "no",
    ]  # fmt: skip


def _process(student: Path, out: Path, rank: int = 0, world: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
    return subprocess.Popen(
        _command(student, out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _assert_same(out: Path, wanted: Path) -> None:
    for name in ("samples.npz", "samples.png"):
        assert (out / name).read_bytes() == (wanted / name).read_bytes(), name
    assert sorted(path.name for path in out.iterdir()) == ["sample.json", "samples.npz", "samples.png"]


@pytest.fixture(scope="module")
def alone(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    run(SampleConfig(student, out, samples=_SAMPLES, batch_size=_BATCH, precision="no"))
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_the_bytes_are_the_same_from_any_number_of_processes(
    world: int, student: Path, alone: Path, tmp_path: Path
) -> None:
    processes = [_process(student, tmp_path / "out", rank, world) for rank in range(world)]
    for process in processes:
        assert process.wait(120) == 0, process.communicate()[1]
    _assert_same(tmp_path / "out", alone)


def test_killed_processes_go_on_with_another_number(student: Path, alone: Path, tmp_path: Path) -> None:
    """SIGKILL at the first part of two processes; one of them alone leaves the rest and says so; then one."""
    out = tmp_path / "out"
    processes = [_process(student, out, rank, 2) for rank in range(2)]
    while not [*out.glob(".parts-*/*.sha256")]:
        assert any(process.poll() is None for process in processes)
        time.sleep(0.001)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "samples.npz").exists()
    half = _process(student, out, 1, 2)
    said, _ = half.communicate(timeout=120)
    assert half.returncode == 0
    assert "rank 1: done;" in said
    assert "parts are other processes'" in said
    assert not (out / "samples.npz").exists()
    whole = _process(student, out)
    assert whole.wait(120) == 0, whole.communicate()[1]
    _assert_same(out, alone)


def test_other_options_start_anew_and_clear_what_was_left(student: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = SampleConfig(student, out, samples=_SAMPLES, batch_size=_BATCH, precision="no")
    with pytest.MonkeyPatch.context() as patch:
        real, calls = sampling.sample, iter(range(3))

        def stopped(*given: torch.Tensor) -> torch.Tensor:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return real(*given)  # type: ignore[arg-type]

        patch.setattr(sampling, "sample", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(replace(config, seed=5))
    assert len([*out.glob(".parts-*/*.sha256")]) == 2
    run(config)
    _assert_same(out, alone)
    run(config)  # again: from the start, to the same bytes
    _assert_same(out, alone)


def test_a_damaged_part_is_made_again(student: Path, alone: Path, tmp_path: Path) -> None:
    """Of a killed call: bytes that changed on the disk do not get into the result."""
    process = _process(student, tmp_path / "out", 0, 2)  # makes every other part
    assert process.wait(120) == 0
    part = sorted((tmp_path / "out").glob(".parts-*/*.safetensors"))[1]
    data = bytearray(part.read_bytes())
    data[-5] ^= 1
    part.write_bytes(data)
    run(SampleConfig(student, tmp_path / "out", samples=_SAMPLES, batch_size=_BATCH, precision="no"))
    _assert_same(tmp_path / "out", alone)


def test_samples_that_move_to_another_kind_of_machine_keep_their_precision(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed where bf16 is fast, or shared with a process of another kind: bf16 to the end, and said."""
    wanted = SampleConfig(student, tmp_path / "wanted", samples=12, batch_size=4, precision="bf16")
    run(wanted)
    moved = replace(wanted, out=tmp_path / "moved", precision="auto")
    monkeypatch.setattr(precision, "prefers_bf16", lambda device: (True, "so says the test"))
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")  # one of two: it makes every other part
        run(moved)
    assert not (moved.out / "samples.npz").exists()
    monkeypatch.setattr(precision, "prefers_bf16", lambda device: (False, "so says the test"))
    capsys.readouterr()
    run(moved)
    assert "precision stays 'bf16', begun so" in capsys.readouterr().out
    _assert_same(moved.out, wanted.out)
    found = json.loads((moved.out / "sample.json").read_text())["precision"]
    assert (found["asked"], found["resolved"]) == ("auto", "bf16")


def test_numpy_reads_what_is_written_in_parts(tmp_path: Path) -> None:
    """Values, shapes and dtypes, of parts of unequal length that are no contiguous memory."""
    wanted = torch.arange(7 * 3 * 4).reshape(7, 4, 3).transpose(1, 2)
    for dtype in (torch.uint8, torch.float32):
        x = wanted.to(dtype)
        write_npz(tmp_path / "x.npz", iter(x.split([3, 3, 1])), 7, torch.arange(7))
        with np.load(tmp_path / "x.npz") as found:
            assert set(found) == {"arr_0", "labels"}
            assert found["arr_0"].dtype == x.numpy().dtype
            assert np.array_equal(found["arr_0"], x.numpy())
            assert found["labels"].tolist() == [*range(7)]
            assert found["labels"].dtype == np.int64


def test_an_error_in_the_middle_leaves_no_file(tmp_path: Path) -> None:
    def parts() -> Iterator[torch.Tensor]:
        yield torch.zeros(2, 3)
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        write_npz(tmp_path / "x.npz", parts(), 4, torch.arange(4))
    assert not any(tmp_path.iterdir())


def picture_student(folder: Path, side: int = 256) -> Path:
    """As cheap as a student of pictures gets: one token per picture, one step."""
    torch.manual_seed(0)
    teacher = DiT(side, side, 3, width=4, depth=1, heads=1, num_classes=10, learn_sigma=False)
    save_student(folder / "student", ARDTransformer.from_teacher(teacher, 1, 0), {})
    return folder / "student"


def test_memory_holds_a_batch_and_not_the_result(tmp_path: Path) -> None:
    """850 more pictures of 256 x 256 are 167 MB, of which the peak must not show two thirds."""
    peaks = []
    student = picture_student(tmp_path)
    code = (
        "import resource, sys; from ard.cli import main; main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    for count in (150, 1000):
        command = [
            sys.executable, "-c", code, "sample", "--student", str(student), "--out",
            str(tmp_path / str(count)), "--samples", str(count), "--batch-size", "50", "--precision", "no",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        scale = 1024 if sys.platform == "linux" else 1  # kilobytes there, bytes on macOS
        peaks.append(int(done.stdout.split()[-1]) * scale)
        with np.load(tmp_path / str(count) / "samples.npz") as found:
            assert found["arr_0"].shape == (count, 256, 256, 3)
    assert peaks[1] - peaks[0] < 110e6, peaks
