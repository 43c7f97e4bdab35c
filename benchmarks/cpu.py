"""The compiled CPU kernels against PyTorch's own ways to the same result.

    python -m benchmarks.cpu

Attention of single sequences, forward and backward, against scaled_dot_product_attention, plain matmuls,
torch.compile of these and the eager backend; between blocks, and the last step with a KV cache, against SDPA
with a dense mask, and per block, on the keys that it sees, SDPA (flash), matmuls and torch.compile of these;
gated residual + adaLN, and GELU, against the eager backend and torch.compile of the composition. Candidates
alternate in one process, which keeps the memory that it frees (with --default-allocator as the C library does
it). Beside each time: useful GFLOP/s or GB/s, and the share of what this machine reaches in a large matrix
product of that dtype or in a copy. Of attention also the memory that a call takes at most beside its inputs,
each in a process of its own (on Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ard_kernels import BlockLayout, block_attention, gated_residual_adaln, gelu, reference, use_backend
from ard_kernels.backends import native
from ard_kernels.layout import Mask
from benchmarks.common import RESULTS, environment, keep_freed_memory, medians, write_json
from benchmarks.suite import attention
from benchmarks.suite.adaln import plain

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_LENGTHS = (64, 256, 1024)
_HEAD_DIMS = (64, 72)
_TOKENS = 4096  # of all samples together
_HEADS = 6
_BLOCK_CAUSAL = BlockLayout.uniform(4, 256)
_VAR = BlockLayout([n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)])
_BATCH, _BLOCKS, _LENGTH, _WIDTH = 8, 4, 256, 1152  # of adaLN
_HIDDEN = 1536  # the width inside DiT-S's MLP


def _ceilings(repeats: int) -> dict[str, float]:
    """GFLOP/s of a matrix product by dtype, GB/s of a copy."""
    found = {}
    for name, dtype in _DTYPES.items():
        a, b = torch.randn(2, 2048, 2048, dtype=dtype).unbind(0)
        found[name] = 2 * 2048**3 / medians({"product": lambda a=a, b=b: a @ b}, repeats)["product"] / 1e9
    source = torch.randn(64 << 20 >> 2)  # 64 MiB
    target = torch.empty_like(source)
    seconds = medians({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return {**found, "copy": 2 * source.numel() * 4 / seconds / 1e9}


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of matmuls and a softmax, in the dtype of the inputs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).softmax(-1)
    return torch.matmul(weights, v).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _with(backend: str, operator: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with use_backend(backend):
            return operator()

    return run


def _attention_candidates(name: str, tokens: int, length: int, dim: int) -> dict[str, Callable[[], Any]]:
    """Forward and backward, for q, k and v of (tokens / length, length, _HEADS, dim)."""
    dtype, layout = _DTYPES[name], BlockLayout((length,))
    shape = (tokens // length, length, _HEADS, dim)
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    dout = torch.randn(shape, dtype=dtype)

    def both(attend: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)

    def ours(*qkv: Tensor) -> Tensor:
        return block_attention(*qkv, layout)

    return {"native": _with("native", both(ours)), "eager": _with("eager", both(ours)), "sdpa": both(_sdpa),
            "matmul": both(_plain), "compile": both(torch.compile(_plain, dynamic=False))}  # fmt: skip


def _attention(name: str, length: int, dim: int, repeats: int) -> list[dict[str, Any]]:
    torch.compiler.reset()  # or it gives up after a few shapes
    seconds = medians(_attention_candidates(name, _TOKENS, length, dim), repeats)
    work = 7 * 2 * _TOKENS * _HEADS * length * dim / 1e9  # 2 products forward, 5 backward
    row = _row("attention", name, "both", seconds, work, "GFLOP/s", name)
    memory = {
        candidate: _in_a_process(peak_memory, candidate, name, length, dim)
        for candidate in seconds
        if candidate != "compile"  # which would compile again
    }
    return [{**row, "length": length, "head_dim": dim, "mib": memory}]


def _block_attention(
    name: str, layout: BlockLayout, mask: Mask, repeats: int, block: int | None = None
) -> list[dict[str, Any]]:
    """Forward and backward; of a step with a KV cache, whose queries are a block, forward."""
    shape = attention.Shape(_TOKENS // layout.total, layout, _HEADS, _HEAD_DIMS[0], name, block)
    others = [
        c for c in attention.dense_candidates(shape, mask) if c.name in ("sdpa flash", "sdpa dense mask")
    ]
    inputs = attention.make_inputs(shape, "cpu", 0)
    phase = shape.phases[-1]
    methods = {key: attention.our_candidate(key, shape, mask).build() for key in ("native", "eager")}
    methods |= {candidate.name: candidate.build() for candidate in others}
    methods["matmul"] = attention.decomposed(_plain, shape, mask)
    torch.compiler.reset()
    methods["compile"] = attention.decomposed(torch.compile(_plain, dynamic=False), shape, mask)
    calls = {key: attention.prepared(method, [inputs], phase)(0) for key, method in methods.items()}
    with torch._dynamo.config.patch(recompile_limit=64):  # blocks of many lengths
        seconds = medians(calls, repeats)
    pairs = shape.batch * _HEADS * layout.area(mask, block)
    work = attention.PHASES[phase] * 4 * shape.dim * pairs / 1e9
    row = _row("attention", name, "both" if block is None else phase, seconds, work, "GFLOP/s", name)
    label = f"{mask}, {replace(shape, dtype='bfloat16')}"  # without dtype, which the row has
    return [{**row, "shape": label, "lengths": layout.lengths, "mask": mask, "block": block}]


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(which: str) -> float:
    """MiB of this process in memory: "VmRSS" now, "VmHWM" at most since that was cleared."""
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def peak_memory(candidate: str, name: str, length: int, dim: int) -> float | None:
    """MiB that attention takes at most beside its inputs: results, and what its kernels use meanwhile.

    Only a process that has not run it before can say so, since kernels keep their memory. None where there is
    no Linux.
    """
    if not _CLEAR.exists():
        return None
    _attention_candidates(name, 256, 64, dim)[candidate]()  # loads and makes what does not depend on the size
    run = _attention_candidates(name, _TOKENS, length, dim)[candidate]
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _row(
    operator: str, dtype: str, phase: str, seconds: dict[str, float], work: float, unit: str, ceiling: str
) -> dict[str, Any]:
    """work: thousand millions of what is counted; ceiling: the name of the one that it is compared with."""
    others = [s for name, s in seconds.items() if name != "native"]
    return {
        "operator": operator, "dtype": dtype, "phase": phase, "ms": {k: 1e3 * s for k, s in seconds.items()},
        "rate": work / seconds["native"], "unit": unit, "ratio": min(others) / seconds["native"],
        "ceiling": ceiling,
    }  # fmt: skip


def _adaln(name: str, repeats: int) -> list[dict[str, Any]]:
    dtype, layout = _DTYPES[name], BlockLayout.uniform(_BLOCKS, _LENGTH)
    x, branch = (torch.randn(_BATCH, layout.total, _WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
    packed = torch.randn(_BATCH, _BLOCKS, 6, _WIDTH, dtype=dtype, requires_grad=True)
    tables = packed.unbind(2)[:3]
    douts = [torch.randn_like(x) for _ in range(2)]

    compiled = torch.compile(plain)

    def forward(operator: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: operator(x, branch, *tables, layout)

    # Activations read and written: x, branch, residual, y; dx, dy, x, branch, dx, dbranch.
    return _elementwise(
        "gated residual + adaLN", name, (4, 6), x, (x, branch, packed), douts, repeats,
        native=_with("native", forward(gated_residual_adaln)),
        eager=_with("eager", forward(gated_residual_adaln)),
        pytorch=lambda: plain(x, branch, *tables),
        compile=lambda: compiled(x, branch, *tables),
    )  # fmt: skip


def _gelu(name: str, repeats: int) -> list[dict[str, Any]]:
    x = torch.randn(_TOKENS, _HIDDEN, dtype=_DTYPES[name], requires_grad=True)
    compiled = torch.compile(reference.gelu)
    return _elementwise(
        "GELU", name, (2, 3), x, (x,), torch.randn_like(x), repeats,
        native=_with("native", lambda: gelu(x)),
        eager=_with("eager", lambda: gelu(x)),
        compile=lambda: compiled(x),
    )  # fmt: skip


def _elementwise(
    operator: str, dtype: str, passes: tuple[int, int], x: Tensor, leaves: tuple[Tensor, ...], douts: Any,
    repeats: int, **forwards: Callable[[], Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Forward and backward of what memory bounds; passes: how many tensors like x each reads or writes."""

    def backward(outs: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)

    backwards = {key: backward(run()) for key, run in forwards.items()}
    rows = []
    for phase, candidates, many in zip(("forward", "backward"), (forwards, backwards), passes, strict=True):
        seconds = medians(candidates, repeats)
        gigabytes = many * x.numel() * x.element_size() / 1e9
        rows.append(_row(operator, dtype, phase, seconds, gigabytes, "GB/s", "copy"))
    return rows


