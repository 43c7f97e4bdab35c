"""Measures which launch of each attention kernel is the fastest on the GPU at hand, and writes it down.

    python -m ard_kernels tune [--dims 64 72 128] [--length 1024] [--batch 8]

The table goes to the file that `ARD_KERNELS_LAUNCHES` names, else to `~/.cache/ard_kernels/launches.json`;
the first launch of a process reads it. It has one section per GPU name, and other GPUs' sections stay.
Launches differ in speed and in the order of sums, not in meaning. "fused" is the whole backward in one
kernel; where it is in the table, the rounding of dq differs from run to run, unless
torch.use_deterministic_algorithms(True) is in force.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import queue
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ard_kernels.layout import BlockLayout, Mask

_VARIABLE = "ARD_KERNELS_LAUNCHES"


@dataclass(frozen=True)
class Launch:
    """Tile sizes and launch options of one attention kernel."""

    rows: int
    """Rows of a program's own tile: queries in forward and dq, keys in dkv and fused."""
    step: int
    """Rows of the other side that it takes at a time."""
    warps: int
    stages: int
    registers: int | None = None
    """Most a thread may use; 128 lets two programs of 8 warps share a multiprocessor."""

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


def table_path() -> Path:
    """Where the table is, or would be."""
    named = os.environ.get(_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "ard_kernels" / "launches.json"


def key(kernel: str, dim: int, whole: bool) -> str:
    return f"{kernel} {dim}{'' if whole else ' ragged'}"


@cache
def _table() -> dict[str, dict[str, Launch]]:
    """By GPU name and `key`. A file that is not such a table is an error that names it."""
    named = bool(os.environ.get(_VARIABLE))
    try:
        path = table_path()
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError) as error:  # a home that is another user's, or nobody's
        if named:
            raise ValueError(f"environment variable {_VARIABLE}: {error}") from None
        warnings.warn(
            f"the table of launches cannot be read, the built-in ones are used: {error}", stacklevel=2
        )
        return {}
    names = {field.name for field in fields(Launch)}
    try:
        stored = json.loads(text)
        table = {
            gpu: {name: Launch(**entry) for name, entry in section.items()} for gpu, section in stored.items()
        }
        sizes = [v for section in table.values() for at in section.values() for v in asdict(at).values()]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no table of launches (fields {sorted(names)}): {error}") from None
    if not all(size is None or (type(size) is int and size > 0) for size in sizes):
        raise ValueError(f"{path}: a launch has a value that is no positive integer")
    return table


_trial: dict[str, Launch] = {}


def tuned(gpu: str, name: str) -> Launch | None:
    """What was measured to be the fastest on this GPU, if anything was."""
    return _trial.get(name) or _table().get(gpu, {}).get(name)


def tuned_launches(gpu: str) -> dict[str, Launch]:
    """All that is in the table for this GPU, by `key`."""
    return dict(_table().get(gpu, {}))


KERNELS = ("forward", "dq", "dkv", "fused")


def candidates(kernel: str, dim: int, whole: bool, major: int) -> tuple[Launch, ...]:
    """Launches worth a measurement, the built-in one first."""
    from ard_kernels.backends.attention_triton import launch

    return tuple(dict.fromkeys([launch(kernel, dim, False, whole, major), *_grid()]))


def _grid() -> Iterator[Launch]:
    """4 warps own 64 rows of a wgmma tile or less; larger tiles take 8."""
    for rows, step, stages in itertools.product((64, 128), (32, 64, 128), (2, 3, 4)):
        yield Launch(rows, step, 4, stages)
        if rows == 128:
            yield Launch(rows, step, 8, stages)
            yield Launch(rows, step, 8, stages, registers=128)


def fastest(
    name: str,
    among: Iterable[Launch],
    time: Callable[[], float],
    say: Callable[[str], None],
    traps: Container[Launch] = (),
) -> tuple[Launch, float] | None:
    """The launch with which `time` is shortest; None where none runs. `traps` must not run."""
    best: tuple[Launch, float] | None = None
    for at in among:
        if at in traps:
            say(f"{name}: {at}: no code that may run")
            continue
        _trial[name] = at
        try:
            measured = time()
        except Exception as error:  # too much shared memory, or the compiler refuses the tile
            say(f"{name}: {at}: {type(error).__name__}: {str(error)[:80]}")
            continue
        finally:
            del _trial[name]
        say(f"{name}: {at}: {measured:.3f} ms")
        if best is None or measured < best[1]:
            best = at, measured
    return best


