"""The suite as it runs on a CPU, on tiny shapes, and what it does when something is wrong."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ard_kernels import BlockLayout, reference
from ard_kernels.backends import attention_eager
from benchmarks import gpu_suite
from benchmarks.suite import attention, correctness, sections
from benchmarks.suite.record import Recorder, Settings
from benchmarks.suite.report import best_of
from benchmarks.suite.sections import SECTIONS, run


def _suite(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    code = gpu_suite.main(["--out", str(out), "--device", "cpu", *options])
    return code, json.loads((out / "gpu_suite.json").read_text())


@pytest.mark.usefixtures("eager_only")
def test_a_reduced_run_measures_everything(tmp_path: Path) -> None:
    code, results = _suite(tmp_path, "--commit", "abc")
    assert code == 0
    assert results["environment"]["commit"] == "abc"
    assert list(results["sections"]) == list(SECTIONS)
    for name, section in results["sections"].items():
        assert section["rows"], name
        assert not section["failures"]
        assert not section["omitted"]
    rows = {name: section["rows"] for name, section in results["sections"].items()}
    assert len(rows["correctness"]) == len(correctness.cases(quick=True))
    assert {row["name"] for row in rows["ceilings"]} == {"copy", "matmul"}
    wide = [row for row in rows["attention"] if row["shape"]["dtype"] == "float32"]
    assert [(row["phase"], set(row["times"]), row["ratio"]) for row in wide] == [
        (phase, {"ours (eager)"}, None) for phase in attention.PHASES
    ]
    for row in rows["attention"]:
        if row in wide:
            continue
        assert {"ours (eager)", "sdpa flash", "sdpa dense mask"} <= set(row["times"])
        for measured in row["times"].values():
            assert set(measured) == {"ms", "host_ms", "spread", "tflops", "percent"}
            assert min(measured["ms"], measured["tflops"], measured["percent"]) > 0
        best = min(t["ms"] for name, t in row["times"].items() if not name.startswith("ours"))
        assert row["ratio"] == best / row["times"]["ours (eager)"]["ms"]
    # 4 Dh operations a visible pair, 2 x 16 x 16 + 16 x 16 pairs, 2 samples, 2 heads.
    first = rows["attention"][0]
    assert first["phase"] == "forward"
    time_of_ours = first["times"]["ours (eager)"]
    assert time_of_ours["tflops"] * time_of_ours["ms"] * 1e9 == pytest.approx(4 * 24 * 3 * 256 * 2 * 2)
    assert [row["phase"] for row in rows["adaln"]] == ["forward", "backward", "forward + backward"]
    assert {(row["side"], row["compiled"]) for row in rows["training"]} == {
        (side, compiled) for side in ("ours", "baseline") for compiled in (False, True)
    }
    assert {(row["batch"], row["kind"]) for row in rows["sampling"]} == {
        (1, "eager"), (2, "eager"), (2, "compiled"),
    }  # fmt: skip
    text = (tmp_path / "gpu_suite.md").read_text()
    for name in SECTIONS:
        assert f"## {name}\n" in text
    assert "could not run: B2 S2 L16 H2 Dh24 causal sdpa cudnn" in text
    assert not (tmp_path / "parts").exists()


@pytest.mark.usefixtures("eager_only")
@pytest.mark.parametrize("broken", ["attention_forward", "attention_backward"])
def test_a_wrong_kernel_makes_the_run_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    """The output, or dq, is one percent too large: an epsilon and a third in bfloat16, 84000 in float32."""
    right = getattr(attention_eager, broken)

    def wrong(q: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        first, *rest = right(q, *arguments)
        return (1.01 * first, *rest)

    monkeypatch.setattr(attention_eager, broken, wrong)
    code, results = _suite(tmp_path, "--only", "correctness")
    assert code == 1
    found = results["sections"]["correctness"]
    assert any("block_attention causal" in name for name in found["failures"])
    assert {row["case"].split()[0] for row in found["rows"]} >= {"gated_residual_adaln", "adaln"}
    assert "FAILED eager" in capsys.readouterr().out


@pytest.mark.usefixtures("eager_only")
def test_peers_that_fail_or_are_wrong_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> Tensor:
        q = arguments[-3]
        return torch.zeros_like(q) * q

    def failing(*_: Any) -> attention.Method:
        raise ImportError("no such thing")

    monkeypatch.setattr(attention, "_masked", wrong)
    monkeypatch.setattr(attention, "_flex", failing)
    code, results = _suite(tmp_path, "--only", "attention")
    found = results["sections"]["attention"]
    assert code == 0
    # In float32 our backends are compared with each other.
    assert {row["best_peer"] for row in found["rows"]} == {"sdpa flash", None}
    where = "B2 S2 L16 H2 Dh24 causal"
    assert "out is wrong: relative error 1.0e+00" in found["errors"][f"{where} sdpa dense mask forward"]
    assert "no such thing" in found["errors"][f"{where} flex 128"]


@pytest.mark.usefixtures("eager_only")
def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    code, results = _suite(tmp_path, "--seconds", "0")
    assert code == 0
    for name in ("correctness", "attention", "adaln", "training", "sampling"):
        assert results["sections"][name]["omitted"]
        assert not results["sections"][name]["rows"]


def test_a_section_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """In a process of its own, what it found so far is kept. Here it has not even imported PyTorch."""
    found = run("training", Settings("cpu", True), tmp_path, 60, time.monotonic() + 0.2, isolated=True)
    assert found["errors"] == {"process training": "was stopped at its time limit"}
    assert found["seconds"] < 30


def test_a_process_that_is_stopped_says_where_and_one_that_dies_fails(tmp_path: Path) -> None:
    path = tmp_path / "correctness-3.json"
    for end, kind in ((sections._STOPPED, "errors"), ("ended with exit code -11", "failures")):
        path.write_text(json.dumps({"rows": [{}], "omitted": [], "doing": "triton causal 72"}))
        found = sections._merged({"correctness-3": path}, {"correctness-3": end})
        assert found.pop(kind) == {"process correctness-3": f"{end}, in triton causal 72"}
        assert found.pop("rows") == [{}]
        assert not any(found.values())


def test_cases_that_take_long_come_first_and_only_while_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(correctness, "check", lambda case, *_: seen.append(case.thorough) or [])
    rec = Recorder("correctness", Settings("cpu", True), tmp_path / "x.json", 60)
    correctness.correctness(rec)
    assert seen == sorted(seen, reverse=True)
    assert {True, False} == set(seen)
    assert not rec.omitted
    assert json.loads((tmp_path / "x.json").read_text())["doing"] == ""
    monkeypatch.setattr(correctness, "with_backends", lambda cases, _: [(case, "eager") for case in cases])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    done = len(seen)
    rec = Recorder("correctness", Settings("cuda", True), tmp_path / "x.json", 20)
    correctness.correctness(rec)
    assert seen[done:]
    assert not any(seen[done:])
    (omitted,) = rec.omitted
    assert re.match(r"\d+ of \d+ cases, the first eager ", omitted)


def test_a_section_in_a_process_of_its_own_reports(tmp_path: Path) -> None:
    found = run("ceilings", Settings("cpu", True), tmp_path, 60, time.monotonic() + 60, isolated=True)
    assert {row["name"] for row in found["rows"]} == {"copy", "matmul"}
    assert not found["errors"]


def test_cudnn_gets_every_padding_where_that_is_asked_for() -> None:
    shape = attention.Shape(1, 2, 16, 1, 72)
    for every in (False, True):
        names = [c.name for c in attention.dense_candidates(shape, "causal", every)]
        for kind, pads in (("flash", (80, 96, 128)), ("cudnn", (80, 96, 128) if every else (128,))):
            wanted = [f"sdpa {kind}", *(f"sdpa {kind}, padded to {pad}" for pad in pads)]
            assert [name for name in names if name.startswith(f"sdpa {kind}")] == wanted


@pytest.mark.parametrize("mask", ["causal", "diagonal"])
def test_dense_calls_put_together_are_block_attention(mask: Any) -> None:
    """The peers that are decomposed by hand compute what they are compared for, gradients included."""
    layout = BlockLayout.uniform(3, 5)
    q, k, v, dout = torch.randn(4, 2, layout.total, 2, 8, dtype=torch.float64).unbind(0)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    method = (attention.PerBlock if mask == "causal" else attention.Folded)(dense, layout)
    exact = attention.Whole(lambda q, k, v: reference.block_attention(q, k, v, layout, mask))
    for got, wanted in zip(
        method.forward_backward(q, k, v, dout), exact.forward_backward(q, k, v, dout), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(method.forward(q, k, v), exact.forward(q, k, v))


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(),
    reason="Triton exists for Linux alone, and is not interpreted where there is a GPU: see -m gpu",
)
def test_triton_kernels_pass_in_the_interpreter() -> None:
    ragged = BlockLayout((3, 1, 6))
    for case in (
        correctness.attention_case(ragged, "causal", 24, torch.bfloat16, False, batch=1),
        correctness.cached_case(ragged, 2, "anchor", 24, torch.bfloat16, False),
        correctness.adaln_case("gated_residual_adaln", ragged, 64, (torch.bfloat16,) * 3, False),
    ):
        correctness.check(case, "triton", "cpu")


@pytest.mark.parametrize(
    ("script", "seconds", "where", "says"),
    [
        ("echo 40 cases run; echo ERROR SUMMARY: 0 errors", 60, "rows", "compute-sanitizer memcheck"),
        ("echo Invalid __global__ read; echo 40 cases run; echo ERROR SUMMARY: 2 errors", 60, "failures",
         "ERROR SUMMARY: 2 errors Invalid __global__ read"),
        ("echo Traceback; echo ERROR SUMMARY: 0 errors", 60, "failures", "ERROR SUMMARY: 0 errors"),
        ("echo Device not supported; echo ERROR SUMMARY: 1 error", 60, "errors", "does not work here"),
        ("sleep 60", 0, "omitted", "compute-sanitizer"),
    ],
)  # fmt: skip
def test_what_the_memory_checker_says_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, seconds: float, where: str, says: str
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    rec = Recorder("sanitizer", Settings("cuda", True), tmp_path / "x.json", seconds)
    correctness.sanitizer(rec)
    found = {"rows": rec.rows, "errors": rec.errors, "failures": rec.failures, "omitted": rec.omitted}
    assert says in str(found.pop(where))
    assert not any(found.values())


def test_nan_is_no_small_error() -> None:
    exact = [torch.ones(3, dtype=torch.float64)]
    plain = [torch.ones(3)]
    assert correctness.judge(plain, exact, plain) == [(0.0, 0.0)]
    with pytest.raises(ArithmeticError, match="tensor 0: rms error nan"):
        correctness.judge([torch.tensor([1, torch.nan, 1])], exact, plain)


def test_a_ratio_is_that_of_the_closest_peer() -> None:
    def row(label: str, ratio: float | None) -> dict[str, Any]:
        return {"label": label, "mask": "causal", "phase": "forward", "ratio": ratio}

    rows = [row("a", 2.0), row("a", 1.5), row("b", 3.0), row("a", None), row("a", 1.7)]
    assert list(best_of(rows)) == [row("a", 1.5), row("b", 3.0)]


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rec = Recorder("x", Settings("cpu", True), tmp_path / "x.json", 60)

    def fail() -> None:
        raise RuntimeError("\n  first line\nsecond line")

    assert rec.attempt("peer", fail) is None
    assert rec.attempt("kernel", fail, ours=True) is None
    assert rec.attempt("too long", fail, needs=100) is None
    assert rec.errors == {"peer": "RuntimeError: first line"}
    assert rec.failures == {"kernel": "RuntimeError: first line"}
    assert rec.omitted == ["too long"]
    assert json.loads((tmp_path / "x.json").read_text())["failures"] == rec.failures


def test_the_profiler_command_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--ncu"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("ncu --clock-control none ")
    assert line.endswith("-m benchmarks.gpu_suite --once profile\n")


@pytest.mark.gpu
def test_a_quick_run_on_the_gpu_passes(tmp_path: Path) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--quick", "--seconds", "240"]) == 0