def _line(row: dict[str, Any], ceilings: dict[str, float]) -> str:
    what = f"{row['operator']} {row['dtype']}"
    if "length" in row:
        what += f" L={row['length']} Dh={row['head_dim']}"
    if "shape" in row:
        what += f" {row['shape']}"
    times = "  ".join(f"{name} {ms:.2f}" for name, ms in row["ms"].items())
    memory = row.get("mib", {})
    kept = "  ".join(f"{name} {mib:.0f}" for name, mib in memory.items() if mib is not None)
    share = 100 * row["rate"] / ceilings[row["ceiling"]]
    return (f"| {what} | {row['phase']} | {times} | {row['ratio']:.2f} | {row['rate']:.0f} {row['unit']} "
            f"| {share:.0f} % | {kept} |")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(_LENGTHS))
    parser.add_argument("--default-allocator", action="store_true", help="see above")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    given = parser.parse_args(arguments)
    if native.C is None:
        raise SystemExit(f"cpu: {native.REASON}")
    kept = not given.default_allocator and keep_freed_memory()
    torch.manual_seed(0)
    repeats, last = given.repeats, _BLOCK_CAUSAL.blocks - 1
    jobs: list[Callable[[], list[dict[str, Any]]]] = []
    for name in _DTYPES:
        for length, dim in itertools.product(given.lengths, _HEAD_DIMS):
            jobs.append(partial(_attention, name, length, dim, repeats))
        for layout, block in ((_BLOCK_CAUSAL, None), (_VAR, None), (_BLOCK_CAUSAL, last)):
            jobs.append(partial(_block_attention, name, layout, "causal", repeats, block))
        jobs += [partial(_adaln, name, repeats), partial(_gelu, name, repeats)]
    ceilings = _ceilings(repeats)
    rows = [row for job in tqdm(jobs, desc="cpu") for row in job()]
    # Of two measurements the higher: a slow moment of a shared machine lowers them.
    ceilings = {name: max(value, ceilings[name]) for name, value in _ceilings(repeats).items()}
    print(", ".join(f"{name} {value:.0f}" for name, value in ceilings.items()), "(GFLOP/s; copy: GB/s)")
    print("| operator | phase | ms | best of the others / native | native | of the ceiling | MiB |")
    print("|---" * 7 + "|")
    print(*(_line(row, ceilings) for row in rows), sep="\n")
    write_json(given.out, {"ceilings": ceilings, "rows": rows, "instruction_set": native.C.instruction_set(),
                           "freed_memory_kept": kept, "environment": environment()})  # fmt: skip


if __name__ == "__main__":
    main()
