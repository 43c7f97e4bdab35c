"""Every operator on the real device: values and all gradients against the float64 reference, two runs bitwise
equal, and, of the kernels, a CUDA graph's replay equal to the plain call. Some cases also go through
torch.compile without graph breaks, and two have tensors of more than 2^31 elements.

An error's root mean square is measured in machine epsilons of the dtype times the root mean square of the
exact tensor, which is stricter than the unit of tests/ard_kernels/conftest.py: over a thousand keys, values
are far smaller than 1. It is at most 1.5 times that of the yardstick on the same inputs, or the few epsilons
of `_NEGLIGIBLE`. The yardstick of a kernel is the eager backend; that of the eager backend is the reference
in its dtype.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import ard_kernels
from ard_kernels import BlockLayout, reference, use_backend
from ard_kernels.layout import MASKS, Mask
from ard_kernels.machine import ROOT
from benchmarks.suite.record import Recorder, backends, compiled, device_works, tf32_allowed

Function = Callable[..., Tensor | tuple[Tensor, ...]]

# What rounding operands and results costs in half precision (0.7 was measured on a CPU), and float32 sums of
# hundreds of terms.
_NEGLIGIBLE = {torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}

# The largest error of one element, or twice the yardstick's, in epsilons of the largest exact value or of 1
# where that is smaller: the bounds of tests/ard_kernels/test_attention.py, doubled because these sequences
# are up to 20 times as long.
_LARGEST = {torch.float32: 48.0, torch.bfloat16: 6.0, torch.float16: 8.0}

# Attention in float32 forms its products in TF32 on a GPU, in every backend: its epsilon over float32's, and
# what takes the place of the two above in it. Products in bfloat16 would cost 6 and 10.
_TF32 = 2.0**13
_NEGLIGIBLE_TF32, _LARGEST_TF32 = 3.0 * _TF32, 6.0 * _TF32


@dataclass(frozen=True)
class Case:
    """One operator on one set of inputs."""

    family: str
    """"attention" or "adaln"."""
    group: str
    """Cases of one group use the same compiled kernels: one process runs them all."""
    name: str
    inputs: Callable[[str, int], tuple[Tensor, ...]]
    """Of a device and a seed; gradients are taken for all."""
    operator: Function
    meaning: Function
    tf32: bool = False
    """Products of float32 operands are formed in TF32 on a GPU."""
    thorough: bool = False
    """With torch.compile; and of the eager backend, too, a CUDA graph, if it is `captured`."""
    captured: bool = True
    """The eager backend can be recorded: it copies no lengths to the GPU on the way."""
    samples: int = 1
    """The operator gets the inputs as the last of so many samples."""
    gigabytes: float = 0.0
    """Of free memory on the GPU, or the case is left out."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Cases