def write(gpu: str, found: Mapping[str, Launch | None]) -> Path:
    """Puts launches into the table, atomically, or takes them out (None); what it has besides stays."""
    path = table_path()
    table: dict[str, dict[str, Launch | None]] = {name: {**section} for name, section in _table().items()}
    table.setdefault(gpu, {}).update(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    stored = {
        name: {entry: asdict(at) for entry, at in section.items() if at is not None}
        for name, section in table.items()
    }
    temporary.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)
    _table.cache_clear()
    return path


# What relative error of a result in the L2 norm is wrong. Operands in bfloat16 give between 1e-3 and 1e-2.
WRONG = 0.02


def check_results(got: Sequence[Tensor], exact: Sequence[Tensor], names: Sequence[str]) -> None:
    """ArithmeticError that names the first result that is wrong."""
    for name, a, b in zip(names, got, exact, strict=True):
        error = float((a.float() - b).norm() / b.norm())
        if not error <= WRONG:
            raise ArithmeticError(f"{name} is wrong: relative error {error:.1e}")


@dataclass(frozen=True)
class _Call:
    """A call that runs a kernel, and the same by PyTorch's operators in float32."""

    run: Callable[[], tuple[Tensor, ...]]
    exact: Callable[[], tuple[Tensor, ...]]
    results: tuple[str, ...]

    def time(self, measure: Callable[[Callable[[], object]], float]) -> float:
        """An assembler's fault in one of many launches would make wrong results: that is an error."""
        check_results(self.run(), self.exact(), self.results)
        return measure(self.run)


def _calls(dim: int, layout: BlockLayout, batch: int, heads: int, device: str = "cuda") -> dict[str, _Call]:
    """By kernel."""
    from ard_kernels.backends import attention_eager, attention_triton

    packed = torch.randn(batch, layout.total, 4, heads, dim, device=device, dtype=torch.bfloat16)
    q, k, v, dout = packed.unbind(2)
    mask: Mask = "causal"
    scale = dim**-0.5
    out, lse = attention_triton.attention_forward(q, k, v, layout, mask, scale, -1)

    @cache  # the same for all launches, and for dq and dkv
    def exact() -> tuple[Tensor, ...]:
        qf, kf, vf, df = packed.float().unbind(2)
        made, kept = attention_eager.attention_forward(qf, kf, vf, layout, mask, scale, -1)
        return made, *attention_eager.attention_backward(
            df, qf, kf, vf, made, kept, layout, mask, scale, -1
        )  # fmt: skip

    def forward() -> tuple[Tensor, ...]:
        return attention_triton.attention_forward(q, k, v, layout, mask, scale, -1)[:1]

    def backward() -> tuple[Tensor, ...]:
        return attention_triton.attention_backward(dout, q, k, v, out, lse, layout, mask, scale, -1)

    gradients = _Call(backward, lambda: exact()[1:], ("dq", "dk", "dv"))
    return {
        "forward": _Call(forward, lambda: exact()[:1], ("out",)),
        **dict.fromkeys(KERNELS[1:], gradients),
    }


def is_trap(kernel: str, at: Launch, dim: int, whole: bool, major: int) -> bool:
    """Whether Triton makes a trap of it, which ends the process's use of the GPU: so it does with tiles for
    which Blackwell's tensor memory has no room."""
    from ard_kernels.backends.attention_triton import production
    from ard_kernels.compile_report import compile_one

    try:
        return major in (10, 11) and compile_one(production(kernel, dim, torch.bfloat16, at, whole), 100).trap
    except Exception:  # no code at all: the measurement meets it again, and says so
        return False


