"""What a result says of where it comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ard.runs import versions
from ard_kernels import machine


def test_a_result_names_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a repository of its own; one that merely holds the environment it is installed in is another's."""
    monkeypatch.setattr(machine, "ROOT", tmp_path / "own")
    (tmp_path / "own").mkdir()
    assert versions()["commit"] == "no repository"

    def git(*words: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert versions()["commit"] == "no repository"
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    commit = machine.git("rev-parse", "HEAD")
    assert commit is not None
    assert len(commit) == 40
    assert versions()["commit"] == commit
    (tmp_path / "file").write_text("x")
    git("add", "file")
    assert versions()["commit"] == f"{commit}-dirty"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.git("rev-parse", "HEAD") is None
