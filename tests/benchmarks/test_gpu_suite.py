"""The suite as it runs on a CPU, on tiny shapes, and what it does when something is wrong."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ard_kernels import BlockLayout, reference, use_backend
from ard_kernels.backends import attention_eager
from ard_kernels.layout import MASKS, Mask
from ard_kernels.machine import ROOT
from benchmarks import gpu_suite
from benchmarks.suite import adaln, attention, correctness, model, record, sections
from benchmarks.suite.demands import demands
from benchmarks.suite.record import DeviceLostError, Recorder, Settings, best_of
from benchmarks.suite.report import summary
from benchmarks.suite.sections import SECTIONS, run


def _suite(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    code = gpu_suite.main(["--out", str(out), "--device", "cpu", *options])
    return code, json.loads((out / "gpu_suite.json").read_text())


@pytest.mark.usefixtures("eager_only")
def test_a_reduced_run_measures_everything(tmp_path: Path) -> None:
    # Time enough for a machine that does other things, too.
    code, results = _suite(tmp_path, "--commit", "abc", "--seconds", "10000", "--only", *SECTIONS)
    assert code == 0
    assert results["environment"]["commit"] == "abc"
    assert list(results["sections"]) == list(SECTIONS)
    for name, section in results["sections"].items():
        assert section["rows"], name
        assert not section["failures"]
        assert not section["omitted"]
        assert not section["stopped"]
    rows = {name: section["rows"] for name, section in results["sections"].items()}
    checks = len(correctness.cases(quick=True))
    assert len(rows["correctness"]) == checks
    assert [results["sections"]["correctness"][key] for key in ("done", "total")] == [checks, checks]
    assert {row["name"] for row in rows["ceilings"]} == {"copy", "matmul"}
    _check_attention(rows)
    _check_adaln(rows)
    for name, compiled in (("training", False), ("training_compiled", True)):
        sides = [(row["side"], row["compiled"]) for row in rows[name]]
        assert sides == [("ours", compiled), ("baseline", compiled)]
    assert [(row["batch"], row["kind"]) for row in rows["sampling"]] == [(1, "eager"), (2, "eager")]
    assert [(row["batch"], row["kind"]) for row in rows["sampling_compiled"]] == [(2, "compiled")]
    text = (tmp_path / "gpu_suite.md").read_text()
    for name in SECTIONS:
        assert f"## {name}\n" in text
    assert "could not run: B2 S2 L16 H2 Dh24 causal sdpa cudnn" in text
    assert f"correctness: {checks} of {checks} checks done, 0 FAILED" in text
    assert not (tmp_path / "parts").exists()


def _check_attention(rows: dict[str, list[dict[str, Any]]]) -> None:
    shape, wide, phases = "B2 S2 L16 H2 Dh24", "B2 S2 L16 H2 Dh24 float32", list(attention.PHASES)
    assert [(row["label"], row["phase"]) for row in rows["attention"]] == [
        *((shape, phase) for phase in phases),
        ("B1 S2 L16 H2 Dh24 cached block 1", "forward"),
        ("B64 S2 L16 H2 Dh24 cached block 1", "forward"),
        *((shape, phase) for phase in phases),  # FlexAttention
    ]
    others = [(shape, "diagonal"), ("B2 S3 L3+1+12 H2 Dh24", "causal"), (shape, "window"), (shape, "anchor")]
    found = [(row["label"], row["mask"], row["phase"]) for row in rows["attention_masks"]]
    assert found == [
        *((*one, phase) for one in others for phase in 2 * phases),
        *((wide, "causal", phase) for phase in phases),
    ]
    for section in ("attention_sizes", "attention_single"):
        assert [row["phase"] for row in rows[section]] == 2 * phases
    for section in (name for name in rows if name.startswith("attention")):
        for row in rows[section]:
            if row["label"] == wide:
                assert (set(row["times"]), row["ratio"]) == ({"ours (eager)"}, None)
                continue
            peers = {name for name in row["times"] if not name.startswith("ours")}
            if "sdpa flash" in peers:  # cuDNN has nothing on a CPU: it is not missing
                assert "sdpa cudnn" not in row["missing"]
            elif row["phase"] == "forward":
                assert any(name.startswith("flex 128") for name in peers)
            else:  # where FlexAttention has no backward
                assert (not peers, "flex 128" in row["missing"]) == (True, section == "attention_tuned")
            for measured in row["times"].values():
                assert set(measured) == {"ms", "host_ms", "spread", "tflops", "percent"}
                assert min(measured["ms"], measured["tflops"], measured["percent"]) > 0
            best = min((row["times"][name]["ms"] for name in peers), default=None)
            assert row["ratio"] == (best and best / row["times"]["ours (eager)"]["ms"])
    # 4 Dh operations a visible pair, 2 heads: 2 samples of 3 x 16 x 16 pairs; a step of 2 x 16 x 16.
    whole, step = 4 * 24 * 2 * 2 * 3 * 256, 4 * 24 * 2 * 2 * 256
    works = (whole, 2.5 * whole, 3.5 * whole, step, 64 * step)
    for row, work in zip(rows["attention"][: len(works)], works, strict=True):
        ours = row["times"]["ours (eager)"]
        assert ours["tflops"] * ours["ms"] * 1e9 == pytest.approx(work)


def _check_adaln(rows: dict[str, list[dict[str, Any]]]) -> None:
    shape = "(2, 32, 64) K4"
    kinds = ("", " float32 residual", " adaln", " gated_residual")
    modes = ("default", "max-autotune-no-cudagraphs")
    found = [*rows["adaln"], *rows["adaln_more"]]
    assert [(row["label"], row["phase"]) for row in found] == [
        *((f"{shape}{kind}", phase) for kind in kinds for _ in range(2) for phase in adaln.PHASES),
        *((f"{shape}, whole DiT block, {mode}", "forward + backward") for mode in modes),
    ]
    # Bytes for each of the 2 x 32 x 64 elements: x and h read and both results written, and so on.
    moved = (8, 12, 12, 18, 4, 6, 6, 6)
    timed = [row for row in found if "torch.compile" in row["times"]]
    for row, each in zip(timed, moved, strict=True):
        assert set(row["times"]) == {"ours (eager)", "pytorch", "torch.compile"}
        ours = row["times"]["ours (eager)"]
        assert ours["gbs"] * ours["ms"] * 1e6 == pytest.approx(each * 2 * 32 * 64)
    for row in best_of(found):
        assert row["untimed"] == row["failed"] == []
    assert all(row["ratio"] > 0 for row in found)


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
    assert {row["best_peer"] for row in best_of(found["rows"])} == {"sdpa flash"}
    where = "B2 S2 L16 H2 Dh24 causal"
    assert "out is wrong: relative error 1.0e+00" in found["errors"][f"{where} sdpa dense mask forward"]
    assert "no such thing" in found["errors"][f"{where} flex 128"]
    # What fails is no peer; what this section does not try might be the best.
    first = next(best_of(found["rows"]))
    assert {name for row in found["rows"] for name in row["failed"]} == {
        "sdpa dense mask", "flex 128", "sdpa cudnn"
    }  # fmt: skip
    assert first["untimed"] == ["flex 128 max-autotune", "flex 256", "flex 256 max-autotune"]
    assert "sdpa flash (best of 1 of 4)" in (tmp_path / "gpu_suite.md").read_text()


@pytest.mark.usefixtures("eager_only")
def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    code, results = _suite(tmp_path, "--seconds", "0")
    assert code == 3
    assert list(results["sections"]) == [name for name, section in SECTIONS.items() if section.essential]
    found, checks = results["sections"]["correctness"], len(correctness.cases(quick=True))
    assert (found["done"], found["total"], len(found["omitted"])) == (0, checks, checks)
    text = (tmp_path / "gpu_suite.md").read_text()
    assert f"correctness: 0 of {checks} checks done, 0 FAILED, {checks} had no time" in text
    assert f"and for {checks - 20} more" in text
    for name in ("correctness", "attention", "adaln", "training", "sampling"):
        assert results["sections"][name]["omitted"]
        assert not results["sections"][name]["rows"]


def test_a_section_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """In a process of its own, what it found so far is kept. Here it has not even imported PyTorch."""
    found = run("training", Settings("cpu", True), tmp_path, 600, time.monotonic() + 0.2, isolated=True)
    assert found["errors"] == {"process training": "was stopped at its time limit"}
    assert found["stopped"] == ["training"]
    assert found["seconds"] < 300
    assert gpu_suite.exit_code({"training": found}) == 3


@pytest.mark.parametrize(
    ("job", "end", "doing", "kind", "code"),
    [
        ("correctness-3", sections._STOPPED, "triton causal 72", "failures", 1),
        ("correctness-3", "ended with exit code -11", "triton causal 72", "failures", 1),
        ("correctness-3", "ended with exit code -11", "", "failures", 1),
        ("correctness-3", sections._STOPPED, "", "errors", 3),
        ("attention", sections._STOPPED, "ours (triton)", "errors", 3),
        ("attention", "ended with exit code -11", "sdpa cudnn", "errors", 0),
    ],
)
def test_a_process_that_is_stopped_says_where_and_one_that_ends_in_a_check_has_failed(
    tmp_path: Path, job: str, end: str, doing: str, kind: str, code: int
) -> None:
    path = tmp_path / f"{job}.json"
    path.write_text(json.dumps({"rows": [{}], "omitted": ["x"], "doing": doing, "done": 4, "total": 9}))
    found = sections._merged({job: path}, {job: end})
    assert gpu_suite.exit_code({"attention": found}) == code
    assert found.pop(kind) == {f"process {job}": f"{end}, in {doing}" if doing else end}
    assert found.pop("stopped") == ([job] if end == sections._STOPPED else [])
    assert found.pop("failures" if kind == "errors" else "errors") == {}
    assert found == {"rows": [{}], "omitted": ["x"], "done": 4, "total": 9}


def test_a_run_without_all_of_its_checks_is_no_success() -> None:
    def code(done: int, total: int, **failures: str) -> int:
        section = {"failures": failures, "stopped": [], "done": done, "total": total}
        return gpu_suite.exit_code({"correctness": section})

    assert [code(5, 5), code(4, 5), code(0, 0), code(4, 5, triton="wrong")] == [0, 3, 3, 1]


def test_the_memory_checker_waits_for_the_checks_that_compile_its_kernels() -> None:
    (checks, first), (memory, last) = sections.stages("correctness", Settings("cuda", False), 100)
    assert {name for name, _ in checks.values()} == {"correctness"}
    assert [settings.share for _, settings in checks.values()] == [
        (i, len(checks)) for i in range(len(checks))
    ]
    assert list(memory) == ["sanitizer"]
    assert (first, last) == (75, 100)
    made = {case.name for case in correctness.cases(quick=False)}
    assert made >= {case.name for case in correctness.small_cases()}


def test_cases_that_take_long_come_first_and_only_while_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []

    def check(case: correctness.Case, backend: str, _: str) -> list[tuple[float, float]]:
        seen.append((not case.thorough, backend == "eager"))
        return []

    monkeypatch.setattr(correctness, "check", check)
    rec = Recorder("correctness", Settings("cpu", True), tmp_path / "x.json", 60)
    correctness.correctness(rec)
    assert seen == sorted(seen)  # and ours before eager
    assert {plain for plain, _ in seen} == {True, False}
    assert not rec.omitted
    assert json.loads((tmp_path / "x.json").read_text())["doing"] == ""
    monkeypatch.setattr(correctness, "with_backends", lambda cases, _: [(case, "eager") for case in cases])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    done = len(seen)
    rec = Recorder("correctness", Settings("cuda", True), tmp_path / "x.json", 20)
    correctness.correctness(rec)
    assert seen[done:]
    assert all(plain for plain, _ in seen[done:])
    assert all(name.startswith("eager ") for name in rec.omitted)
    assert rec.done == len(seen) - done
    assert rec.done + len(rec.omitted) == rec.total == len(correctness.cases(quick=True))


def test_a_section_in_a_process_of_its_own_reports(tmp_path: Path) -> None:
    found = run("ceilings", Settings("cpu", True), tmp_path, 60, time.monotonic() + 60, isolated=True)
    assert {row["name"] for row in found["rows"]} == {"copy", "matmul"}
    assert not found["errors"]


def test_cudnn_gets_every_padding_where_that_is_asked_for() -> None:
    shape = attention.Shape(1, BlockLayout.uniform(2, 16), 1, 72)
    for every in (False, True):
        names = [c.name for c in attention.dense_candidates(shape, "causal", every)]
        for kind, pads in (("flash", (80, 96, 128)), ("cudnn", (80, 96, 128) if every else (128,))):
            wanted = [f"sdpa {kind}", *(f"sdpa {kind}, padded to {pad}" for pad in pads)]
            assert [name for name in names if name.startswith(f"sdpa {kind}")] == wanted


_LAYOUTS = (BlockLayout.uniform(3, 5), BlockLayout((2, 7, 1, 4)))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", _LAYOUTS, ids=str)
@pytest.mark.parametrize("block", [None, 2])
def test_dense_calls_put_together_are_block_attention(
    layout: BlockLayout, mask: Mask, block: int | None
) -> None:
    """The peers that are decomposed by hand compute what they are compared for, gradients included."""
    shape = attention.Shape(2, layout, 2, 8, "float64", block)
    inputs = attention.make_inputs(shape, "cpu", 0)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    def meaning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if block is None:
            return reference.block_attention(q, k, v, layout, mask)
        return reference.cached_block_attention(q, k, v, layout, block, mask)

    method, exact = attention.decomposed(dense, shape, mask), attention.Whole(meaning)
    wanted = exact.forward_backward(*inputs)
    for got, right in zip(method.forward_backward(*inputs), wanted, strict=True):
        torch.testing.assert_close(got, right)
    torch.testing.assert_close(method.forward(*inputs[:3]), wanted[0])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", _LAYOUTS, ids=str)
def test_flex_attention_is_told_the_mask(layout: BlockLayout, mask: Mask) -> None:
    rows = torch.arange(layout.total)
    visible = attention._visible(layout, mask, "cpu")(None, None, rows[:, None], rows[None, :])
    assert torch.equal(visible, layout.mask(mask))


def test_a_call_without_a_backward_is_a_peer_of_the_forward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "installed", lambda module: module == "flash_attn")
    for layout, there in ((BlockLayout.uniform(3, 5), True), (BlockLayout((3, 1)), False)):
        shape = attention.Shape(1, layout, 2, 16)
        found = {c.name: c.phases(shape) for c in attention.dense_candidates(shape, "causal")}
        assert found["flash-attention 2"] == tuple(attention.PHASES)
        assert found.get("flash-attention 2, one launch") == (("forward",) if there else None)


# Interpreted where there is no GPU; else compiled. Triton exists for Linux alone.
_TRITON = pytest.mark.parametrize(
    "device",
    [
        *(["cpu"] if sys.platform == "linux" and not torch.cuda.is_available() else []),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


@_TRITON
def test_triton_kernels_pass(device: str) -> None:
    ragged = BlockLayout((3, 1, 6))
    for case in (
        correctness.attention_case(ragged, "causal", 24, torch.bfloat16, False, batch=1),
        correctness.cached_case(ragged, 2, "anchor", 24, torch.bfloat16, False),
        correctness.adaln_case("gated_residual_adaln", ragged, 64, (torch.bfloat16,) * 3, False),
        *correctness.large_cases(quick=True),
    ):
        correctness.check(case, "triton", device)


@_TRITON
def test_the_memory_checker_sees_keys_shared_out_among_programs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ard_kernels.backends import attention_triton

    found: list[int] = []
    parts = attention_triton._parts

    def spy(*arguments: Any) -> int:
        found.append(parts(*arguments))
        return found[-1]

    monkeypatch.setattr(attention_triton, "_parts", spy)
    cached = [case for case in correctness.small_cases() if case.name.startswith("cached")]
    assert len(cached) == len(MASKS)
    for case in cached:
        with use_backend("triton"), torch.no_grad():
            case.operator(*case.inputs(device, 0))
    assert len(found) == len(MASKS)
    assert min(found) > 1


def _case(operator: correctness.Function | None = None, samples: int = 1) -> correctness.Case:
    made = correctness.attention_case(BlockLayout((3, 2)), "causal", 16, torch.float32, False, batch=1)
    return replace(made, operator=operator or made.meaning, samples=samples)


def test_every_case_is_run_twice_and_compared_bitwise() -> None:
    right, calls = _case().meaning, iter(range(100))
    correctness.check(_case(), "eager", "cpu")
    with pytest.raises(ArithmeticError, match="two deterministic runs differ in tensor 0"):
        correctness.check(_case(lambda x: right(x) * (1 + 3e-7 * (next(calls) % 2))), "eager", "cpu")


def test_an_offset_that_wraps_is_found_in_the_last_of_many_samples() -> None:
    right = _case().meaning

    def wrapping(x: Tensor) -> Tensor:
        out = right(x)
        assert isinstance(out, Tensor)
        return out if len(x) == 1 else torch.cat([out[:-1], out[:1]])

    correctness.check(_case(wrapping), "eager", "cpu")
    correctness.check(_case(samples=3), "eager", "cpu")
    with pytest.raises(ArithmeticError, match="tensor 0: rms error"):
        correctness.check(_case(wrapping, samples=3), "eager", "cpu")


def test_a_case_that_the_gpu_has_no_memory_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40e9, 80e9))
    rec = Recorder("correctness", Settings("cuda", False), tmp_path / "x.json", 60)
    large = [case for case in correctness.cases(quick=False) if not correctness._fits(rec, case)]
    assert [case.name for case in large] == [case.name for case in correctness.large_cases(quick=False)]
    assert len({case.group for case in large}) == 1  # of one process, that runs one after the other
    for case in large:
        assert "needs 60 GB of the GPU's memory, free are 40" in rec.errors[case.name]
        assert (case.samples - 1) * 1024 * 1152 > 2**31  # elements before the last sample


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


def test_a_ratio_is_that_of_the_closest_peer_and_says_of_how_many() -> None:
    def row(label: str, ratio: float | None, *names: str, **untimed: list[str]) -> dict[str, Any]:
        return {"label": label, "mask": "causal", "phase": "forward", "ratio": ratio,
                "times": dict.fromkeys(names), "missing": [], "failed": [], **untimed}  # fmt: skip

    rows = [
        row("a", 2.0, "ours", "x", missing=["y", "z", "w"]),
        row("a", 1.5, "ours", "y", missing=["x", "w"], failed=["z"]),
        row("b", 3.0, "ours", "x"),
        row("a", None, "ours"),
        row("c", None, "ours"),
    ]
    assert list(best_of(rows)) == [
        {**rows[1], "timed": 2, "untimed": ["w"]},
        {**rows[2], "timed": 1, "untimed": []},
    ]


def test_the_demands_are_answered_from_the_rows() -> None:
    def timed(label: str, phase: str, ratio: float, *untimed: str, **ours: float) -> dict[str, Any]:
        times = {"ours (triton)": {"ms": 2.0, **ours}, "torch.compile": {"ms": 2.0 * ratio}}
        row = {"label": label, "mask": "causal", "phase": phase, "times": times, "ratio": ratio}
        peer = {"best_peer": "torch.compile", "missing": [*untimed], "failed": []}
        return {**row, **peer, "ours": "ours (triton)"}

    large, _, long = map(str, attention.shapes(quick=False))
    shape = str(adaln.shapes(quick=False)[0])
    rows: dict[str, list[dict[str, Any]]] = {
        "attention": [
            timed(large, "forward + backward", 1.6, "flex 128"),
            timed(large, "forward + backward", 1.4),
            timed(long, "forward + backward", 1.3),
            timed(large, "forward", 3.0, tflops=410.0),
            timed(large, "backward", 3.0, tflops=300.0),
        ],
        "adaln": [
            timed(shape, "forward", 2.0, percent=91.0),
            timed(shape, "backward", 1.5, percent=84.0),
        ],
        "training": [
            {"side": side, "batch": batch, "compiled": False, "samples_per_second": speed, "utilisation": use}
            for side, batch, speed, use in (("ours", 8, 26.0, 48.0), ("baseline", 8, 10.0, 18.0),
                                            ("ours", 16, 28.0, 52.0))
        ],
        "sampling": [{"batch": 1, "kind": "cuda graph", "overhead_percent": [1.2, 1.6]}],
    }  # fmt: skip
    checks = {"correctness": {"done": 50, "total": 50, "failures": {"triton": "wrong"}}}
    found = {one.what: (one.measured, one.answer, one.note) for one in demands(rows, checks)}
    wanted = {
        "checks that passed, of all": (98.0, "NO", ""),
        "causal attention, head dim 72, L = 1024, forward + backward, to the best peer":
            (1.4, "NO", "not timed: flex 128"),
        "causal attention, head dim 72, L = 1024, forward (goal)": (410.0, "yes", ""),
        "causal attention, head dim 72, L = 1024, backward (goal)": (300.0, "NO", ""),
        "causal attention, head dim 72, L = 256, forward + backward, to the best peer":
            (None, "not measured", ""),
        "causal attention, head dim 72, L = 4096, forward + backward, to the best peer": (1.3, "yes", ""),
        "causal attention, head dim 72, L = 4096, forward (goal)": (None, "not measured", ""),
        "causal attention, head dim 72, L = 4096, backward (goal)": (None, "not measured", ""),
        f"adaLN {shape}, forward, of a copy": (91.0, "yes", ""),
        f"adaLN {shape}, backward, of a copy": (84.0, "NO", ""),
        "adaLN backward, to torch.compile": (1.5, "yes", "not timed: torch.compile max-autotune"),
        "training step, to the straightforward one": (2.6, "yes", ""),
        "training step, of the matmul ceiling": (52.0, "yes", ""),
        "training step, torch.compile, to the straightforward one": (None, "not measured", ""),
        "training step, torch.compile, of the matmul ceiling": (None, "not measured", ""),
        "sampling, batch 1, cuda graph: what history costs": (1.6, "NO", ""),
    }  # fmt: skip
    assert found == wanted
    nothing = demands({}, {})
    assert {one.answer for one in nothing} == {"not measured"}
    results = {"options": {"quick": False}, "sections": {}}
    assert summary(results).count("not measured") == len(nothing)


def test_a_lost_device_ends_its_section_and_is_one_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rec = Recorder("x", Settings("cpu", True), tmp_path / "x.json", 60)

    def fail() -> None:
        monkeypatch.setattr(record, "device_works", lambda _: False)
        raise RuntimeError("illegal memory access")

    with pytest.raises(DeviceLostError, match="the device was lost in peer"):
        rec.attempt("shape", lambda: rec.attempt("peer", fail), ours=True)
    assert rec.errors == {"peer": "RuntimeError: illegal memory access"}
    assert not rec.failures


def test_a_baseline_that_pytorchs_first_choice_of_attention_fails_gets_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = model.StraightforwardARD.forward

    def forward(*arguments: Any) -> Tensor:
        if torch.backends.cuda.cudnn_sdp_enabled():
            raise RuntimeError("no engine")
        return right(*arguments)

    monkeypatch.setattr(model.StraightforwardARD, "forward", forward)
    rec = Recorder("training", Settings("cpu", True), tmp_path / "x.json", 600)
    model._training(rec, under_compile=False)
    assert [row["side"] for row in rec.rows] == ["ours", "baseline"]
    assert rec.errors == {"baseline: largest batch": "RuntimeError: no engine"}


# What torch can do without, and so do the sections that check and time kernels.
_BLOCKED = ("PIL", "accelerate", "ard", "diffusers", "huggingface_hub", "hypothesis", "matplotlib", "pytest",
            "safetensors", "sklearn", "tensorboard", "tqdm", "tyro")  # fmt: skip
_KERNELS = ("correctness", "ceilings", "attention", "adaln")
_MODELS = ("ard", "huggingface_hub", "safetensors", "tqdm")  # tqdm is huggingface_hub's, too


@pytest.mark.parametrize(
    ("program", "allowed"),
    [
        (f"gpu_suite.main([*sys.argv[1:], '--only', *{_KERNELS}])", ()),
        ("import benchmarks.suite.model", _MODELS),
        ("import benchmarks.suite.sampling", (*_MODELS, "PIL")),
    ],
    ids=["kernels", "training", "sampling"],
)
def test_the_suite_imports_what_it_says(tmp_path: Path, program: str, allowed: tuple[str, ...]) -> None:
    """A module that is None in sys.modules cannot be imported, nor found."""
    blocked = [name for name in _BLOCKED if name not in allowed]
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({blocked}))",
             "from benchmarks import gpu_suite", program]  # fmt: skip
    options = ["--out", str(tmp_path), "--device", "cpu", "--seconds", "10"]
    found = subprocess.run([sys.executable, "-c", "\n".join(lines), *options], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)  # fmt: skip
    assert found.returncode == 0, found.stdout
    assert "ModuleNotFoundError" not in found.stdout


def test_timings_are_collected_without_a_tensor() -> None:
    """Every plain pytest imports them: on a GPU it would initialise CUDA."""

    class NoTensors(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, *_: Any) -> Any:
            raise AssertionError(f"{function} at collection")

    path = Path(__file__).with_name("test_timings.py")
    spec = importlib.util.spec_from_file_location("collected_once_more", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with NoTensors():
        spec.loader.exec_module(module)
    assert any("ours (eager)" in name for name in module._ATTENTION)
    assert any("ours (eager)" in name for name in module._ADALN)


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


@pytest.mark.parametrize(
    ("what", "flags", "modules"),
    [
        ("check", "avx2", ["pip", "pytest", "benchmarks.gpu_suite"]),
        ("check", "avx2 amx_bf16", ["pip", "pytest", "pytest", "benchmarks.gpu_suite"]),
        ("measure", "avx2", ["pip", "ard_kernels", "benchmarks.gpu_suite"]),
        ("more", "avx2", ["pip", "benchmarks.gpu_suite"]),
    ],
)
def test_a_lent_gpu_is_used_by_commands_that_exist(
    tmp_path: Path, what: str, flags: str, modules: list[str]
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {flags}\n")
    python = tmp_path / "python"
    script = f'echo "$@" >> {tmp_path}/calls; echo $ARD_KERNELS_LAUNCHES >> {tmp_path}/table'
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    out = tmp_path / "out"
    command = [ROOT / "benchmarks" / "on_gpu.sh", what, out, "abc", "adaln_more", "training_compiled"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "CPUINFO": str(cpuinfo)}
    subprocess.run(command, env=environment, check=True)
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [words[1] for words in calls] == modules
    assert {*(tmp_path / "table").read_text().split()} == {str(out / "launches.json")}
    options = calls[-1][2:]
    assert options[:4] == ["--out", str(out), "--commit", "abc"]
    named = options[options.index("--only") + 1 : options.index("--seconds")]
    assert named
    assert {*named} <= {*SECTIONS}
    assert float(options[-1]) <= 520
    for path in (word.partition("::")[0] for word in calls[1] if word.startswith("tests/")):
        assert (ROOT / path).exists()


@pytest.mark.gpu
def test_a_quick_run_on_the_gpu_passes(tmp_path: Path) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--quick"]) == 0