def _compile(name: str, kernel: str, at: Launch, dim: int, length: int, heads: int) -> bool:
    """Runs a kernel once with a launch, in a process of its own: its code stays in Triton's cache. A trap
    does not run: returns whether it is one."""
    from ard_kernels.backends.attention_triton import is_whole

    layout = BlockLayout.uniform(4, length)
    if is_trap(kernel, at, dim, is_whole(layout), torch.cuda.get_device_capability()[0]):
        return True
    _trial[name] = at
    with contextlib.suppress(Exception):  # as above
        _calls(dim, layout, 2, heads)[kernel].run()
    _trial.clear()
    return False


_Job = tuple[str, str, Launch, int, int, int]
"""What `_compile` is told: name, kernel, launch, head dim, length of a block, heads."""


def compile_all(
    jobs: Sequence[_Job], workers: int, run: Callable[..., bool] = _compile
) -> Iterator[tuple[_Job, bool]]:
    """Every job, in processes, as it ends; and whether its code must not run: it is a trap, or its compiler
    ended the process, as it would end this one."""
    waiting = iter(jobs)
    context = multiprocessing.get_context("spawn")
    found: queue.SimpleQueue[tuple[_Job, bool]] = queue.SimpleQueue()

    def serve() -> None:
        """With a process of its own: one that ends takes no other job along."""
        pool = ProcessPoolExecutor(1, context)
        while (job := next(waiting, None)) is not None:
            try:
                stop = pool.submit(run, *job).result()
            except Exception as error:
                stop = True
                if isinstance(error, BrokenProcessPool):
                    pool.shutdown()
                    pool = ProcessPoolExecutor(1, context)
            found.put((job, stop))
        pool.shutdown()

    with ThreadPoolExecutor(workers) as threads:
        for _ in range(workers):
            threads.submit(serve)
        for _ in jobs:
            yield found.get()


def tune(dims: list[int], length: int, batch: int, heads: int = 16) -> dict[str, Launch]:
    """Measures the `KERNELS` for block-causal attention over four blocks in bfloat16, and writes the table
    after each: fused, which is not deterministic, if it is faster than the best dq and dkv. Launches with
    wrong results are passed over."""
    from triton.testing import do_bench

    from ard_kernels.backends import attention_triton as kernels

    measure = partial(do_bench, return_mode="median")
    gpu, (major, _) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    layout = BlockLayout.uniform(4, length)
    whole = kernels.is_whole(layout)
    kinds: Sequence[str] = KERNELS
    if kernels.has_few_tiles(torch.empty(batch, layout.total, heads, 0)):
        print("forward: left out, it has launches of its own for so few tiles; take more samples", flush=True)
        kinds = KERNELS[1:]
    write(gpu, {key("fused", dim, whole): None for dim in dims})  # not in force while dq and dkv are measured
    among = {(kernel, dim): candidates(kernel, dim, whole, major) for dim in dims for kernel in kinds}
    jobs = [(key(kernel, dim, whole), kernel, at, dim, length, heads)
            for (kernel, dim), launches in among.items() for at in launches]  # fmt: skip
    traps: dict[str, set[Launch]] = {job[0]: set() for job in jobs}
    for done, ((name, _, at, *_), trap) in enumerate(compile_all(jobs, min(os.cpu_count() or 1, 16)), 1):
        # No tqdm: this package needs PyTorch alone.
        print(f"compiled {done} of {len(jobs)}", end="\n" if done == len(jobs) else "\r", flush=True)
        if trap:
            traps[name].add(at)
    found = {}
    with in_any_order():
        for dim in dims:
            pair = math.inf
            calls = _calls(dim, layout, batch, heads)
            for kernel in kinds:
                name = key(kernel, dim, whole)
                time, say = partial(calls[kernel].time, measure), partial(print, flush=True)
                best = fastest(name, among[kernel, dim], time, say, traps[name])
                if best is None:
                    continue
                if kernel == "fused" and best[1] >= pair:
                    print(f"{name}: left out, dq and dkv take {pair:.3f} ms", flush=True)
                    continue
                if kernel in ("dq", "dkv"):  # dkv is measured beside the best dq
                    pair = best[1]
                found[name] = _trial[name] = best[0]
                print(f"{name}: best {best[0]}, {best[1]:.3f} ms; in {write(gpu, found)}", flush=True)
            _trial.clear()
    return found


@contextlib.contextmanager
def in_any_order() -> Iterator[None]:
    """Sums may differ from run to run."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
