"""Kernels for processors that are not here, run in plain code: AMX's tile registers, CUDA's threads."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch
from torch import Tensor
from variants import gradients, normal

from ard_kernels import BlockLayout, block_attention, reference
from ard_kernels.backends import adaln_native, native
from ard_kernels.layout import MASKS

_ROOT = Path(__file__).resolve().parents[2]
_SHORT, _RAGGED = BlockLayout((3, 1)), BlockLayout((37, 1, 70))
_ONE, _TOKENS = BlockLayout((5,)), BlockLayout((1,) * 5)
_PAIRS = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """ard_kernels._C, built with both emulations, by the first of the test processes that gets here."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "emulated"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    assert shutil.which("ninja", path=environment["PATH"]) is not None
    with (shared / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-G", "Ninja", "-S", _ROOT, "-B", folder, "-DARD_CUDA=host",
             "-DARD_INSTRUCTION_SETS=portable;amx_emulated", f"-DPython_EXECUTABLE={sys.executable}",
             f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
            ["cmake", "--build", folder],
        ):  # fmt: skip
            done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("emulated._C", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def amx(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    able = "amx_emulated" in emulated.instruction_sets()
    # Only the tiles are emulated. What is around them is compiled for AVX-512 with bfloat16, which every
    # processor with AMX has: elsewhere it is an illegal instruction, not a wrong result. A mistake in our
    # look at the processor fails here, since PyTorch's own must agree.
    assert able == torch.cpu._is_avx512_bf16_supported()
    if not able:
        pytest.skip("around the emulated tiles run AVX-512 bfloat16 instructions, which this processor lacks")
    emulated.use_instruction_set("amx_emulated")
    monkeypatch.setattr(native, "C", emulated)


@pytest.fixture(params=["clusters", "partial sums", pytest.param("device", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The adaLN family's CUDA kernels, on the CPU's memory or on a GPU; where their tensors are."""
    if request.param == "device":
        assert native.CUDA_REASON is None, native.CUDA_REASON
        return "cuda"
    emulated = request.getfixturevalue("emulated")
    monkeypatch.setattr(native, "C", emulated)
    monkeypatch.setattr(adaln_native, "_on_cuda", lambda x: True)
    monkeypatch.setattr(adaln_native, "_device", lambda x: (request.param == "clusters", 0))
    return "cpu"


@pytest.mark.parametrize(
    ("architectures", "capability", "made"),
    [
        ("80 90 100", (9, 0), (9, 0)),
        ("80 90 100", (8, 9), (8, 0)),
        ("80 90 100", (12, 0), (10, 0)),
        ("80", (9, 0), (8, 0)),  # no clusters on a Hopper: not compiled for one
        ("90", (8, 0), None),
        ("80 90a", (10, 0), (8, 0)),
        ("90a", (9, 0), (9, 0)),
        ("100f", (10, 3), (10, 0)),
        ("100f", (12, 0), None),
    ],
)
def test_which_code_a_device_runs(
    architectures: str, capability: tuple[int, int], made: tuple[int, int] | None
) -> None:
    assert adaln_native.runs_as(architectures, capability) == made


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("lengths", "dim"), [((70, 3, 130), 72), ((64, 64), 64), ((1, 5, 33), 40)])
def test_attention_in_tiles_of_amx(
    assert_accurate: Callable[..., None], lengths: tuple[int, ...], dim: int, mask: str
) -> None:
    layout, results = BlockLayout(lengths), []
    inputs = normal(3, 2, layout.total, 2, dim, dtype=torch.bfloat16).unbind(0)
    for attend, kind in (
        (block_attention, torch.bfloat16),
        (reference.block_attention, torch.float64),
        (reference.block_attention, torch.bfloat16),
    ):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        results.append(gradients(attend(*leaves, layout, mask), *leaves))
    assert_accurate(*results, 3.0)


def _inputs(
    device: str, layout: BlockLayout, width: int, stream: torch.dtype, other: torch.dtype
) -> list[Tensor]:
    """x, branch, and gate, shift and scale as views of a packed table."""
    x, branch = normal(2, 2, layout.total, width, dtype=stream).to(device).unbind(0)
    tables = normal(2, layout.blocks, 6, width, dtype=other, seed=1).to(device).unbind(2)[1:4]
    return [x, branch.to(other), *tables]


def _meaning(
    kind: torch.dtype, layout: BlockLayout, inputs: list[Tensor], douts: list[Tensor]
) -> list[Tensor]:
    leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
    out = reference.gated_residual_adaln(*leaves, layout)
    found = torch.autograd.grad(out, leaves, [d.to(o.dtype) for d, o in zip(douts, out, strict=True)])
    return [*(o.detach() for o in out), *found]


@pytest.mark.parametrize(("stream", "other"), _PAIRS, ids=str)
@pytest.mark.parametrize(
    ("layout", "width"),
    [(_RAGGED, 384), (_SHORT, 768), (_SHORT, 1152), (_ONE, 1024), (_TOKENS, 1024)],
    ids=str,
)
def test_adaln_on_cuda(
    cuda: str,
    assert_accurate: Callable[..., None],
    layout: BlockLayout,
    width: int,
    stream: torch.dtype,
    other: torch.dtype,
) -> None:
    x, branch, gate, _, scale = inputs = _inputs(cuda, layout, width, stream, other)
    douts = list(normal(2, *x.shape, dtype=torch.bfloat16, seed=2).to(cuda).unbind(0))
    residual, y, mean, rstd = adaln_native.gated_residual_adaln_forward(*inputs, layout, 1e-6, other)
    back = adaln_native.gated_residual_adaln_backward(
        douts[0].to(stream), douts[1].to(other), residual, branch, gate, scale, mean, rstd, layout
    )
    dx, dbranch, dgate, dshift, dscale = back
    got = [residual, y, dx, dbranch, dgate, dshift, dscale]
    exact = _meaning(torch.float64, layout, inputs, douts)
    plain = [p.to(g.dtype) for p, g in zip(_meaning(torch.float32, layout, inputs, douts), got, strict=True)]
    assert_accurate(got, exact, plain, 64.0 if other == torch.float32 else 4.0, stored=other)
    assert all(torch.isfinite(value).all() for value in (mean, rstd))


def test_the_parts_on_cuda(cuda: str) -> None:
    """The operators of the family are the fused one's parts, to the bit."""
    x, branch, gate, shift, scale = inputs = _inputs(cuda, _RAGGED, 384, torch.float32, torch.bfloat16)
    dx, dy = normal(2, *x.shape, seed=2).to(cuda).unbind(0)
    dy = dy.bfloat16()
    residual, y, mean, rstd = adaln_native.gated_residual_adaln_forward(
        *inputs, _RAGGED, 1e-6, torch.bfloat16
    )
    assert torch.equal(residual, adaln_native.gated_residual_forward(x, branch, gate, _RAGGED))
    parts = adaln_native.adaln_forward(residual, shift, scale, _RAGGED, 1e-6, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(parts, (y, mean, rstd), strict=True))
    total, dbranch, dgate, dshift, dscale = adaln_native.gated_residual_adaln_backward(
        dx, dy, residual, branch, gate, scale, mean, rstd, _RAGGED
    )
    parts = adaln_native.adaln_backward(dy, dx, residual, scale, mean, rstd, _RAGGED)
    assert all(torch.equal(a, b) for a, b in zip(parts, (total, dshift, dscale), strict=True))
    pair = adaln_native.gated_residual_backward(total, branch, gate, _RAGGED)
    assert all(torch.equal(a, b) for a, b in zip(pair, (dbranch, dgate), strict=True))


def test_more_blocks_than_a_kernel_holds_are_an_error(cuda: str) -> None:
    layout = BlockLayout((1,) * (adaln_native._CUDA_BLOCKS + 1))
    x, branch, gate, *_ = _inputs(cuda, layout, 384, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="too many blocks"):
        adaln_native.gated_residual_forward(x, branch, gate, layout)


def test_a_width_without_a_kernel_is_an_error(cuda: str) -> None:
    x, branch, gate, *_ = _inputs(cuda, _SHORT, 64, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="no kernel for that width"):
        adaln_native.gated_residual_forward(x, branch, gate, _SHORT)
