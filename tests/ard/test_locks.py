"""Two processes never write to one folder, and a folder is never left locked."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from ard import locks
from ard.distilling import DistillConfig, distill
from ard.locks import acquire, release
from ard.recording import RecordConfig, record
from ard.training import Optimisation

_HOLD = (
    "import time; from pathlib import Path; from ard.locks import acquire; acquire(Path({!r}), {}); "
    "print('held', flush=True); time.sleep(60)"
)


def _holder(folder: Path, rank: int = 0) -> subprocess.Popen[str]:
    """A process that has the lock."""
    command = [sys.executable, "-c", _HOLD.format(str(folder), rank)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    process = _holder(tmp_path / "out")
    yield tmp_path / "out"
    process.kill()
    process.wait()


def test_a_second_process_is_refused_in_one_line_and_changes_nothing(
    held: Path, recording: RecordConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in held.iterdir()}
    o = Optimisation(iterations=1, batch_size=4)
    config = DistillConfig(recording.teacher, held, recording.out, history_layers=2, optimisation=o)
    for start in (lambda: record(replace(recording, out=held)), lambda: distill(config)):
        with pytest.raises(ValueError, match=rf"^{held}: is in use by process \d+ on .* since .*;") as error:
            start()
        assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in held.iterdir()} == before


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    process = _holder(tmp_path)
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on"):
        acquire(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    acquire(tmp_path)
    assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    release(tmp_path)
    assert not any(tmp_path.iterdir())


def test_ranks_of_one_job_share_a_folder_and_each_has_one_process(tmp_path: Path) -> None:
    process = _holder(tmp_path, rank=1)
    acquire(tmp_path, 0)
    acquire(tmp_path, 0)  # of this process already
    with pytest.raises(ValueError, match="in use"):
        acquire(tmp_path, 1)
    release(tmp_path, 0)
    process.kill()
    process.wait()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder removes the file after it was opened here: a lock on that file would keep nobody off."""
    path, lock, calls = tmp_path / ".lock", locks._lock, []

    def late(file: IO[str]) -> int | None:
        if not calls:
            path.unlink()
        calls.append(file)
        return lock(file)

    monkeypatch.setattr(locks, "_lock", late)
    acquire(tmp_path)
    assert len(calls) == 2
    assert os.path.samestat(path.stat(), os.fstat(calls[1].fileno()))
    release(tmp_path)


def test_a_file_system_without_locks_is_said_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_lock", lambda file: errno.ENOLCK)
    with pytest.warns(UserWarning, match=f"{tmp_path}: no file locks there"):
        acquire(tmp_path)
    release(tmp_path)


def test_a_run_lets_others_in_when_it_has_ended_or_failed(recording: RecordConfig, tmp_path: Path) -> None:
    config = DistillConfig(
        recording.teacher, tmp_path / "out", recording.out, history_layers=2,
        optimisation=Optimisation(iterations=1, batch_size=4, precision="no"),
    )  # fmt: skip
    distill(config)
    assert not (tmp_path / "out" / ".lock").exists()
    with pytest.raises(ValueError, match="steps was 4, is 2"):
        distill(replace(config, steps=2))
    assert not (tmp_path / "out" / ".lock").exists()
    assert not [path for path in locks._held if path.is_relative_to(tmp_path)]


def test_two_recordings_at_once_leave_a_whole_store(recording: RecordConfig, tmp_path: Path) -> None:
    """Started together: one records, the other says so; the files are those of one alone."""
    command = [
        sys.executable, "-m", "ard", "record", "--teacher", str(recording.teacher), "--out",
        str(tmp_path / "out"), "--samples", str(recording.samples), "--shard-size", str(recording.shard_size),
        "--batch-size", str(recording.batch_size), "--precision", "no",
    ]  # fmt: skip
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    for process, words in zip(both, said, strict=True):
        if process.returncode:  # where the first had ended before the second began, both succeed
            assert process.returncode == 1
            assert "is in use by process" in words.splitlines()[-1]
    assert 0 in [process.returncode for process in both]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in recording.out.iterdir()
    }