def _randn(device: str, seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def _attention(module: Any, layout: BlockLayout, mask: Mask) -> Function:
    return lambda packed: module.block_attention(*packed.unbind(2), layout, mask)


def _cached(module: Any, layout: BlockLayout, block: int, mask: Mask) -> Function:
    return lambda q, k, v: module.cached_block_attention(q, k, v, layout, block, mask)


def _group(dim: int, dtype: torch.dtype, mask: Mask) -> str:
    """Masks share kernels, but the thorough cases are too many for one process."""
    apart = f" {mask}" if (dim, dtype) == (72, torch.bfloat16) else ""
    return f"attention {dim} {_name(dtype)}{apart}"


def attention_case(
    layout: BlockLayout,
    mask: Mask,
    dim: int,
    dtype: torch.dtype,
    thorough: bool,
    batch: int = 2,
    heads: int = 2,
) -> Case:
    def inputs(device: str, seed: int) -> tuple[Tensor, ...]:
        return (_randn(device, seed, dtype, batch, layout.total, 3, heads, dim),)

    return Case(
        "attention",
        _group(dim, dtype, mask),
        f"block_attention {mask} {layout.lengths} Dh{dim} {_name(dtype)}",
        inputs,
        _attention(ard_kernels, layout, mask),
        _attention(reference, layout, mask),
        tf32=dtype == torch.float32,
        thorough=thorough,
    )


def cached_case(
    layout: BlockLayout, block: int, mask: Mask, dim: int, dtype: torch.dtype, thorough: bool
) -> Case:
    """One sample: the keys are split among programs. Rows that the mask hides hold NaN."""

    def inputs(device: str, seed: int) -> tuple[Tensor, ...]:
        q = _randn(device, seed, dtype, 1, layout.lengths[block], 2, dim)
        k, v = _randn(device, seed + 1, dtype, 2, 1, layout.total, 2, dim).unbind(0)
        hidden = ~layout.mask(mask, device)[layout.slice(block)].any(0)
        return (
            q,
            k.masked_fill(hidden[:, None, None], torch.nan),
            v.masked_fill(hidden[:, None, None], torch.nan),
        )

    return Case(
        "attention",
        _group(dim, dtype, mask),
        f"cached_block_attention {mask} block {block} of {layout.lengths} Dh{dim} {_name(dtype)}",
        inputs,
        _cached(ard_kernels, layout, block, mask),
        _cached(reference, layout, block, mask),
        tf32=dtype == torch.float32,
        thorough=thorough,
    )


def _adaln(module: Any, operator: str, layout: BlockLayout) -> Function:
    function = getattr(module, operator)
    if operator == "adaln":
        return lambda x, table: function(x, table[:, :, 0], table[:, :, 1], layout)
    if operator == "gated_residual":
        return lambda x, h, table: function(x, h, table[:, :, 2], layout)
    return lambda x, h, table: function(x, h, table[:, :, 2], table[:, :, 3], table[:, :, 4], layout)


OPERATORS = ("gated_residual_adaln", "adaln", "gated_residual")


def adaln_case(
    operator: str,
    layout: BlockLayout,
    width: int,
    dtypes: tuple[torch.dtype, ...],
    thorough: bool,
    batch: int = 2,
) -> Case:
    """`dtypes`: of the residual stream, the branch and the packed (B, S, 6, D) table."""

    def inputs(device: str, seed: int) -> tuple[Tensor, ...]:
        size = (batch, layout.total, width)
        x, h = (_randn(device, 2 * seed + i, dtypes[i], *size) for i in range(2))
        table = _randn(device, seed + 7, dtypes[2], batch, layout.blocks, 6, width)
        return (x, table) if operator == "adaln" else (x, h, table)

    kinds = "/".join(_name(dtype) for dtype in dtypes)
    short = layout.lengths if layout.blocks < 10 else f"{layout.blocks} of {layout.lengths[0]}"
    return Case(
        "adaln",
        f"adaln {width} {kinds}",
        f"{operator} {short} D{width} {kinds}",
        inputs,
        _adaln(ard_kernels, operator, layout),
        _adaln(reference, operator, layout),
        thorough=thorough,
        captured=layout.is_uniform,
    )


# A block of a cached step that the kernel shares out among programs (`attention_triton._parts` is 2 or more),
# with a tile that ends in the middle.
SPLIT = BlockLayout((33, 1, 260))


def small_cases() -> list[Case]:
    """Every operator on small shapes, for a memory checker: they are among `cases`, where their kernels are
    compiled by many processes."""
    bf16 = torch.bfloat16
    ragged = BlockLayout((33, 1, 70))
    made = [
        attention_case(layout, mask, dim, dtype, False, batch=1)
        for dim, dtype in ((72, bf16), (40, torch.float16), (128, torch.float32))
        for layout in (ragged, BlockLayout.uniform(2, 128))
        for mask in MASKS
    ]
    made += [cached_case(SPLIT, 2, mask, 72, bf16, False) for mask in MASKS]
    return made + [
        adaln_case(operator, layout, width, (bf16,) * 3, False)
        for width, layout in ((200, ragged), (200, BlockLayout((1,) * 5)), (384, ragged))
        for operator in OPERATORS
    ]


def large_cases(quick: bool) -> list[Case]:
    """Tensors of more than 2^31 elements: 1900 samples of 1024 tokens of width 1152. Most of the memory is
    the packed qkv, its gradient and that of its parts, 13.4 GB each; for adaLN ten tensors of 4.5 GB."""
    layout = BlockLayout.uniform(2, 4) if quick else BlockLayout.uniform(4, 256)
    many: dict[str, Any] = {"samples": 3} if quick else {"samples": 1900, "gigabytes": 60, "group": "large"}
    made = (
        attention_case(layout, "causal", 24 if quick else 72, torch.bfloat16, False, 1, 2 if quick else 16),
        adaln_case("gated_residual_adaln", layout, 64 if quick else 1152, (torch.bfloat16,) * 3, False, 1),
    )
    return [
        replace(case, name=f"{case.name}, the last of {many['samples']} samples", **many) for case in made
    ]


def cases(quick: bool) -> list[Case]:
    """The most telling first."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    dtypes = (bf16, f32) if quick else (bf16, f32, f16)
    ragged = BlockLayout((3, 1, 6)) if quick else BlockLayout((64, 1, 200, 37, 130))
    uniform = BlockLayout.uniform(2, 8) if quick else BlockLayout.uniform(4, 256)
    # torch.compile takes seconds a case: DiT-XL's head dim with every mask, others with one.
    others: tuple[Any, ...] = ((64, f16, "window"), (128, bf16, "causal"), (128, f32, "anchor"))
    traced = {(24, bf16, "causal")} if quick else {*((72, bf16, mask) for mask in MASKS), *others}
    made = []
    for dim in (24,) if quick else (72, 64, 128):
        for dtype in dtypes:
            for mask in MASKS:
                thorough = (dim, dtype, mask) in traced
                made += [attention_case(layout, mask, dim, dtype, thorough) for layout in (uniform, ragged)]
            for mask in MASKS[:1] if quick else MASKS:
                made += [
                    cached_case(layout, block, mask, dim, dtype, (dim, dtype, block) == (72, bf16, 2))
                    for layout, blocks in ((uniform, range(uniform.blocks)), (ragged, (2, 4)))
                    for block in blocks
                    if block < layout.blocks
                ]
    if not quick:
        long = BlockLayout.uniform(4, 1024)
        made.append(attention_case(long, "causal", 72, bf16, True, batch=1))
        for dim in (16, 24, 40, 80, 96, 104):
            made += [attention_case(ragged, "causal", dim, dtype, False) for dtype in dtypes]
            made += [attention_case(uniform, mask, dim, bf16, False) for mask in MASKS]
    mixes = ((bf16, bf16, bf16), (f32, bf16, f32), (f32, f32, f32), (f16, f16, f16))
    layouts = [uniform, ragged, BlockLayout((uniform.total,)), BlockLayout((1,) * (8 if quick else 64))]
    for width in (64,) if quick else (1152, 384, 4096, 200):
        for kinds in mixes[:2] if quick else mixes:
            for layout in layouts if width in (64, 1152) else layouts[1:2]:
                for operator in OPERATORS:
                    with_ragged = operator == "gated_residual_adaln"  # made of the other two
                    thorough = layout is uniform or (layout is ragged and with_ragged)
                    made.append(adaln_case(operator, layout, width, kinds, width == 1152 and thorough))
    return [*made, *([] if quick else small_cases()), *large_cases(quick)]


def with_backends(made: list[Case], device: str) -> list[tuple[Case, str]]:
    """Every case with every backend that takes its inputs on the device. What needs a large GPU is for the
    kernels: the eager backend would need more of it."""
    return [
        (case, name)
        for case in made
        for name in backends(case.family, *case.inputs(device, 0))
        if name != "eager" or not case.gigabytes
    ]


# Checks


def evaluate(function: Function, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and the gradients of all inputs for random gradients of the outputs, which are rounded to
    `dtype`: that of the operator's outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = function(*leaves)
    outs = (outs,) if isinstance(outs, Tensor) else outs
    douts = [_randn(out.device.type, 5 + i, dtype, *out.shape).to(out.dtype) for i, out in enumerate(outs)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, douts)]


def _errors(got: list[Tensor], exact: list[Tensor], dtypes: list[torch.dtype]) -> list[tuple[float, float]]:
    """Of each tensor the largest and the root mean square, in the units above."""
    found = []
    for g, e, dtype in zip(got, exact, dtypes, strict=True):
        if g.shape != e.shape:
            raise ArithmeticError(f"shape is {tuple(g.shape)}, expected is {tuple(e.shape)}")
        error, eps = g.double() - e, torch.finfo(dtype).eps
        largest = float(error.abs().max()) / (eps * max(float(e.abs().max()), 1.0))
        found.append((largest, float(error.norm()) / (eps * max(float(e.norm()), eps))))
    return found


def judge(
    got: list[Tensor], exact: list[Tensor], yardstick: list[Tensor], tf32: bool = False
) -> list[tuple[float, float]]:
    """The errors; raises ArithmeticError where `got` is less accurate than it must be."""
    dtypes = [g.dtype for g in got]
    errors, others = _errors(got, exact, dtypes), _errors(yardstick, exact, dtypes)
    for i, ((largest, rms), (other_largest, other_rms)) in enumerate(zip(errors, others, strict=True)):
        # So written that NaN does not pass.
        rounded = tf32 and got[0].is_cuda and dtypes[i] == torch.float32
        if not rms <= max(1.5 * other_rms, _NEGLIGIBLE_TF32 if rounded else _NEGLIGIBLE[dtypes[i]]):
            raise ArithmeticError(f"tensor {i}: rms error {rms:.3g} eps, yardstick {other_rms:.3g}")
        if not largest <= max(2 * other_largest, _LARGEST_TF32 if rounded else _LARGEST[dtypes[i]]):
            raise ArithmeticError(f"tensor {i}: error {largest:.3g} eps, yardstick {other_largest:.3g}")
    return errors


def check(case: Case, backend: str, device: str) -> list[tuple[float, float]]:
    """The errors of values and gradients. Raises ArithmeticError for a wrong result."""
    inputs = case.inputs(device, 0)
    dtype = inputs[0].dtype
    exact = evaluate(case.meaning, tuple(x.double() for x in inputs), dtype)
    if backend == "eager":
        yardstick = evaluate(case.meaning, inputs, dtype)
    else:
        with use_backend("eager"):
            yardstick = evaluate(case.operator, inputs, dtype)
    with use_backend(backend):
        _poison(device)
        if case.samples > 1:
            return judge(evaluate(_last_of(case), inputs, dtype), exact, yardstick, case.tf32)
        errors = judge(evaluate(case.operator, inputs, dtype), exact, yardstick, case.tf32)
        with _deterministic():
            first, second = (evaluate(case.operator, inputs, dtype) for _ in range(2))
        judge(first, exact, yardstick, case.tf32)
        _same(first, second, "two deterministic runs")
        if case.thorough:
            torch.compiler.reset()
            fused = compiled(case.operator, device, fullgraph=True, dynamic=False)
            judge(evaluate(fused, inputs, dtype), exact, yardstick, case.tf32)
        if device == "cuda" and (backend != "eager" or (case.thorough and case.captured)):
            _check_graph(case, device)
    return errors


def _last_of(case: Case) -> Function:
    """The operator on the last of case.samples samples: the inputs, of one sample, follow random ones."""

    def among(x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(9)
        others = torch.randn(
            case.samples - 1, *x.shape[1:], generator=generator, device=x.device, dtype=x.dtype
        )
        return torch.cat([others, x])

    def last(*inputs: Tensor) -> tuple[Tensor, ...]:
        outs = case.operator(*(among(x) for x in inputs))
        return tuple(out[-1:] for out in ((outs,) if isinstance(outs, Tensor) else outs))

    return last


def _check_graph(case: Case, device: str) -> None:
    """Values and gradients recorded for some inputs, and replayed for others."""
    other, inputs = case.inputs(device, 1), case.inputs(device, 0)
    dtype = inputs[0].dtype
    with _deterministic():
        expected = evaluate(case.operator, other, dtype)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            evaluate(case.operator, inputs, dtype)
        torch.cuda.current_stream().wait_stream(stream)
        # Random numbers are drawn outside: a generator with a fixed seed cannot be recorded.
        leaves = [x.detach().requires_grad_() for x in inputs]
        shapes = [x.shape for x in expected[: len(expected) - len(inputs)]]
        douts = [_randn(device, 5 + i, dtype, *shape) for i, shape in enumerate(shapes)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = case.operator(*leaves)
            outs = (outs,) if isinstance(outs, Tensor) else outs
            # Clones: the gradient of a residual is its dout itself.
            got = [x.detach().clone() for x in (*outs, *torch.autograd.grad(outs, leaves, douts))]
        for target, source in zip(inputs, other, strict=True):
            target.copy_(source)
        for tensor in got:
            tensor.fill_(torch.nan)
        graph.replay()
    _same(got, expected, "a CUDA graph's replay and the plain call")


def _same(a: list[Tensor], b: list[Tensor], what: str) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if not torch.equal(x, y):
            raise ArithmeticError(f"{what} differ in tensor {i}")


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """As a user asks for it; memory handed out unwritten then holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _poison(device: str) -> None:
    """Leaves NaN in memory that the allocator is about to hand out: small blocks and large ones."""
    if device == "cuda":
        for size, count in ((1 << 12, 64), (1 << 18, 8), (1 << 24, 4)):
            _ = [torch.full((size,), torch.nan, device=device) for _ in range(count)]


# Seconds that a case may take on a GPU. A kernel compiles in less than one; torch.compile takes the rest.
_THOROUGH, _PLAIN = 30.0, 5.0


@tf32_allowed()
def correctness(rec: Recorder) -> None:
    """This process's share of all cases; the rest goes on after a failure, unless the device is lost."""
    # What deterministic matrix products on CUDA ask for; read when the first one runs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The graphs are tiny, and every process of this section would start a compiler on every core.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    index, count = rec.settings.share
    made = cases(rec.quick)
    compiling = Counter(case.group for case in made if case.thorough)
    groups = sorted(dict.fromkeys(case.group for case in made), key=lambda group: -compiling[group])
    mine = set(groups[index::count])
    todo = with_backends([case for case in made if case.group in mine and _fits(rec, case)], rec.device)
    # Those that torch.compile makes code for take the longest, and of these ours are in question.
    todo.sort(key=lambda one: (not one[0].thorough, one[1] == "eager"))
    rec.total = len(todo)
    for case, backend in todo:
        name = f"{backend} {case.name}"
        needs = 0.0 if rec.device == "cpu" else _THOROUGH if case.thorough else _PLAIN
        if rec.left() < needs:
            rec.omitted.append(name)
            continue
        rec.doing = name
        rec.save()
        try:
            errors = check(case, backend, rec.device)
            if rec.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # whatever a kernel does, it is a failure
            rec.fail(name, error)
            if not device_works(rec.device):
                rec.fail("device", "lost after this failure; the rest of this process's cases was not run")
                break
        else:
            rec.rows.append({"backend": backend, "case": case.name, "thorough": case.thorough,
                             "largest": [e[0] for e in errors], "rms": [e[1] for e in errors]})  # fmt: skip
        rec.done += 1
        if case.gigabytes:
            torch.cuda.empty_cache()
        if rec.done % 20 == 0:
            rec.say(f"{rec.done} of {rec.total} cases, {len(rec.failures)} failed")
    rec.doing = ""
    rec.save()
    rec.say(
        f"{rec.done} of {rec.total} cases done, {len(rec.failures)} failed, {len(rec.omitted)} had no time"
    )


def _fits(rec: Recorder, case: Case) -> bool:
    """Whether the GPU has the memory for it; if not, it is named."""
    if not case.gigabytes:
        return True
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < case.gigabytes:
        rec.error(case.name, f"needs {case.gigabytes:.0f} GB of the GPU's memory, free are {free:.0f}")
    return free >= case.gigabytes


# compute-sanitizer


@tf32_allowed()
def touch_everything(device: str) -> None:
    """The small cases forward and backward, in our backends: for a memory checker."""
    made = small_cases()
    for case, name in with_backends(made, device):
        if name != "eager":
            inputs = case.inputs(device, 0)
            with use_backend(name):
                evaluate(case.operator, inputs, inputs[0].dtype)
    torch.cuda.synchronize()
    print(f"{len(made)} cases run")


def sanitizer(rec: Recorder) -> None:
    """compute-sanitizer's memcheck over `touch_everything`, where the tool exists and works."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if tool is None or rec.device != "cuda":
        rec.error("compute-sanitizer", "not here")
        return
    program = [sys.executable, "-m", "benchmarks.gpu_suite", "--once", "small"]
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", *program]
    # One allocation per tensor, or a read past its end would fall into its neighbour.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(rec.left(), 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the tool and what it runs, which would disturb timings
        process.communicate()
        rec.omit("compute-sanitizer")
        return
    lines = output.splitlines()
    summary = next((line for line in reversed(lines) if "ERROR SUMMARY" in line), None)
    ran = any("cases run" in line for line in lines)
    if summary is not None and " 0 errors" in summary and ran:
        rec.row(f"compute-sanitizer: {summary}", backend="all", case="compute-sanitizer memcheck")
    elif "Device not supported" in output or summary is None:
        rec.error("compute-sanitizer", f"does not work here: {' / '.join(lines[-3:])}")
    else:
        first = next((line for line in lines if "Invalid" in line or "Error" in line), "")
        rec.fail("compute-sanitizer", f"{summary} {first}")
        rec.say("\n".join(lines[:60]))
