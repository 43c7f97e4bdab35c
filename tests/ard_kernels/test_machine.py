"""What a result says of where it comes from, and which precision is fast there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from ard.runs import versions
from ard_kernels import machine
from ard_kernels.__main__ import main


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


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "limit", "wanted", "reason"),
    [
        (False, False, None, False, "neither AVX512-BF16 nor AMX"),
        (False, True, None, True, "has AVX512-BF16"),
        (True, True, None, True, "has AMX"),
        (True, True, "avx2", False, "ONEDNN_MAX_CPU_ISA is avx2"),
        (True, True, "AVX512_CORE_VNNI", False, "ONEDNN_MAX_CPU_ISA is AVX512_CORE_VNNI"),
        (True, True, "avx512_core_bf16", True, "has AMX"),
    ],
)
def test_bf16_is_preferred_where_a_processor_multiplies_it(
    amx: bool, avx512_bf16: bool, limit: str | None, wanted: bool, reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    for variable in machine._ONEDNN_LIMITS:
        monkeypatch.delenv(variable, raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    found, said = machine.prefers_bf16(torch.device("cpu"))
    assert found == wanted
    assert reason in said


@pytest.mark.parametrize(("capability", "wanted"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_is_preferred_on_gpus_that_multiply_it(
    capability: tuple[int, int], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found, said = machine.prefers_bf16(torch.device("cuda"))
    assert found == wanted
    assert f"compute capability {capability[0]}.{capability[1]} has" in said


def test_the_overview_says_which_precision_is_fast(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    faster, reason = machine.prefers_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert f"precision: {'bf16' if faster else 'float32'} on " in (said := capsys.readouterr().out)
    assert reason in said
